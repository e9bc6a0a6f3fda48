"""TensorRT and TensorRT-RTX in the first half hour: a block compiled in three ways, the cost of streams and shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import tstitch_trt
from gpubench.cases import DitCase
from gpubench.ceilings import matmul_rate
from gpubench.first_checks import COMPILED, attempt, built, verified
from gpubench.flops import dit_work
from gpubench.models import build_bundle
from gpubench.ours import OurTrajectory
from gpubench.record import NO_CUDA, Context, Entry, NotRun, Part
from gpubench.trajectories import initial_noise, labels_of
from tstitch_engines.errors import FailedWork

__all__ = ["block_part", "streams_part"]

_LEAST_SHARE: Final = 0.4  # of a large product measured beside it; 45 to 65 % are likely (benchmarks/README.md)


def block_part(context: Context, part: Part) -> None:
    """One block of DiT-XL/2 in bfloat16: attention fused, apart, and of opset 22, all against float32."""
    model = "tiny" if context.smoke else "XL-1"
    case = DitCase(small="tiny", large=model, pixels=64 if context.smoke else 256, batch=2, precision="bf16")
    for backend in COMPILED:
        for name, options in (
            ("attention fused", {"attention": "fused"}),
            ("attention apart", {"attention": "apart"}),
            ("opset 22", {"opset": 22}),
        ):

            def check(entry: Entry, backend: str = backend, options: dict[str, Any] = options) -> Entry:
                bundle = built(context, case, backend, options)
                if not context.cuda:
                    raise NotRun(f"{NO_CUDA} (the engines were compiled)")
                return verified(bundle, context.device, backend, entry)

            part.attempt(f"{backend}, {name}", check, reserve=0 if context.smoke else 40)
    context.need_cuda()


def streams_part(context: Context, part: Part) -> None:
    """Auxiliary streams 0 and 2, a batch of exactly 16 and one from 2 to 16: milliseconds and TFLOP/s of bare calls."""
    context.need_cuda()
    case = DitCase(small="S/2", large="XL/2", pixels=256, batch=8, precision="bf16", steps=20, fractions=(0.0,))
    ceiling = part.attempt("matmul", lambda entry: matmul_rate(context.device, case.precision, size=8192))
    work = dit_work(case.large, case.pixels).flops * 2 * case.batch
    for backend in COMPILED:
        for streams in (0, 2):
            for largest in (None, 16):
                options = {"max-aux-streams": streams, "profiling-verbosity": "detailed"}
                bundle = partial(build_bundle, context, case, backend, options, largest=largest)

                def bare(entry: Entry, backend: str = backend, bundle: Callable[[], Path] = bundle) -> Entry:
                    with tstitch_trt.load(bundle(), device=context.device, backend=backend, verify="size") as runtime:
                        found = OurTrajectory(runtime, case, initial_noise(case), labels_of(case)).measure(2)
                    ms = found["members"]["large"]["median"]
                    entry |= {"ms": ms, "tflops": work / ms / 1e9}
                    if ceiling is not None:
                        entry["share_of_matmul"] = share = entry["tflops"] / ceiling["tflops"]["median"]
                        if share < _LEAST_SHARE:
                            raise FailedWork(
                                f"{share:.0%} of the measured product; at least {_LEAST_SHARE:.0%} are expected",
                                hint="see its layers, the hottest first",
                            )
                    return {}

                def layers(entry: Entry, bundle: Callable[[], Path] = bundle) -> Entry:
                    command = [sys.executable, "-m", "tstitch_trt.cli", "inspect", str(bundle()), "--layers"]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    entry["layers"] = done.stdout[-50_000:]
                    if done.returncode:
                        raise FailedWork(f"inspect ended with {done.returncode}: {done.stderr[-500:]}", hint="by hand")
                    return {}

                shape = "16:16:16" if largest is None else "2:16:16"
                name = f"{backend}, {streams} streams, {shape}"
                attempt(part, name, bare, {"the layer list": layers}, reserve=90)
