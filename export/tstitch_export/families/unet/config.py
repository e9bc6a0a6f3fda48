"""Text-conditioned UNets as data: the inputs and shapes of a diffusers ``UNet2DConditionModel`` config. No torch.

Stable Diffusion (arXiv 2112.10752), SDXL (arXiv 2307.01952) and their pruned relatives (BK-SDM arXiv 2305.15798,
SSD-1B and Vega arXiv 2401.02677) differ in this table alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["CLASS", "UNetConfig", "flat", "published_name"]

CLASS: Final = "UNet2DConditionModel"
Kind = Literal["sd", "sdxl", "other"]

# diffusers' own defaults, for what a config.json leaves out
_DEFAULTS: Final[dict[str, Any]] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
}


@dataclass(frozen=True)
class UNetConfig:
    """``raw`` is what diffusers' ``from_config`` takes; the properties are what this exporter reads from it."""

    raw: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        """The value, or diffusers' default; a ``null`` counts only where diffusers tells it from a missing key."""
        found = self.raw.get(key, _DEFAULTS.get(key))
        return _DEFAULTS.get(key) if found is None and key != "mid_block_type" else found

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, from the finest."""
        return tuple(int(c) for c in self["block_out_channels"])

    @property
    def layers(self) -> tuple[int, ...]:
        """Residual blocks of each level on the way down."""
        layers = self["layers_per_block"]
        return (layers,) * len(self.channels) if isinstance(layers, int) else tuple(int(n) for n in layers)

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer layers after each residual block on the way down; 0 without attention."""
        depth = self["transformer_layers_per_block"]
        per_level = (depth,) * len(self.channels) if isinstance(depth, int) else depth
        found: list[int] = []
        for kind, layers, level in zip(self["down_block_types"], self.layers, per_level, strict=True):
            each = (level,) * layers if isinstance(level, int) else tuple(level)
            found += each if "CrossAttn" in kind else (0,) * layers
        return tuple(found)

    @property
    def multiple(self) -> int:
        """What height and width have to be a multiple of: each level but the last halves them."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def native(self) -> tuple[int, int]:
        """Height and width it was trained at; the usual ones of its kind where it does not say, as a ControlNet."""
        size = self.raw.get("sample_size")
        if size is None:
            size = 64 if self.kind == "sd" else 128
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def width(self) -> int | None:
        """Width of the text embeddings; ``None`` where its levels want different ones."""
        found = set(flat(self["cross_attention_dim"]))
        return found.pop() if len(found) == 1 else None

    @property
    def residuals(self) -> tuple[tuple[int, int], ...]:
        """What a ControlNet adds to, as (channels, part of height and width).

        The first convolution, then each level's blocks and its downsampler, then the middle.
        """
        last = len(self.channels) - 1
        found = [(self.channels[0], 1)]
        for level, (width, count) in enumerate(zip(self.channels, self.layers, strict=True)):
            found += [(width, 2**level)] * count
            if level < last:
                found.append((width, 2 ** (level + 1)))
        return (*found, (self.channels[-1], 2**last))

    @property
    def kind(self) -> Kind:
        """``other`` where it wants conditioning that neither family has; see ``unknown``."""
        if self.unknown is not None:
            return "other"
        return "sd" if self["addition_embed_type"] is None else "sdxl"

    @property
    def unknown(self) -> str | None:
        """The setting that makes it another kind of UNet than Stable Diffusion's and SDXL's."""
        wanted: dict[str, tuple[Any, ...]] = {
            "addition_embed_type": (None, "text_time"),
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "encoder_hid_dim_type": (None,),
            "encoder_hid_dim": (None,),
            "attention_type": (None, "default"),
            "center_input_sample": (None, False),
        }
        for key, allowed in wanted.items():
            if self.raw.get(key) not in allowed:
                return f"{key} = {self.raw[key]!r}"
        for key in ("down_block_types", "up_block_types"):
            if strange := [kind for kind in self[key] if kind.startswith("Skip")]:  # they give a third tensor
                return f"{key} has {strange[0]}, which diffusers' {CLASS} can't run"
        if self.width is None:
            return f"cross_attention_dim = {self.raw['cross_attention_dim']!r}"
        return None


def flat(value: Any) -> Iterable[int]:
    """The numbers of a nested list, as configs hold them; of a number itself."""
    if isinstance(value, int):
        yield value
    else:
        for part in value:
            yield from flat(part)


# (channels, text width, transformer layers of each block on the way down, middle block) -> name
_SD: Final = (320, 640, 1280, 1280)
_XL: Final = (320, 640, 1280)
_CROSS: Final = "UNetMidBlock2DCrossAttn"
_PLAIN: Final = "UNetMidBlock2D"
_PUBLISHED: Final[dict[tuple[Any, ...], str]] = {
    (_SD, 768, (1, 1, 1, 1, 1, 1, 0, 0), _CROSS): "Stable Diffusion 1.x",
    (_SD, 1024, (1, 1, 1, 1, 1, 1, 0, 0), _CROSS): "Stable Diffusion 2.x",
    (_SD, 768, (1, 1, 1, 0), _CROSS): "BK-SDM-Base",
    (_SD, 768, (1, 1, 1, 0), None): "BK-SDM-Small",
    (_XL, 768, (1, 1, 1), None): "BK-SDM-Tiny",
    (_SD, 1024, (1, 1, 1, 0), _CROSS): "BK-SDM-v2-Base",
    (_SD, 1024, (1, 1, 1, 0), None): "BK-SDM-v2-Small",
    (_XL, 1024, (1, 1, 1), None): "BK-SDM-v2-Tiny",
    (_XL, 2048, (0, 0, 2, 2, 10, 10), _CROSS): "SDXL",
    (_XL, 2048, (0, 0, 2, 2, 4, 4), _PLAIN): "SSD-1B",
    (_XL, 2048, (0, 0, 1, 1, 2, 2), _PLAIN): "Vega",
    ((384, 768, 1536, 1536), 1280, (0, 0, 4, 4, 4, 4, 0, 0), _CROSS): "SDXL refiner",
}


def published_name(config: UNetConfig) -> str | None:
    """The published model whose architecture this is, if any."""
    return _PUBLISHED.get((config.channels, config.width, config.depths, config["mid_block_type"]))
