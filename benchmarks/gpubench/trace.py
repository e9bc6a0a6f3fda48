"""What the GPU and its driver did during a stretch of host code, read from a torch.profiler (CUPTI) trace.

The stretch is an annotation in the trace. On the host side every call of the CUDA runtime and driver inside it is
counted, and those that wait, copy or allocate are named. On the device side the work that those calls started (by
correlation id) is laid on a time line: its gaps are the time in which nothing ran.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpubench.record import Entry

__all__ = ["STRETCH", "analyse", "traced"]

STRETCH = "gpubench stretch"

_HOST = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# Parts of names of CUDA calls that a step must not make. cudaStreamIsCapturing, cudaEventRecord, cudaStreamWaitEvent
# and the like cost nothing and wait for nothing.
_WAITS = ("Synchronize", "EventQuery", "StreamQuery")
_COPIES = ("Memcpy", "Memset")
_ALLOCATES = ("Malloc", "MemAlloc", "MemCreate", "MemFree", "cudaFree", "MemMap", "MemPool")


def traced(work: Callable[[], object], settle: Callable[[], object]) -> Entry:
    """Profiles one call of ``work`` (warmed up before by the caller); ``settle`` waits for the device."""
    import torch

    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    settle()
    with torch.profiler.profile(activities=kinds) as profiler:
        with torch.profiler.record_function(STRETCH):
            work()
        settle()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(path))
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
    return analyse(events)


def analyse(events: list[dict[str, Any]]) -> Entry:
    """Counts and times (microseconds) of the stretch; ``clean`` is ``None`` where no device work was seen.

    Raises ``ValueError`` when the trace has no such stretch.
    """
    whole = [e for e in events if e.get("ph") == "X"]
    marks = [e for e in whole if e.get("name") == STRETCH and e.get("cat") == "user_annotation"]
    if not marks:
        raise ValueError(f"the trace holds no annotation {STRETCH!r}")
    start, stop = marks[0]["ts"], marks[0]["ts"] + marks[0]["dur"]
    calls = [e for e in whole if e.get("cat") in _HOST and start <= e["ts"] < stop]
    started = {e.get("args", {}).get("correlation") for e in calls} - {None}
    work = [e for e in whole if e.get("cat") in _DEVICE and e.get("args", {}).get("correlation") in started]
    names = Counter(e["name"] for e in calls)
    found: Entry = {
        "host_us": marks[0]["dur"],
        "calls": dict(names),
        "waits": _matching(names, _WAITS),
        "copies": _matching(names, _COPIES),
        "allocations": _matching(names, _ALLOCATES),
        "device_work": dict(Counter(e["cat"] for e in work)),
        "gaps": _gaps([(e["ts"], e["ts"] + e["dur"]) for e in work]),
    }
    # A copy that a recorded graph makes shows on the device only. A trace without any work saw nothing.
    dirty = found["waits"] or found["copies"] or found["allocations"] or any(e["cat"] != "kernel" for e in work)
    found["clean"] = not dirty if work else None
    return found


def _matching(names: Counter[str], parts: tuple[str, ...]) -> dict[str, int]:
    return {name: count for name, count in names.items() if any(part in name for part in parts)}


def _gaps(spans: list[tuple[float, float]]) -> Entry | None:
    """Times between the end of all that ran before and the next start."""
    if not spans:
        return None
    spans = sorted(spans)
    gaps, end = [], spans[0][1]
    for begin, finish in spans[1:]:
        if begin > end:
            gaps.append(begin - end)
        end = max(end, finish)
    total = end - spans[0][0]
    return {
        "span_us": total,
        "idle_us": sum(gaps),
        "idle_share": sum(gaps) / total if total else 0.0,
        "count": len(gaps),
        "median_us": float(np.median(gaps)) if gaps else 0.0,
        "p90_us": float(np.percentile(gaps, 90)) if gaps else 0.0,
        "largest_us": max(gaps, default=0.0),
    }
