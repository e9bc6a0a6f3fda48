"""The pictures of the page: enlarged where they are small, as files for the browser."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.files import atomic_file

__all__ = ["SMALLEST", "enlarged", "kept"]

SMALLEST: Final = 224  # pixels a side; smaller pictures are enlarged for the page, pixel by pixel
_MOST_PICTURES: Final = 1000
_MOST_BYTES: Final = 1 << 30
_KEY: Final = secrets.token_bytes(16)  # so that nobody finds a picture's name by drawing it elsewhere


def enlarged(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[H,W,3]``, with whole pixels repeated where it is small."""
    factor = max(1, SMALLEST // max(image_HWC.shape[:2]))
    rgb = image_HWC if image_HWC.shape[2] == 3 else image_HWC[:, :, :1].repeat(3, axis=2)
    return np.ascontiguousarray(rgb.repeat(factor, axis=0).repeat(factor, axis=1))


def kept(
    image_HWC: NDArray[np.uint8], folder: Path, *, most: int = _MOST_PICTURES, most_bytes: int = _MOST_BYTES
) -> Path:
    """The picture as the page shows it, as a PNG file in ``folder`` named by its pixels, which is written once.

    Gradio would write the files of all pictures again whenever one is added, while the browser reads them. The folder
    keeps at most ``most`` pictures of ``most_bytes`` in all: those that were used last.
    """
    from PIL import Image

    shown = enlarged(image_HWC)
    name = hashlib.blake2b(repr(shown.shape).encode() + shown.tobytes(), key=_KEY, digest_size=16).hexdigest()
    path = folder / f"{name}.png"
    if path.exists():
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # used now, and not written again
        return path
    with atomic_file(path) as file:
        Image.fromarray(shown).save(file, format="PNG")
    found = sorted(
        ((one.stat(), one) for one in folder.glob("*.png")),
        key=lambda one: -max(one[0].st_mtime_ns, one[0].st_atime_ns),
    )
    size = 0
    for rank, (about, one) in enumerate(found):
        size += about.st_size
        if one != path and (rank >= most or size > most_bytes):
            one.unlink(missing_ok=True)
    return path
