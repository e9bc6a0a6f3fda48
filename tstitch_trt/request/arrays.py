"""Arrays from outside: pictures, masks, latents and embeddings, checked and in one layout each.

All are copies: whoever gave them may go on with them while the request waits and runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.checks import run_check
from tstitch_engines.child.memory import free_memory
from tstitch_engines.device.base import Buffer
from tstitch_engines.errors import BadInput, NotFiniteInput

__all__ = [
    "ForeignLatents",
    "as_pictures",
    "check_room",
    "locate_latents",
    "read_array",
    "read_control",
    "read_embedding",
    "read_image",
    "read_latents",
    "read_masks",
    "to_float32",
]

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]
_NO_LEVELS: Final = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
_HOST: Final = (1, 3)  # DLPack: the CPU, and pinned memory
_MOST_ENTRIES: Final = 1 << 24  # of lists, which take a second to read; arrays may be larger
_WORTH_A_LOOK: Final = 1 << 26  # bytes


def read_array(value: object, what: str) -> NDArray[np.generic]:
    """``value`` as a numpy array, without a copy where it can be. Raises ``BadInput``."""
    mode = getattr(value, "mode", "") if type(value).__module__.startswith("PIL.") else ""
    if mode in _NO_LEVELS:
        raise BadInput(
            f"{what} is a PIL image of mode {mode!r}, whose numbers are no levels of red, green, blue or grey",
            hint="numpy.asarray(picture.convert('RGB')), or 'L' for a mask",
        )
    try:
        if isinstance(value, list | tuple | range) and _entries(value) > _MOST_ENTRIES:
            raise ValueError(f"lists of more than {_MOST_ENTRIES:,} numbers are not made into arrays")
        if hasattr(value, "__dlpack__") and not isinstance(value, (np.ndarray, np.generic)):
            array: NDArray[np.generic] = np.from_dlpack(value)
        else:
            array = np.asarray(value)
    except Exception as error:  # whatever the object's own methods raise
        raise BadInput(
            f"a {type(value).__name__} can't be read as {what}: {str(error)[:200]}",
            hint="pass a numpy array, or in torch tensor.detach()",
        ) from error
    check_room(max(array.nbytes, 4 * array.size), f"{what} {array.dtype}{list(array.shape)}")
    return array


def check_room(nbytes: int, what: str) -> None:
    """Raises ``BadInput`` where ``nbytes`` are more than this process can get. Arrays may have no memory yet: those of
    ``numpy.broadcast_to``, and those that are to be made."""
    free = free_memory() if nbytes > _WORTH_A_LOOK else None
    if free is not None and nbytes > free:
        raise BadInput(
            f"{what} takes {nbytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of memory are free",
            hint="ask for fewer or smaller images at once",
        )


def _entries(value: object) -> int:
    """About how many numbers nested lists hold, by the first entry of each level."""
    found, depth = 1, 0
    while isinstance(value, list | tuple | range) and len(value) and depth < 8:
        found, value, depth = found * len(value), value[0], depth + 1
    return found


def as_pictures(array: NDArray[np.generic], *, what: str, channels: int) -> Pixels:
    """One picture or several as uint8 ``[N,H,W,channels]``. Raises ``BadInput``."""
    pixels = array
    if pixels.ndim == 2 or (pixels.ndim == 3 and channels == 1 and pixels.shape[-1] != 1):
        pixels = pixels[..., None]
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != channels or not pixels.size:
        hint = "numpy.asarray(picture.convert('RGB')) makes that of a PIL image"
        if array.dtype.kind in "iuf" and array.dtype != np.uint8:  # PIL would cut them off at 255
            white = "65535" if array.dtype.kind in "iu" else "1"
            hint = f"scale it by its white, e.g. (255 * (x / {white})).round().astype('uint8')"
            hint += ", or give float [N,3,H,W] from 0 to 1" if what == "control" else ""
        raise BadInput(
            f"{what} is {array.dtype}{list(array.shape)}; needed is uint8 [H,W,{channels}] or [N,H,W,{channels}]",
            hint=hint,
        )
    return np.array(pixels, np.uint8, order="C")


def read_image(image: object, channels: int) -> Pixels | Array:
    """Pictures uint8 ``[N,H,W,channels]``, or latents float32 ``[N,C,H,W]``. Raises ``BadInput``."""
    array = read_array(image, "image")
    if array.dtype.kind == "f" and array.ndim == 4 and array.size:
        latents = to_float32(array)
        if not np.isfinite(latents).all():
            raise NotFiniteInput("NaN or infinity in the latents given as image", hint="check what encoded them")
        return latents
    return as_pictures(array, what="image", channels=channels)


def read_control(control: object) -> Array:
    """Control pictures, uint8 ``[N,H,W,3]`` or float ``[N,3,H,W]`` in [0, 1], as the latter. Raises ``BadInput``."""
    array: NDArray[Any] = read_array(control, "control")
    if array.dtype.kind == "f" and array.ndim == 4 and array.shape[1] == 3:
        if not (array.size and array.min() >= 0 and array.max() <= 1):
            raise BadInput("control is floats that are not all from 0 to 1", hint="scale it: black is 0 and white is 1")
        return np.array(array, np.float32, order="C")
    pixels = as_pictures(array, what="control", channels=3)
    return np.ascontiguousarray(pixels.astype(np.float32).transpose(0, 3, 1, 2) / 255)


def read_masks(value: object, *, size: tuple[int, int]) -> Array:
    """One mask or several as float32 ``[N,1,H,W]`` of 0 and 1 (paint anew). ``size``: height and width in pixels."""
    given: NDArray[Any] = read_array(value, "mask")
    mask = given
    if mask.ndim in (3, 4) and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or not (mask.dtype.kind in "bf" or mask.dtype == np.uint8) or not mask.size:
        raise BadInput(
            f"mask is {given.dtype}{list(given.shape)}; needed is [H,W] or [N,H,W] of bool, uint8 or floats in 0..1",
            hint="numpy.asarray(picture.convert('L')) makes that of a PIL image",
        )
    if mask.shape[1:] != size:
        raise BadInput(
            f"the mask is {mask.shape[2]}x{mask.shape[1]} pixels, the picture {size[1]}x{size[0]}; both must be equal",
            hint="resize the mask to the picture's size",
        )
    if not np.isfinite(mask).all():
        raise NotFiniteInput("NaN or infinity in the mask", hint="give it as bool: true where to paint anew")
    if mask.dtype.kind == "f" and not (mask.min() >= 0 and mask.max() <= 1):
        raise BadInput(
            f"the mask has floats from {mask.min():g} to {mask.max():g}; allowed are those from 0 to 1",
            hint="give it as bool: true where to paint anew",
        )
    half = 128 if mask.dtype.kind == "u" else 0.5
    return np.asarray(mask if mask.dtype.kind == "b" else mask >= half)[:, None].astype(np.float32)


@dataclass(frozen=True, eq=False)
class ForeignLatents:
    """Latents in the memory of a device. The runtime borrows ``value`` when the request's turn has come."""

    value: Any
    shape: tuple[int, ...]

    def read(self, borrowed: Buffer | None) -> Array | Buffer:
        """The latents, as ``borrowed`` from ``value`` or else copied. The steps find what of them is not finite."""
        if borrowed is None:
            return read_latents(read_array(self.value, "latents"), self.shape[1:])
        _check_latents(borrowed.shape, borrowed.dtype, self.shape[1:], number=borrowed.dtype == "float32")
        return borrowed


def locate_latents(latents: object) -> NDArray[np.generic] | ForeignLatents:
    """As a numpy array, unless they lie in the memory of a device. Raises ``BadInput``."""
    return run_check(_located, latents, "latents")


def _located(value: Any, what: str) -> NDArray[np.generic] | ForeignLatents:
    interface = getattr(value, "__cuda_array_interface__", None)
    place = value.__dlpack_device__()[0] if hasattr(value, "__dlpack_device__") else _HOST[0]
    if interface is not None or place not in _HOST:
        shape = interface["shape"] if interface is not None else value.shape
        return ForeignLatents(value, tuple(int(side) for side in shape))
    return read_array(value, what)


def read_latents(latents: NDArray[np.generic], shape: tuple[int, ...]) -> Array:
    """Latents float32 ``[N, *shape]``. Raises ``BadInput``."""
    _check_latents(latents.shape, latents.dtype, shape, number=latents.dtype.kind == "f")
    checked = to_float32(latents)
    if not np.isfinite(checked).all():
        bad = int(np.flatnonzero(~np.isfinite(checked).reshape(len(checked), -1).all(axis=1))[0])
        raise NotFiniteInput(
            f"NaN or infinity in the latents given for image {bad}, before the first step",
            hint="check the file or array that was passed as latents",
        )
    return checked


def _check_latents(found: tuple[int, ...], dtype: object, shape: tuple[int, ...], *, number: bool) -> None:
    if len(found) != 4 or found[1:] != shape or not number:
        raise BadInput(
            f"latents are {dtype}{list(found)}; needed is float32[N, {', '.join(map(str, shape))}]",
            hint="give one [C,H,W] array of standard normal noise per image",
        )


def read_embedding(value: object, what: str, member: str, *, pooled: bool) -> Array:
    """Embeddings float32 ``[N,T,D]``, ``pooled`` ones ``[N,E]``. Raises ``BadInput``."""
    array = read_array(value, what)
    if array.ndim != (2 if pooled else 3) or not array.size or array.dtype.kind != "f":
        raise BadInput(
            f"{what} is {array.dtype}{list(array.shape)}; needed is float[N{', E' if pooled else ', T, D'}]",
            hint="give one row per image, as the text encoder makes them",
        )
    found = to_float32(array)
    if not np.isfinite(found).all():
        raise NotFiniteInput(
            f"{what} for member {member!r} holds NaN or infinity", hint="check what encoded the prompt"
        )
    return found


def to_float32(array: NDArray[np.generic]) -> Array:
    """A copy. Numbers too large for float32 become infinite."""
    with np.errstate(over="ignore"):
        return np.array(array, np.float32, order="C")
