"""Fashion-MNIST (Xiao et al., arXiv 1708.07747; MIT licence) from its four idx.gz files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "load_split"]

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

_HOW = (
    "hint: on Debian or Ubuntu: apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fm, "
    "then pass --data fm/usr/share/datasets/fashion-mnist"
)


def load_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``uint8 [N,28,28]`` and labels ``int64 [N]`` of ``split`` (``train``: 60,000, ``t10k``: 10,000).

    Raises ``FileNotFoundError`` with the way to get the data, ``ValueError`` for a file that is not what it should be.
    """
    arrays: list[NDArray[np.uint8]] = []
    for kind, magic, rank in (("images-idx3", 2051, 3), ("labels-idx1", 2049, 1)):
        path = folder / f"{split}-{kind}-ubyte.gz"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist\n{_HOW}")
        raw = gzip.decompress(path.read_bytes())
        head = struct.unpack_from(f">{1 + rank}I", raw)
        if head[0] != magic or len(raw) != 4 * (1 + rank) + int(np.prod(head[1:])):
            raise ValueError(f"{path} is not an idx file of {kind}: magic {head[0]}, {len(raw)} bytes\n{_HOW}")
        arrays.append(np.frombuffer(raw, np.uint8, offset=4 * (1 + rank)).reshape(head[1:]))
    return arrays[0], arrays[1].astype(np.int64)
