"""What the page draws: one request at several fractions, with the time per image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.progress import Progress
from tstitch_trt.files import atomic_file
from tstitch_trt.plan.plan import Plan
from tstitch_trt.runtime.result import StepEvent
from tstitch_trt.runtime.runtime import Runtime

__all__ = ["Asked", "FractionImages", "draw", "enlarged", "kept", "warm_up"]

_SMALLEST: Final = 224  # pixels a side; smaller pictures are enlarged for the page, pixel by pixel


@dataclass(frozen=True)
class Asked:
    """``pictures``: keywords of ``Runtime.sample`` for what to draw. The rest as ``make_plan`` takes it."""

    pictures: Mapping[str, Any]
    seed: int
    steps: int
    solver: str
    guidance: float

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "solver": self.solver, "guidance": self.guidance}


@dataclass(frozen=True)
class FractionImages:
    """One image per seed at one fraction, uint8 ``[N,H,W,C]``; ``ms``: per image, without decoding."""

    fraction: float
    plan: Plan
    images: NDArray[np.uint8]
    ms: float

    @property
    def caption(self) -> str:
        members = " + ".join(f"{steps} {name}" for name, steps in self.plan.schedule.counts.items())
        return f"{self.fraction:.0%}: {members}, {self.ms:,.0f} ms per image"


def draw(runtime: Runtime, asked: Asked, fractions: Sequence[float], progress: Progress) -> Iterator[FractionImages]:
    """Each fraction in turn, in the order given. Raises what ``sample`` raises."""
    plans = [runtime.plan(fraction=fraction, **asked.settings()) for fraction in fractions]
    for index, (fraction, plan) in enumerate(zip(fractions, plans, strict=True)):

        def tell(event: StepEvent, index: int = index, fraction: float = fraction) -> None:
            done = (event.chunk - 1 + event.step / event.steps) / event.chunks
            progress(f"{fraction:.0%}, step {event.step} on {event.member}", (index + done) / len(fractions))

        drawn = runtime.sample(**asked.pictures, seed=asked.seed, fraction=fraction, callback=tell, **asked.settings())
        assert drawn.images is not None, "bundles without a decoder are refused before"
        yield FractionImages(fraction, plan, drawn.images, drawn.total_ms / len(drawn.images))


def warm_up(runtime: Runtime, pictures: Mapping[str, Any], guidance: float) -> None:
    """Runs every member that a fraction goes between once: the first runs of an engine are slow."""
    for fraction in (0.0, 1.0):
        runtime.sample(**pictures, steps=1, fraction=fraction, guidance=guidance, decode=fraction == 0)


def enlarged(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[H,W,3]``, with whole pixels repeated where it is small."""
    factor = max(1, _SMALLEST // max(image_HWC.shape[:2]))
    rgb = image_HWC if image_HWC.shape[2] == 3 else image_HWC[:, :, :1].repeat(3, axis=2)
    return np.ascontiguousarray(rgb.repeat(factor, axis=0).repeat(factor, axis=1))


def kept(image_HWC: NDArray[np.uint8], folder: Path) -> Path:
    """The picture as the page shows it, as a PNG file in ``folder`` named by its pixels, which is written once.

    Gradio would write the files of all pictures again whenever one is added, while the browser reads them.
    """
    from PIL import Image

    shown = enlarged(image_HWC)
    path = folder / f"{hashlib.sha256(repr(shown.shape).encode() + shown.tobytes()).hexdigest()[:32]}.png"
    if not path.exists():
        with atomic_file(path) as file:
            Image.fromarray(shown).save(file, format="PNG")
    return path
