"""Many stitch points of one pair drawn together: what they have in common is run once.

With equal seeds all points that start on the small member pass through the same states until they switch. So each
member walks its whole trajectory once, the state at every switch is kept, and each point is finished from there. The
latents are bit for bit those of a run of the point alone (a test compares them); this needs a solver that remembers
nothing but the latent, such as ``ddim``: ``Runtime.sample`` refuses others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tstitch_trt.runtime import Runtime

__all__ = ["ORDERS", "StitchPoint", "draw_points", "stitch_points"]

Order = Literal["small-first", "large-first"]
ORDERS: tuple[Order, ...] = ("small-first", "large-first")
Latents = NDArray[np.float32]


class StitchPoint(msgspec.Struct, frozen=True, kw_only=True):
    """``first`` runs the steps before ``switch``, ``then`` the others of ``steps``; ``fraction`` is small's share."""

    order: Order
    fraction: float
    first: str
    then: str
    switch: int
    steps: int

    @property
    def schedule(self) -> str:
        return f"{self.first}:{self.switch},{self.then}:{self.steps - self.switch}"

    @property
    def members(self) -> dict[str, int]:
        counts = {self.first: self.switch, self.then: self.steps - self.switch}
        return {name: count for name, count in counts.items() if count}


def stitch_points(fractions: Sequence[float], steps: int, *, small: str, large: str) -> list[StitchPoint]:
    """Both orders at each fraction; the small member gets round(fraction x steps) steps, as in the paper."""
    points = []
    for order in ORDERS:
        for fraction in fractions:
            count = round(fraction * steps)
            first, then, switch = (small, large, count) if order == "small-first" else (large, small, steps - count)
            points.append(
                StitchPoint(order=order, fraction=fraction, first=first, then=then, switch=switch, steps=steps)
            )
    return points


def draw_points(
    runtime: Runtime, points: Sequence[StitchPoint], *, labels: Sequence[int], seeds: Sequence[int], **settings: Any
) -> Iterator[tuple[StitchPoint, Latents]]:
    """Yields each point's final latents, float32 ``[N,C,H,W]``, in no particular order.

    ``settings`` are those of ``Runtime.plan`` without steps and schedule. Raises ``BadInput`` for a solver that can't
    be entered in the middle.
    """
    groups: dict[str, list[tuple[int, StitchPoint]]] = {}
    for point in points:  # a switch before the first step is the other member's whole walk
        leader, switch = (point.first, point.switch) if point.switch else (point.then, point.steps)
        groups.setdefault(leader, []).append((switch, point))
    for leader, group in groups.items():
        steps = group[0][1].steps
        states: dict[int, list[Latents]] = {switch: [] for switch, _ in group}
        request = {"labels": labels, "seeds": seeds, "steps": steps, "decode": False, **settings}
        for event in runtime.iterate(schedule=[leader] * steps, **request):
            if event.step in states:
                states[event.step].append(event.latents())
        for switch, point in group:
            state = np.concatenate(states[switch])
            if switch < steps:
                state = runtime.sample(schedule=point.schedule, latents=state, start_step=switch, **request).latents
            yield point, state
