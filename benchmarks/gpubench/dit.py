"""One pair at one batch, size and precision: every contender walks the same plans, is compared, then timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import tstitch_trt
from gpubench.cases import CONTENDERS, DitCase
from gpubench.ceilings import copy_rate, matmul_rate, synchronize
from gpubench.diffusers_trajectory import DiffusersTrajectory, diffusers_schedulers
from gpubench.flops import contender_seconds, dit_work
from gpubench.models import SETTINGS, build_bundle, plan_manifest, random_pair
from gpubench.ours import OurTrajectory
from gpubench.record import Context, Entry, NotRun, Part, spread_of
from gpubench.trace import traced
from gpubench.trajectories import TorchTrajectory, error_of, initial_noise, labels_of
from tstitch_engines.backends import open_backend
from tstitch_engines.errors import FailedWork
from tstitch_trt.plan.plan import Plan, make_plan

__all__ = ["TOLERANCE", "run_case"]

# Relative L2 difference of final latents from PyTorch in float32. One call's own error is about u sqrt(n), u being half
# a unit in the last place (2^-11 in fp16, 2^-8 in bf16) and n the roundings in a row that matter, some ten per block;
# guidance of 4 multiplies the difference of the halves, 100 steps add it up with random signs. PyTorch on a CPU is off
# by 8e-4 in fp16 and 8e-3 in bf16 (S/2, 100 steps, latents of 4 x 4); ten times that is allowed, for deeper models and
# other orders of summation. Wrong work (a swapped half, another timestep) is off by order 1.
TOLERANCE: Final = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 1e-1}
_TRACED_STEPS: Final = 10
_SET_UP_SECONDS: Final = 60  # of one contender: exporting, building, loading
_COMPILE_SECONDS: Final = 180  # TorchInductor's max-autotune of XL/2


def run_case(context: Context, part: Part, case: DitCase) -> None:
    noise, labels = initial_noise(case), labels_of(case)
    manifest = plan_manifest(case)
    plans = {f: make_plan(manifest, steps=case.steps, fraction=f, **SETTINGS) for f in case.fractions}
    part.data["tolerance"] = TOLERANCE[case.precision]
    part.data["work"] = {
        name: {
            "flops_per_call": 2 * case.batch * work.flops,
            "bytes_per_call": work.bytes(2 * case.batch, case.precision),
            "parameters": work.parameters,
        }
        for name, work in ((n, dit_work(m, case.pixels)) for n, m in (("small", case.small), ("large", case.large)))
    }
    reserve = 0 if context.smoke else _SET_UP_SECONDS + contender_seconds(case, context.rounds)
    part.attempt("ceilings", lambda entry: _ceilings(context, case), reserve=10)
    path = context.scratch / f"{case.name}-{case.steps}.npz"
    if part.attempt("reference", lambda entry: _reference(context, case, plans, noise, labels, path)) is None:
        return
    if not path.is_file():  # made on a machine that is gone: nothing but that file was lost
        _reference(context, case, plans, noise, labels, path)
    with np.load(path, allow_pickle=False) as stored:
        reference = {f: stored[str(f)] for f in case.fractions}
    for name in CONTENDERS:
        if context.only and name not in context.only:
            if name not in part.entries:
                part.data.setdefault("left_out", []).append(name)
            continue

        def contend(entry: Entry, name: str = name) -> Entry:
            before = _probe(context, case)
            if name.startswith("ours:"):
                _ours(context, case, name, noise, labels, reference, entry)
            else:
                _baseline(context, case, name, plans, noise, labels, reference, entry)
            _rates(part.data["work"], entry)
            return {"probe_tflops": [before, _probe(context, case)]}

        compiling = 0 if context.smoke or "compile" not in name else _COMPILE_SECONDS
        part.attempt(name, contend, reserve=reserve + compiling)


def _ceilings(context: Context, case: DitCase) -> Entry:
    small = context.smoke
    return {
        "matmul": matmul_rate(context.device, case.precision, size=128 if small else 8192),
        "copy": copy_rate(context.device, nbytes=1 << 20 if small else 1 << 30),
    }


def _probe(context: Context, case: DitCase) -> float:
    """TFLOP/s of a short product just before and after a contender: tells when the GPU's clock was another."""
    rate = matmul_rate(context.device, case.precision, size=128 if context.smoke else 8192, repeats=5)
    return float(rate["tflops"]["median"])


def _checked(case: DitCase) -> list[int]:
    """The images that are compared: the first and the last. Of the others only that they are finite is asked."""
    return sorted({0, case.batch - 1})


def _reference(
    context: Context, case: DitCase, plans: dict[float, Plan], noise: NDArray[np.float32], labels: list[int], path: Any
) -> Entry:
    """PyTorch in float32 (no TF32) on the images that are compared."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    chosen = _checked(case)
    trajectory = TorchTrajectory(random_pair(case, "fp32", context.device))
    trajectory.prepare(noise[chosen], [labels[i] for i in chosen])
    found = {str(f): trajectory.walk(plan).cpu().numpy() for f, plan in plans.items()}
    norms = {f: float(np.sqrt(np.mean(np.square(latents)))) for f, latents in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **found)
    return {"images": chosen, "rms": norms}


def _compare(
    case: DitCase, reference: dict[float, NDArray[np.float32]], latents: dict[float, NDArray[np.float32]], entry: Entry
) -> None:
    """Notes the errors; raises ``FailedWork`` for a contender that computes something else."""
    allowed = TOLERANCE[case.precision]
    errors = {f: error_of(found[_checked(case)], reference[f]) for f, found in latents.items()}
    entry["errors"] = {str(f): error if np.isfinite(error) else "not finite" for f, error in errors.items()}
    if not all(np.isfinite(found).all() for found in latents.values()) or max(errors.values()) > allowed:
        raise FailedWork(
            f"its latents differ from PyTorch's in float32 by {max(errors.values()):.2e} ({case.precision}; "
            f"allowed is {allowed:.0e}): not timed",
            hint="compare one step: tstitch-trt verify BUNDLE",
        )


def _rates(work: dict[str, Entry], entry: Entry) -> None:
    """TFLOP/s and GB/s: of each member's bare calls, and of whole trajectories by their wall time."""
    for name, member in entry.get("members", {}).items():
        seconds = member["median"] / 1e3
        member["tflops"] = work[name]["flops_per_call"] / seconds / 1e12
        member["gb_per_s"] = work[name]["bytes_per_call"] / seconds / 1e9
    for row in entry.get("trajectories", ()):
        seconds = row["wall_ms"]["median"] / 1e3
        for key, unit, scale in (("flops_per_call", "tflops", 1e12), ("bytes_per_call", "gb_per_s", 1e9)):
            row[unit] = sum(work[name][key] * n for name, n in row["counts"].items()) / seconds / scale


@contextmanager
def _memory(context: Context, entry: Entry) -> Iterator[None]:
    """Device memory in use at the end of the block more than before it, as the driver counts it."""
    if not context.cuda:
        yield
        return
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(context.device)[0]
    yield
    entry["device_memory_bytes"] = before - torch.cuda.mem_get_info(context.device)[0]


def _baseline(
    context: Context,
    case: DitCase,
    name: str,
    plans: dict[float, Plan],
    noise: NDArray[np.float32],
    labels: list[int],
    reference: dict[float, NDArray[np.float32]],
    entry: Entry,
) -> None:
    with _memory(context, entry):
        start = time.perf_counter()
        pair = random_pair(case, case.precision, context.device)
        trajectory: DiffusersTrajectory | TorchTrajectory
        if name == "diffusers":
            schedulers = diffusers_schedulers(plan_manifest(case), solver="ddim", spacing="leading")
            trajectory = DiffusersTrajectory(pair, schedulers)
        else:
            trajectory = TorchTrajectory(pair, compiled=name == "torch-compile")
        trajectory.prepare(noise, labels)
        latents = {f: trajectory.walk(plan).cpu().numpy() for f, plan in plans.items()}
        entry["first_walks_ms"] = 1e3 * (time.perf_counter() - start)
    _compare(case, reference, latents, entry)
    times: dict[float, dict[str, list[float]]] = {f: {"wall": [], "host": []} for f in plans}
    for index in range(context.rounds + 1):  # the first warms up
        for fraction, plan in plans.items():
            synchronize(context.device)
            start = time.perf_counter()
            trajectory.walk(plan)
            host = time.perf_counter() - start
            synchronize(context.device)
            if index:
                times[fraction]["wall"].append(1e3 * (time.perf_counter() - start))
                times[fraction]["host"].append(1e6 * host / case.steps)
    entry["trajectories"] = [
        {
            "fraction": f,
            "wall_ms": spread_of(values["wall"]),
            "host_us_per_step": spread_of(values["host"]) if context.cuda else None,
            "counts": _counts(plans[f]),
        }
        for f, values in times.items()
    ]
    if context.cuda:
        few = make_plan(plan_manifest(case), steps=_TRACED_STEPS, fraction=0.5, **SETTINGS)
        trajectory.walk(few)
        entry["trace"] = traced(lambda: trajectory.walk(few), lambda: synchronize(context.device))


def _ours(
    context: Context,
    case: DitCase,
    name: str,
    noise: NDArray[np.float32],
    labels: list[int],
    reference: dict[float, NDArray[np.float32]],
    entry: Entry,
) -> None:
    backend, _, option = name.removeprefix("ours:").partition("+")
    if backend.startswith("tensorrt"):
        context.need_cuda()
    known = open_backend(backend).options
    if option and option not in known:
        raise NotRun(f"the backend {backend!r} has no option {option!r}")
    settings: dict[str, Any] = {option: True if known[option][0] is bool else "max-autotune"} if option else {}
    start = time.perf_counter()
    bundle = build_bundle(context, case, backend, settings)
    entry["build_s"] = time.perf_counter() - start
    with _memory(context, entry):
        runtime = tstitch_trt.load(bundle, device=context.device, backend=backend, verify="size")
    with runtime:
        trajectory = OurTrajectory(runtime, case, noise, labels)
        latents = {f: trajectory.latents(f) for f in case.fractions}
        _compare(case, reference, latents, entry)
        del latents
        entry |= trajectory.measure(context.rounds)
        for row in entry["trajectories"]:
            row["counts"] = _counts(runtime.plan(steps=case.steps, fraction=row["fraction"], **SETTINGS))
        entry["load_ms"], entry["jit_ms"] = runtime.load_ms, runtime.jit_ms()
        entry["memory"] = runtime.memory()
        entry["step_kernels"] = trajectory.kernels()
        entry["calls_per_ten_steps"] = trajectory.counted(0.5)
        entry["host"] = trajectory.host(0.5, min(_TRACED_STEPS, case.steps))
    if "private-scratch" in known:
        with tstitch_trt.load(
            build_bundle(context, case, backend, {**settings, "private-scratch": True}),
            device=context.device,
            backend=backend,
            verify="size",
        ) as private:
            OurTrajectory(private, case, noise, labels).walk(0.5)
            entry["memory_private_scratch"] = private.memory()


def _counts(plan: Plan) -> dict[str, int]:
    return {name: plan.schedule.names.count(name) for name in dict.fromkeys(plan.schedule.names)}
