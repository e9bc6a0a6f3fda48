"""The text tower of CLIP (Radford et al., arXiv 2103.00020), with the parameter names of transformers' CLIPTextModel.

OpenAI's CLIP-L and OpenCLIP's ViT-H and bigG differ in sizes and activation. Only the layers that the outputs need are
there. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "ClipText", "ClipTextConfig"]


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation OpenAI's models were trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """``projection`` 0: there is none, and no pooled output. ``eos`` ``None``: the highest token ends the text.

    ``masked``: the tokens that end a text and that follow it, where nothing attends to what lies behind the end;
    ``None``: the padding attends to itself.
    """

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    tokens: int
    activation: str
    epsilon: float
    projection: int
    hidden_state: int
    final_norm: bool
    eos: int | None
    masked: tuple[int, int] | None = None

    @property
    def hidden_layers(self) -> int:
        """How many layers make the hidden states: all for -1, all but the last for -2."""
        return self.layers + self.hidden_state + 1

    @property
    def used_layers(self) -> int:
        """The pooled output always takes all of them."""
        return self.layers if self.projection else self.hidden_layers

    @property
    def uses_final_norm(self) -> bool:
        return self.final_norm or bool(self.projection)


class Embeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.token_embedding(input_ids) + self.position_embedding.weight
        return out


class Attention(nn.Module):
    """Causal: a token sees those before it, so the padding behind a text changes nothing in it.

    ``seen`` bool ``[B,1,T,T]``: what each token sees, where it is less than that.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTD: Tensor, seen: Tensor | None) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.reshape(*y.shape[:-1], self.heads, -1).transpose(1, 2)

        q, k, v = split(self.q_proj(x_BTD)), split(self.k_proj(x_BTD)), split(self.v_proj(x_BTD))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        merged: Tensor = self.out_proj(out.transpose(1, 2).flatten(-2))
        return merged


class MLP(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.inner)
        self.fc2 = nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class Layer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.epsilon)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), seen)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Encoder(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.used_layers))


def _seen(input_ids: Tensor, eos: int, pad: int) -> Tensor:
    """bool ``[B,1,T,T]``: of the tokens up to its own place, those of the text with its begin and end."""
    ids = input_ids.float()  # as below: no integers for engine builders
    tokens = ids.shape[1]
    places = torch.arange(tokens, dtype=torch.float32, device=ids.device)
    # the end is the last one, or where pads equal it the first behind the last word
    last = ids != float(eos) if pad == eos else ids == float(eos)
    end = torch.where(last, places, 0.0).amax(1) + (1.0 if pad == eos else 0.0)
    return (places <= end[:, None, None, None]) & (places <= places[:, None])


class ClipText(nn.Module):
    """input_ids int64 ``[B,T]`` -> hidden ``[B,T,D]`` and, with a projection, pooled ``[B,E]``.

    hidden: the states after ``hidden_layers`` layers, normalised with ``final_norm``. pooled: the projected, normalised
    last state of the token that ends the text: the first ``eos``, or the first of all where there is none; in OpenCLIP
    and before transformers 4.31 (whose ``eos_token_id`` is a wrong 2) the first of the highest token.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        if config.uses_final_norm:
            self.final_layer_norm = nn.LayerNorm(config.width, eps=config.epsilon)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        config = self.config
        x = self.embeddings(input_ids)
        hidden: Tensor = x
        seen = None if config.masked is None else _seen(input_ids, *config.masked)
        for index, layer in enumerate(self.encoder.layers, start=1):
            x = layer(x, seen)
            if index == config.hidden_layers:
                hidden = x
        if config.final_norm:
            hidden = self.final_layer_norm(hidden)
        if not config.projection:
            return hidden
        last = hidden if config.final_norm and config.hidden_state == -1 else self.final_layer_norm(x)
        # Without ArgMax, whose choice among equals engine builders don't promise: pads may equal the end.
        ids = input_ids.float()  # exact: vocabularies are far below 2**24
        ends = ids == (ids.amax(1, keepdim=True) if config.eos is None else float(config.eos))
        places = torch.arange(config.tokens, dtype=torch.float32, device=input_ids.device)
        first = torch.where(ends, places, float(config.tokens)).amin(1)
        first = torch.where(first < config.tokens, first, 0.0).long()
        state = last.gather(1, first[:, None, None].expand(-1, 1, config.width))[:, 0]
        pooled: Tensor = self.text_projection(state)
        return hidden, pooled
