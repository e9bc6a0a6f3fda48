"""Studies made by hand, for what needs no measuring."""

from __future__ import annotations

from typing import Any

from tstitch_trt.machine import describe_machine
from tstitch_trt.study.records import (
    Calibration,
    Check,
    Divergence,
    DivergenceStep,
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

__all__ = ["calibration", "check", "divergence", "evaluation", "evaluation_point", "search", "setting"]

_WEIGHTS = {"small": "s" * 64, "large": "l" * 64}


def _said(weights: dict[str, str] | None) -> dict[str, Any]:
    return {
        "bundle": "test",
        "weights": weights or _WEIGHTS,
        "machine": describe_machine(),
        "command": "tstitch-trt calibrate test.bundle",
        "made": "2024-01-02T03:04:05Z",
    }


def calibration(*, weights: dict[str, str] | None = None, **changes: Any) -> Calibration:
    steps = tuple(
        StepCost(member=name, guided=guided, batch=8, height=8, width=8, ms=ms, p10_ms=ms, p90_ms=ms, blocks=3)
        for name, guided, ms in (("small", False, 1.0), ("large", False, 10.0))
    )
    fields: dict[str, Any] = {
        **_said(weights),
        "backend": "onnxruntime",
        "device": "cpu",
        "threads": 1,
        "graph": "off",
        "engines": {"small": "a" * 64, "large": "b" * 64},
        "steps": steps,
        "overheads": (Overhead(batch=8, height=8, width=8, ms=0.5),),
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


def setting(small: int, large: int, **changes: Any) -> Setting:
    """``small`` steps of the small member, then ``large`` of the large one."""
    members = {name: count for name, count in (("small", small), ("large", large)) if count}
    fields: dict[str, Any] = {
        "schedule": ",".join(f"{name}:{count}" for name, count in members.items()),
        "members": members,
        "steps": small + large,
        "rows": small + large,
        "solver": "ddim",
        "guidance": 1.0,
    }
    return Setting(**(fields | changes))


def check(small: int, large: int, predicted: float, measured: float) -> Check:
    return Check(
        schedule=setting(small, large).schedule,
        steps=small + large,
        guidance=1.0,
        batch=8,
        height=8,
        width=8,
        predicted_ms=predicted,
        measured_ms=measured,
        repeats=3,
    )


def divergence(*, weights: dict[str, str] | None = None, **changes: Any) -> Divergence:
    """Of ten steps: the small member agrees at first and drifts away towards the end."""
    steps = tuple(
        DivergenceStep(
            step=step,
            timestep=999.0 - 100 * step,
            sigma=10.0 / (1 + step),
            cosine=1 - 0.01 * step,
            rel_l2=0.02 + 0.004 * step**2,
            p10=0.015 + 0.003 * step**2,
            p90=0.03 + 0.005 * step**2,
        )
        for step in range(10)
    )
    fields: dict[str, Any] = {
        **_said(weights),
        "command": "tstitch-trt profile test.bundle --steps 10",
        "reference": "large",
        "steps": 10,
        "solver": "ddim",
        "guidance": 1.0,
        "seeds": (0, 1, 2, 3),
        "members": {"small": steps},
        "orders": (
            OrderTrial(order="small-first", schedule="small:4,large:6", latent_error=0.05, p10=0.04, p90=0.07),
            OrderTrial(order="large-first", schedule="large:6,small:4", latent_error=0.21, p10=0.18, p90=0.26),
            OrderTrial(
                order="large-small-large", schedule="large:1,small:4,large:5", latent_error=0.06, p10=0.05, p90=0.08
            ),
        ),
        "order": "small-first",
        "suggested": "small:4,large:6",
        "reason": "up to step 4 the members differ by less than 10 %",
    }
    return Divergence(**(fields | changes))


def evaluation_point(small: int, large: int, ms: float, **values: float) -> Point:
    """A point of 1,000 samples in batches of 8; its intervals are 3 % wide to each side. ``ms`` 0: not timed."""
    measures = {
        metric: Measure(value=value, low=0.97 * value, high=1.03 * value, std=0.015 * value)
        for metric, value in values.items()
    }
    return Point(setting=setting(small, large), samples=1000, measures=measures, batch=8 if ms else 0, ms=ms)


def evaluation(*, weights: dict[str, str] | None = None, **changes: Any) -> Evaluation:
    """Fractions 0, 0.4 and 1 of ten steps, and the large member alone with five."""
    points = (
        evaluation_point(0, 10, 100.5, fid=18.0, precision=0.80),
        evaluation_point(4, 6, 64.5, fid=18.2, precision=0.79),
        evaluation_point(10, 0, 10.5, fid=60.0, precision=0.41),
        evaluation_point(0, 5, 50.5, fid=24.0, precision=0.72),
    )
    fields: dict[str, Any] = {
        **_said(weights),
        "command": "tstitch-trt evaluate test.bundle --samples 1000",
        "samples": 1000,
        "seed": 0,
        "metrics": ("fid", "precision"),
        "features": {"name": "features.onnx", "sha256": "f" * 64, "count": 64},
        "reference": {"name": "held-out.npz", "sha256": "e" * 64, "count": 10000},
        "level": 0.95,
        "resamples": 1000,
        "baseline": setting(0, 10),
        "points": points,
        "notes": ("1,000 samples for 64 features: the Fréchet distance is biased upwards",),
    }
    return Evaluation(**(fields | changes))
