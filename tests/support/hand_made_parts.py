"""Parts for bundles made by hand: a text encoder, both halves of a VAE and a ControlNet of a few nodes each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.hand_made import CHANNELS, Made, graph, made_member, text_bundle
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Decoder, Defaults, Network, TextInputs
from tstitch_engines.spec import Range, TensorSpec

__all__ = ["FACTOR", "Control", "World", "made_controlnet", "made_text_encoder", "made_vae"]

Array = NDArray[np.float64]
FACTOR = 8
TOKENS = 6  # places of the text encoders
WORDS = ("<begin>", "<end>", "a", "red", "blue", "fox", "bear", "blurry", "sky", "sea")


def _network(family: str, inputs: list[TensorSpec], outputs: list[TensorSpec], **config: Any) -> Network:
    return Network(
        family=family, precision="fp32", inputs=tuple(inputs), outputs=tuple(outputs), onnx=(), sources=(), check=None,
        config=config,
    )  # fmt: skip


def _spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=("B", *shape))


def _model(
    network: Network, nodes: list[tuple[str, list[str], str, dict[str, Any]]], constants: Mapping[str, Any]
) -> Any:
    from onnx import helper, numpy_helper

    made = [helper.make_node(kind, inputs, [output], **attributes) for kind, inputs, output, attributes in nodes]
    return graph(network, made, [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()])


def word_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))  # noqa: S106 - not a password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def made_text_encoder(width: int, pooled: int, seed: int) -> tuple[Made, Any]:
    """The part, and what it makes of the words of a text: hidden ``[k TOKENS, width]`` and pooled ``[pooled]``."""
    rng = np.random.default_rng(seed)
    table, projection = rng.normal(size=(len(WORDS), width)), rng.normal(size=(width, pooled))
    network = _network(
        "clip-text", [_spec("input_ids", TOKENS, dtype="int64")],
        [_spec("hidden", TOKENS, width), _spec("pooled", pooled)], tokens=TOKENS, bos=0, eos=1, pad=1, width=width,
    )  # fmt: skip
    model = _model(
        network,
        [
            ("Gather", ["table", "input_ids"], "hidden", {}),
            ("ReduceMean", ["hidden", "axis"], "mean", {"keepdims": 0}),
            ("MatMul", ["mean", "projection"], "pooled", {}),
        ],
        {"table": table.astype(np.float32), "projection": projection.astype(np.float32), "axis": np.array([1])},
    )

    def oracle(text: str, chunks: int = 1) -> tuple[Array, Array]:
        ids = [WORDS.index(word) for word in text.split()]
        room = TOKENS - 2
        rows = [[0, *part, *[1] * (TOKENS - 1 - len(part))] for part in (ids[i * room :][:room] for i in range(chunks))]
        hidden = table[np.array(rows)]
        return hidden.reshape(-1, width), hidden[0].mean(axis=0) @ projection

    return Made(network, model, {}), oracle


def pooled_mean(pictures: Array, size: int) -> Array:
    """Means of ``size x size`` blocks of ``[N,C,H,W]``."""
    n, c, h, w = pictures.shape
    return pictures.reshape(n, c, h // size, size, w // size, size).mean(axis=(3, 5))


def made_vae() -> tuple[Made, Made, Any, Any]:
    """Decoder and encoder with their oracles: latents to images in [-1, 1], and images to mean and std of latents."""
    rng = np.random.default_rng(8)
    down, up = rng.normal(size=(3, CHANNELS)), rng.normal(size=(CHANNELS, 3)) / 2
    large = (f"{FACTOR}*H", f"{FACTOR}*W")
    decoder = _network("vae-decoder", [_spec("latent", CHANNELS, "H", "W")], [_spec("image", 3, *large)], factor=FACTOR)
    encoder = _network(
        "vae-encoder", [_spec("image", 3, *large)],
        [_spec("mean", CHANNELS, "H", "W"), _spec("std", CHANNELS, "H", "W")], factor=FACTOR,
    )  # fmt: skip
    weights = {"w": up.T[:, :, None, None].astype(np.float32), "scales": np.array([1, 1, FACTOR, FACTOR], np.float32)}
    decoding = _model(
        decoder,
        [
            ("Conv", ["latent", "w"], "small", {}),
            ("Tanh", ["small"], "bounded", {}),
            ("Resize", ["bounded", "", "scales"], "image", {"mode": "nearest"}),
        ],
        weights,
    )
    encoding = _model(
        encoder,
        [
            ("AveragePool", ["image"], "pooled", {"kernel_shape": [FACTOR] * 2, "strides": [FACTOR] * 2}),
            ("Conv", ["pooled", "w"], "mean", {}),
            ("Abs", ["mean"], "size", {}),
            ("Mul", ["size", "tenth"], "std", {}),
        ],
        {"w": down.T[:, :, None, None].astype(np.float32), "tenth": np.float32(0.1)},
    )

    def decode(latents: Array) -> Array:
        small = np.tanh(np.einsum("nchw,cd->ndhw", latents, up))
        return small.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)

    def encode(images: Array) -> tuple[Array, Array]:
        mean = np.einsum("nchw,cd->ndhw", pooled_mean(images, FACTOR), down)
        return mean, np.abs(mean) / 10

    return Made(decoder, decoding, {}), Made(encoder, encoding, {}), decode, encode


class Control:
    """What the ControlNet gives, in numpy."""

    def __init__(self, weight: Array, text: Array) -> None:
        self._weight = weight
        self._text = text

    def __call__(self, sample: Array, hidden: Array, control: Array, scale: float) -> dict[str, Array]:
        down = np.einsum("nchw,cd->ndhw", pooled_mean(control, FACTOR), self._weight) + 0.3 * sample
        down = scale * (down + (hidden.mean(axis=1) @ self._text)[:, :, None, None])
        return {"down_residual_0": down, "mid_residual": pooled_mean(down, 2)}


def made_controlnet(width: int) -> tuple[Made, Control]:
    rng = np.random.default_rng(9)
    weight, text = rng.normal(size=(3, CHANNELS)), rng.normal(size=(width, CHANNELS)) / width
    network = _network(
        "controlnet",
        [
            _spec("sample", CHANNELS, "H", "W"), _spec("timestep"), _spec("encoder_hidden_states", "T", width),
            _spec("control", 3, f"{FACTOR}*H", f"{FACTOR}*W"), _spec("control_scale"),
        ],
        [_spec("down_residual_0", CHANNELS, "H", "W"), _spec("mid_residual", CHANNELS, "H/2", "W/2")],
    )  # fmt: skip
    model = _model(
        network,
        [
            ("AveragePool", ["control"], "pooled", {"kernel_shape": [FACTOR] * 2, "strides": [FACTOR] * 2}),
            ("Conv", ["pooled", "w"], "seen", {}),
            ("Mul", ["sample", "third"], "shown", {}),
            ("Add", ["seen", "shown"], "sum", {}),
            ("ReduceMean", ["encoder_hidden_states", "axis"], "read", {"keepdims": 0}),
            ("MatMul", ["read", "text"], "said", {}),
            ("Reshape", ["said", "map"], "told", {}),
            ("Mul", ["timestep", "nothing"], "never", {}),
            ("Reshape", ["never", "column"], "still", {}),
            ("Add", ["told", "still"], "both", {}),
            ("Add", ["sum", "both"], "all", {}),
            ("Reshape", ["control_scale", "column"], "scale", {}),
            ("Mul", ["all", "scale"], "down_residual_0", {}),
            ("AveragePool", ["down_residual_0"], "mid_residual", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ],
        {
            "w": weight.T[:, :, None, None].astype(np.float32), "text": text.astype(np.float32),
            "third": np.float32(0.3), "axis": np.array([1]), "map": np.array([-1, CHANNELS, 1, 1]),
            "column": np.array([-1, 1, 1, 1]), "nothing": np.float32(0),
        },
    )  # fmt: skip
    return Made(network, model, {}), Control(weight, text)


RESIDUALS: dict[str, tuple[int | str, ...]] = {
    "down_residual_0": (CHANNELS, "H", "W"), "mid_residual": (CHANNELS, "H/2", "W/2"),
}  # fmt: skip


class World:
    """A bundle with all parts: its networks and their oracles."""

    def __init__(self) -> None:
        text = TextInputs(hidden=("text_encoder", "text_encoder_2"), width=9)
        hidden: dict[str, tuple[int | str, ...]] = {"encoder_hidden_states": ("T", 9)}
        self.members = {
            "plain": made_member("plain", inputs=hidden, text=text),
            "steered": made_member("steered", inputs={**hidden, **RESIDUALS}, text=text, controlled=True),
            "painter": made_member(
                "painter", inputs={**hidden, "inpaint": (1 + CHANNELS, "H", "W")}, text=text, inpaints=True,
                latent_ratio=1.25,
            ),
        }  # fmt: skip
        first, self.first = made_text_encoder(5, 3, 1)
        second, self.second = made_text_encoder(4, 3, 2)
        decoder, encoder, self.decode, self.encode = made_vae()
        controlnet, self.control = made_controlnet(9)
        self.parts: dict[str, Made] = {
            "text_encoder": first, "text_encoder_2": second, "vae_decoder": decoder, "vae_encoder": encoder,
            "controlnet": controlnet,
        }  # fmt: skip

    def hidden(self, text: str, chunks: int = 1) -> np.ndarray:
        return np.concatenate([self.first(text, chunks)[0], self.second(text, chunks)[0]], axis=-1)

    def bundle(self, folder: Path) -> Bundle:
        tokenizer = word_tokenizer(folder / "tokenizer.json")
        files = {name: {"tokenizer": tokenizer} for name in ("text_encoder", "text_encoder_2")}
        return text_bundle(
            folder / "whole.bundle", self.members, parts=self.parts, files=files,
            tokens=Range(TOKENS, TOKENS, 3 * TOKENS),
            decoder=Decoder(kind="vae", factor=FACTOR), defaults=Defaults(steps=6, schedule="plain:0.5,steered"),
        )  # fmt: skip
