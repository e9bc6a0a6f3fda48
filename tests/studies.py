"""Studies made by hand, for what needs no measuring."""

from __future__ import annotations

from typing import Any

from tstitch_trt.machine import describe_machine
from tstitch_trt.splitting import Splitting
from tstitch_trt.study.records import Calibration, Measure, Overhead, Search, SearchPoint, Setting, StepCost

__all__ = ["calibration", "overhead", "search", "step_cost"]

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


def search(*, weights: dict[str, str] | None = None, **changes: Any) -> Search:
    def point(small: int, large: int, cost: float, quality: float, *, front: bool = True) -> SearchPoint:
        members = {name: count for name, count in (("small", small), ("large", large)) if count}
        setting = Setting(
            schedule=",".join(f"{name}:{count}" for name, count in members.items()),
            members=members,
            steps=small + large,
            rows=small + large,
            solver="ddim",
            guidance=1.0,
        )
        measure = Measure(value=quality, low=quality - 1, high=quality + 1, std=0.5)
        return SearchPoint(
            kind="two members", setting=setting, cost_ms=cost, quality=measure, samples=64, dropped=False, front=front
        )

    fields: dict[str, Any] = {
        **_said(weights),
        "metric": "fid",
        "batch": 8,
        "samples": 64,
        "seed": 0,
        "calibration": "c" * 64,
        "points": (point(10, 0, 10.5, 60.0), point(4, 6, 64.5, 20.0), point(0, 10, 100.5, 18.0)),
    }
    return Search(**(fields | changes))
