"""Does one launch for a whole segment pay? Plans walked with it (``graph="segment"``) and step by step, in turn."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Final

import numpy as np

import tstitch_trt
from gpubench.cases import DitCase
from gpubench.models import build_bundle
from gpubench.ours import OurTrajectory
from gpubench.record import Context, Entry, Part, spread_of
from gpubench.trajectories import initial_noise, labels_of
from tstitch_engines.errors import FailedWork

__all__ = ["segments_part"]

_BACKENDS: Final = ("onnxruntime", "torch", "tensorrt-rtx", "tensorrt")
_RESERVE: Final = 90  # seconds that one entry may take


def segments_part(context: Context, part: Part) -> None:
    """At batch 1, where the gaps between launches weigh most, and 8. ``--contenders`` leaves backends out."""
    smoke = context.smoke
    for batch in (1,) if smoke else (1, 8):
        case = DitCase(
            small="tiny" if smoke else "S/2",
            large="tiny+" if smoke else "XL/2",
            pixels=64 if smoke else 256,
            batch=batch,
            precision="fp32" if smoke else "fp16",
            steps=4 if smoke else 100,
            fractions=(0.0, 0.5) if smoke else (0.0, 0.4, 1.0),
        )
        for backend in _BACKENDS:
            if context.only and f"ours:{backend}" not in context.only:
                continue

            def compare(entry: Entry, case: DitCase = case, backend: str = backend) -> Entry:
                if backend.startswith("tensorrt"):
                    context.need_cuda()
                return _compare(context, case, backend)

            part.attempt(f"{backend} b{batch}", compare, reserve=0 if smoke else _RESERVE)


def _compare(context: Context, case: DitCase, backend: str) -> Entry:
    """Milliseconds of a trajectory, with and without. Without a GPU there are no graphs: both are then the same."""
    bundle = build_bundle(context, case, backend, {})
    noise, labels = initial_noise(case), labels_of(case)
    with ExitStack() as stack:
        trajectories = {}
        for mode in ("step", "segment"):
            runtime = tstitch_trt.load(
                bundle, device=context.device, backend=backend, graph=mode if context.cuda else "auto", verify="size"
            )
            trajectories[mode] = OurTrajectory(stack.enter_context(runtime), case, noise, labels)
        for fraction in case.fractions:
            one, other = (trajectory.latents(fraction) for trajectory in trajectories.values())
            if not np.array_equal(one, other):
                raise FailedWork(
                    f"at fraction {fraction:g} whole segments give other latents than steps: not timed",
                    hint="pytest -m gpu -k segments",
                )
        times: dict[float, dict[str, list[float]]] = {f: {mode: [] for mode in trajectories} for f in case.fractions}
        for index in range(context.rounds + 1):  # the first warms up
            for fraction in case.fractions:
                for mode, trajectory in trajectories.items():
                    start = time.perf_counter()
                    trajectory.walk(fraction)
                    if index:
                        times[fraction][mode].append(1e3 * (time.perf_counter() - start))
        launches = {
            mode: trajectory.counted(case.fractions[-1]).get("graph launch", 0)
            for mode, trajectory in trajectories.items()
        }
    return {
        "graphs": context.cuda,
        "launches_per_ten_steps": launches,
        "trajectories": [
            {
                "fraction": fraction,
                "step_ms": spread_of(found["step"]),
                "segment_ms": spread_of(found["segment"]),
                "step_over_segment": spread_of([a / b for a, b in zip(found["step"], found["segment"], strict=True)]),
            }
            for fraction, found in times.items()
        ],
    }
