"""The NVIDIA driver of this machine, asked without any package, and the extras whose packages it runs.

A driver runs programs of its own CUDA release and of older ones, and of any minor version of its release:
https://docs.nvidia.com/deploy/cuda-compatibility. An older driver answers packages of a newer release with error 35.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["DRIVERS", "Gpu", "driver_cuda", "driver_version", "fitting_cuda", "fitting_extra", "list_gpus"]

DRIVERS: Final = {12: 525, 13: 580}  # CUDA release that the extras come for -> the first driver that runs it

_VARIED: Final = ("gpu", "rtx", "tensorrt")  # extras with a variant for each release; the plain name is the newest's
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    memory_bytes: int


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, e.g. ``(12, 4)``; ``None`` without a driver. Starts nothing on a GPU."""
    number = ctypes.c_int()
    try:
        if _library().cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except OSError:
        return None
    return number.value // 1000, number.value % 1000 // 10


def driver_version() -> str | None:
    """The driver's own version, e.g. ``"580.65.06"``, where Linux tells it."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip() or None
    except OSError:
        return None


def list_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows, in its order (``cuda:0`` first). Starts the driver, without a context.

    Raises ``OSError`` when there is no driver, or with its own words when it does not start.
    """
    driver = _library()
    _require(driver, driver.cuInit(0))
    count = ctypes.c_int()
    _require(driver, driver.cuDeviceGetCount(ctypes.byref(count)))
    return tuple(_describe(driver, index) for index in range(count.value))


def fitting_cuda(driver: tuple[int, int] | None = None) -> int:
    """The CUDA release (a key of ``DRIVERS``) whose packages to install: the newest, unless the driver is older.

    ``driver``: the newest CUDA that it runs, if that is known.
    """
    known = driver or driver_cuda()
    if known is None:
        return max(DRIVERS)
    return max((release for release in DRIVERS if release <= known[0]), default=min(DRIVERS))


def fitting_extra(extra: str, driver: tuple[int, int] | None = None) -> str:
    """``extra``, or its variant for an older CUDA: ``gpu`` becomes ``gpu-cu12`` on a driver for CUDA 12."""
    release = fitting_cuda(driver)
    return f"{extra}-cu{release}" if extra in _VARIED and release != max(DRIVERS) else extra


def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _describe(driver: Any, index: int) -> Gpu:
    device, number, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _require(driver, driver.cuDeviceGet(ctypes.byref(device), index))
    _require(driver, driver.cuDeviceGetName(name, len(name), device))
    _require(driver, driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    capability = []
    for attribute in (_MAJOR, _MINOR):
        _require(driver, driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device))
        capability.append(number.value)
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]), memory.value)


def _require(driver: Any, code: int) -> None:
    if code == 0:
        return
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    raise OSError(f"the NVIDIA driver does not start: {(text.value or b'unknown error').decode()} (CUDA error {code})")
