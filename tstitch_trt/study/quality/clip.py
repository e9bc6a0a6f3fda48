"""How well pictures fit their prompts (CLIPScore: Hessel et al., arXiv 2104.08718), by the user's CLIP model.

``100 max(cos(image, text), 0)``, as torchmetrics counts it. A model is a folder: one of transformers (``config.json``,
weights, tokenizer), or ``image.onnx`` and ``text.onnx`` (or ``.pt``, TorchScript) with the ``tokenizer.json`` of the
``tokenizers`` library. The first network takes pictures float32 ``[N,3,S,S]`` normalised as CLIP's, the second
``input_ids`` int64 ``[N,77]``; both give ``[N,D]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.read import CONFIG_BYTES, read_json
from tstitch_engines.errors import BadInput, first_line
from tstitch_engines.needs import require
from tstitch_trt.study.quality.loading import open_network

__all__ = ["Clip"]

_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)  # arXiv 2103.00020: of the pictures it was trained on
_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_TOKENS: Final = 77
_SIZE: Final = 224
_BATCH = 32

Floats = NDArray[np.float32]


class Clip:
    """A loaded model; ``sha256`` is of its files."""

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        """Raises ``BadInput`` for a folder that is no such model, ``Unavailable`` for a missing library."""
        if not folder.is_dir():
            raise BadInput(f"--clip {folder} is no folder", hint="give the folder of a CLIP model")
        config = folder / "config.json"
        if config.is_file():
            self._towers: _Transformers | _Pair = _Transformers(folder, config)
        else:
            self._towers = _Pair(folder, threads)
        self.sha256 = digest({path.name: hash_file(path)[0] for path in sorted(folder.iterdir()) if path.is_file()})

    def __call__(self, images_NHWC: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float64]:
        """The score of each picture with its text, float64 ``[N]``."""
        found = []
        for start in range(0, len(images_NHWC), _BATCH):
            pictures = normalised(images_NHWC[start : start + _BATCH], self._towers.size)
            pair = self._towers.embed(pictures, list(texts[start : start + _BATCH]))
            a, b = (np.asarray(x, np.float64).reshape(len(pictures), -1) for x in pair)
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


class _Transformers:
    def __init__(self, folder: Path, config: Path) -> None:
        instead = "pip install transformers, or give image.onnx, text.onnx and tokenizer.json"
        what = "a CLIP model in transformers' form"
        require("torch", what, instead=instead)
        transformers = require("transformers", what, instead=instead)
        try:
            kind = dict(read_json(config, CONFIG_BYTES)).get("model_type")
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"--clip {config} is damaged: {error}", hint="download or copy it again") from None
        if kind != "clip":
            raise BadInput(f"--clip {folder} holds a model of type {kind!r}; allowed is clip", hint="give a CLIP model")
        try:
            model: Any = transformers.CLIPModel.from_pretrained(folder, local_files_only=True)
            self._tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"--clip {folder} can't be loaded: {first_line(error)}",
                hint="it needs config.json, the weights and the tokenizer's files",
            ) from None
        self._model = model.eval()
        self.size = int(self._model.config.vision_config.image_size)
        self._tokens = int(self._model.config.text_config.max_position_embeddings)

    def embed(self, pictures: Floats, texts: list[str]) -> tuple[Any, Any]:
        """Embeddings ``[N,D]`` of normalised pictures ``[N,3,size,size]`` and of as many texts."""
        import torch

        given = self._tokenizer(
            texts, padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            found = self._model(pixel_values=torch.from_numpy(pictures), **given)
        return found.image_embeds.float().numpy(), found.text_embeds.float().numpy()


class _Pair:
    def __init__(self, folder: Path, threads: int) -> None:
        found = {}
        for name in ("image", "text"):
            path = next(
                (folder / f"{name}{end}" for end in (".onnx", ".pt") if (folder / f"{name}{end}").is_file()), None
            )
            if path is None:
                raise BadInput(
                    f"--clip {folder} has neither config.json nor {name}.onnx or {name}.pt",
                    hint="give a model of transformers, or image.onnx, text.onnx and tokenizer.json",
                )
            found[name] = open_network(path, threads=threads, what=f"CLIP {name} network")
        self._image, self._text = found["image"], found["text"]
        if not (folder / "tokenizer.json").is_file():
            raise BadInput(f"--clip {folder} has no tokenizer.json", hint="save it with the tokenizers library")
        tokenizers = require("tokenizers", "reading prompts", extra="prompt")
        self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(_TOKENS)
        end = self._tokenizer.token_to_id("<|endoftext|>")
        self._tokenizer.enable_padding(length=_TOKENS, pad_id=end or 0)
        self.size = self._image.size[0] if self._image.size else _SIZE

    def embed(self, pictures: Floats, texts: list[str]) -> tuple[Any, Any]:
        ids = np.array([row.ids for row in self._tokenizer.encode_batch(texts)], np.int64)
        if not self._text.scripted:
            ids = ids.astype(self._text.dtype, copy=False)
        pair = self._image.run([pictures], {}), self._text.run([ids], {})
        image, text = (next(iter(found.values())) for found in pair)
        return image, text
