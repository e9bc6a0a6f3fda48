"""The pictures of the page: enlarged where they are small, as files for the browser."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.files import atomic_file

__all__ = ["enlarged", "kept"]

_SMALLEST: Final = 224  # pixels a side; smaller pictures are enlarged for the page, pixel by pixel


def enlarged(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[H,W,3]``, with whole pixels repeated where it is small."""
    factor = max(1, _SMALLEST // max(image_HWC.shape[:2]))
    rgb = image_HWC if image_HWC.shape[2] == 3 else image_HWC[:, :, :1].repeat(3, axis=2)
    return np.ascontiguousarray(rgb.repeat(factor, axis=0).repeat(factor, axis=1))


def kept(image_HWC: NDArray[np.uint8], folder: Path) -> Path:
    """The picture as the page shows it, as a PNG file in ``folder`` named by its pixels, which is written once.

    Gradio would write the files of all pictures again whenever one is added, while the browser reads them.
    """
    from PIL import Image

    shown = enlarged(image_HWC)
    path = folder / f"{hashlib.sha256(repr(shown.shape).encode() + shown.tobytes()).hexdigest()[:32]}.png"
    if not path.exists():
        with atomic_file(path) as file:
            Image.fromarray(shown).save(file, format="PNG")
    return path
