"""Opening a device by its name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tstitch_engines.checks import shown
from tstitch_engines.device.base import Device
from tstitch_engines.errors import BadInput, UnknownName

__all__ = ["device_kept", "open_device", "parse_device"]


def parse_device(text: str) -> tuple[str, int]:
    """``"cpu"`` -> ``("cpu", 0)``; ``"cuda"`` and ``"cuda:1"`` likewise. Raises ``UnknownName``."""
    kind, _, index = text.partition(":")
    if (
        kind not in ("cpu", "cuda")
        or (index and not (index.isascii() and index.isdecimal() and len(index) < 4))
        or (kind == "cpu" and index)
    ):
        raise UnknownName(
            f"unknown device {shown(text)}; known: cpu, cuda, cuda:N",
            hint="cuda is the first NVIDIA GPU, cuda:1 the second",
        )
    return kind, int(index or 0)


def open_device(text: str, *, stream: Any = None) -> Device:
    """The device called ``text``. Raises ``Unavailable`` when there is no such GPU or cuda-core is not installed.

    ``stream``: a CUDA stream to work on in place of one of our own: an object with ``__cuda_stream__`` or an integer
    handle. Its owner keeps it alive.

    A CUDA device is the calling thread's current one afterwards (``device_kept``).
    """
    kind, index = parse_device(text)
    if kind == "cpu":
        if stream is not None:
            raise BadInput(
                f"stream={shown(stream)} was given for the device cpu", hint="use device='cuda', or leave it out"
            )
        from tstitch_engines.device.host import HostDevice

        return HostDevice()
    from tstitch_engines.device.cuda import CudaDevice

    return CudaDevice(index, stream=stream)


def device_kept(text: str) -> AbstractContextManager[None]:
    """A block that may open the device ``text``, after which the calling thread has the CUDA device it had, if any.

    PyTorch takes the current device for ``cuda`` without a number.
    """
    if parse_device(text)[0] == "cpu":
        return nullcontext()
    from tstitch_engines.device.cuda_stream import kept_device

    return kept_device()
