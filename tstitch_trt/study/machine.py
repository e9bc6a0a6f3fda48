"""The machine of a measurement: processor, memory, accelerators, library versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec

from tstitch_engines.backends import BACKENDS
from tstitch_engines.bundle.manifest import Bytes, Count, Number, Text
from tstitch_engines.version import VERSION

__all__ = ["Machine", "describe_machine", "gpu_names", "package_version", "peak_memory"]

_ENGINES = (name for entry in BACKENDS.values() for name in entry.packages)
PACKAGES = ("numpy", *_ENGINES, "cuda-core", "cuda-bindings", "onnx")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """``load``: the one-minute load average when the record was made; far above 0 the machine was busy."""

    system: Text
    processor: Text
    cores: Count
    memory_bytes: Bytes
    load: Number
    gpus: tuple[Text, ...]
    python: Text
    versions: dict[Text, Text]


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine() -> Machine:
    found = {name: package_version(name) for name in PACKAGES}
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load=round(os.getloadavg()[0], 2),
        gpus=gpu_names(),
        python=platform.python_version(),
        versions={"tstitch-trt": VERSION, **{k: v for k, v in found.items() if v is not None}},
    )


def gpu_names() -> tuple[str, ...]:
    """The NVIDIA GPUs that nvidia-smi lists; empty where there is no driver."""
    import shutil

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    asked = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip()) if answer.returncode == 0 else ()


def peak_memory() -> int:
    """The peak resident memory of this process, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
