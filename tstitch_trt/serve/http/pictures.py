"""Pictures of requests, looked at before they are decoded, and pictures of answers."""

from __future__ import annotations

import base64
import binascii
from io import BytesIO
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.serve.http.errors import ApiError
from tstitch_trt.serve.http.messages import FORMATS, Format

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["decode_mask", "decode_picture", "encode_picture", "read_data_url"]

Pixels = NDArray[np.uint8]
_PNG_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}
_HINT: Final = "send a PNG, JPEG or WebP picture"


def decode_picture(content: bytes, *, channels: int, size: tuple[int, int] | None, most_pixels: int) -> Pixels:
    """A picture file as uint8 ``[H,W,channels]``, upright as its EXIF says; transparency becomes white.

    ``channels``: 1 for grey, 3 or 4. ``size``: the height and width it is brought to (Lanczos), without keeping its
    proportions. Raises ``ApiError`` for another format, more than ``most_pixels`` and damage.
    """
    from PIL import Image

    picture = _open(content, "image", most_pixels)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        raise ApiError(400, "image has more than 8 bits a channel\nhint: save it with 8 bits a channel", param="image")
    if channels != 4 and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert(_PNG_MODES[channels])
    if size is not None and (picture.height, picture.width) != size:
        if size[1] * picture.height > 2 * most_pixels:  # Pillow resizes columns first
            raise ApiError(
                400, f"image is {picture.width}x{picture.height} pixels, too tall for the size {size[1]}x{size[0]}\n"
                "hint: resize it first", param="image",
            )  # fmt: skip
        picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def decode_mask(content: bytes, *, size: tuple[int, int], resize: bool, most_pixels: int) -> NDArray[np.bool_]:
    """A mask file as ``[H,W]``: true, painted anew, where it is fully transparent, as OpenAI has it.

    ``size``: height and width of the picture; another is refused, or with ``resize`` brought to it. Raises
    ``ApiError`` as ``decode_picture`` does, and for a mask without transparency.
    """
    from PIL import Image

    picture = _open(content, "mask", most_pixels)
    if not picture.has_transparency_data:
        raise ApiError(
            400, "mask has no alpha channel\nhint: save it as PNG with alpha 0 where the picture is painted anew, and "
            "255 elsewhere", param="mask",
        )  # fmt: skip
    alpha = picture.convert("RGBA").getchannel("A")
    if (alpha.height, alpha.width) != size:
        if not resize:
            raise ApiError(
                400, f"mask is {alpha.width}x{alpha.height} pixels and image {size[1]}x{size[0]}; both must be equal\n"
                "hint: resize the mask to the picture's size", param="mask",
            )  # fmt: skip
        alpha = alpha.resize((size[1], size[0]), Image.Resampling.NEAREST)
    mask: NDArray[np.bool_] = np.asarray(alpha) == 0
    if not mask.any():
        raise ApiError(
            400, "mask is transparent nowhere: nothing is to be painted anew\nhint: set alpha to 0 there, or leave the "
            "mask out", param="mask",
        )  # fmt: skip
    return mask


def _open(content: bytes, what: str, most_pixels: int) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(BytesIO(content), formats=[name.upper() for name in FORMATS]) as picture:
            pixels = picture.width * picture.height
            if not 0 < pixels <= most_pixels:
                raise ApiError(
                    400, f"{what} has {picture.width}x{picture.height} = {pixels:,} pixels; allowed are "
                    f"{most_pixels:,}\nhint: make it smaller first", param=what, code="image_too_large",
                )  # fmt: skip
            picture.load()
            return ImageOps.exif_transpose(picture)
    except ApiError:
        raise
    except UnidentifiedImageError:
        problem = "is no picture that can be read; allowed are PNG, JPEG and WebP"
    except Image.DecompressionBombError:
        problem = f"has too many pixels; allowed are {most_pixels:,}"
    except Exception:  # whatever a decoder makes of a file that was made to break it
        problem = "is damaged"
    raise ApiError(400, f"{what} {problem}\nhint: {_HINT}", param=what, code="invalid_image")


def read_data_url(url: str, what: str) -> bytes:
    """The bytes of ``data:image/png;base64,...``. Raises ``ApiError``."""
    head, _, text = url.partition(",")
    if head not in {f"data:image/{form};base64" for form in FORMATS}:
        raise ApiError(
            400, f"{what} is no data URL of a picture; addresses are not fetched\nhint: send "
            "data:image/png;base64,... with the picture in it", param=what,
        )  # fmt: skip
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{what} is no base64\nhint: encode the file's bytes", param=what) from None


def encode_picture(pixels: Pixels, form: Format, quality: int) -> bytes:
    """A picture uint8 ``[H,W,C]`` as a file. ``quality``: of jpeg and webp, 1 to 100."""
    from PIL import Image

    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if form == "jpeg" and picture.mode == "RGBA":
        picture = picture.convert("RGB")
    file = BytesIO()
    if form == "png":
        picture.save(file, "PNG", compress_level=4)
    else:
        picture.save(file, form.upper(), quality=max(1, quality))
    return file.getvalue()
