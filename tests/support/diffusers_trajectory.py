"""diffusers' schedulers walked beside our tables: the same start, noise and denoiser, compared after every step."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.denoiser import draw, member, rows_for
from support.reference import Model, walk
from tstitch_trt.solvers import StepTable

__all__ = ["RELATIVE", "compare", "in_float64", "run_theirs"]

Array = NDArray[np.float64]

RELATIVE = 1e-5  # the largest difference over the largest value, at every step


class _InFloat64:
    """``torch`` or ``numpy`` whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def in_float64(cls: type) -> Iterator[None]:
    """diffusers' scheduler ``cls`` computes in float64 what its code asks to be float32, so that only its formulas
    are compared."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("torch", "np"):
                module = importlib.import_module(cls.__module__)
                if hasattr(module, name):
                    patch.setattr(module, name, _InFloat64(getattr(module, name)))
            # which would refuse a scheduler whose module has another torch
            patch.setattr("tstitch_trt.pipeline.scheduler.scheduler_class", lambda scheduler: type(scheduler).__name__)
            yield
    finally:
        torch.set_default_dtype(before)


def run_theirs(
    scheduler: Any, model: Model, x: Array, noise: Array, *, t: Array | None = None, start: int = 0, **step_options: Any
) -> Array:
    """diffusers' loop with our noise; ``t`` overrides what the model is told (not what the scheduler does). ``start``:
    the step at which a pipeline enters the trajectory with ``x``."""
    import torch

    module = importlib.import_module(type(scheduler).__module__)
    latents = [x]
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        for step, timestep in enumerate(scheduler.timesteps[start:], start):
            patch.setattr(
                module, "randn_tensor", lambda *_, step=step, **__: torch.from_numpy(noise[step]), raising=False
            )
            sample = torch.from_numpy(latents[-1])
            seen = scheduler.scale_model_input(sample, timestep).double().numpy()
            output = torch.from_numpy(model(seen, float(timestep if t is None else t[step]), step))
            after = scheduler.step(output, timestep, sample, return_dict=False, **step_options)[0]
            latents.append(after.double().numpy())
    return np.stack(latents)


def compare(
    table: StepTable,
    scheduler: Any,
    kind: str,
    *,
    their_kind: str | None = None,
    learned: bool = False,
    t: Array | None = None,
    seen: Array | None = None,
    silent_end: bool = False,
    relative: float = RELATIVE,
    **step_options: Any,
) -> None:
    """Walks both from the same start. ``t``: the scheduler's timesteps, if not the table's; ``seen``: what its model is
    told instead of them; ``silent_end``: the last noise is zero."""
    np.testing.assert_allclose(scheduler.timesteps.numpy(), table.t if t is None else t, rtol=1e-5, atol=1e-4)
    assert float(scheduler.init_noise_sigma) == pytest.approx(table.init_scale, rel=1e-4)
    x, noise = draw(table.steps)
    if silent_end:
        noise[-1] = 0
    x = x * table.init_scale
    ours = walk(rows_for(kind, table, learned=learned), x, member(kind, table, learned=learned), noise)
    theirs = run_theirs(scheduler, member(their_kind or kind, table, learned=learned), x, noise, t=seen, **step_options)
    axes = tuple(range(1, ours.ndim))
    error = np.abs(ours - theirs).max(axes) / np.abs(theirs).max(axes)
    assert error.max() <= relative, f"step {error.argmax()}: {error.max():.2e}"
