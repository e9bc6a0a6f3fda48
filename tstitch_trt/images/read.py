"""Pictures and masks from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput

__all__ = ["read_mask", "read_picture"]

Pixels = NDArray[np.uint8]


def read_picture(
    path: Path, *, size: tuple[int, int] | None = None, resize: bool = False, what: str = "image"
) -> Pixels:
    """A picture file as uint8 RGB ``[H,W,3]``, upright as its EXIF says; transparency becomes white.

    ``size``: the height and width it must have. Another is refused, or with ``resize`` brought to it (Lanczos) without
    keeping its proportions. ``what``: its name in messages. Raises ``BadInput``.
    """
    from PIL import Image

    picture = _open(path, what)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(_sized(picture.convert("RGB"), path, size, resize, what))


def read_mask(path: Path, *, size: tuple[int, int] | None = None, resize: bool = False, what: str = "mask") -> Pixels:
    """A mask file as grey uint8 ``[H,W]``: from 128 on is painted anew. Otherwise as ``read_picture``."""
    picture = _open(path, what)
    if picture.mode != "L":  # made grey after it was resized, as diffusers does it
        picture = picture.convert("RGB")
    return np.asarray(_sized(picture, path, size, resize, what).convert("L"))


def _open(path: Path, what: str) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    hint = "give a picture file, e.g. PNG or JPEG"
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise BadInput(f"{what} {path} is no picture that can be read", hint=hint) from None
    except Image.DecompressionBombError as error:
        raise BadInput(f"{what} {path} is too large: {error}", hint="make it smaller first") from None
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow's word for a broken PNG
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {error}"
        raise BadInput(f"{what} {path} {problem}", hint=hint) from None


def _sized(picture: Any, path: Path, size: tuple[int, int] | None, resize: bool, what: str) -> Any:
    from PIL import Image

    if size is None or (picture.height, picture.width) == size:
        return picture
    if not resize:
        raise BadInput(
            f"{what} {path} is {picture.width}x{picture.height} pixels; needed is {size[1]}x{size[0]}",
            hint=f"have it resized (--resize), or draw in its size: --size {picture.width}x{picture.height}",
        )
    return picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
