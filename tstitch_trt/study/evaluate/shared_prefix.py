"""Draws many settings together and runs their common first steps once.

With equal seeds two schedules pass through the same states until they differ. One setting runs its whole trajectory,
and the others go on from its states. The latents are bit for bit those of a run of the setting alone. A setting whose
solver remembers more than the latent there is drawn alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.plan.plan import Plan
from tstitch_trt.plan.step_rows import reads_before
from tstitch_trt.study.records import Setting
from tstitch_trt.study.settings import options_of, plan_of

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["draw_settings"]

Latents = NDArray[np.float32]


class _Branch(NamedTuple):
    setting: Setting
    plan: Plan


def draw_settings(
    runtime: Runtime, settings: Sequence[Setting], request: Mapping[str, Any]
) -> Iterator[tuple[Setting, Latents]]:
    """Yields each setting's final latents, float32 ``[N,C,H,W]``, those of the first setting first.

    ``request``: keywords of ``Runtime.sample`` for the pictures, with ``seeds``. Nothing is shared where it has an
    initial image.
    """
    branches = [_Branch(setting, plan_of(runtime.manifest, setting)) for setting in settings]
    if request.get("image") is not None:
        for branch in branches:
            yield branch.setting, _run(runtime, branch, 0, None, request, {})
        return
    yield from _draw(runtime, branches, 0, None, request)


def _draw(
    runtime: Runtime, branches: Sequence[_Branch], start: int, state: Latents | None, request: Mapping[str, Any]
) -> Iterator[tuple[Setting, Latents]]:
    """``branches`` have all rows before ``start`` in common and can be entered there."""
    if not branches:
        return
    leader, alone = branches[0], []
    others: dict[int, list[_Branch]] = {}
    for branch in branches[1:]:
        step = _first_difference(leader.plan, branch.plan)
        if step > start and not reads_before(branch.plan.rows, step):
            others.setdefault(step, []).append(branch)
        else:
            alone.append(branch)
    states: dict[int, list[Latents]] = {step: [] for step in others}
    yield leader.setting, _run(runtime, leader, start, state, request, states)
    for step in sorted(others, reverse=True):
        yield from _draw(runtime, others[step], step, np.concatenate(states.pop(step)), request)
    yield from _draw(runtime, alone, start, state, request)


def _run(
    runtime: Runtime,
    branch: _Branch,
    start: int,
    state: Latents | None,
    request: Mapping[str, Any],
    states: Mapping[int, list[Latents]],
) -> Latents:
    """The final latents from ``state`` before row ``start``. Appends those before the rows in ``states`` to it."""
    keywords = {**request, **options_of(branch.setting).explicit()}
    if start:
        keywords |= {"latents": state, "start_step": start}

    def keep(event: Any) -> None:
        if event.step in states:
            states[event.step].append(event.latents())

    return runtime.sample(decode=False, callback=keep if states else None, **keywords).latents


def _first_difference(a: Plan, b: Plan) -> int:
    """The first row that differs."""
    if (a.rescale, dict(a.embedded)) != (b.rescale, dict(b.embedded)):
        return 0
    count = min(a.steps, b.steps)
    same = (a.rows[:count] == b.rows[:count]).all(1)
    same &= np.array([x == y for x, y in zip(a.schedule.names, b.schedule.names, strict=False)])
    return count if same.all() else int(np.argmin(same))
