"""The parts that ``benchmarks/gpu_first.sh`` adds to ``benchmarks/gpu.py``: does it run on this GPU at all, and right?

A step that fails is followed by its fallback, an entry of its own, where that can be tried by itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

import tstitch_trt
from gpubench.cases import DitCase
from gpubench.commands import KERNEL_TESTS, ROOT, groups, pytest_work
from gpubench.first_checks import COMPILED, PLAIN, attempt, built, verified
from gpubench.first_tensorrt import block_part, streams_part
from gpubench.models import build_bundle
from gpubench.ours import OurTrajectory
from gpubench.record import NO_CUDA, Context, Entry, NotRun, Part
from gpubench.supervise import default_device
from gpubench.trajectories import error_of, initial_noise, labels_of
from tstitch_engines.backends import open_backend
from tstitch_engines.device.cuda_kernels import fatbin_path
from tstitch_engines.driver import driver_cuda
from tstitch_engines.errors import FailedWork
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_trt.doctor import examine

__all__ = ["PARTS"]

_ACROSS: Final = 3e-2  # relative L2 of final latents, CUDA to CPU: libraries take TF32 for float32 products


# --- the machine and the kernels


def machine_part(context: Context, part: Part) -> None:
    def query(entry: Entry) -> Entry:
        tool = shutil.which("nvidia-smi")
        if tool is None:
            raise NotRun("nvidia-smi is not on the PATH")
        fields = ("name", "driver_version", "compute_cap", "power.limit", "clocks.max.sm", "memory.total")
        asked = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
        entry["gpus"] = [
            dict(zip(fields, (word.strip() for word in line.split(",")), strict=False))
            for line in done.stdout.splitlines()
        ]
        if done.returncode or not entry["gpus"]:
            raise FailedWork(f"nvidia-smi ended with {done.returncode}: {done.stderr[-500:]}", hint="mend the driver")
        return {}

    def doctor(entry: Entry) -> Entry:
        found = examine()
        entry["doctor"] = msgspec.to_builtins(found)
        needed = [check for check in found.checks if check.group in ("cuda", "cuda release") and check.name != "nvcc"]
        lacking = [f"{check.name}: {check.detail}" for check in needed if not check.ok]
        wanted = context.cuda or (not context.smoke and driver_cuda() is not None)
        if default_device() == "cpu":  # for no CUDA, or a newer one than the driver runs
            lacking.append("torch: it sees no GPU, or is not installed")
        if not found.usable or (wanted and lacking):
            raise FailedWork("; ".join(["the doctor finds it unusable", *lacking]), hint="tstitch-trt doctor")
        return {}

    part.attempt("nvidia-smi", query)
    part.attempt("doctor", doctor)
    context.need_cuda()


def device_tests_part(context: Context, part: Part) -> None:
    """The tests of the step kernels and the CUDA device; with kernels made on the spot if those that came fail."""

    def again(entry: Entry) -> Entry:
        # In the place of those that came, which would be found first; and tests have a cache of their own.
        command = [sys.executable, "-m", "tstitch_engines.make_fatbin", "--output", str(fatbin_path())]
        made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        entry["make_fatbin"] = made.stderr[-1000:]
        if made.returncode:
            raise FailedWork(f"make_fatbin ended with {made.returncode}: {made.stderr[-500:]}", hint="install NVRTC")
        return pytest_work(context, [KERNEL_TESTS])(entry)

    attempt(
        part, "device tests", pytest_work(context, [KERNEL_TESTS]), {"python -m tstitch_engines.make_fatbin": again}
    )
    if not context.cuda:
        raise NotRun(f"{NO_CUDA} (the tests skipped themselves)")


def capture_part(context: Context, part: Part) -> None:
    """Warm-up, capture, and replay on other data against a plain run bit for bit, by the runtime's own tests."""
    chosen = groups(["tests/tstitch_trt/runtime/test_gpu.py"], "replay or segments or mixed or two_streams")
    for name, tests in chosen.items() if not context.smoke else [*chosen.items()][:1]:
        part.attempt(name, pytest_work(context, tests), reserve=0 if context.smoke else 60)
    if not context.cuda:
        raise NotRun(f"{NO_CUDA} (the tests skipped themselves)")


# --- the built-in pair, and half precision


def fashion_part(context: Context, part: Part) -> None:
    """Build, verify, sample, and what became of the graphs. The CPU's latents are the oracle."""

    def made(backend: str, profile: Range | None = None) -> Path:
        tag = "" if profile is None else "-static"
        output = context.scratch / f"fashion-{backend}{tag}.bundle"
        more = {} if profile is None else {"profile": profile}
        build("fashion", output=output, backend=backend, device=context.device, **more)  # type: ignore[arg-type]
        return output

    def draw(bundle: Path, device: str, backend: str, graph: str = "auto") -> tuple[Any, Entry]:
        with tstitch_trt.load(bundle, device=device, backend=backend, graph=graph) as runtime:  # type: ignore[arg-type]
            latents = runtime.sample(labels=[1, 2, 3, 4], seed=0, steps=10, guidance=2.0, fraction=0.4).latents
            return latents, msgspec.to_builtins(runtime.graphs())

    def sample(entry: Entry, backend: str, graph: str = "auto", profile: Range | None = None) -> Entry:
        want, _ = draw(_cpu_pair(context), "cpu", "onnxruntime")
        got, entry["graphs"] = draw(made(backend, profile), context.device, backend, graph)
        entry["error"] = error = error_of(got, want)
        if not error <= _ACROSS:
            raise FailedWork(f"latents differ from the CPU's by {error:.1e}; allowed is {_ACROSS:g}", hint="verify it")
        if context.cuda and graph == "auto" and (entry["graphs"]["call_by_call"] or entry["graphs"]["mode"] == "off"):
            raise FailedWork(f"no graph: {entry['graphs']}", hint="the steps run call by call, with the same result")
        return {}

    def check(entry: Entry, backend: str) -> Entry:
        return verified(made(backend), context.device, backend, entry)

    for backend in PLAIN:
        part.attempt(f"{backend} verify", partial(check, backend=backend))
        attempt(
            part,
            f"{backend} sample",
            partial(sample, backend=backend),
            {
                "static batch": partial(sample, backend=backend, profile=Range(8, 8, 8)),
                "graph off": partial(sample, backend=backend, graph="off"),
            },
        )
    context.need_cuda()


def _cpu_pair(context: Context) -> Path:
    output = context.scratch / "fashion-cpu.bundle"
    build("fashion", output=output)
    return output


def half_part(context: Context, part: Part) -> None:
    """A pair of DiTs in float16 and bfloat16 on each plain backend, verified against references in float32."""
    for precision in ("fp16", "bf16"):
        for backend in PLAIN:
            if backend == "onnxruntime" and not context.cuda:
                continue  # its CPU side has not these types everywhere
            case = DitCase(small="tiny", large="tiny+", pixels=64, batch=2, precision=precision)

            def check(
                entry: Entry, backend: str = backend, case: DitCase = case, options: dict[str, Any] | None = None
            ) -> Entry:
                return verified(built(context, case, backend, options or {}), context.device, backend, entry)

            # ONNX alone has opsets; the torch backend runs the exported program.
            opset_20 = {"opset 20": partial(check, options={"opset": 20})}
            attempt(part, f"{precision} {backend}", check, opset_20 if backend == "onnxruntime" else {})
    context.need_cuda()


# --- graphs against single launches


def launches_part(context: Context, part: Part) -> None:
    """The same bundle with recorded steps and without: equal latents, the time of both, and the overhead of each."""
    smoke = context.smoke
    case = DitCase(
        small="tiny" if smoke else "S/2",
        large="tiny+" if smoke else "XL/2",
        pixels=64 if smoke else 256,
        batch=1,
        precision="fp32" if smoke else "fp16",
        steps=4 if smoke else 50,
        fractions=(0.0, 1.0),
    )
    for backend in ("onnxruntime",) if smoke else (*PLAIN, *COMPILED):

        def compare(entry: Entry, backend: str = backend) -> Entry:
            if backend in COMPILED:
                context.need_cuda()
            bundle = build_bundle(context, case, backend, {})
            latents = {}
            for mode in ("step", "off") if context.cuda else ("auto",):
                with tstitch_trt.load(
                    bundle,
                    device=context.device,
                    backend=backend,
                    graph=mode,
                    verify="size",
                ) as runtime:
                    trajectory = OurTrajectory(runtime, case, initial_noise(case), labels_of(case))
                    latents[mode] = trajectory.latents(0.0)
                    entry[mode] = trajectory.measure(context.rounds) | {
                        "graphs": msgspec.to_builtins(runtime.graphs()),
                        "calls_per_ten_steps": trajectory.counted(1.0),
                    }
            first, *others = latents.values()
            if not all(np.array_equal(first, other) for other in others):
                raise FailedWork(
                    "recorded steps give other latents than single launches", hint="pytest -m gpu -k replay"
                )
            return {}

        part.attempt(f"{backend}", compare, reserve=0 if smoke else 45)
    context.need_cuda()


def prepare_part(context: Context, part: Part) -> None:
    """Bundles of the later steps, on the CPU, while others use the GPU."""
    tiny = DitCase(small="tiny", large="tiny+", pixels=64, batch=2, precision="fp32", steps=4, fractions=(0.0, 0.5))
    for precision in ("fp32",) if context.smoke else ("bf16", "fp16"):
        for batch in (2,) if context.smoke else (8, 1):
            case = (
                tiny
                if context.smoke
                else DitCase(small="S/2", large="XL/2", pixels=256, batch=batch, precision=precision)
            )
            for backend in PLAIN:

                def bundle(entry: Entry, case: DitCase = case, backend: str = backend) -> None:
                    open_backend(backend)
                    build_bundle(context, case, backend, {})

                part.attempt(f"{case.name} {backend}", bundle)


PARTS: Final[Mapping[str, Callable[[Context, Part], None]]] = {
    "machine": machine_part,
    "prepare": prepare_part,
    "device-tests": device_tests_part,
    "fashion": fashion_part,
    "half": half_part,
    "block": block_part,
    "capture": capture_part,
    "streams": streams_part,
    "launches": launches_part,
}
