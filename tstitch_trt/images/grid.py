"""Pictures: labelled grids, PNG files with their settings, ``.npz`` for evaluators."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.files import atomic_file, write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["grid", "labelled_rows", "png_bytes", "save_npz", "save_png"]

Pixels = NDArray[np.uint8]


def grid(images_NHWC: Pixels, *, columns: int | None = None, gap: int = 2, scale: int = 1) -> Image:
    """The images in reading order on white; ``scale`` repeats pixels. By default as square as possible."""
    from PIL import Image

    count, height, width, channels = images_NHWC.shape
    across = columns or math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    step_y, step_x = height * scale + gap, width * scale + gap
    sheet = np.full((down * step_y - gap, across * step_x - gap, channels), 255, np.uint8)
    enlarged = images_NHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    for index, image in enumerate(enlarged):
        y, x = index // across * step_y, index % across * step_x
        sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)


def labelled_rows(
    rows: Sequence[tuple[str, Pixels]], *, heads: Sequence[str] = (), scale: int = 2, gap: int = 2, text_size: int = 13
) -> Image:
    """One row of images per entry, its text (lines split by newlines) to the left, ``heads`` above the columns."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=text_size)
    strips = [grid(images, columns=len(images), gap=gap, scale=scale).convert("RGB") for _, images in rows]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 12 + math.ceil(max(measure.multiline_textbbox((0, 0), text, font=font)[2] for text, _ in rows))
    step = strips[0].width // max(1, len(rows[0][1])) if heads else 0
    lines = [_wrapped(measure, head, font, step - 4) for head in heads]
    top = 6 + math.ceil(max((measure.multiline_textbbox((0, 0), h, font=font)[3] for h in lines), default=0))
    heights = [
        max(s.height, math.ceil(measure.multiline_textbbox((0, 0), text, font=font)[3]) + 4)
        for s, (text, _) in zip(strips, rows, strict=True)
    ]
    sheet = Image.new("RGB", (left + max(s.width for s in strips) + 6, top + sum(heights) + gap * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, head in enumerate(lines):
        draw.multiline_text(
            (left + (index + 0.5) * step, 3), head, fill="black", font=font, anchor="ma", align="center"
        )
    y = top
    for strip, (text, _), height in zip(strips, rows, heights, strict=True):
        draw.multiline_text((6, y + height / 2), text, fill="black", font=font, anchor="lm")
        sheet.paste(strip, (left, y + (height - strip.height) // 2))
        y += height + gap
    return sheet


def _wrapped(draw: Any, text: str, font: Any, width: int) -> str:
    """``text`` with its spaces turned into newlines where it is wider than ``width`` pixels."""
    return text if draw.textlength(text, font=font) <= width else text.replace(" ", "\n").replace("/", "/\n")


def png_bytes(image: Image, metadata: Mapping[str, str]) -> bytes:
    """``image`` as a PNG file with ``metadata`` as text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(path: Path, image: Image, metadata: Mapping[str, str]) -> None:
    """Writes what ``png_bytes`` makes; the file appears whole or not at all."""
    write_bytes(path, png_bytes(image, metadata))


def save_npz(path: Path, images_NHWC: Pixels) -> None:
    """``arr_0`` uint8 ``[N,H,W,C]``, as the evaluators of ADM (arXiv 2105.05233) read it."""
    with atomic_file(path) as file:
        np.savez(file, images_NHWC)
