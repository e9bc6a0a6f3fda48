"""One local Ray for all tests of a process that want one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def address() -> Iterator[str]:
    """``RAY_ADDRESS`` of a cluster of four CPUs, as Ray counts them, which this process is connected to."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, logging_level="ERROR",
        _system_config={"memory_monitor_refresh_ms": 0},  # other tests may fill the memory: Ray would end its workers
    )  # fmt: skip
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
