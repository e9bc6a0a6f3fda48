"""What is kept of a request in the pictures that it drew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tstitch_engines.device.step_row import ROW

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest
    from tstitch_trt.cli._drawn import DrawnImage, DrawnWith
    from tstitch_trt.runtime.result import Result

__all__ = ["describe", "drawn_with"]


def describe(
    manifest: Manifest, result: Result, *, where: Mapping[str, str], kept: Mapping[str, object]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``drawn_with`` as it is kept in picture files."""
    import msgspec

    settings, images = drawn_with(manifest, result, where=where, kept=kept)
    return msgspec.to_builtins(settings), msgspec.to_builtins(images)


def drawn_with(
    manifest: Manifest, result: Result, *, where: Mapping[str, str], kept: Mapping[str, object]
) -> tuple[DrawnWith, list[DrawnImage]]:
    """All that is needed to draw the images again: what they share, and what each has of its own.

    ``where``: bundle, device and backend. ``kept``: the texts and numbers of ``PictureOptions``.
    """
    from msgspec import UNSET

    from tstitch_trt.cli._drawn import DrawnImage, DrawnSegment, DrawnWith, WrittenSchedule

    names = manifest.conditioning.names
    plan, schedule = result.plan, result.schedule
    scales = list(zip(plan.schedule.names, plan.rows[:, ROW["G"]].tolist(), strict=True))
    height, width = (manifest.decoder.factor * side for side in result.latents.shape[2:])
    said: dict[str, Any] = {**where, **kept}
    settings = DrawnWith(
        **said,
        width=width,
        height=height,
        steps=len(schedule.names),
        solver=plan.table.solver.name,
        solver_options=plan.table.solver.explicit(),
        guided=[bool(g) for g in plan.guided],
        guidance={
            name: sorted({plan.embedded.get(name, scale) for step, scale in scales if step == name})
            for name in dict.fromkeys(plan.schedule.names)
        },
        schedule=WrittenSchedule(
            text=schedule.text,
            rule=schedule.rule,
            members=list(schedule.names),
            segments=[DrawnSegment(member=part.name, start=part.start, stop=part.stop) for part in schedule.segments],
        ),
        loras=dict(result.loras) or UNSET,
    )
    if result.prompts:
        images = [DrawnImage(seed=s, prompt=p) for s, p in zip(result.seeds, result.prompts, strict=True)]
    elif result.labels:
        images = [
            DrawnImage(seed=s, label=label, name=names[label] if names else None)
            for s, label in zip(result.seeds, result.labels, strict=True)
        ]
    else:
        images = [DrawnImage(seed=seed) for seed in result.seeds]
    return settings, images
