"""Requests for measuring: any picture will do, and no text encoder is to be waited for."""

from __future__ import annotations

from typing import Any

import numpy as np

from tstitch_engines.manifest import Manifest
from tstitch_trt.plan import Plan

__all__ = ["stand_in_wishes"]


def stand_in_wishes(manifest: Manifest, backend: str, plan: Plan, count: int) -> dict[str, Any]:
    """Keywords of ``Runtime.sample`` for ``count`` images: classes in turn, or random embeddings for each member.

    As many tokens as the engines of ``backend`` are tuned for.
    """
    if manifest.conditioning.kind == "class":
        return {"labels": [i % manifest.conditioning.classes for i in range(count)]}
    rng = np.random.default_rng(0)
    wishes: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(plan.schedule.names):
        text = manifest.members[name].text
        if text is None:
            continue
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (1, _tokens(manifest, name, backend), text.width)}
        if text.pooled_width:
            shapes["pooled_prompt_embeds"] = (1, text.pooled_width)
        if any(plan.guided):
            shapes |= {f"negative_{key}": shape for key, shape in shapes.items()}
        for key, shape in shapes.items():
            wishes.setdefault(key, {})[name] = rng.standard_normal(shape, np.float32)
    return {"n": count, **wishes}


def _tokens(manifest: Manifest, name: str, backend: str) -> int:
    member = manifest.members[name]
    size = next(spec.shape[1] for spec in member.inputs if spec.name == "encoder_hidden_states")
    if isinstance(size, int):
        return size
    return next(r.identity.profile.dims["T"].opt for r in member.engines if r.identity.backend == backend)
