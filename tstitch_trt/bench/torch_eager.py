"""The baseline of ``bench --against torch``: PyTorch runs the same plan on the same weights.

The weights are read from the members' ONNX files. ``bench`` compares the latents before it compares times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.step_row import FLAG_STORE_Y, ROW
from tstitch_engines.errors import BadInput
from tstitch_engines.threads import check_threads
from tstitch_trt.reference.torch_module import need_eager, torch_module
from tstitch_trt.solvers.table import Y_COLUMNS
from tstitch_trt.study.machine import package_version

if TYPE_CHECKING:
    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_trt.plan.plan import Plan

__all__ = ["EagerTorch"]


@dataclass
class EagerTorch:
    """PyTorch eager on the CPU, float32, in inference mode. Solvers that draw noise are refused: ours is Philox.

    ``tolerance``: relative L2 difference up to which its latents count as equal. ``null``: the class of the
    unconditional half.
    """

    models: dict[str, Any]
    null: int | None
    version: str
    threads: int
    name: str = "torch eager"
    tolerance: float = 1e-3

    @staticmethod
    def of(bundle: Bundle, *, threads: int = 0) -> EagerTorch:
        """The members of a bundle as PyTorch modules. Raises ``Unavailable`` without torch and onnx, or for members
        of another family than DiT in its published layout."""
        need_eager()
        check_threads(threads)
        import torch

        manifest = bundle.manifest
        models = {
            name: torch_module(name, member, [bundle.path(part) for part in member.onnx])
            for name, member in manifest.members.items()
        }
        version = package_version("torch") or torch.__version__
        return EagerTorch(models, manifest.conditioning.null, version, threads or torch.get_num_threads())

    def tune(self, plan: Plan, noise: NDArray[np.float32], labels: Sequence[int]) -> None:
        """Runs with one thread and with all, and keeps the faster: where other work shares the cores, PyTorch's threads
        wait for each other so long that one alone is faster."""
        import torch

        times: dict[int, float] = {}
        for threads in sorted({1, self.threads}):
            torch.set_num_threads(threads)
            for _ in range(2):  # the first walk warms up
                start = perf_counter()
                self.walk(plan, noise, labels)
                times[threads] = perf_counter() - start
        self.threads = min(times, key=times.__getitem__)
        torch.set_num_threads(self.threads)

    def walk(self, plan: Plan, noise: NDArray[np.float32], labels: Sequence[int]) -> NDArray[np.float32]:
        """The final latents, float32 ``[B,C,H,W]``, from unit Gaussian noise of that shape."""
        import torch

        rows = plan.rows
        for column, what in (("S", "draws noise"), ("RESCALE", "rescales guidance")):
            if rows[:, ROW[column]].any():
                raise BadInput(
                    f"the plan ({plan.table.solver.name}) {what}, which the loop of --against torch does not; "
                    "allowed are deterministic solvers without rescale",
                    hint="compare with --solver ddim, euler or dpmpp-2m",
                )
        with torch.inference_mode():
            x = torch.from_numpy(noise) * float(plan.init_scale)
            classes = torch.tensor(labels, dtype=torch.int64)
            both = None if self.null is None else torch.cat([classes, torch.full_like(classes, self.null)])
            oldest = older = newer = y = torch.zeros_like(x)
            for name, guided, row in zip(plan.schedule.names, plan.guided, rows.tolist(), strict=True):
                sample = x * row[ROW["C_IN"]]
                if guided:
                    sample = torch.cat([sample, sample])
                timestep = torch.full((len(sample),), row[ROW["T"]])
                output = self.models[name](sample, timestep, both if guided else classes)[:, : x.shape[1]]
                if guided:
                    conditional, unconditional = output.chunk(2)
                    k = int(row[ROW["GUIDED_CHANNELS"]])
                    mixed = unconditional + row[ROW["G"]] * (conditional - unconditional)
                    output = torch.cat([mixed[:, :k], conditional[:, k:]], dim=1)
                estimate = row[ROW["P"]] * x + row[ROW["Q"]] * output
                before, kept = x, y
                x = row[ROW["A"]] * x + row[ROW["B"]] * estimate + row[ROW["C"]] * newer + row[ROW["E"]] * older
                if row[ROW["F"]]:
                    x = x + row[ROW["F"]] * oldest
                if row[ROW["Y"]]:
                    x = x + row[ROW["Y"]] * kept
                if int(row[ROW["FLAGS"]]) & FLAG_STORE_Y:
                    terms = zip(Y_COLUMNS, (before, kept, estimate, newer, older, oldest), strict=True)
                    y = sum(row[ROW[name]] * term for name, term in terms)
                newer, older, oldest = estimate, newer, older
            latents: NDArray[np.float32] = x.numpy()
        return latents
