"""Many settings drawn together: what they have in common is run once.

With equal seeds two schedules pass through the same states until they part. So one setting walks its whole trajectory,
the state at every parting is kept, and the others are finished from there. The latents are bit for bit those of a run
of the setting alone (a test compares them). Where a solver remembers more than the latent at a parting, the setting is
drawn alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.plan.plan import Plan
from tstitch_trt.plan.step_rows import reads_before
from tstitch_trt.study.records import Setting
from tstitch_trt.study.settings import plan_of, wishes_of

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["draw_settings"]

Latents = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Way:
    setting: Setting
    plan: Plan


def draw_settings(
    runtime: Runtime, settings: Sequence[Setting], request: Mapping[str, Any]
) -> Iterator[tuple[Setting, Latents]]:
    """Yields each setting's final latents, float32 ``[N,C,H,W]``: those of the first setting first.

    ``request``: keywords of ``Runtime.sample`` that say what the pictures are to be, with ``seeds``; with a picture to
    start from nothing is shared.
    """
    ways = [_Way(setting, plan_of(runtime.manifest, setting)) for setting in settings]
    if request.get("image") is not None:
        for way in ways:
            yield way.setting, _run(runtime, way, 0, None, request, {})
        return
    yield from _walk(runtime, ways, 0, None, request)


def _walk(
    runtime: Runtime, ways: Sequence[_Way], start: int, state: Latents | None, request: Mapping[str, Any]
) -> Iterator[tuple[Setting, Latents]]:
    """``ways`` have all rows before ``start`` in common, and can be entered there."""
    if not ways:
        return
    leader, alone = ways[0], []
    parted: dict[int, list[_Way]] = {}
    for way in ways[1:]:
        step = _parting(leader.plan, way.plan)
        if step > start and not reads_before(way.plan.rows, step):
            parted.setdefault(step, []).append(way)
        else:
            alone.append(way)
    states: dict[int, list[Latents]] = {step: [] for step in parted}
    yield leader.setting, _run(runtime, leader, start, state, request, states)
    for step in sorted(parted, reverse=True):
        yield from _walk(runtime, parted[step], step, np.concatenate(states.pop(step)), request)
    yield from _walk(runtime, alone, start, state, request)


def _run(
    runtime: Runtime,
    way: _Way,
    start: int,
    state: Latents | None,
    request: Mapping[str, Any],
    states: Mapping[int, list[Latents]],
) -> Latents:
    """The final latents from ``state`` before row ``start``; those before the rows in ``states`` are put there."""
    wishes = {**request, **wishes_of(way.setting)}
    if start:
        wishes |= {"latents": state, "start_step": start}

    def keep(event: Any) -> None:
        if event.step in states:
            states[event.step].append(event.latents())

    return runtime.sample(decode=False, callback=keep if states else None, **wishes).latents


def _parting(a: Plan, b: Plan) -> int:
    """The first row that differs."""
    if (a.rescale, dict(a.embedded)) != (b.rescale, dict(b.embedded)):
        return 0
    count = min(a.steps, b.steps)
    same = (a.rows[:count] == b.rows[:count]).all(1)
    same &= np.array([x == y for x, y in zip(a.schedule.names, b.schedule.names, strict=False)])
    return count if same.all() else int(np.argmin(same))
