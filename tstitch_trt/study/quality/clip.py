"""How well pictures fit their prompts (CLIPScore: Hessel et al., arXiv 2104.08718), by the user's CLIP model.

``100 max(cos(image, text), 0)``, as torchmetrics counts it. A model is a folder: one of transformers (``config.json``,
weights, tokenizer), or ``image.onnx`` and ``text.onnx`` (or ``.pt``, TorchScript) with the ``tokenizer.json`` of the
``tokenizers`` library. The first network takes pictures float32 ``[N,3,S,S]`` normalised as CLIP's, the second
``input_ids`` int64 ``[N,77]``; both give ``[N,D]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.identity import digest
from tstitch_engines.child import DEFAULT, Array, Limits, run_in_child
from tstitch_engines.errors import BadInput
from tstitch_trt.study.quality.clip_towers import ClipBatch, clip_embed, clip_size
from tstitch_trt.study.quality.foreign import NetworkFile, check_side, job_of

__all__ = ["Clip"]

_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)  # arXiv 2103.00020: of the pictures it was trained on
_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_BATCH = 32

Floats = NDArray[np.float32]


class Clip:
    """A loaded model; ``sha256`` is of its files."""

    def __init__(self, folder: Path, *, threads: int = 0, limits: Limits = DEFAULT) -> None:
        """``limits``: of loading it and of each batch.

        Raises ``BadInput`` for a folder that is no such model, ``Unavailable`` for a missing library.
        """
        if not folder.is_dir():
            raise BadInput(f"--clip {folder} is no folder", hint="give the folder of a CLIP model")
        self.sha256 = digest({path.name: hash_file(path)[0] for path in sorted(folder.iterdir()) if path.is_file()})
        what = "CLIP model"
        self._file = NetworkFile(path=str(folder.absolute()), stamp=self.sha256, threads=threads, what=what)
        self._job = job_of(what, folder, limits)
        self.size = run_in_child(clip_size, self._file, self._job)
        check_side((self.size, self.size), f"{what} {folder.name}")

    def __call__(self, images_NHWC: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float64]:
        """The score of each picture with its text, float64 ``[N]``."""
        found = []
        for start in range(0, len(images_NHWC), _BATCH):
            pictures = normalised(images_NHWC[start : start + _BATCH], self.size)
            batch = ClipBatch(file=self._file, pictures=Array.of(pictures), texts=tuple(texts[start : start + _BATCH]))
            pair = run_in_child(clip_embed, batch, self._job)
            a, b = (x.numpy().astype(np.float64).reshape(len(pictures), -1) for x in pair)
            cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
            found.append(100 * np.clip(cosines, 0, None))
        return np.concatenate(found)


def normalised(images_NHWC: NDArray[np.uint8], size: int) -> Floats:
    """Float32 ``[N,3,size,size]``: shorter side resized (bicubic), middle cut out, CLIP's mean and deviation.

    Resized as bytes, as in CLIP's training.
    """
    from PIL import Image

    height, width = images_NHWC.shape[1:3]
    scale = size / min(height, width)
    tall, wide = max(size, int(height * scale)), max(size, int(width * scale))
    top, left = (tall - size) // 2, (wide - size) // 2
    found = np.empty((len(images_NHWC), size, size, 3), np.float32)
    for index, pixels in enumerate(images_NHWC):
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
        resized = picture.resize((wide, tall), Image.Resampling.BICUBIC)
        found[index] = np.asarray(resized.crop((left, top, left + size, top + size)))
    mean, std = (np.array(values, np.float32) for values in (_MEAN, _STD))
    return np.ascontiguousarray(((found / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
