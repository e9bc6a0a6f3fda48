"""The first half hour on a GPU: every step in order, each bounded in time, one JSON and one log.

    benchmarks/gpu_first.sh --minutes 9            # three such runs make the half hour; proved steps are skipped
    benchmarks/gpu_first.sh --steps fashion,capture --again
    benchmarks/gpu_first.sh --from first.json      # go on from the record of a machine that is gone
    benchmarks/gpu_first.sh --list
    benchmarks/gpu_first.sh --smoke                # tiny models, without a GPU: proves the script

A step that fails is noted with the failure that was expected and what to do, and the next one begins. The record,
``$OUT/first.json``, is written after each step. Steps that failed are tried again when all others had their turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ROOT: Final = Path(__file__).resolve().parents[2]
try:
    import tstitch_trt  # noqa: F401
except ImportError:  # not installed: run from the checkout
    sys.path[:0] = [str(ROOT), str(ROOT / "export"), str(ROOT / "engines")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

from gpubench.cases import CONTENDERS  # noqa: E402
from gpubench.first_steps import FALLBACK, FirstStep, first_steps  # noqa: E402
from gpubench.record import Entry, place_of, read_part  # noqa: E402
from gpubench.script import parser_of, run_script, share_inductor_cache, write_record  # noqa: E402
from gpubench.supervise import CRASHED, GRACE_SECONDS, SCRIPT, default_device, run_part  # noqa: E402
from tstitch_engines.errors import BadInput, unknown_name  # noqa: E402
from tstitch_trt.progress import log  # noqa: E402

_LEAST_SECONDS: Final = 15.0  # with less left, no step is begun
_RECORD: Final = "first.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this run, all in all (default 9)")
    parser.add_argument("--steps", help="names, separated by commas (default: all)")
    parser.add_argument("--again", action="store_true", help="forget what the chosen steps have measured")
    parser.add_argument(
        "--from",
        dest="before",
        type=Path,
        metavar="FILE",
        help="first.json of an earlier run, where --out has none yet",
    )
    parser.add_argument("--list", action="store_true", help="print the plan and how far it is")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps; runs without a GPU")
    parser.add_argument("--device", help="cuda:N or cpu (default: cuda:0 where there is one)")
    parser.add_argument("--rtx-site", action="append", default=[], metavar="VERSION=DIR", help="unpacked RTX wheels")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu-first"))
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "gpubench", help="bundles, caches")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["benchmarks/gpu_first.sh", *words])
    return run_script(lambda: _main(args, command))


def _main(args: argparse.Namespace, command: str) -> int:
    plan = first_steps(smoke=args.smoke)
    known = [step.name for step in plan]
    names = known if args.steps is None else [word.strip() for word in args.steps.split(",") if word.strip()]
    for name in names:
        if name not in known:
            raise unknown_name("step", name, known)
    if not names:
        raise BadInput(f"--steps {args.steps!r} names no step", hint=f"use some of: {','.join(known)}; or leave it out")
    if not args.minutes > 0:
        raise BadInput(f"--minutes {args.minutes:g}; allowed is more than 0", hint="leave it out for 9")
    steps = [step for step in plan if step.name in names]
    if args.list:
        found = _read(args.out / _RECORD).get("steps", {})
        for step in steps:
            state = found.get(step.name, {}).get("status", "not run")
            print(f"{step.name}\t{step.minutes:g} min\t{state}\t{step.proves}")
        return 0
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # an end from outside: keep what there is, end the children
    first = _First(args, command)
    try:
        first.run(steps)
    finally:
        print(first.table(plan))
    return 1 if any(first.state(step)["status"] == "failed" for step in steps) else 0


class _First:
    """One run. ``document``: the record, of earlier runs too."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self._args = args
        spent = time.time() - float(os.environ.get("GPUBENCH_STARTED", time.time()))  # on installing
        self._end = time.monotonic() + 60 * args.minutes - spent
        self._parts = args.scratch / ("first-smoke" if args.smoke else "first")
        self._path = args.out / _RECORD
        self._device = args.device or default_device()
        self._background: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        share_inductor_cache(args.scratch)
        before = _read(self._path)
        if args.before is not None and not before:
            before = _read(args.before)
            if not before:
                raise BadInput(f"--from {args.before}: there is no record that can be read", hint="leave it out")
        same = {"smoke": args.smoke, **place_of(self._device)}
        if before and any(before.get(key) != value for key, value in same.items()):
            raise BadInput(
                f"{self._path if self._path.is_file() else args.before} is of {_place(before)}; this run is on "
                f"{_place(same)}",
                hint="give another folder: OUT=DIR benchmarks/gpu_first.sh",
            )
        self.document: Entry = {"runs": [], "steps": {}, "parts": {}, **before, **same}
        self.document["runs"].append({"command": command, "minutes": args.minutes, "started": _now()})
        for name, part in self.document["parts"].items():
            if read_part(self._parts / f"{name}.json") is None:
                write_record(self._parts / f"{name}.json", part)
        self._write()

    def state(self, step: FirstStep) -> Entry:
        found: Entry = self.document["steps"].get(step.name, {"status": "not run", "why": "", "seconds": 0.0})
        return found

    def run(self, steps: Sequence[FirstStep]) -> None:
        """First those that were not run or not to their end, then those that failed before."""
        failed = [step for step in steps if self.state(step)["status"] == "failed"]
        fresh = [step for step in steps if step not in failed]
        if self._args.again:
            self._forget(steps)
            fresh, failed = list(steps), []
        try:
            for step in fresh:
                if self.state(step)["status"] == "proved":
                    log(f"{step.name}: proved before")
                else:
                    if step.timed:
                        self._join(steps)
                    self._step(step)
            for step in failed:
                self._step(step)
        except KeyboardInterrupt:
            self._end = time.monotonic()  # what runs beside is not waited for
            raise
        finally:
            self._join(steps)

    # --- one step

    def _step(self, step: FirstStep) -> None:
        left = self._end - time.monotonic() - GRACE_SECONDS
        if left < _LEAST_SECONDS:
            state = self.state(step)
            self._note(step, state["status"], state["why"] or "no time was left", state["seconds"])
            return
        if self.state(step)["status"] == "failed":
            self._forget_failures(step)
        log(f"{step.name}: {step.proves}")
        seconds = min(60 * step.minutes, left)
        if step.background:
            command = [sys.executable, str(SCRIPT), *self._words(step), "--device", self._device, "--child", step.part]
            env = {**os.environ, "GPUBENCH_DEADLINE": str(time.time() + seconds)}
            process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
            self._background[step.name] = (process, time.monotonic())
            return
        started = time.monotonic()
        part: Entry | None = None
        problem: str | None = "interrupted"
        try:
            part, problem = run_part(self._words(step), self._parts, step.part, self._device, seconds)
        finally:
            part = part or read_part(self._parts / f"{step.part}.json")
            self._judged(step, part, problem, time.monotonic() - started)

    def _words(self, step: FirstStep) -> list[str]:
        args = self._args
        words = ["--out", str(self._parts), "--scratch", str(args.scratch)]
        words += ["--contenders", ",".join(step.contenders)] if step.contenders else []
        words += ["--smoke"] if args.smoke else []
        return words + [word for site in args.rtx_site for word in ("--rtx-site", site)]

    def _join(self, steps: Sequence[FirstStep]) -> None:
        """Waits for what runs beside the others, to the end of its time; what it has made by then is kept."""
        for step in [step for step in steps if step.name in self._background]:
            process, started = self._background[step.name]
            try:
                code = process.wait(max(min(self._end, started + 60 * step.minutes) - time.monotonic(), 0.1))
                problem = None if code in (0, 1) else f"{CRASHED} {code}"
            except subprocess.TimeoutExpired:
                problem = "stopped at the end of its time; the same command goes on"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            del self._background[step.name]
            part = read_part(self._parts / f"{step.part}.json")
            self._judged(step, part, problem, time.monotonic() - started)

    def _judged(self, step: FirstStep, part: Entry | None, problem: str | None, seconds: float) -> None:
        status, why = judge(step, part, problem)
        if part is not None:
            self.document["parts"][step.part] = part
        self._note(step, status, why, seconds)

    def _note(self, step: FirstStep, status: str, why: str, seconds: float) -> None:
        state: Entry = {"status": status, "why": why, "seconds": round(seconds, 1), "proves": step.proves}
        if status == "failed":
            state |= {
                "expected failure": step.expected,
                "fallback": step.fallback,
                "as expected": step.is_expected(why),
            }
        self.document["steps"][step.name] = state
        self._write()
        log(f"{step.name}: {status}" + (f": {why}" if why else ""))
        if status == "failed" and step.expected:
            log(f"expected failure: {step.expected}; fallback: {step.fallback}")

    def _write(self) -> None:
        self.document["written"] = _now()
        write_record(self._path, self.document)

    # --- what was measured before

    def _forget(self, steps: Sequence[FirstStep]) -> None:
        for step in steps:
            self.document["steps"].pop(step.name, None)
            self.document["parts"].pop(step.part, None)
            (self._parts / f"{step.part}.json").unlink(missing_ok=True)

    def _forget_failures(self, step: FirstStep) -> None:
        part = self.document["parts"].get(step.part)
        if part is not None:
            part["entries"] = {
                n: e for n, e in part["entries"].items() if e["status"] != "failed" and FALLBACK not in n
            }
            write_record(self._parts / f"{step.part}.json", part)

    # --- the end

    def table(self, plan: Sequence[FirstStep]) -> str:
        """Every step of the plan, proved or not, and why."""
        where = "tiny models, a dry run: nothing here is proved of a GPU" if self._args.smoke else self._device
        rows = [("step", "", "seconds", f"why ({where})")]
        for step in plan:
            state = self.state(step)
            why = state["why"].replace("\n", " ")
            if state["status"] == "failed" and step.expected:
                why += " [as expected]" if state["as expected"] else " [not the expected failure]"
                why += f" fallback: {step.fallback}"
            rows.append((step.name, state["status"], f"{state['seconds']:.0f}", why[:300]))
        wide = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, wide, strict=False)), row[3]]) for row in rows
        )


def judge(step: FirstStep, part: Mapping[str, Any] | None, problem: str | None) -> tuple[str, str]:
    """``proved``, ``failed`` or ``not run``, and why. Something must have worked, and nothing failed, to be proved."""
    if part is None:
        return "failed", problem or "it left no record"
    entries = {
        name: entry
        for name, entry in part["entries"].items()
        if not step.contenders or name not in CONTENDERS or name in step.contenders
    }
    failed = [f"{n}: {e['reason']}" for n, e in entries.items() if e["status"] == "failed" and FALLBACK not in n]
    helped = [n for n, e in entries.items() if e["status"] == "ok" and FALLBACK in n]
    absent = [f"{n}: {e['reason']}" for n, e in entries.items() if e["status"] == "not run"]
    worked = [n for n, e in entries.items() if e["status"] == "ok" and FALLBACK not in n]
    if failed:
        return "failed", "; ".join([*failed, *(f"worked: {name}" for name in helped)])
    if problem is not None and problem.startswith(CRASHED):
        return "failed", f"{problem}, in {', '.join(n for n, e in entries.items() if e['status'] == 'running')}"
    if problem is not None or part["status"] in ("partial", "running"):
        return "not run", f"in part ({', '.join(worked) or 'nothing yet'}): {problem or 'its time was over'}"
    if part["status"] == "failed":
        return "failed", str(part["reason"])
    if part["status"] == "not run":
        return "not run", str(part["reason"]).removeprefix("not run: ")
    if step.part == "rtx" and worked and not any(entry.get("runs") for entry in entries.values()):
        return "failed", _last_words(entries)
    if not worked:
        return "not run", "; ".join(absent) or "it has no entries"
    return "proved", "; ".join(f"without {text}" for text in absent)


def _last_words(entries: Mapping[str, Entry]) -> str:
    """What TensorRT-RTX said last in the attempts that did not run."""
    found = []
    for name, entry in entries.items():
        step = next((s for s in reversed(entry.get("steps", [])) if s.get("problem")), None)
        if step is not None:
            errors = [m for m in step["messages"] if m.startswith(("ERROR", "INTERNAL_ERROR"))]
            found.append(f"{name}: {step['step']}: {step['problem']} {'; '.join(errors[:1])}".rstrip())
    return "; ".join(found) or "no attempt ran"


def _place(record: Mapping[str, Any]) -> str:
    gpus = f" ({', '.join(record['gpus'])})" if record.get("gpus") else ""
    return f"the device {record.get('device')}{gpus}{', a dry run' if record.get('smoke') else ''}"


def _read(path: Path | None) -> dict[str, Any]:
    """The record at ``path``; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text()) if path is not None else None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


if __name__ == "__main__":
    sys.exit(main())
