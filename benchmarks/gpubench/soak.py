"""A thousand trajectories in one process: the memory in use must not grow."""

from __future__ import annotations

from typing import Final

import numpy as np

import tstitch_trt
from gpubench.cases import DitCase
from gpubench.models import SETTINGS, build_bundle
from gpubench.record import Context, Entry, Part

__all__ = ["soak_part"]

_WARM: Final = 50  # trajectories after which every graph is recorded and every pool filled
_BACKENDS: Final = ("torch", "onnxruntime", "tensorrt-rtx", "tensorrt")


def soak_part(context: Context, part: Part) -> None:
    """Random fractions, step counts, batches, labels and places of the result, drawn from one seed."""
    smoke = context.smoke
    case = DitCase(
        small="tiny" if smoke else "S/2",
        large="tiny+" if smoke else "B/2",
        pixels=64 if smoke else 256,
        batch=4,
        precision="fp32" if smoke else "fp16",
        steps=2,
    )
    total, warm = (12, 6) if smoke else (1000, _WARM)
    for backend in _BACKENDS:

        def soak(entry: Entry, backend: str = backend) -> Entry:
            if backend.startswith("tensorrt"):
                context.need_cuda()
            bundle = build_bundle(context, case, backend, {}, largest=8)
            with tstitch_trt.load(bundle, device=context.device, backend=backend, verify="size") as runtime:
                return _soak(context, runtime, entry, total, warm)

        part.attempt(backend, soak, reserve=0 if smoke else 150)


def _soak(context: Context, runtime: tstitch_trt.Runtime, entry: Entry, total: int, warm: int) -> Entry:
    generator = np.random.default_rng(0)
    used: list[list[int]] = []
    allocated = 0
    for index in range(total):
        if index == warm:
            allocated = runtime.device.calls["alloc"]
        # Batches and places come round in turn, so that each has been seen before the warm-up is over.
        runtime.sample(
            labels=[int(v) for v in generator.integers(0, 1000, 1 + index % 6)],
            seed=index,
            steps=int(generator.integers(2, 4 if context.smoke else 11)),
            fraction=float(generator.uniform()),
            output="device" if index % 7 == 3 else "host",
            decode=False,
            **SETTINGS,
        )
        if index + 1 >= warm and ((index + 1 - warm) % max(warm // 2, 1) == 0 or index + 1 == total):
            used.append([index + 1, _in_use(context)])
            entry["bytes_in_use"] = used
    growth = used[-1][1] - used[0][1]
    return {
        "trajectories": total,
        "warm": warm,
        "growth_bytes": growth,
        "allocations_after_warm_up": runtime.device.calls["alloc"] - allocated,
        "measured": "device memory in use, by the driver" if context.cuda else "resident memory of the process",
    }


def _in_use(context: Context) -> int:
    if context.cuda:
        import torch

        free, total = torch.cuda.mem_get_info(context.device)
        return int(total - free)
    import os
    from pathlib import Path

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
