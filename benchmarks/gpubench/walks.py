"""The baselines: the same plan walked by PyTorch, eager or compiled, and by diffusers' own scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpubench.cases import GUIDANCE, GUIDED_CHANNELS, DitCase
from gpubench.models import random_dit
from gpubench.record import NotRun
from tstitch_engines.rows import ROW
from tstitch_trt.plan import Plan

__all__ = ["TORCH_DTYPES", "DiffusersWalk", "TorchWalk", "error_of", "initial_noise", "labels_of"]

TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TorchWalk:
    """The plain loop, written to be fast: latents float32 on the device, no wait inside, coefficients from the plan.

    ``compiled``: the whole step (both halves, guidance, update) through ``torch.compile`` with ``max-autotune``, which
    on CUDA records CUDA graphs; its coefficients are then read from a table on the device.
    """

    def __init__(self, case: DitCase, precision: str, device: str, *, compiled: bool = False) -> None:
        import torch

        self._torch = torch
        self._case = case
        self._device = device
        self._compiled = compiled
        dtype = getattr(torch, TORCH_DTYPES[precision])
        self._models = {
            name: random_dit(model, case.pixels).to(device=device, dtype=dtype)
            for name, model in (("small", case.small), ("large", case.large))
        }
        self._steps: dict[str, Callable[..., Any]] = {}
        for name, model in self._models.items():
            step = _step_of(torch, model, dtype)
            if compiled:
                mode = "max-autotune" if device != "cpu" else "default"
                step = torch.compile(step, mode=mode, fullgraph=True, dynamic=False)
            self._steps[name] = step

    def prepare(self, noise: NDArray[np.float32], labels: list[int]) -> None:
        """Puts what a request brings onto the device; not timed."""
        torch = self._torch
        self._noise = torch.from_numpy(noise).to(self._device)
        classes = torch.tensor(labels, dtype=torch.int64, device=self._device)
        self._both = torch.cat([classes, torch.full_like(classes, 1000)])
        self._times = torch.empty(2 * len(labels), dtype=torch.float32, device=self._device)

    def walk(self, plan: Plan) -> Any:
        """The final latents on the device. Does not wait."""
        torch = self._torch
        columns = [ROW[name] for name in ("T", "P", "Q", "A", "B")]
        rows = plan.rows[:, columns]
        if self._compiled:
            table = torch.from_numpy(rows.astype(np.float32)).to(self._device)
            coefficients = [table[i].unbind() for i in range(len(rows))]
        else:
            coefficients = [tuple(row) for row in rows.tolist()]
        with torch.inference_mode():
            x = self._noise * plan.init_scale
            for name, (t, p, q, a, b) in zip(plan.schedule.names, coefficients, strict=True):
                if self._compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                x = self._steps[name](x, t, p, q, a, b, self._both)
            return x.clone() if self._compiled else x  # a recorded graph's output is overwritten by its next run


def _step_of(torch: Any, model: Any, dtype: Any) -> Callable[..., Any]:
    def step(x: Any, t: Any, p: Any, q: Any, a: Any, b: Any, both: Any) -> Any:
        sample = x.to(dtype)
        sample = torch.cat([sample, sample])
        timestep = (
            t.expand(sample.shape[0])
            if isinstance(t, torch.Tensor)
            else torch.full((sample.shape[0],), t, device=x.device)
        )
        output = model(sample, timestep, both)[:, : x.shape[1]].float()
        conditional, unconditional = output.chunk(2)
        k = GUIDED_CHANNELS
        mixed = unconditional[:, :k] + GUIDANCE * (conditional[:, :k] - unconditional[:, :k])
        output = torch.cat([mixed, conditional[:, k:]], dim=1)
        return a * x + b * (p * x + q * output)

    return step


class DiffusersWalk(TorchWalk):
    """The loop of diffusers' pipelines around its ``DDIMScheduler``; the denoiser is the same module, run eagerly."""

    def __init__(self, case: DitCase, precision: str, device: str) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise NotRun(f"diffusers is not installed ({error})") from None
        super().__init__(case, precision, device)
        self._dtype = getattr(self._torch, TORCH_DTYPES[precision])
        scheduler: Any = diffusers.DDIMScheduler
        self._scheduler = scheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="leading"
        )

    def walk(self, plan: Plan) -> Any:
        torch, scheduler = self._torch, self._scheduler
        scheduler.set_timesteps(plan.steps, device=self._device)
        k = GUIDED_CHANNELS
        with torch.inference_mode():
            x = self._noise * scheduler.init_noise_sigma
            for name, t in zip(plan.schedule.names, scheduler.timesteps, strict=True):
                sample = scheduler.scale_model_input(torch.cat([x, x]), t).to(self._dtype)
                output = self._models[name](sample, t.float().expand(sample.shape[0]), self._both)
                output = output[:, : x.shape[1]].float()
                conditional, unconditional = output.chunk(2)
                mixed = unconditional[:, :k] + GUIDANCE * (conditional[:, :k] - unconditional[:, :k])
                x = scheduler.step(torch.cat([mixed, conditional[:, k:]], dim=1), t, x).prev_sample
            return x


def initial_noise(case: DitCase) -> NDArray[np.float32]:
    side = case.pixels // 8
    return np.random.default_rng(0).standard_normal((case.batch, 4, side, side), np.float32)


def labels_of(case: DitCase) -> list[int]:
    return [(7 * i + 207) % 1000 for i in range(case.batch)]


def error_of(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Relative L2 difference; infinite where a value is not finite."""
    difference = float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))
    return difference if math.isfinite(difference) else math.inf
