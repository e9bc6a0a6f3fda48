"""Pictures and masks from files, read to their range and within bounds.

Formats: PNG, JPEG, WebP, TIFF, BMP and GIF; of a file with several pictures the first. Grey 16-bit pictures are 0 to
65535, and so are whole numbers of 32 bits, which some programs write for them; floats are 0 to 1. Colours have 8 bits,
the upper ones where the file has 16. Profiles of colours are not applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.read import NotRegular, open_regular
from tstitch_engines.errors import BadInput, NotFiniteInput, first_line
from tstitch_engines.quiet import silence_output

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MOST_BYTES", "MOST_PIXELS", "read_control", "read_mask", "read_picture"]

Pixels = NDArray[np.uint8]

MOST_PIXELS: Final = 50_000_000
"""Of a picture, before and after it is resized."""
MOST_BYTES: Final = 256 << 20
"""Of a file."""

# Without those whose decoders run programs (EPS) or are rarely looked at
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
_COLOURS: Final = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_WHOLE: Final = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_MOST_LEVELS: Final = 65535


def read_picture(
    path: Path,
    *,
    channels: Literal[1, 3] = 3,
    size: tuple[int, int] | None = None,
    resize: bool = False,
    what: str = "image",
) -> Pixels:
    """A picture file as uint8 ``[H,W,channels]``, upright as its EXIF says; transparency becomes white.

    ``channels``: 3 for RGB, 1 for grey. ``size``: the height and width it must have. Another is refused, or with
    ``resize`` brought to it (Lanczos) without keeping its proportions. ``what``: its name in messages. Raises
    ``BadInput``.
    """
    picture = _open(path, what)
    if picture.mode == "F":
        grey = _bytes(_sized(picture, path, size, resize, what))
        return np.repeat(grey[..., None], channels, axis=2)
    picture = _sized(_on_white(picture), path, size, resize, what)
    return np.asarray(picture) if channels == 3 else np.asarray(picture.convert("L"))[..., None]


def read_control(
    path: Path, *, size: tuple[int, int] | None = None, resize: bool = False, what: str = "control"
) -> Pixels | NDArray[np.float32]:
    """As ``read_picture``; a grey picture of more than 8 bits as float32 ``[1,3,H,W]`` in [0, 1], in its precision."""
    picture = _open(path, what)
    if picture.mode != "F":
        return np.asarray(_sized(_on_white(picture), path, size, resize, what))
    grey = np.asarray(_sized(picture, path, size, resize, what)).clip(0, 1)
    return np.repeat(grey[None, None], 3, axis=1)


def read_mask(path: Path, *, size: tuple[int, int] | None = None, resize: bool = False, what: str = "mask") -> Pixels:
    """A mask file as grey uint8 ``[H,W]``: from 128 on is painted anew. Otherwise as ``read_picture``."""
    picture = _open(path, what)
    if picture.mode == "F":
        return _bytes(_sized(picture, path, size, resize, what))
    if picture.mode != "L":  # made grey after it was resized, as diffusers does it
        picture = picture.convert("RGB")
    return np.asarray(_sized(picture, path, size, resize, what).convert("L"))


def _open(path: Path, what: str) -> Image:
    """The picture in colours, or grey in mode ``F`` from 0 to 1."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    named = f"{what} {path}"
    hint = "give a picture file, e.g. PNG or JPEG"
    try:
        # The library warns of pictures that are large, and of what is odd in their tags.
        with open_regular(path) as file, silence_output(stdout=False):
            length = file.seek(0, 2)
            if length > MOST_BYTES:
                raise BadInput(
                    f"{named} has {length:,} bytes; allowed are {MOST_BYTES:,}", hint="make it smaller first"
                )
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as picture:
                _check_pixels(named, "has", picture.width, picture.height)
                picture.load()
                return _to_range(ImageOps.exif_transpose(picture), named)
    except BadInput:
        raise
    except UnidentifiedImageError:
        known = ", ".join(_FORMATS)
        raise BadInput(f"{named} is no picture that can be read; known are {known}", hint=hint) from None
    except Image.DecompressionBombError as error:
        raise BadInput(f"{named} is too large: {error}", hint="make it smaller first") from None
    except NotRegular as error:
        raise BadInput(f"{named} can't be read: {error.message}", hint=hint) from None
    except Exception as error:  # whatever a decoder makes of a file that was made to break it
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {first_line(error)}"
        raise BadInput(f"{named} {problem}", hint=hint) from None


def _to_range(picture: Image, named: str) -> Image:
    from PIL import Image

    if picture.mode in _COLOURS:
        return picture
    if picture.mode == "F":
        grey = np.asarray(picture)
        if not np.isfinite(grey).all():
            raise NotFiniteInput(f"{named} has NaN or infinity in it", hint="check what wrote it")
        most, allowed = 1, "floats from 0 to 1"
    elif picture.mode in _WHOLE:
        grey, most, allowed = np.asarray(picture), _MOST_LEVELS, f"whole numbers from 0 to {_MOST_LEVELS}"
    else:
        raise BadInput(f"{named} has colours of the kind {picture.mode}, which are not known", hint="save it as RGB")
    low, high = grey.min(), grey.max()
    if low < 0 or high > most:
        raise BadInput(
            f"{named} has values from {low:g} to {high:g}; allowed are {allowed}",
            hint="scale it first: black is 0, and white the largest of these",
        )
    return picture if most == 1 else Image.fromarray((grey / np.float32(most)).astype(np.float32))


def _on_white(picture: Image) -> Image:
    from PIL import Image

    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _bytes(picture: Image) -> Pixels:
    """A picture of mode ``F`` as uint8. Lanczos goes beyond black and white at edges."""
    return (np.asarray(picture) * 255).round().clip(0, 255).astype(np.uint8)


def _sized(picture: Image, path: Path, size: tuple[int, int] | None, resize: bool, what: str) -> Image:
    from PIL import Image

    if size is None or (picture.height, picture.width) == size:
        return picture
    if not resize:
        raise BadInput(
            f"{what} {path} is {picture.width}x{picture.height} pixels; needed is {size[1]}x{size[0]}",
            hint=f"have it resized (--resize), or draw in its size: --size {picture.width}x{picture.height}",
        )
    _check_pixels(f"{what} {path}", "is to have", size[1], size[0])
    _check_pixels(f"{what} {path}", "is to have, half-way,", size[1], picture.height)  # Pillow: columns, then rows
    return picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def _check_pixels(named: str, has: str, width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise BadInput(
            f"{named} {has} {width}x{height} = {width * height:,} pixels; allowed are {MOST_PIXELS:,}",
            hint="make it smaller first",
        )
