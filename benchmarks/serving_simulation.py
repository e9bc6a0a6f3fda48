"""The simulation of serving beside the real engine, and then with more devices than anybody here has.

    tstitch-trt build fashion -o build/fashion.bundle
    python benchmarks/serving_simulation.py check build/fashion.bundle      # the engine, then its simulation: 6 minutes
    python benchmarks/serving_simulation.py scale                           # 1,000 devices, 40 minutes on one core
    python benchmarks/serving_simulation.py scale --parts 'router-*,million'

``check`` drives one engine in this process with Poisson arrivals of a mix, simulates the same requests at the same
times with the costs of that window, and writes both to ``serving-simulation-check.json``. ``scale`` draws that mix with
the step times of a calibration and what the check measured beside the steps. It writes ``serving-simulation.json``
after every part; one that is in it, made by the same command, is not simulated again. What came out:
``docs/benchmarks/serving-simulation.md``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from gpubench.script import parser_of, run_script, write_record
from servingbench.asks import MIXES, Kind, make_asks
from servingbench.replay import (
    Step,
    Watch,
    drive,
    percentiles,
    simulated,
    steps_of,
    summary,
)

import tstitch_trt
from tstitch_engines.bundle.read import read_bounded
from tstitch_engines.errors import BadInput
from tstitch_trt.progress import log
from tstitch_trt.serve.costs import CostPoint, MeasuredCosts
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.policy import DeadlineFirst, FirstCome, LargestBatch
from tstitch_trt.serve.simulate import Failure, RequestClass, Setup, Stage, bursts, poisson, simulate
from tstitch_trt.study.machine import describe_machine
from tstitch_trt.study.records import Calibration

RESULTS = Path(__file__).parent / "results"
CALIBRATION = RESULTS / "study/calibration-d97c67432c031681.json"
LIMIT = 2.0  # seconds, for the goodput
BYTES = 64 << 20
SCALE = {  # what the parts are made of, by default
    "check": RESULTS / "serving-simulation-check.json",
    "calibration": CALIBRATION,
    "devices": 1000,
    "requests": 50_000,
    "seed": 0,
}


class Costed(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of request and the member and guided of each of its steps. ``share``: of the arrivals."""

    kind: Kind
    steps: tuple[tuple[str, bool], ...]
    share: int


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds beside a step, and of a batch of the stages: the least of all windows."""

    step: float
    encode: float
    decode: float


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """What ``scale`` reads of a check."""

    slots: int
    beside: Beside
    kinds: tuple[Costed, ...]


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="the engine and its simulation, the same requests")
    one.add_argument("bundle", type=Path)
    one.add_argument("--mix", choices=list(MIXES), default="mixed", help="default mixed")
    one.add_argument(
        "--loads", default="0.5,0.8,1,1.2", help="shares of what one request at a time can do (default %(default)s)"
    )
    one.add_argument("--seconds", type=float, default=20.0, help="of arrivals in each window (default 20)")
    one.add_argument("--windows", type=int, default=3, help="of each load (default 3)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--out", type=Path, default=RESULTS / "serving-simulation-check.json")
    many = commands.add_parser("scale", help="many devices, simulated")
    many.add_argument("--check", type=Path, help="what check wrote")
    many.add_argument("--calibration", type=Path, help="of the bundle, as its studies/ has it")
    many.add_argument("--parts", default="*", help="names and patterns, separated by commas (default all)")
    many.add_argument("--devices", type=int)
    many.add_argument("--requests", type=int, help="of each part but the last (default 50000)")
    many.add_argument("--seed", type=int)
    many.set_defaults(**SCALE)
    many.add_argument("--out", type=Path, default=RESULTS / "serving-simulation.json")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/serving_simulation.py", *(sys.argv[1:] if argv is None else argv)])
    work = check if args.command == "check" else scale
    return run_script(lambda: work(args, command))


# --- beside the engine


def check(args: argparse.Namespace, command: str) -> None:
    try:
        loads = [float(part) for part in args.loads.split(",")]
    except ValueError:
        loads = [0.0]
    if not all(0 < load <= 100 for load in loads) or not 0 < args.seconds <= 1e5 or args.windows < 1:
        raise BadInput(
            f"--loads {args.loads} --seconds {args.seconds:g} --windows {args.windows}; allowed are loads up to 100, "
            "seconds above 0 and 1 window or more",
            hint="e.g. --loads 0.5,1 --seconds 20 --windows 3",
        )
    mix, watch, windows = MIXES[args.mix], Watch(), []
    with tstitch_trt.load(args.bundle, threads=1) as runtime:
        rows = max(runtime.splitting.tuned or (runtime.splitting.limit,))  # the engine's caps without a calibration
        caps = {name: (rows, max(1, rows // 2)) for name in runtime.members}
        kinds = {kind: steps_of(runtime, kind) for kind in sorted(mix.kinds(), key=str)}
        with Engine(runtime, observer=watch) as engine:
            engine.warm_up()
            slots = engine.state().models[engine.models[0]].max_lanes
            alone = []
            for kind in list(kinds)[::2]:
                began = time.monotonic()
                engine.submit(labels=[0] * kind.images, **kind.keywords()).result()
                alone.append(time.monotonic() - began)
            for load in loads:
                for number in range(args.windows):
                    asks = make_asks(
                        runtime.manifest, mix, arrivals="poisson", rate=load / float(np.mean(alone)),
                        seconds=args.seconds, seed=f"{args.seed} {load} {number}",
                    )  # fmt: skip
                    watch.clear()
                    window = drive(engine, asks)
                    timed = watch.timed(caps, slots)
                    costs, classes, stages = simulated(timed, {kind: kinds[kind] for kind in window.kinds})
                    numbers = {kind: number for number, kind in enumerate(classes)}
                    found = simulate(
                        Setup(
                            list(classes.values()),
                            [(at, numbers[kind]) for at, kind in zip(window.at, window.kinds, strict=True)],
                            costs,
                            slots=slots,
                            pace=watch.pace(timed, window.start),
                            front=timed.before,
                            fronts=len(window.at),  # a delay, no queue
                            encode=stages[0],
                            decode=stages[1],
                        )
                    )
                    ended = max(at + latency for at, latency in zip(window.at, window.latency, strict=True))
                    real = {
                        "throughput": sum(kind.images for kind in window.kinds) / (ended - window.at[0]),
                        **percentiles(window.latency),
                        "batch": float(np.mean([tick.lanes for _, tick in watch.ticks])),
                    }
                    error = {name: value / real[name] - 1 for name, value in summary(found).items()}
                    windows.append(
                        {
                            "load": load,
                            "requests": len(window.at),
                            "refused": window.refused,
                            "engine": real,
                            "simulation": summary(found),
                            "error": error,
                            "costs": msgspec.to_builtins(timed),
                        }
                    )
                    log(f"load {load:g}: " + ", ".join(f"{name} {100 * each:+.1f} %" for name, each in error.items()))
    timed_of = [each["costs"] for each in windows]
    beside = Beside(
        step=min(each["steps"][0]["beside"] for each in timed_of),
        encode=min(each["encode"][0] for each in timed_of),
        decode=min(each["decode"][0] + each["after"] for each in timed_of),
    )
    document = {
        "command": command,
        "machine": msgspec.to_builtins(describe_machine()),
        "bundle": runtime.manifest.name,
        "mix": args.mix,
        "kinds": [
            msgspec.to_builtins(
                Costed(
                    kind=kind,
                    steps=steps,
                    share=mix.guidances.count(kind.guidance) * mix.images.count(kind.images),
                )
            )
            for kind, steps in kinds.items()
        ],
        "slots": slots,
        "beside": msgspec.to_builtins(beside),
        "median_error": {
            name: float(np.median([abs(each["error"][name]) for each in windows])) for name in windows[0]["error"]
        },
        "windows": windows,
    }  # fmt: skip
    write_record(args.out, document)
    log(f"written: {args.out}; median errors {document['median_error']}")


# --- many devices


class World:
    """Setups of ``devices`` devices that draw the mix of a check."""

    def __init__(self, checked: Checked, points: Sequence[CostPoint], devices: int, requests: int, seed: int) -> None:
        self.devices = devices
        self.requests = requests
        self.seed = seed
        self.checked = checked
        self.size = points[0].size
        most = {guided: max(point.batch for point in points if point.guided == guided) for guided in (False, True)}
        self.costs = MeasuredCosts(points, most=lambda key: most[key.guided])  # type: ignore[attr-defined]  # a Step
        steps: dict[tuple[str, bool], Step] = {}
        self.classes = [
            RequestClass(
                tuple(steps.setdefault(pair, Step(*pair, self.size)) for pair in each.steps), str(each.kind),
                images=each.kind.images, encode=1.0, share=float(each.share),
            )
            for each in checked.kinds
        ]  # fmt: skip

    def seconds(self, classes: Sequence[RequestClass], *, full: bool = True) -> list[float]:
        """Of device time for a request of each class: its share of full batches, or alone."""
        found = []
        for each in classes:
            sizes = [self.costs.cap(key) if full else 1 for key in each.keys]
            steps = (self.costs.seconds(key, size) / size for key, size in zip(each.keys, sizes, strict=True))
            found.append(each.images * sum(steps))
        return found

    def setup(
        self,
        load: float,
        *,
        classes: Sequence[RequestClass] | None = None,
        devices: int | None = None,
        requests: int | None = None,
        burst: float | None = None,
        **changes: Any,
    ) -> Setup:
        """``load``: of what the devices can do in full batches. ``burst``: all arrivals of 10 s in this share of it."""
        chosen, count = self.classes if classes is None else classes, devices or self.devices
        mean = float(np.average(self.seconds(chosen), weights=[each.share for each in chosen]))
        rate = load * count / mean
        arrivals = poisson(rate, chosen, seed=self.seed)
        if burst is not None:
            arrivals = bursts(rate, chosen, period=10.0, busy=burst, seed=self.seed)
        beside = self.checked.beside
        base = Setup(
            chosen, islice(arrivals, requests or self.requests), self.costs, devices=count, slots=self.checked.slots,
            max_images=64, limit=LIMIT, seed=self.seed, overhead=beside.step,
            encode=Stage(beside.encode, most=32), decode=Stage(beside.decode, most=16),
        )  # fmt: skip
        return replace(base, **changes)

    def rate(self, load: float) -> float:
        """Requests per second."""
        shares = [each.share for each in self.classes]
        return load * self.devices / float(np.average(self.seconds(self.classes), weights=shares))

    def span(self, load: float) -> float:
        """Seconds over which requests arrive."""
        return self.requests / self.rate(load)


def steps_in(each: RequestClass) -> list[Step]:
    return [key for key in each.keys if isinstance(key, Step)]


def parts_of(world: World) -> dict[str, Callable[[], Setup]]:
    """What is simulated, by name."""
    found: dict[str, Callable[[], Setup]] = {}

    def add(name: str, load: float, **changes: Any) -> None:
        found[name] = lambda: world.setup(load, **changes)

    for load in (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1):
        add(f"load-{load:g}", load)
    for router in ("least_work", "two_choices", "round_robin"):
        add(f"router-{router}", 0.9, router=router)
        add(f"slow-{router}", 0.8, router=router, speeds=[2.0] + [1.0] * 19)
    for refresh in (0.1, 1.0, 5.0):
        for router in ("least_work", "two_choices"):
            add(f"stale-{router}-{refresh:g}s", 0.9, router=router, refresh=refresh, fronts=32)
    for share in (0.8, 0.95, 1.05, 1.5):
        fronts = round(world.rate(0.8) * 0.002 * share)
        add(f"front-{share:g}", 0.8, front=0.002, fronts=max(1, fronts))
    for load, lost in ((0.8, 0.01), (0.8, 0.1), (0.8, 0.25), (0.95, 0.1)):
        at = world.span(load) / 3
        failures = [Failure(device, at) for device in range(round(lost * world.devices))]
        add(f"failure-{lost:g}-load-{load:g}", load, failures=failures, detect=at / 10)
    # What one device shows as well as a thousand: more requests for each.
    few = {"devices": max(1, world.devices // 50), "requests": max(1, world.requests // 5)}
    for burst in (0.8, 0.5, 0.25):
        add(f"burst-{burst:g}", 0.6, burst=burst, **few)
    for retries in (0, 1, 10):
        add(f"retry-{retries}", 1.3, retries=retries, **few)
    for policy in (DeadlineFirst, FirstCome, LargestBatch):
        add(f"policy-{policy.__name__}", 0.9, policy=policy, **few)
    for patience in (1.0, 16.0):
        add(f"patience-{patience:g}", 0.9, policy=lambda patience=patience: DeadlineFirst(patience=patience), **few)
    many = replace(world.classes[0], name="many", images=48, share=0.02 * sum(each.share for each in world.classes))
    usual = world.classes[-1]
    large = {key: replace(key, size=(2 * key.size[0], 2 * key.size[1])) for key in steps_in(usual)}
    share = 0.05 * sum(each.share for each in world.classes)
    wide = replace(usual, name="large size", keys=tuple(large[key] for key in steps_in(usual)), share=share)
    for policy in (DeadlineFirst, FirstCome):
        add(f"many-{policy.__name__}", 0.8, policy=policy, classes=[*world.classes, many], **few)
        add(f"wide-{policy.__name__}", 0.8, policy=policy, classes=[*world.classes, wide], **few)
    alone = world.seconds(world.classes, full=False)
    due = [replace(each, budget=4 * seconds + 0.2) for each, seconds in zip(world.classes, alone, strict=True)]
    for load in (0.7, 0.9, 1.1, 1.5):
        add(f"deadline-{load:g}", load, classes=due, **few)
    add("million", 0.9, requests=1_000_000)
    return found


def scale(args: argparse.Namespace, command: str) -> None:
    try:
        checked = msgspec.json.decode(read_bounded(args.check, BYTES), type=Checked)
        calibration = msgspec.json.decode(read_bounded(args.calibration, BYTES), type=Calibration)
    except (OSError, msgspec.MsgspecError) as error:
        raise BadInput(
            f"a file can't be read: {error}", hint="write it: python benchmarks/serving_simulation.py check BUNDLE"
        ) from None
    points = [
        CostPoint(step.member, step.guided, (step.height, step.width), step.batch, step.ms / 1e3)
        for step in calibration.steps
    ]
    world = World(checked, points, args.devices, args.requests, args.seed)
    done: dict[str, Any] = json.loads(args.out.read_text())["parts"] if args.out.is_file() else {}
    patterns = args.parts.split(",")
    parts = {name: part for name, part in parts_of(world).items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
    if not parts:
        raise BadInput(f"no part is called {args.parts}", hint=f"parts: {', '.join(parts_of(world))}")
    for name, part in parts.items():
        words = [f"--{key}={getattr(args, key)}" for key, usual in SCALE.items() if getattr(args, key) != usual]
        made_by = shlex.join(["python", "benchmarks/serving_simulation.py", "scale", "--parts", name, *words])
        if name in done and done[name]["command"] == made_by:
            continue
        setup, began = part(), time.perf_counter()
        report = simulate(setup)
        wall = time.perf_counter() - began
        many = [number for number, each in enumerate(setup.classes) if each.name in ("many", "large size")]
        done[name] = {
            "devices": setup.devices,
            "requests": report.requests,
            "done": report.done,
            "within_limit": report.good,
            **{key: getattr(report, key) for key in ("refused", "failed", "retried", "missed", "most_waiting")},
            "seconds": report.seconds,
            "throughput": report.throughput,
            "goodput": report.goodput,
            **percentiles(report.latency),
            **{f"p95_of_{setup.classes[number].name}": report.percentile(95, number) for number in many},
            "batch": report.batch,
            "fill": report.fill,
            "busy": float(report.busy.mean()) / report.seconds,
            "busiest": float(report.busy.max() / report.busy.mean()),
            "fronts": setup.fronts,
            "batches": report.ticks,
            "events": report.events,
            "wall_seconds": wall,
            "command": made_by,
        }
        write_record(
            args.out,
            {"command": command, "limit": LIMIT, "machine": msgspec.to_builtins(describe_machine()), "parts": done},
        )
        log(
            f"{name}: p50 {done[name]['p50']:.3f} p95 {done[name]['p95']:.3f} s, {report.refused} refused, {wall:.0f} s"
        )


if __name__ == "__main__":
    sys.exit(main())
