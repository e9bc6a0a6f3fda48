"""The guidance of each step, as the member that runs there is guided.

A plain member is guided by a second half: ``u + g (c - u)`` (arXiv 2207.12598), 1 = off. A member distilled for a scale
(``Member.guidance_embedding``, arXiv 2310.04378) takes ``w = g - 1`` as an input at all its steps, and runs one half.
One number is the ``g`` of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.schedule import Schedule

__all__ = ["Guidance", "check_guidance_options", "guided_channels", "guided_steps"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Guidance:
    """``scales`` float64 ``[N]``: 1 where the step has no second half. ``embedded``: ``g`` of the distilled members."""

    scales: Array
    embedded: Mapping[str, float]


def guided_steps(manifest: Manifest, schedule: Schedule, options: PlanOptions) -> Guidance:
    """Raises ``BadInput``. A member that ``options`` give no scale has the bundle's default, or 1 without a null."""
    asked = _asked(manifest, schedule, options.guidance)
    names = np.array(schedule.names)
    plain = np.array([not manifest.members[name].guidance_embedding for name in schedule.names])
    for name, scale in zip(names[plain].tolist(), asked[plain].tolist(), strict=True):
        if scale < 0:
            raise BadInput(
                f"guidance {scale:g} of member {name!r}; allowed are numbers from 0 on",
                hint="1 is no guidance, e.g. --guidance 1.5",
            )
        if scale != 1 and not manifest.conditioning.guidable:
            raise BadInput(
                f"guidance {scale:g}, but the members were trained without a null class",
                hint="pass guidance=1 (--guidance 1)",
            )
    inside = _inside(options.guidance_interval, len(schedule))
    distilled = dict.fromkeys(names[~plain].tolist())
    embedded = {name: _one_scale(name, asked[names == name], inside[names == name]) for name in distilled}
    return Guidance(np.where(plain & inside, asked, 1.0), embedded)


def _asked(manifest: Manifest, schedule: Schedule, guidance: float | Mapping[str, float] | None) -> Array:
    """``g`` of each step; the schedule's own goes first."""
    usual = manifest.defaults.guidance if manifest.conditioning.guidable else 1.0
    if isinstance(guidance, Mapping):
        for name in guidance:
            if name not in manifest.members:
                raise unknown_name("member", name, manifest.members, hint="(in guidance)")
        by_member = {name: guidance.get(name, usual) for name in manifest.members}
    else:
        by_member = dict.fromkeys(manifest.members, usual if guidance is None else guidance)
    steps = zip(schedule.names, schedule.guidance, strict=True)
    return np.array([by_member[name] if own is None else own for name, own in steps], np.float64)


def _inside(interval: tuple[int, int] | None, steps: int) -> NDArray[np.bool_]:
    start, stop = (0, steps) if interval is None else interval
    if not 0 <= start <= stop <= steps:
        raise BadInput(
            f"guidance interval {start}:{stop} is outside the {steps} steps",
            hint=f"START:STOP with 0 <= START <= STOP <= {steps}; steps count from 0, STOP is not guided",
        )
    step = np.arange(steps)
    return (start <= step) & (step < stop)


def _one_scale(name: str, scales: Array, inside: NDArray[np.bool_]) -> float:
    what = f"member {name!r} takes its guidance scale as an input, one for all its steps"
    found = np.unique(scales)
    if found.size > 1:
        raise BadInput(f"{what}; got {', '.join(f'{scale:g}' for scale in found)}", hint="give it one scale")
    if not inside.all():
        raise BadInput(
            f"{what}; the guidance interval leaves {np.count_nonzero(~inside)} of its {inside.size} steps out",
            hint="leave guidance_interval (--guidance-interval) out, and guide the other members by segments: "
            '"small:5:g=1,small:5:g=4,large"',
        )
    return float(found[0])


def check_guidance_options(options: PlanOptions, guided: tuple[bool, ...]) -> None:
    """Raises ``BadInput`` for an option of guidance that was said for a request in which no step is ``guided``."""
    said = {
        "guidance_rescale": bool(options.guidance_rescale),
        "guided_channels": options.guided_channels is not None,
        "guidance_interval": options.guidance_interval is not None and len(set(options.guidance_interval)) > 1,
    }
    for name in (name for name, is_said in said.items() if is_said and not any(guided)):
        flag = name.replace("_", "-")
        raise BadInput(
            f"{name} {getattr(options, name)} has no effect: no step of this plan is guided by a second half",
            hint=f"leave {name} (--{flag}) out, or guide a member that has two halves",
        )


def guided_channels(manifest: Manifest, asked: int | None) -> int:
    """How many leading channels are guided; ``None`` is the bundle's default. Raises ``BadInput``."""
    channels = manifest.latent.channels
    wanted = manifest.defaults.guided_channels if asked is None else asked
    if wanted is None:
        return channels
    if not 1 <= wanted <= channels:
        raise BadInput(f"guided_channels {wanted} is outside 1..{channels}", hint=f"the latent has {channels} channels")
    return wanted
