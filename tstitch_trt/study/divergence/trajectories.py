"""Trajectories of one member after another from the same noise, entered at one another's states.

That needs a solver that remembers nothing but the latent, such as ``ddim``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadSchedule, Unavailable
from tstitch_trt.plan.step_rows import reads_before
from tstitch_trt.study.image_set import ImageSet, prompts_for

if TYPE_CHECKING:
    from tstitch_trt.plan.plan import Plan
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["SINGLE_STEP", "MemberTrajectories", "batches", "images_of", "is_single_step"]

Latents = NDArray[np.float32]
SINGLE_STEP: Final = "ddim"


def images_of(manifest: Manifest, *, samples: int, seed: int, prompts: Sequence[str] = ()) -> ImageSet:
    """``samples`` images from ``seed`` on: all classes in turn, or ``prompts`` (``PROMPTS`` where none are given).

    Raises what ``prompts_for`` raises, and ``Unavailable`` for a bundle that inpaints.
    """
    painting = [name for name, member in manifest.members.items() if member.inpaints]
    if painting:
        raise Unavailable(
            f"member {painting[0]!r} of the bundle {manifest.name!r} paints into pictures, and trajectories that start "
            "from a picture can't be entered at another member's states",
            hint="measure a bundle of members that draw from noise",
        )
    return ImageSet(samples, seed, prompts_for(manifest, prompts)[: max(samples, len(prompts))])


def is_single_step(plan: Plan) -> bool:
    """Whether a trajectory of ``plan`` can be entered before any of its rows."""
    return not any(reads_before(plan.rows, row) for row in range(1, plan.steps))


def batches(runtime: Runtime, guidance: float, count: int) -> list[range]:
    """``count`` images in parts that fit one engine call of any member at this scale."""
    halves = any(not member.guidance_embedding for member in runtime.manifest.members.values())
    size = runtime.splitting.most(guided=guidance != 1 and halves)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class MemberTrajectories:
    """The trajectories of the images of one engine call. The states of whole ones are kept and reused."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        images: dict[str, Any],
        settings: dict[str, Any],
        steps: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """``images``: keywords of ``Runtime.sample``. ``settings``: of ``Runtime.plan``, without schedule.

        ``steps``: the rows of that plan. ``tick`` is called after each step.
        """
        self._runtime = runtime
        self._request = {**images, **settings, "decode": False}
        self._steps = steps
        self._tick = tick
        self._states: dict[str, list[Latents]] = {}

    def whole(self, member: str) -> list[Latents]:
        """The denoised estimates ``[B,C,H,W]`` of every step of ``member`` alone. Its states are kept."""
        states, estimates = [], []
        for event in self._runtime.iterate(schedule=[member] * self._steps, **self._request):
            states.append(event.latents())
            estimates.append(event.estimate())
            self._tick()
        self._states[member] = states
        return estimates

    def estimate(self, member: str, other: str, step: int) -> Latents | None:
        """``member``'s denoised estimate ``[B,C,H,W]`` at the state before ``step`` of ``other``'s own trajectory.

        ``None`` where the plan refuses it: the state is noisier than ``member`` was trained for.
        """
        schedule = [other] * step + [member] * (self._steps - step)
        try:
            events = self._runtime.iterate(schedule=schedule, **self._entered(other, step))
        except BadSchedule:
            return None
        try:
            return next(events).estimate()
        finally:
            events.close()
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

    def _entered(self, member: str, step: int) -> dict[str, Any]:
        if step == 0:
            return self._request
        return {**self._request, "start_step": step, "latents": self._states[member][step - 1]}
