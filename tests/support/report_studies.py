"""Studies made by hand as a whole page shows them: fractions and plain step reduction, divergence, orders, checks."""

from __future__ import annotations

from typing import Any

import msgspec

from support import studies
from tstitch_trt.study.records import Check, Divergence, DivergenceStep, Evaluation, OrderTrial, Point, Setting

__all__ = ["check", "divergence", "evaluation", "evaluation_point"]


def _said(weights: dict[str, str] | None) -> dict[str, Any]:
    made = studies.search(weights=weights)
    return {name: getattr(made, name) for name in ("bundle", "weights", "machine", "made")}


def _setting(small: int, large: int) -> Setting:
    """``small`` steps of the small member, then ``large`` of the large one."""
    counts = {"small": small, "large": large}
    return studies.setting(",".join(f"{name}:{count}" for name, count in counts.items() if count))


def check(small: int, large: int, predicted: float, measured: float) -> Check:
    return Check(
        schedule=_setting(small, large).schedule,
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
        "seeds": tuple(range(16)),
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
        metric: msgspec.structs.replace(studies.measure(value, std=0.015 * value), low=0.97 * value, high=1.03 * value)
        for metric, value in values.items()
    }
    return Point(setting=_setting(small, large), samples=1000, measures=measures, batch=8 if ms else 0, ms=ms)


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
        "references": (_setting(0, 10),),
        "points": points,
        "notes": ("1,000 samples for 64 features: the Fréchet distance is biased upwards",),
    }
    return Evaluation(**(fields | changes))
