"""What a CUDA fat binary holds: machine code and PTX, for which GPUs, and which drivers load it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tstitch_engines.driver import fitting_cuda, fitting_extra
from tstitch_engines.errors import Unavailable

__all__ = ["Image", "image_for", "read_images"]

_MAGIC: Final = 0xBA55ED50
_PTX, _MACHINE_CODE = 1, 2


class Image(NamedTuple):
    """``cuda``: the CUDA whose PTX it is, and so the oldest driver that compiles it; ``None`` for machine code."""

    capability: tuple[int, int]
    cuda: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{'PTX of ' if self.cuda else ''}{self.capability[0]}.{self.capability[1]}"


def read_images(path: Path) -> tuple[Image, ...]:
    """In their order. Raises ``Unavailable`` for a file that is no whole fat binary."""
    try:
        return tuple(_images(path.read_bytes()))
    except (OSError, struct.error, ValueError) as error:
        raise Unavailable(
            f"the CUDA step kernels at {path} can't be read: {error}",
            hint=f"python -m tstitch_engines.make_fatbin --output {path}",
        ) from None


def image_for(path: Path, capability: tuple[int, int], driver: tuple[int, int] | None) -> Image:
    """What a GPU of ``capability`` runs of the fat binary at ``path``: machine code before PTX, the nearest first.

    ``driver``: the newest CUDA that the driver runs, ``None`` where it is not known. Machine code runs on GPUs of its
    major version that are not older; drivers load it from compilers of their own CUDA release or older ones. PTX is
    compiled for any GPU that is not older, by drivers that are not older either.
    Raises ``Unavailable`` when there is nothing for this GPU, or not for this driver.
    """
    images = read_images(path)
    compiler = max((image.cuda for image in images if image.cuda), default=None)
    if driver is not None and compiler is not None and compiler[0] > driver[0]:
        raise Unavailable(
            f"the CUDA step kernels at {path} were compiled by CUDA {compiler[0]}; the NVIDIA driver runs CUDA "
            f"{driver[0]}.{driver[1]} and older",
            hint=f'pip install "tstitch-trt[{fitting_extra("gpu", driver)}]" && python -m tstitch_engines.make_fatbin '
            f"--output {path}, which compiles them by CUDA {fitting_cuda(driver)}; or update the driver",
        )
    fitting = [image for image in images if _runs(image, capability, driver)]
    if not fitting:
        number = f"{capability[0]}{capability[1]}"
        raise Unavailable(
            f"the CUDA step kernels at {path} have no code for compute capability {capability[0]}.{capability[1]} "
            f"(they have {_listed(images)})",
            hint=f"python -m tstitch_engines.make_fatbin --arch {number} --output {path}",
        )
    return max(fitting, key=lambda image: (image.cuda is None, image.capability))


def _runs(image: Image, capability: tuple[int, int], driver: tuple[int, int] | None) -> bool:
    if image.capability > capability:
        return False
    if image.cuda is None:
        return image.capability[0] == capability[0]
    return driver is None or image.cuda <= driver


def _listed(images: Sequence[Image]) -> str:
    return ", ".join(str(image) for image in images) or "none"


def _cuda_of_ptx(major: int, minor: int) -> tuple[int, int]:
    """The CUDA that brought a version of the PTX ISA: 8.5 came with 12.5, 8.6 with 12.7, 9.0 with 13.0."""
    return major + 4, minor + (major == 8 and minor > 5)


def _images(fatbin: bytes) -> Iterator[Image]:
    """A header of 16 bytes, then parts that begin with their sizes."""
    magic, _, header, size = struct.unpack_from("<IHHQ", fatbin)
    if (magic, header + size) != (_MAGIC, len(fatbin)):
        raise ValueError("it is no fat binary, or not a whole one")
    at = header
    while at < len(fatbin):
        kind, _, part_header, part = struct.unpack_from("<HHIQ", fatbin, at)
        minor, major, arch = struct.unpack_from("<HHI", fatbin, at + 24)
        if part_header + part == 0:
            raise ValueError("a part of it is empty")
        if kind in (_PTX, _MACHINE_CODE):
            yield Image((arch // 10, arch % 10), _cuda_of_ptx(major, minor) if kind == _PTX else None)
        at += part_header + part
