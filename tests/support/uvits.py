"""Real tiny U-ViTs with random weights, as published state dicts, and U-ViT once more from the paper's equations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PUBLISHED_NAMES", "forward", "uvit_checkpoint", "uvit_model"]

Array = NDArray[np.float64]

_BLOCK = [
    "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias",
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
]  # fmt: skip

# The tensors of the published checkpoints (github.com/baofff/U-ViT), of a model of three blocks.
PUBLISHED_NAMES = [
    "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "label_emb.weight", "norm.weight", "norm.bias",
    "decoder_pred.weight", "decoder_pred.bias", "final_layer.weight", "final_layer.bias",
    *(f"{block}.{name}" for block in ("in_blocks.0", "mid_block", "out_blocks.0") for name in _BLOCK),
    "out_blocks.0.skip_linear.weight", "out_blocks.0.skip_linear.bias",
]  # fmt: skip


def uvit_model(
    *,
    depth: int = 5,
    width: int = 32,
    heads: int = 4,
    size: int = 8,
    labels: int = 11,
    time: str = "discrete",
    mlp_time: bool = False,
    conv: bool = True,
    qkv_bias: bool = False,
    seed: int = 0,
) -> Any:
    """Our U-ViT on 4-channel latents, patch 2, every weight random; the last label is the null class."""
    import torch

    from tstitch_export.families.uvit.layout import UViTConfig
    from tstitch_export.families.uvit.model import UViT

    torch.manual_seed(seed)
    config = UViTConfig(
        depth=depth, width=width, heads=heads, patch=2, size=size, channels=4, labels=labels, mlp_time=mlp_time,
        conv=conv, qkv_bias=qkv_bias,
    )  # fmt: skip
    model = UViT(config, time)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def uvit_checkpoint(path: Path, **changes: Any) -> Any:
    """Writes a tiny U-ViT as a published state dict (``.safetensors`` or ``.pth``); returns the module."""
    import torch
    from safetensors.torch import save_file

    model = uvit_model(**changes)
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model


def forward(state: dict[str, Array], heads: int, x: Array, t: Array, labels: list[int]) -> Array:
    """arXiv 2209.12152, section 3, in numpy and float64; ``t`` is the time as the network is told it, ``[B]``."""
    width = state["label_emb.weight"].shape[1]
    patch = state["patch_embed.proj.weight"].shape[2]
    b, c, h, w = x.shape

    def linear(name: str, y: Array) -> Array:
        bias = state.get(f"{name}.bias")
        out: Array = y @ state[f"{name}.weight"].reshape(len(state[f"{name}.weight"]), -1).T
        return out if bias is None else np.asarray(out + bias)

    def norm(name: str, y: Array) -> Array:
        centred = y - y.mean(-1, keepdims=True)
        scaled: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(name: str, y: Array) -> Array:
        q, k, v = np.split(linear(f"{name}.qkv", y), 3, axis=-1)
        out = np.empty_like(q)
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = q[..., part] @ k[..., part].swapaxes(1, 2) / math.sqrt(width // heads)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
        return linear(f"{name}.proj", out)

    def block(name: str, y: Array) -> Array:
        y = y + attention(f"{name}.attn", norm(f"{name}.norm1", y))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", y))
        gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        return y + linear(f"{name}.mlp.fc2", gelu)

    grid = [(i, j) for i in range(0, h, patch) for j in range(0, w, patch)]
    patches = np.stack([x[:, :, i : i + patch, j : j + patch].reshape(b, -1) for i, j in grid], axis=1)
    half = width // 2
    angles = t[:, None] * 10_000 ** (-np.arange(half) / half)
    time = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    if "time_embed.0.weight" in state:
        hidden = linear("time_embed.0", time)
        time = linear("time_embed.2", hidden / (1 + np.exp(-hidden)))
    tokens = [state["label_emb.weight"][labels][:, None], time[:, None], linear("patch_embed.proj", patches)]
    y = np.concatenate(tokens, axis=1) + state["pos_embed"]
    deep = len({name.split(".")[1] for name in state if name.startswith("in_blocks.")})
    kept = []
    for index in range(deep):
        y = block(f"in_blocks.{index}", y)
        kept.append(y)
    y = block("mid_block", y)
    for index in range(deep):
        joined = np.concatenate([y, kept[deep - 1 - index]], axis=-1)
        y = block(f"out_blocks.{index}", linear(f"out_blocks.{index}.skip_linear", joined))
    y = linear("decoder_pred", norm("norm", y))[:, 2:]
    picture = np.empty_like(x)
    for index, (i, j) in enumerate(grid):
        picture[:, :, i : i + patch, j : j + patch] = y[:, index].reshape(b, patch, patch, c).transpose(0, 3, 1, 2)
    if "final_layer.weight" not in state:
        return picture
    padded = np.pad(picture, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros_like(picture) + state["final_layer.bias"][:, None, None]
    for i in range(3):
        for j in range(3):
            part = padded[:, :, i : i + h, j : j + w]
            out += np.einsum("oc,bchw->bohw", state["final_layer.weight"][:, :, i, j], part)
    return out
