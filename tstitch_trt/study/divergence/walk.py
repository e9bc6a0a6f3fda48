"""A few seeds of a bundle walked by one member after another, so that its members can be compared at the same states.

A trajectory is entered in the middle here, at states that another member made. That needs a solver that remembers
nothing but the latent, such as ``ddim``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, BadSchedule, Unavailable
from tstitch_trt.plan.step_rows import reads_before
from tstitch_trt.request.synthetic import PROMPTS

if TYPE_CHECKING:
    from tstitch_trt.plan.plan import Plan
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["SINGLE_STEP", "Asked", "MemberWalk", "batches", "is_single_step", "request_of"]

Latents = NDArray[np.float32]
SINGLE_STEP: Final = "ddim"


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the images of a study are: seed i with label i, or with prompt i, going round."""

    seeds: tuple[int, ...]
    labels: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()

    def wishes(self, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Keywords of ``Runtime.sample`` for images ``start`` to ``stop``."""
        key, given = ("labels", self.labels) if self.labels else ("prompt", self.prompts)
        images = range(len(self.seeds))[start:stop]
        return {key: [given[i % len(given)] for i in images], "seeds": [self.seeds[i] for i in images]}


def request_of(manifest: Manifest, *, samples: int, seed: int, prompts: Sequence[str] = ()) -> Asked:
    """``samples`` images from ``seed`` on: all classes in turn, or ``prompts`` (made up where none are given).

    Raises ``BadInput`` for prompts of a class bundle, ``Unavailable`` for a bundle that paints into pictures.
    """
    seeds = tuple(range(seed, seed + samples))
    if manifest.conditioning.kind == "class":
        if prompts:
            raise BadInput(
                f"{len(prompts)} prompts were given, and the bundle {manifest.name!r} draws classes, not texts",
                hint="leave out --prompts: all classes are drawn in turn",
            )
        return Asked(seeds=seeds, labels=tuple(i % manifest.conditioning.classes for i in range(samples)))
    painting = [name for name, member in manifest.members.items() if member.inpaints]
    if painting:
        raise Unavailable(
            f"member {painting[0]!r} of the bundle {manifest.name!r} paints into pictures, and trajectories that start "
            "from a picture can't be entered at another member's states",
            hint="measure a bundle of members that draw from noise",
        )
    return Asked(seeds=seeds, prompts=tuple(prompts) or PROMPTS[:samples])


def is_single_step(plan: Plan) -> bool:
    """Whether a trajectory of ``plan`` can be entered before any of its rows."""
    return not any(reads_before(plan.rows, row) for row in range(1, plan.steps))


def batches(runtime: Runtime, plan: Plan, count: int) -> list[range]:
    """``count`` images in parts that fit one engine call."""
    size = max(1, runtime.batch_limit // (2 if any(plan.guided) else 1))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class MemberWalk:
    """The images of one engine call. Whole walks are kept, and what begins like one goes on from its states."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        wishes: dict[str, Any],
        settings: dict[str, Any],
        steps: int,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        """``settings``: of ``Runtime.plan``, without schedule. ``steps``: the rows it gives. ``tick``: after each."""
        self._runtime = runtime
        self._request = {**wishes, **settings, "decode": False}
        self._steps = steps
        self._tick = tick
        self._states: dict[str, list[Latents]] = {}

    def whole(self, member: str) -> list[Latents]:
        """The denoised estimates ``[B,C,H,W]`` of every step of ``member``'s own trajectory, whose states are kept."""
        states: list[Latents] = []
        estimates = []
        for event in self._runtime.iterate(schedule=[member] * self._steps, **self._request):
            states.append(event.latents())
            estimates.append(event.estimate())
            self._tick()
        self._states[member] = states
        return estimates

    def estimate(self, member: str, walked: str, step: int) -> Latents | None:
        """What ``member`` takes for the denoised latents ``[B,C,H,W]`` at the state before ``step`` of a walk.

        ``None`` where the plan refuses it: the state is noisier than anything that ``member`` was trained on.
        """
        schedule = [walked] * step + [member] * (self._steps - step)
        try:
            walk = self._runtime.iterate(schedule=schedule, **self._entered(walked, step))
        except BadSchedule:
            return None
        try:
            return next(walk).estimate()
        finally:
            walk.close()
            self._tick()

    def final(self, names: Sequence[str]) -> Latents:
        """The final latents ``[B,C,H,W]`` of the schedule ``names``. Raises ``BadSchedule``."""
        first = names[0]
        step = next((i for i, name in enumerate(names) if name != first), len(names))
        known = self._states.get(first)
        if known is not None and step == len(names):
            return known[-1]
        result = self._runtime.sample(
            schedule=list(names),
            callback=lambda event: self._tick(),
            **(self._request if known is None else self._entered(first, step)),
        )
        return result.latents

    def _entered(self, walked: str, step: int) -> dict[str, Any]:
        if step == 0:
            return self._request
        return {**self._request, "start_step": step, "latents": self._states[walked][step - 1]}
