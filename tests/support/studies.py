"""Studies made by hand, for what needs no measuring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tstitch_trt.request.batching import Splitting
from tstitch_trt.study.machine import describe_machine
from tstitch_trt.study.records import (
    Calibration,
    Divergence,
    Evaluation,
    Measure,
    OrderTrial,
    Overhead,
    Point,
    Search,
    SearchPoint,
    Setting,
    StepCost,
)

__all__ = [
    "calibration",
    "divergence",
    "evaluation",
    "measure",
    "overhead",
    "search",
    "search_point",
    "setting",
    "step_cost",
]

_WEIGHTS = {"small": "s" * 64, "large": "l" * 64}


def _said(weights: dict[str, str] | None) -> dict[str, Any]:
    return {
        "bundle": "test",
        "weights": weights or _WEIGHTS,
        "machine": describe_machine(),
        "command": "tstitch-trt calibrate test.bundle",
        "made": "2024-01-02T03:04:05Z",
    }


def step_cost(member: str, batch: int, ms: float, *, guided: bool = False, size: tuple[int, int] = (8, 8)) -> StepCost:
    height, width = size
    return StepCost(
        member=member, guided=guided, batch=batch, height=height, width=width, ms=ms, p10_ms=ms, p90_ms=ms, blocks=3
    )


def overhead(batch: int, ms: float, *, switch: float = 0.0, size: tuple[int, int] = (8, 8)) -> Overhead:
    return Overhead(batch=batch, height=size[0], width=size[1], ms=ms, switch_ms=switch)


def calibration(*, weights: dict[str, str] | None = None, **changes: Any) -> Calibration:
    steps = tuple(step_cost(name, 8, ms) for name, ms in (("small", 1.0), ("large", 10.0)))
    fields: dict[str, Any] = {
        **_said(weights),
        "backend": "onnxruntime",
        "device": "cpu",
        "threads": 1,
        "graph": "off",
        "engines": {"small": "a" * 64, "large": "b" * 64},
        "splitting": Splitting(floor=1, limit=16),
        "repeats": 3,
        "steps": steps,
        "overheads": (overhead(8, 0.5),),
        "checks": (),
        "median_error": 0.01,
        "worst_error": 0.02,
        "upper_ratio": 1.02,
    }
    return Calibration(**(fields | changes))


def setting(schedule: str, *, solver: str = "ddim", guidance: float = 1.0, **plan: Any) -> Setting:
    """``schedule`` by counts, ``small:4,large:6``."""
    parts = [part.split(":") for part in schedule.split(",")]
    members: dict[str, int] = {}
    for name, count in parts:
        members[name] = members.get(name, 0) + int(count)
    rows = sum(members.values())
    return Setting(
        schedule=schedule, members=members, steps=rows, rows=rows, solver=solver, guidance=guidance, plan=plan
    )


def measure(value: float, *, std: float = 0.5, own: float = 0.0, bias: float = 0.0) -> Measure:
    """Resampled like all others: ``own`` is the part of its deviations, in ``std``, that no other one shares."""
    shared = np.random.default_rng(0).standard_normal(200)
    alone = np.random.default_rng(round(1e6 * value)).standard_normal(200)
    deviations = np.sqrt(1 - own**2) * shared + own * alone
    deviations = (deviations - deviations.mean()) / deviations.std(ddof=1)
    kept = np.asarray(deviations, "<f2").tobytes()
    return Measure(value=value, low=value - 1, high=value + 1, std=std, bias=bias, deviations=kept)


def search_point(schedule: str, quality: float | Measure, *, dropped: bool = False, **more: Any) -> SearchPoint:
    """``quality``: its value, or all of it."""
    return SearchPoint(
        kind="two members",
        setting=setting(schedule, **more),
        cost_ms=1.0,
        quality=quality if isinstance(quality, Measure) else measure(quality),
        samples=1000,
        dropped=dropped,
        front=not dropped,
    )


def search(*, weights: dict[str, str] | None = None, **changes: Any) -> Search:
    fields: dict[str, Any] = {
        **_said(weights),
        "metric": "fid",
        "batch": 8,
        "samples": 1000,
        "seed": 0,
        "calibration": "c" * 64,
        "points": (
            search_point("small:10", 60.0),
            search_point("small:4,large:6", 20.0),
            search_point("large:10", 18.0),
        ),
    }
    return Search(**(fields | changes))


def evaluation(
    points: Mapping[str, Mapping[str, float | Measure]],
    *,
    weights: dict[str, str] | None = None,
    samples: int = 1000,
    **more: Any,
) -> Evaluation:
    """``points``: measures by schedule, their values or all of them. ``more``: of every point's ``setting``."""
    metrics = tuple(dict.fromkeys(name for measures in points.values() for name in measures))
    return Evaluation(
        **_said(weights),
        samples=samples,
        seed=0,
        metrics=metrics,
        features={"name": "test"},
        reference={"name": "test"},
        level=0.95,
        resamples=10,
        points=tuple(
            Point(
                setting=setting(schedule, **more),
                samples=samples,
                measures={name: m if isinstance(m, Measure) else measure(m) for name, m in measures.items()},
            )
            for schedule, measures in points.items()
        ),
    )


def divergence(trials: dict[str, float], *, weights: dict[str, str] | None = None, **changes: Any) -> Divergence:
    """``trials``: the error of the final latents by schedule."""
    fields: dict[str, Any] = {
        **_said(weights),
        "reference": "large",
        "steps": 10,
        "solver": "ddim",
        "guidance": 1.0,
        "seeds": (0, 1),
        "members": {},
        "orders": tuple(
            OrderTrial(order="small-first", schedule=schedule, latent_error=error, p10=error, p90=error)
            for schedule, error in trials.items()
        ),
        "order": "small-first",
        "suggested": "small:4,large:6",
        "reason": "test",
    }
    return Divergence(**(fields | changes))
