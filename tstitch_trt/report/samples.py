"""Pictures for a report, drawn now: the same seeds at several fractions."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.progress import Progress
from tstitch_trt.runtime.result import Result
from tstitch_trt.runtime.runtime import Runtime

__all__ = ["LARGEST", "Row", "Samples", "draw_samples", "png_url", "undrawable"]

_SMALLEST: Final = 84  # pixels a side on the page; smaller pictures are enlarged by the browser
LARGEST: Final = 256  # pixels a side; larger pictures are made smaller, or a page of them would not be read


@dataclass(frozen=True)
class Row:
    """One fraction. ``images`` uint8 ``[N,H,W,C]``; ``ms_per_image``: of this one run, without decoding."""

    fraction: float
    members: Mapping[str, int]
    images: NDArray[np.uint8]
    ms_per_image: float


@dataclass(frozen=True)
class Samples:
    """``asked``: what each column was asked to be. All rows have the same ``seeds``."""

    rows: tuple[Row, ...]
    asked: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    solver: str
    guidance: float


def draw_samples(
    runtime: Runtime,
    *,
    fractions: Sequence[float],
    pictures: Mapping[str, Any],
    settings: Mapping[str, Any],
    progress: Progress,
) -> Samples:
    """``pictures``: keywords of ``Runtime.sample`` for what to draw, seeds included; ``settings``: for ``make_plan``,
    without a schedule. Raises what ``Runtime.sample`` raises.
    """
    plans = [runtime.plan(fraction=fraction, **settings) for fraction in fractions]  # refused before anything runs
    for fraction in (0.0, 1.0):  # the first runs of an engine are slow
        runtime.sample(**pictures, **{**settings, "steps": 2}, fraction=fraction, decode=False)
    rows: list[Row] = []
    drawn: Result | None = None
    for index, (fraction, plan) in enumerate(zip(fractions, plans, strict=True)):
        progress(f"drawing at fraction {fraction:g}", index / len(fractions))
        drawn = runtime.sample(**pictures, **settings, fraction=fraction)
        assert drawn.images is not None, "the caller asks bundles that have a decoder only"
        rows.append(Row(fraction, plan.schedule.counts, drawn.images, drawn.total_ms / len(drawn.seeds)))
    assert drawn is not None, "there is at least one fraction"
    names = runtime.manifest.conditioning.names
    asked = drawn.prompts or tuple(names[i] if names else f"class {i}" for i in drawn.labels)
    guidance = settings.get("guidance")
    return Samples(
        tuple(rows),
        asked,
        drawn.seeds,
        settings.get("steps") or runtime.manifest.defaults.steps,
        drawn.plan.solver.name,
        float(runtime.manifest.defaults.guidance if guidance is None else guidance),
    )


def undrawable(manifest: Manifest) -> str | None:
    """Why no pictures at several fractions can be drawn from labels or prompts alone, or ``None`` if they can."""
    if manifest.conditioning.kind == "text" and not any(name.startswith("text_encoder") for name in manifest.parts):
        return "The bundle has no text encoder: it draws from embeddings, and not from prompts."
    if manifest.decoder.kind == "none":
        return "The bundle has no decoder: it gives latents and no pictures."
    if len(manifest.members) < 2:
        return f"The bundle has one member ({next(iter(manifest.members))}): there is nothing to stitch."
    if any(member.inpaints for member in manifest.members.values()):
        return "A member paints into pictures, of which there are none here."
    return None


def png_url(image_HWC: NDArray[np.uint8]) -> tuple[str, int, int]:
    """A picture as a ``data:`` URL of a PNG, at most ``LARGEST`` pixels a side, its width and height on the page."""
    from PIL import Image

    image = Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    factor = max(1, _SMALLEST // max(image.size))
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return url, image.width * factor, image.height * factor
