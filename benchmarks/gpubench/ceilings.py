"""What the GPU reaches at its best: a large matrix product and a large copy, on random data."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from gpubench.record import Context, Entry, Part, spread_of

__all__ = ["ceiling_parts", "copy_rate", "matmul_rate", "synchronize"]


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)


def matmul_rate(device: str, precision: str, *, size: int, repeats: int = 20) -> Entry:
    """TFLOP/s of ``size`` cubed products. Random values: on zeros a GPU draws less power and clocks higher."""
    import torch

    from gpubench.trajectories import TORCH_DTYPES

    dtype = getattr(torch, TORCH_DTYPES[precision])
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _rates(device, lambda: torch.matmul(a, b, out=out), 2 * size**3 / 1e12, repeats, "tflops") | {"size": size}


def copy_rate(device: str, *, nbytes: int, repeats: int = 20) -> Entry:
    """GB/s of a copy within the device, bytes read plus bytes written."""
    import torch

    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rates(device, lambda: target.copy_(source), 2 * nbytes / 1e9, repeats, "gb_per_s") | {"bytes": nbytes}


def _rates(device: str, work: Any, amount: float, repeats: int, unit: str) -> Entry:
    """On CUDA by events around each run, all enqueued at once; elsewhere by the clock."""
    import torch

    for _ in range(3):
        work()
    synchronize(device)
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    else:
        event: Any = torch.cuda.Event
        marks = [event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        synchronize(device)
        times = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    return {unit: spread_of([amount / seconds for seconds in times])}


def ceiling_parts(context: Context, part: Part) -> None:
    """Square products of several sizes and copies of several; the best of each is the ceiling."""
    sizes = (128,) if context.smoke else (4096, 8192, 16384)
    copies = (1 << 20,) if context.smoke else (1 << 28, 1 << 30, 1 << 32)
    for precision in ("fp32",) if context.smoke else ("bf16", "fp16"):
        for size in sizes:

            def product(entry: Entry, precision: str = precision, size: int = size) -> Entry:
                return matmul_rate(context.device, precision, size=size)

            part.attempt(f"matmul {precision} {size}", product, reserve=5)
    for nbytes in copies:

        def copy(entry: Entry, nbytes: int = nbytes) -> Entry:
            return copy_rate(context.device, nbytes=nbytes)

        part.attempt(f"copy {nbytes}", copy, reserve=5)
