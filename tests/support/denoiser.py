"""A small fixed denoiser, nonlinear in latent and time, and members that say what it says in each parametrisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from support.reference import Model
from tstitch_trt.plan.step_rows import fill_rows
from tstitch_trt.solvers import StepTable
from tstitch_trt.solvers.prediction import coefficients

__all__ = ["SHAPE", "draw", "estimate", "member", "rows_for"]

Array = NDArray[np.float64]

SHAPE = (2, 2, 4, 4)  # [B, C, H, W]
_WIDTH = SHAPE[1] * SHAPE[2] * SHAPE[3]
_rng = np.random.default_rng(20)
_W1, _W2, _W3 = (_rng.normal(size=(_WIDTH, _WIDTH)) / np.sqrt(_WIDTH) for _ in range(3))
_TIME = _rng.normal(size=_WIDTH)


def estimate(sample: Array, t: float) -> Array:
    """The clean latent ``[B, C, H, W]`` it sees in a unit-variance ``sample`` at timestep ``t``."""
    flat = sample.reshape(len(sample), -1)
    hidden = np.tanh(flat @ _W1 + _TIME * np.sin(t / 150))
    return np.asarray(np.tanh(hidden @ _W2 + 0.5 * flat * np.cos(t / 90))).reshape(sample.shape)


def variance(sample: Array, t: float) -> Array:
    """What a member with learned variance puts in its second half of channels: values around [-1, 1]."""
    flat = sample.reshape(len(sample), -1)
    return np.asarray(np.tanh(flat @ _W3 + _TIME * np.cos(t / 200))).reshape(sample.shape)


def member(kind: str, table: StepTable, *, learned: bool = False) -> Model:
    """The denoiser as a member with parametrisation ``kind`` over the noise levels of ``table``."""
    scale = np.hypot(table.a, table.s)
    p, q = coefficients(kind, table.a / scale, table.s / scale)

    def model(sample: Array, t: float, step: int) -> Array:
        output = (estimate(sample, t) - p[step] * sample) / q[step]
        return np.concatenate([output, variance(sample, t)], axis=1) if learned else output

    return model


def rows_for(kind: str, table: StepTable, *, learned: bool = False) -> Array:
    """The unguided rows of ``table`` for a member with parametrisation ``kind``."""
    p, q = coefficients(kind, table.a, table.s, estimate=table.estimate)
    return fill_rows(table, p=p, q=q, learned=learned)


def draw(steps: int, seed: int = 0) -> tuple[Array, Array]:
    """Unit Gaussian start ``[B, C, H, W]`` and noise ``[steps, B, C, H, W]``."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=SHAPE), rng.normal(size=(steps, *SHAPE))
