"""TensorRT-RTX, which compiles without a GPU."""

from __future__ import annotations

import pytest

from tstitch_engines.backends import open_backend
from tstitch_engines.backends.tensorrt import TensorRtBackend


@pytest.fixture(scope="module")
def rtx() -> TensorRtBackend:
    opened = open_backend("tensorrt-rtx")
    assert isinstance(opened, TensorRtBackend)
    return opened
