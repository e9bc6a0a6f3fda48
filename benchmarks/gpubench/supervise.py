"""Runs one part of ``benchmarks/gpu.py`` in a process of its own, which ends when its time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpubench.record import Entry, read_part
from gpubench.script import write_record

__all__ = ["CRASHED", "GRACE_SECONDS", "SCRIPT", "default_device", "run_part"]

SCRIPT = Path(__file__).resolve().parents[1] / "gpu.py"
GRACE_SECONDS = 10.0
CRASHED = "its process ended with"


def run_part(
    words: Sequence[str], out: Path, name: str, device: str, seconds: float
) -> tuple[Entry | None, str | None]:
    """Its record in ``out``, and what was wrong with the process's end, if anything. ``words``: of ``gpu.py``."""
    problem = _supervise([sys.executable, str(SCRIPT), *words, "--device", device, "--child", name], seconds)
    path = out / f"{name}.json"
    part = read_part(path)
    if part is not None and problem is not None:
        part |= {"status": "partial", "reason": problem}
        write_record(path, part)
    return part, problem


def _supervise(command: list[str], seconds: float) -> str | None:
    """The process has a group of its own, which ends as a whole."""
    env = {**os.environ, "GPUBENCH_DEADLINE": str(time.time() + seconds)}
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(seconds + GRACE_SECONDS)
        return None if code in (0, 1) else f"{CRASHED} {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds / 60:.1f} minutes; the same command goes on"
    finally:
        if process.poll() is None:
            for kind, wait in ((signal.SIGINT, 10.0), (signal.SIGKILL, None)):
                os.killpg(process.pid, kind)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(wait)
                    break


def default_device() -> str:
    """``cuda:0`` where PyTorch sees a GPU: the baselines need it as much as we do."""
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda:0" if torch.cuda.is_available() else "cpu"
