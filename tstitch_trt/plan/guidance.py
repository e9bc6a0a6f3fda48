"""The guidance scale of each step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.plan.schedule import Schedule

__all__ = ["embedded_scales", "guidance_scales", "guided_channels"]


def guidance_scales(
    manifest: Manifest,
    schedule: Schedule,
    guidance: float | Mapping[str, float] | None,
    interval: tuple[int, int] | None,
) -> NDArray[np.float64]:
    """One scale per step, 1 where the step is not guided. Raises ``BadInput``.

    ``None`` is the bundle's default, and 1 where the bundle can't be guided.
    """
    if guidance is None:
        guidance = manifest.defaults.guidance if manifest.conditioning.guidable else 1.0
    if isinstance(guidance, Mapping):
        for name in guidance:
            if name not in manifest.members:
                raise unknown_name("member", name, manifest.members, hint="(in guidance)")
        per_member = {name: guidance.get(name, 1.0) for name in manifest.members}
    else:
        per_member = dict.fromkeys(manifest.members, guidance)
    scales = np.array(
        [per_member[name] if own is None else own for name, own in zip(schedule.names, schedule.guidance, strict=True)]
    )
    bad = scales[~(np.isfinite(scales) & (scales >= 0))]
    if bad.size:
        raise BadInput(
            f"guidance {bad[0]:g}; allowed are finite numbers from 0 on", hint="1 is no guidance, e.g. --guidance 1.5"
        )
    if interval is not None:
        start, stop = interval
        if not 0 <= start <= stop <= len(scales):
            raise BadInput(
                f"guidance interval {start}:{stop} is outside the {len(scales)} steps",
                hint=f"START:STOP with 0 <= START <= STOP <= {len(scales)}; steps count from 0, STOP is not guided",
            )
        scales[:start] = 1.0
        scales[stop:] = 1.0
    if not manifest.conditioning.guidable and (scales != 1).any():
        raise BadInput(
            f"guidance {scales[scales != 1][0]:g}, but the members were trained without a null class",
            hint="pass guidance=1 (--guidance 1)",
        )
    return scales


def embedded_scales(manifest: Manifest, schedule: Schedule, scales: NDArray[np.float64]) -> dict[str, float]:
    """The scale each distilled member is given; its ``scales`` become 1, because it runs no second half."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(schedule.names):
        if not manifest.members[name].guidance_embedding:
            continue
        mine = np.array([n == name for n in schedule.names])
        wanted = np.unique(scales[mine])
        if wanted.size > 1:
            raise BadInput(
                f"member {name!r} takes its guidance scale as an input, one for all its steps; "
                f"got {', '.join(f'{scale:g}' for scale in wanted)}",
                hint="give it one scale, and leave guidance_interval (--guidance-interval) out",
            )
        found[name] = float(wanted[0])
        scales[mine] = 1.0
    return found


def guided_channels(manifest: Manifest, asked: int | None) -> int:
    """How many leading channels are guided; ``None`` is the bundle's default. Raises ``BadInput``."""
    channels = manifest.latent.channels
    wanted = manifest.defaults.guided_channels if asked is None else asked
    if wanted is None:
        return channels
    if not 1 <= wanted <= channels:
        raise BadInput(f"guided_channels {wanted} is outside 1..{channels}", hint=f"the latent has {channels} channels")
    return wanted
