"""The two networks of a CLIP model, in a child process: of transformers, or a pair of network files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.read import CONFIG_BYTES, VOCABULARY_BYTES, decode_json, read_bounded, read_json
from tstitch_engines.child import Array, Channel
from tstitch_engines.errors import BadInput, first_line
from tstitch_engines.needs import require
from tstitch_trt.study.quality.foreign import NetworkFile, opened
from tstitch_trt.study.quality.loading import open_network

__all__ = ["ClipBatch", "clip_embed", "clip_size"]

_TOKENS: Final = 77
_SIZE: Final = 224

Floats = NDArray[np.float32]


class ClipBatch(msgspec.Struct, frozen=True, kw_only=True):
    """``pictures``: float32 ``[N,3,size,size]``, normalised. ``file``: of the model's folder."""

    file: NetworkFile
    pictures: Array
    texts: tuple[str, ...]


def clip_size(request: NetworkFile, channel: Channel) -> int:
    """Pixels along each side of the pictures that it takes."""
    return _towers(request).size


def clip_embed(request: ClipBatch, channel: Channel) -> tuple[Array, Array]:
    """Embeddings ``[N,D]`` of the pictures and of the texts."""
    image, text = _towers(request.file).embed(request.pictures.numpy().copy(), list(request.texts))
    return Array.of(np.asarray(image, np.float32)), Array.of(np.asarray(text, np.float32))


def _towers(file: NetworkFile) -> _Transformers | _Pair:
    def make() -> _Transformers | _Pair:
        folder = Path(file.path)
        config = folder / "config.json"
        return _Transformers(folder, config) if config.is_file() else _Pair(folder, file.threads)

    return opened(file, make)


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
        except Exception as error:  # whatever transformers makes of the files of a folder
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
        try:
            content = read_bounded(folder / "tokenizer.json", VOCABULARY_BYTES)
            decode_json(content)
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library has no errors of its own type
            raise BadInput(
                f"--clip {folder}: tokenizer.json is no tokenizer: {first_line(error)}",
                hint="save it with the tokenizers library",
            ) from None
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
