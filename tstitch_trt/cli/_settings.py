"""What is kept of a request in the pictures that it drew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tstitch_engines.device.step_row import ROW

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest
    from tstitch_trt.runtime.result import Result

__all__ = ["describe"]


def describe(
    manifest: Manifest, result: Result, *, where: Mapping[str, str], kept: Mapping[str, object]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that is needed to draw the images again: what they share, and what each has of its own.

    ``where``: bundle, device and backend. ``kept``: the texts and numbers of ``PictureOptions``.
    """
    names = manifest.conditioning.names
    plan = result.plan
    scales = list(zip(plan.schedule.names, plan.rows[:, ROW["G"]].tolist(), strict=True))
    drawn: list[dict[str, Any]] = (
        [{"prompt": prompt} for prompt in result.prompts]
        or [{"label": label, "name": names[label] if names else None} for label in result.labels]
        or [{}] * len(result.seeds)
    )
    height, width = (manifest.decoder.factor * side for side in result.latents.shape[2:])
    settings = {
        **where,
        "width": width,
        "height": height,
        "steps": len(result.schedule.names),
        "solver": plan.table.solver.name,
        "solver_options": plan.table.solver.explicit(),
        "guided": [bool(g) for g in plan.guided],
        "guidance": {
            name: sorted({plan.embedded.get(name, scale) for step, scale in scales if step == name})
            for name in dict.fromkeys(plan.schedule.names)
        },
        "schedule": {
            "text": result.schedule.text,
            "rule": result.schedule.rule,
            "members": list(result.schedule.names),
            "segments": [
                {"member": part.name, "start": part.start, "stop": part.stop} for part in result.schedule.segments
            ],
        },
        **kept,
    }
    if result.loras:
        settings["loras"] = dict(result.loras)
    return settings, [{**one, "seed": seed} for one, seed in zip(drawn, result.seeds, strict=True)]
