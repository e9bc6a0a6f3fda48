"""Who walks a plan: PyTorch, eager or compiled, and this package. (diffusers: ``diffusers_trajectory.py``.)

All are given the same modules or their exports, the same noise and the same labels. ``benchmarks/gpu.py`` walks DiTs
with random weights, ``benchmarks/peers.py`` the members of a bundle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpubench.cases import DitCase
from tstitch_engines.device.step_row import ROW
from tstitch_engines.errors import BadInput
from tstitch_trt.plan.plan import Plan
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.statistics import relative_error

__all__ = ["TORCH_DTYPES", "Pair", "RuntimeTrajectory", "TorchTrajectory", "error_of", "initial_noise", "labels_of"]

TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_LEFT_OUT: Final = ("E", "F", "Y", "S", "RESCALE")  # columns of a row that the loop has no term for


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The modules of a pair, and how what they say is guided; ``guidance`` 1 is none.

    ``null``: the class of the unconditional half. ``channels``: of the latent, ``guided_channels`` of them guided.
    """

    models: Mapping[str, Any]
    device: str
    precision: str
    channels: int
    null: int | None = None
    guidance: float = 1.0
    guided_channels: int

    @property
    def guided(self) -> bool:
        return self.guidance != 1

    @property
    def dtype(self) -> Any:
        import torch

        return getattr(torch, TORCH_DTYPES[self.precision])

    def classes(self, labels: list[int]) -> Any:
        """int64 on the device: ``[B]``, or ``[2B]`` with the null class for the second half."""
        import torch

        classes = torch.tensor(labels, dtype=torch.int64, device=self.device)
        return torch.cat([classes, torch.full_like(classes, self.null or 0)]) if self.guided else classes

    def output_of(self, model: Any, sample: Any, timestep: Any, classes: Any) -> Any:
        """What the solver is given, float32: without the learned variance, and guided."""
        import torch

        output = model(sample, timestep, classes)[:, : self.channels].float()
        if not self.guided:
            return output
        conditional, unconditional = output.chunk(2)
        k = self.guided_channels
        mixed = unconditional[:, :k] + self.guidance * (conditional[:, :k] - unconditional[:, :k])
        return mixed if k == self.channels else torch.cat([mixed, conditional[:, k:]], dim=1)


class TorchTrajectory:
    """The plain loop, written to be fast: latents float32 on the device, no wait inside, coefficients from the plan.

    ``compiled``: the whole step (both halves, guidance, update) through ``torch.compile``: with ``max-autotune`` on
    CUDA, where that records CUDA graphs, and with ``default`` on the CPU. Its coefficients are read from a table on the
    device. What a step gives is copied, since the next step's beginning frees a recorded graph's outputs
    (``torch.compiler.cudagraph_mark_step_begin``). Plans of solvers that draw noise, or remember more than one
    estimate, are refused.
    """

    def __init__(self, pair: Pair, *, compiled: bool = False) -> None:
        import torch

        self._torch = torch
        self._pair = pair
        self._compiled = compiled
        self._single: dict[str, Callable[..., Any]] = {}
        self._double: dict[str, Callable[..., Any]] = {}  # of solvers that remember the estimate before
        for name, model in pair.models.items():
            self._single[name], self._double[name] = (
                self._compile(step) if compiled else step for step in _steps_of(torch, pair, model)
            )

    def _compile(self, step: Callable[..., Any]) -> Callable[..., Any]:
        mode = "default" if self._pair.device == "cpu" else "max-autotune"
        made: Callable[..., Any] = self._torch.compile(step, mode=mode, fullgraph=True, dynamic=False)
        return made

    def prepare(self, noise: NDArray[np.float32], labels: list[int]) -> None:
        """Puts what a request brings onto the device; not timed."""
        self._noise = self._torch.from_numpy(noise).to(self._pair.device)
        self._classes = self._pair.classes(labels)

    def walk(self, plan: Plan) -> Any:
        """The final latents on the device. Does not wait."""
        torch = self._torch
        double = bool(plan.rows[:, ROW["C"]].any())
        with torch.inference_mode():
            x = self._noise * plan.init_scale
            estimate = torch.zeros_like(x) if double else None
            for name, row in zip(plan.schedule.names, self._coefficients(plan, double), strict=True):
                if self._compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                if double:
                    x, estimate = self._double[name](x, estimate, self._classes, *row)
                else:
                    x = self._single[name](x, self._classes, *row)
                if self._compiled:
                    x = x.clone()
                    estimate = None if estimate is None else estimate.clone()
            return x

    def _coefficients(self, plan: Plan, double: bool) -> list[tuple[Any, ...]]:
        if plan.rows[:, [ROW[name] for name in _LEFT_OUT]].any() or (plan.rows[:, ROW["C_IN"]] != 1).any():
            raise BadInput(
                f"the plain loop can't walk a plan of the solver {plan.table.solver.name!r}; "
                "allowed are solvers that neither scale nor draw noise and remember one estimate",
                hint="use --solver ddim or dpmpp-2m",
            )
        columns = [ROW[name] for name in ("T", "P", "Q", "A", "B", *(("C",) if double else ()))]
        rows = plan.rows[:, columns]
        if not self._compiled:
            return [tuple(row) for row in rows.tolist()]
        table = self._torch.from_numpy(rows.astype(np.float32)).to(self._pair.device)
        return [table[i].unbind() for i in range(len(rows))]


def _steps_of(torch: Any, pair: Pair, model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    dtype, guided = pair.dtype, pair.guided

    def estimate(x: Any, classes: Any, t: Any, p: Any, q: Any) -> Any:
        sample = x.to(dtype)
        if guided:
            sample = torch.cat([sample, sample])
        timestep = (
            t.expand(sample.shape[0])
            if isinstance(t, torch.Tensor)
            else torch.full((sample.shape[0],), t, device=x.device)
        )
        return p * x + q * pair.output_of(model, sample, timestep, classes)

    def single(x: Any, classes: Any, t: Any, p: Any, q: Any, a: Any, b: Any) -> Any:
        return a * x + b * estimate(x, classes, t, p, q)

    def double(x: Any, before: Any, classes: Any, t: Any, p: Any, q: Any, a: Any, b: Any, c: Any) -> Any:
        now = estimate(x, classes, t, p, q)
        return a * x + b * now + c * before, now

    return single, double


class RuntimeTrajectory:
    """This package: one request to a loaded runtime. ``settings``: those of ``Runtime.plan`` without the fraction."""

    def __init__(self, runtime: Runtime, noise: NDArray[np.float32], labels: list[int], **settings: Any) -> None:
        self.runtime = runtime
        self.settings = settings
        self._labels = labels
        self._noise: Any = noise
        if runtime.device.name != "cpu":  # as the baselines have it: on the device already
            import torch

            self._noise = torch.from_numpy(noise).to(runtime.device.name)

    def walk(self, fraction: float, *, output: str = "device") -> Any:
        return self.runtime.sample(
            labels=self._labels,
            latents=self._noise,
            decode=False,
            output=output,  # type: ignore[arg-type]
            fraction=fraction,
            **self.settings,
        )

    def latents(self, fraction: float) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.walk(fraction, output="host").latents
        return found


def initial_noise(case: DitCase) -> NDArray[np.float32]:
    side = case.pixels // 8
    return np.random.default_rng(0).standard_normal((case.batch, 4, side, side), np.float32)


def labels_of(case: DitCase) -> list[int]:
    return [(7 * i + 207) % 1000 for i in range(case.batch)]


def error_of(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Relative L2 difference; infinite where a value is not finite."""
    difference = relative_error(got, want)
    return difference if math.isfinite(difference) else math.inf
