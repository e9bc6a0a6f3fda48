"""How often a latency budget is met: random feasible budgets on a bundle that was calibrated on this machine.

    tstitch-trt build fashion -o build/fashion.bundle
    tstitch-trt calibrate build/fashion.bundle --threads 1
    python benchmarks/budget.py build/fashion.bundle --threads 1

Every run draws a number of images, a guidance scale and a budget between what the first member alone and what the last
one alone take, lets the runtime choose the schedule (``latency_budget_ms``) and compares the time it took with the
budget. Writes ``budget.json``. Stop it at any time: the same command goes on from the last finished run. Without a
calibration that holds here it measures one first and keeps it in the bundle. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec
from gpubench.script import parser_of, run_script, write_record

import tstitch_trt
from tstitch_engines.bundle.identity import digest
from tstitch_engines.errors import BadInput, NotCalibrated
from tstitch_trt.files import write_text
from tstitch_trt.progress import log, progress_bar
from tstitch_trt.study.budget import Conditions, find_calibration, predict_ms
from tstitch_trt.study.calibrate.calibrate import calibrate
from tstitch_trt.study.calibrate.trials import warm_up
from tstitch_trt.study.machine import describe_machine
from tstitch_trt.study.records import Calibration
from tstitch_trt.study.store import save_study, weights_of


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=100, help="budgets to try (default 100)")
    parser.add_argument("--steps", type=int, help="steps of every run (default: the choice is free)")
    parser.add_argument("--most", type=int, help="images per run at most (default: half as many again as fit a call)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of engines (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "budget.json")
    parser.add_argument("--scratch", type=Path, default=Path("build/budget"), help="unfinished work is kept here")
    args = parser.parse_args(argv)
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    if args.runs < 1:
        raise BadInput(f"--runs {args.runs}; allowed is 1 or more", hint="leave it out for 100")
    with tstitch_trt.load(args.bundle, device=args.device, threads=args.threads) as runtime:
        calibration = calibrated(runtime)
        asked = {name: getattr(args, name) for name in ("seed", "steps", "most")}
        what = {**asked, "weights": weights_of(runtime.manifest), "calibration": digest(calibration)}
        path = args.scratch / f"{digest(what)[:16]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        done: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        if done:
            log(f"going on after {len(done)} of {args.runs} runs")
        with progress_bar("sampling", args.runs, counted="runs") as bar:
            for index in range(len(done), args.runs):
                bar.update(done=index)
                done.append(one(runtime, calibration, args, index))
                write_text(path, json.dumps(done))
        write(args, runtime, calibration, done[: args.runs])


def calibrated(runtime: tstitch_trt.Runtime) -> Calibration:
    here = Conditions.here(runtime.setup)
    try:
        return find_calibration(runtime.bundle, here)
    except NotCalibrated as error:
        log(error.message)
    command = here.command(runtime.bundle.root.name)
    with progress_bar("calibrating") as bar:
        found = calibrate(runtime, command=command, progress=bar)
    save_study(runtime.bundle, found, key=Conditions.of(found).key)
    return found


def one(runtime: tstitch_trt.Runtime, calibration: Calibration, args: argparse.Namespace, index: int) -> dict[str, Any]:
    """Run ``index``: the same request and budget whenever it is run."""
    manifest = runtime.manifest
    rng = random.Random(f"{args.seed} {index}")  # noqa: S311 - requests, not secrets
    scales = [1.0, manifest.defaults.guidance] if manifest.conditioning.guidable else [1.0]
    guidance = rng.choice(scales)
    fits = runtime.splitting.most(guided=guidance != 1)
    images = rng.randint(1, args.most or fits + fits // 2)
    settings: dict[str, Any] = {"guidance": guidance, **({} if args.steps is None else {"steps": args.steps})}
    cheap, dear = (
        calibration.upper_ratio * predict_ms(calibration, runtime.plan(schedule=name, **settings), batch=images)
        for name in (runtime.members[0], runtime.members[-1])
    )
    budget_ms = math.exp(rng.uniform(math.log(cheap), math.log(1.1 * dear)))
    labels = [rng.randrange(manifest.conditioning.classes) for _ in range(images)]
    chosen = runtime.within_budget(budget_ms, labels=labels, **settings)
    warm_up(runtime, chosen)
    result = runtime.sample(labels=labels, seed=index, decode=False, latency_budget_ms=budget_ms, **settings)
    assert result.budget == chosen, "the same request, the same choice"
    return {
        "images": images,
        "guidance": guidance,
        "budget_ms": budget_ms,
        "schedule": chosen.schedule,
        "steps": chosen.steps,
        "solver": chosen.solver,
        "source": chosen.source,
        "metric": chosen.metric,
        "quality": chosen.quality,
        "predicted_ms": chosen.predicted_ms,
        "upper_ms": chosen.upper_ms,
        "measured_ms": result.total_ms,
        "met": result.total_ms <= budget_ms,
    }


def write(
    args: argparse.Namespace, runtime: tstitch_trt.Runtime, calibration: Calibration, done: list[dict[str, Any]]
) -> None:
    met = sum(each["met"] for each in done)
    errors = [abs(each["predicted_ms"] / each["measured_ms"] - 1) for each in done]
    document = {
        "bundle": runtime.manifest.name,
        "weights": weights_of(runtime.manifest),
        "command": "python benchmarks/budget.py " + " ".join(sys.argv[1:]),
        "backend": runtime.backend_name,
        "device": runtime.device.name,
        "threads": args.threads or 0,
        "seed": args.seed,
        "runs": len(done),
        "met": met,
        "budget_used": statistics.median(each["measured_ms"] / each["budget_ms"] for each in done),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "calibration": {
            name: getattr(calibration, name)
            for name in ("made", "command", "median_error", "worst_error", "upper_ratio", "repeats")
        }
        | {"checks": len(calibration.checks), "load": calibration.machine.load},
        "machine": msgspec.to_builtins(describe_machine()),
        "each": done,
    }
    write_record(args.out, document)
    log(f"written: {args.out}")
    print(
        f"{met} of {len(done)} budgets met; {document['budget_used']:.1%} of a budget used (median); prediction off "
        f"by {document['median_error']:.1%} (median), {document['worst_error']:.1%} at worst"
    )


if __name__ == "__main__":
    sys.exit(main())
