"""What is measured, as data: the models, and the parts in the order of their worth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

__all__ = ["CONTENDERS", "GUIDANCE", "GUIDED_CHANNELS", "MODELS", "DitCase", "dit_cases", "part_names"]

# (depth, width, heads, patch) of arXiv 2212.09748, table 1
MODELS: Final = {
    "S/2": (12, 384, 6, 2),
    "B/2": (12, 768, 12, 2),
    "L/2": (24, 1024, 16, 2),
    "XL/2": (28, 1152, 16, 2),
    "XL-1": (1, 1152, 16, 2),  # one block of XL/2
    "tiny": (1, 32, 2, 2),
    "tiny+": (2, 48, 3, 2),
}
GUIDANCE: Final = 4.0
GUIDED_CHANNELS: Final = 3  # of 4, as the published DiT sampler does

# Who walks the same plan. `ours:BACKEND` is this package; the text after a plus is an option of that backend.
CONTENDERS: Final = (
    "torch-eager",
    "ours:onnxruntime",
    "ours:torch",
    "ours:torch+compile",
    "ours:tensorrt-rtx",
    "ours:tensorrt",
    "torch-compile",
    "diffusers",
)


@dataclass(frozen=True, kw_only=True)
class DitCase:
    """A pair stitched at several fractions. ``pixels``: of the picture; the latent has an eighth of them a side."""

    small: str
    large: str
    pixels: int
    batch: int
    precision: str
    steps: int = 100
    fractions: tuple[float, ...] = (0.0, 0.4, 0.5, 1.0)

    @property
    def name(self) -> str:
        pair = "-".join(text.replace("/2", "").lower() for text in (self.small, self.large))
        return f"dit-{pair}-{self.pixels}-b{self.batch}-{self.precision}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fractions": list(self.fractions)}


def dit_cases(*, smoke: bool) -> tuple[DitCase, ...]:
    if smoke:
        return tuple(
            DitCase(
                small="tiny", large="tiny+", pixels=64, batch=batch, precision="fp32", steps=4, fractions=(0.0, 0.5)
            )
            for batch in (1, 2)
        )

    def pair(small: str, large: str, pixels: int, *batches: int, **less: Any) -> list[DitCase]:
        return [
            DitCase(small=small, large=large, pixels=pixels, batch=batch, precision=precision, **less)
            for precision in ("fp16", "bf16")
            for batch in batches
        ]

    # A hundred steps at four fractions would take ours a quarter of an hour: see contender_seconds in flops.py.
    short: dict[str, Any] = {"steps": 20, "fractions": (0.0, 0.4)}

    return (
        *pair("S/2", "XL/2", 256, 8, 1),
        *pair("B/2", "L/2", 256, 8, 1),
        *pair("S/2", "XL/2", 512, 8, 1),
        *pair("S/2", "XL/2", 256, 32),
        *pair("B/2", "L/2", 256, 32),
        *pair("B/2", "L/2", 512, 8, 1),
        *pair("S/2", "XL/2", 512, 32, **short),
        *pair("B/2", "L/2", 512, 32, **short),
    )


def part_names(*, smoke: bool) -> tuple[str, ...]:
    cases = [case.name for case in dit_cases(smoke=smoke)]
    first = len(cases) if smoke else 4  # S and XL at 256 px, batch 8 and 1, in both precisions
    return (
        "tests",
        "sanitizer",
        "rtx",
        "ceilings",
        *cases[:first],
        "segments",
        "soak",
        "kernels",
        *cases[first:],
        "train",
    )
