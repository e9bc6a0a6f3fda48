"""Quantises one member of a bundle to 8 bits, with ranges from its real inputs, and measures the loss.

1. ONNX Runtime runs the schedules, with guidance, for several seeds and labels or prompts, and the member's inputs are
   recorded. Rows are picked so that every noise level has an equal share.
2. Its graph gets Q/DQ nodes whose ranges are those of the rows (``tstitch_export.quantise.quantise``).
3. Source and quantised graph are compared on inputs recorded from other seeds, by noise level, and the final latents
   of whole trajectories with and without quantisation.
4. The new bundle holds the quantised graph, an ONNX Runtime engine of it, and all other files unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends import open_backend
from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle.bundle import Bundle, check_bundle, open_bundle, require_vouched, write_bundle
from tstitch_engines.bundle.files import copy_component, temporary_directory
from tstitch_engines.bundle.identity import model_digest
from tstitch_engines.bundle.manifest import Manifest, Member, Precision, Quantisation, QuantisationLoss
from tstitch_engines.bundle.weights import WEIGHTS
from tstitch_engines.checks import (
    check_callable,
    check_path,
    check_text,
    check_whole,
    checked,
    items_of,
    optional,
    taken_as_is,
)
from tstitch_engines.child import Limits
from tstitch_engines.errors import BadBundle, BuildFailed, unknown_name
from tstitch_engines.progress import Progress, silent
from tstitch_engines.threads import check_threads
from tstitch_trt.progress import Phases
from tstitch_trt.quantise.bundle import assemble
from tstitch_trt.quantise.calibration_plan import CalibrationPlan, plan_calibration
from tstitch_trt.quantise.trajectories import Trajectories, group_levels, pick_rows
from tstitch_trt.reference.recorder import own_files, widen_graph
from tstitch_trt.request.limits import MOST_IMAGES, MOST_SEED, check_prompt
from tstitch_trt.study.statistics import compare_rows, relative_error

__all__ = ["loss_of", "quantise"]

_GROUPS: Final = 10  # of noise levels in the report, at most


@checked(
    bundle=check_bundle,
    member=partial(check_text, example="large", most=1000),
    mode=partial(check_text, example="int8", most=100),
    output=check_path,
    samples=partial(check_whole, low=1, high=MOST_IMAGES),
    steps=taken_as_is,  # these three by PlanOptions
    solver=taken_as_is,
    guidance=taken_as_is,
    schedules=items_of(partial(check_text, example="small:0.4,large")),
    seed=partial(check_whole, high=MOST_SEED),
    calibration=partial(check_text, example="max", most=100),
    high_precision=partial(check_text, example="fp16", most=100),
    keep=items_of(partial(check_text, example="/blocks.0/*", most=10_000), 100_000),
    prompts=items_of(check_prompt, MOST_IMAGES),
    threads=check_threads,
    require_signature=optional(check_path),
    progress=check_callable,
    time_limit=taken_as_is,
    memory_limit=taken_as_is,
)
def quantise(
    bundle: str | Path | Bundle,
    *,
    member: str,
    mode: str,
    output: str | Path,
    samples: int = 256,
    steps: int | None = None,
    solver: str | None = None,
    guidance: float | None = None,
    schedules: Sequence[str] = (),
    seed: int = 0,
    calibration: str = "max",
    high_precision: str = "fp16",
    keep: Sequence[str] = (),
    prompts: Sequence[str] = (),
    threads: int = 0,
    require_signature: str | Path | None = None,
    progress: Progress = silent,
    time_limit: float | str | None = None,
    memory_limit: int | str | None = None,
) -> Manifest:
    """Writes ``bundle`` with ``member`` quantised to the new bundle ``output`` and returns its manifest.

    ``mode``: ``int8`` or ``fp8``. ``samples``: rows that set the ranges, spread evenly over the noise levels at which
    the member runs. ``schedules``: those it is calibrated for, by default the member alone (every noise level) and the
    bundle's own. ``steps``, ``solver``, ``guidance``: of the trajectories, by default the bundle's (guidance 1.5 where
    that is off and there is a null class). ``calibration``: ``max`` or, for int8, ``entropy``. ``prompts``: of a text
    bundle, in turn, by default ``PROMPTS``. ``high_precision``: the precision of the other layers. ``keep``: layers to
    leave in it, by name or pattern. ``time_limit``, ``memory_limit``: of each child process that compiles or quantises
    a graph, as of ``tstitch_export.build.build``.

    The same settings give the same graph. ``output`` appears whole or not at all. Raises ``BadInput`` before any long
    work, ``Unavailable`` without nvidia-modelopt or ONNX Runtime, ``BuildFailed``, ``NotFinite``,
    ``OutOfTime`` and ``OutOfMemory``.
    """
    from tstitch_export.quantise.quantise import check_method, check_quantisable, need_modelopt

    limits = Limits.of(time_limit, memory_limit)
    check_method(mode, calibration, high_precision)
    place = Path(output)
    if place.exists() or place.is_symlink():
        raise BadBundle(
            f"{place} exists already; quantising makes a new bundle and replaces none",
            hint=f"choose another directory with -o DIR, or remove it: rm -r {place}",
        )
    if isinstance(bundle, Bundle):
        opened = require_vouched(bundle, require_signature)
    else:
        opened = open_bundle(Path(bundle), require_signature=require_signature)
    manifest = opened.manifest
    if member not in manifest.members:
        raise unknown_name("member", member, manifest.members)
    need_modelopt()
    open_backend("onnxruntime")
    source = manifest.members[member]
    check_quantisable(member, source, opened.path(source.onnx[0]))
    wanted = {"steps": steps, "solver": solver, "guidance": guidance}
    plan = plan_calibration(manifest, member, schedules, wanted, samples=samples, seed=seed, prompts=prompts)
    graph = (mode, calibration, high_precision, tuple(keep), samples, seed)
    return write_bundle(place, _Work(opened, member, *graph, plan, threads, Phases(progress), limits).fill).manifest


@dataclass(frozen=True)
class _Work:
    bundle: Bundle
    name: str
    mode: str
    method: str
    high_precision: str
    keep: tuple[str, ...]
    samples: int
    seed: int
    plan: CalibrationPlan
    threads: int
    phases: Phases
    limits: Limits

    def fill(self, staging: Path) -> Manifest:
        # Inside the bundle being made: the same file system, which must have room anyway, and gone with it.
        with temporary_directory(staging, ".work-") as folder:
            self.phases.phase("compiling the members", 0.0, 0.05)
            trajectories = Trajectories(
                self.bundle,
                limits=self.limits,
                options=self.plan.options,
                folder=folder,
                threads=self.threads,
                tick=self.phases.tick,
                names=self.plan.names,
                prompts=self.plan.prompts,
            )
            try:
                member = self._quantised(trajectories, folder, staging)
            finally:
                trajectories.close()
        self.phases.phase("writing the bundle", 0.95, 1.0)
        return assemble(self.bundle, staging, self.name, member)

    def _quantised(self, trajectories: Trajectories, folder: Path, staging: Path) -> Member:
        from tstitch_export.quantise.quantise import float32_specs, quantise_graph

        name, plan = self.name, self.plan
        source = self.bundle.manifest.members[name]
        rows = self._record(trajectories, plan.seeds, "recording trajectories to calibrate on", 0.05, 0.4)
        chosen = pick_rows(rows["timestep"], self.samples, seed=self.seed)
        rows = {key: values[chosen] for key, values in rows.items()}
        self.phases.phase(f"quantising {name} to {self.mode}", 0.4, 0.6)
        graph = quantise_graph(
            self.bundle.path(source.onnx[0]),
            folder / f"{name}.{self.mode}.onnx",
            member=source,
            mode=self.mode,
            calibration=rows,
            method=self.method,
            high_precision=self.high_precision,
            keep=self.keep,
            limits=self.limits,
        )
        member = msgspec.structs.replace(
            source,
            precision=cast("Precision", self.mode),
            inputs=float32_specs(source.inputs),
            outputs=float32_specs(source.outputs),
            onnx=tuple(copy_component(file, staging, f"{name}/{file.name}") for file in graph.files),
            check=None,  # that was of the other graph, and so was the map of its weights
            files={purpose: part for purpose, part in source.files.items() if purpose != WEIGHTS},
            engines=(),
        )
        model, measured = graph.files[0], member
        if self.high_precision == "bf16":  # measured with these layers in float32
            model = widen_graph(model, folder / f"{name}.{self.mode}.wide.onnx")
            measured = msgspec.structs.replace(member, onnx=own_files(model))
        engine = trajectories.compiled(f"{name}-{self.mode}", model, measured)
        try:
            loss = self._loss(trajectories, engine)
            latents = self._latents(trajectories, member, engine)
        finally:
            engine.close()
        record = Quantisation(
            method=self.method,
            high_precision=cast("Precision", self.high_precision),
            source_precision=source.precision,
            source_sha256=model_digest(source.onnx),
            layers=tuple(layer.name for layer in graph.quantised),
            kept=tuple(layer.name for layer in graph.kept),
            rows=len(chosen),
            seed=self.seed,
            steps=plan.steps,
            solver=plan.solver,
            guidance=plan.guidance,
            schedules=plan.schedules,
            timesteps=(float(rows["timestep"].max()), float(rows["timestep"].min())),
            loss=loss,
            latents=latents,
            latents_seeds=plan.held_out,
            latents_schedule=plan.default,
            prompts=plan.prompts,
        )
        return msgspec.structs.replace(member, quantisation=record)

    def _record(
        self, trajectories: Trajectories, seeds: Sequence[int], text: str, start: float, stop: float
    ) -> dict[str, NDArray[Any]]:
        """The member's inputs over all schedules."""
        self.phases.phase(
            text, start, stop, len(self.plan.schedules) * self.plan.steps * trajectories.chunks(len(seeds))
        )
        found = [trajectories.record(self.name, schedule, seeds) for schedule in self.plan.schedules]
        return {key: np.concatenate([rows[key] for rows in found]) for key in found[0]}

    def _loss(self, trajectories: Trajectories, engine: Engine) -> tuple[QuantisationLoss, ...]:
        """On inputs from seeds that were not calibrated on, as many as were, by noise level. Raises ``BuildFailed``."""
        rows = self._record(trajectories, self.plan.held_out, "recording trajectories to measure on", 0.6, 0.7)
        chosen = pick_rows(rows["timestep"], self.samples, seed=self.seed + 1)
        rows = {key: values[chosen] for key, values in rows.items()}
        self.phases.phase("measuring the loss", 0.7, 0.85, 2 * math.ceil(len(chosen) / 16))
        want, got = trajectories.outputs(self.name, rows), trajectories.outputs(engine, rows)
        if not np.isfinite(got).all():
            raise BuildFailed(
                f"the {self.mode} graph of member {self.name!r} gives NaN or infinity",
                hint="the other layers leave the range of float16: --high-precision bf16 or fp32"
                if self.high_precision == "fp16"
                else "give more --samples, or keep layers out: --keep 'blocks.0.*'",
            )
        return tuple(
            loss_of(rows["timestep"][part], got[part], want[part]) for part in group_levels(rows["timestep"], _GROUPS)
        )

    def _latents(self, trajectories: Trajectories, member: Member, engine: Engine) -> tuple[float, ...]:
        """Relative L2 of the final latents of each held-out seed."""
        schedule, seeds = self.plan.default, self.plan.held_out
        self.phases.phase("comparing final latents", 0.85, 0.95, 2 * self.plan.steps * trajectories.chunks(len(seeds)))
        want = trajectories.latents(schedule, seeds, {})
        got = trajectories.latents(schedule, seeds, {self.name: (member, engine)})
        return tuple(relative_error(a, b) for a, b in zip(got, want, strict=True))


def loss_of(timesteps: NDArray[np.float32], got: NDArray[np.float32], want: NDArray[np.float32]) -> QuantisationLoss:
    return QuantisationLoss(
        timesteps=(float(timesteps.max()), float(timesteps.min())),
        rows=len(got),
        rel_l2=relative_error(got, want),
        cosine=float(compare_rows(got, want)[0].min()),
        max_abs=float(abs(got.astype(np.float64) - want).max()),
    )
