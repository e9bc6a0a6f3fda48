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
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.fractions import FractionImages, draw_fractions, warm_up_fractions

__all__ = ["LARGEST", "SampleTable", "draw_samples", "png_url", "undrawable"]

_SMALLEST: Final = 84  # pixels a side on the page; smaller pictures are enlarged by the browser
LARGEST: Final = 256  # pixels a side; larger pictures are made smaller, or a page of them would not be read


@dataclass(frozen=True)
class SampleTable:
    """``asked``: what each column was asked to be. All rows have the same seeds."""

    rows: tuple[FractionImages, ...]
    asked: tuple[str, ...]
    steps: int
    guidance: float


def draw_samples(
    runtime: Runtime,
    *,
    fractions: Sequence[float],
    pictures: Mapping[str, Any],
    settings: Mapping[str, Any],
    progress: Progress,
) -> SampleTable:
    """See ``draw_fractions``. Raises what ``Runtime.sample`` raises."""
    warm_up_fractions(runtime, {**pictures, **settings})
    rows = tuple(draw_fractions(runtime, fractions, pictures, settings, progress))
    names, defaults, result = runtime.manifest.conditioning.names, runtime.manifest.defaults, rows[0].result
    asked = result.prompts or tuple(names[i] if names else f"class {i}" for i in result.labels)
    guidance = settings.get("guidance")
    return SampleTable(
        rows, asked, settings.get("steps") or defaults.steps, float(defaults.guidance if guidance is None else guidance)
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
