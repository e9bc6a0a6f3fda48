"""A stand-in for NVIDIA's driver: a ``libcuda.so.1`` that says what a test wants and can do no work."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

__all__ = ["OLD", "compile_driver", "environment", "install_driver"]

OLD = 12040  # a driver for CUDA 12.4, as cuDriverGetVersion says it

# The attributes are 75 and 76, the error is CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: cuda.h.
_SOURCE = r"""
#include <cstdlib>
#include <cstring>
static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}
extern "C" {
int cuDriverGetVersion(int *version) { *version = number("STAND_IN_CUDA", 13000); return 0; }
int cuInit(unsigned) { return number("STAND_IN_INIT", 0); }
int cuGetErrorString(int, const char **text) {
  *text = "system has unsupported display driver / cuda driver combination";
  return 0;
}
int cuDeviceGetCount(int *count) { *count = number("STAND_IN_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int) { strncpy(name, "NVIDIA H100 PCIe", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = size_t(80) << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
  int capability = number("STAND_IN_CAPABILITY", 90);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  return 0;
}
}
"""


def compile_driver(compiler: str, folder: Path) -> None:
    """Makes ``folder``, with the library, for ``LD_LIBRARY_PATH``."""
    folder.mkdir()
    target = folder / "libcuda.so.1"
    command = [compiler, "-x", "c++", "-fPIC", "-shared", "-o", str(target), "-"]
    subprocess.run(command, input=_SOURCE, text=True, check=True)


def environment(*, cuda: int = 13000, init: int = 0, gpus: int = 1, capability: int = 90) -> dict[str, str]:
    """What the library answers. ``cuda`` as ``OLD``, ``init`` an error of ``cuInit``, ``capability`` as ``90``."""
    said = {"CUDA": cuda, "INIT": init, "GPUS": gpus, "CAPABILITY": capability}
    return {f"STAND_IN_{name}": str(value) for name, value in said.items()}


def install_driver(monkeypatch: pytest.MonkeyPatch, folder: Path, **said: int) -> None:
    """In this process, for the code that asks the driver itself. CUDA's libraries don't find it: no soname."""
    from tstitch_engines import driver

    library = ctypes.CDLL(str(folder / "libcuda.so.1"))
    monkeypatch.setattr(driver, "_library", lambda: library)
    for name, value in environment(**said).items():
        monkeypatch.setenv(name, value)
