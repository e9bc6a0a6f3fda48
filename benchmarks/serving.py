"""Requests that arrive at any time: one at a time, whole requests in batches, diffusers, and batches of steps.

    tstitch-trt build fashion -o build/fashion.bundle
    python benchmarks/serving.py build/fashion.bundle                     # mixed and uniform, five loads each
    python benchmarks/serving.py build/fashion.bundle --quick             # a smoke run
    python benchmarks/serving.py build/fashion.bundle --arrivals burst --mixes mixed --limits 3x,500ms
    python benchmarks/serving.py build/fashion.bundle --steps 20 --record trace.jsonl
    python benchmarks/serving.py build/fashion.bundle --arrivals trace --trace trace.jsonl --contenders single,engine

Every contender is a server of its own behind the same front (LitServe, HTTP on the loopback), with the same bundle and
number of threads. First the pictures of all are compared, one request of every kind; who draws others ends the run.
Then requests are sent at the times of an open loop, whatever became of those before, the contenders in turn at every
load; the servers that wait are stopped. Writes ``serving-NAME.json``, ``.md`` and ``.png``. Stop it at any time: the
same command goes on after the last finished window. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
from gpubench.script import parser_of, run_script, write_record
from servingbench.asks import MIXES, Arrivals, Kind, Mix, read_trace, write_trace
from servingbench.client import Client
from servingbench.figures import ATTAINED, Limit, strain, sustained
from servingbench.front import CONTENDERS, Setup
from servingbench.measure import TOLERANCE, Load, Measurement, Window, figures
from servingbench.report import markdown, plot

from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.identity import digest
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.cli._parsing import parse_fractions, parse_numbers, parse_pixels
from tstitch_trt.files import write_text
from tstitch_trt.plots.figure import check_plot
from tstitch_trt.progress import log, progress_bar
from tstitch_trt.study.machine import describe_machine, package_version
from tstitch_trt.study.store import weights_of

OURS: Final = "engine"


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="default: %(default)s; the first is compared with"
    )
    parser.add_argument("--arrivals", choices=get_args(Arrivals), default="poisson", help="default poisson")
    parser.add_argument("--trace", type=Path, help="recorded arrivals, for --arrivals trace")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the requests of the largest load as a trace, and stop"
    )
    parser.add_argument("--mixes", default=",".join(MIXES), help="default: %(default)s")
    parser.add_argument("--steps", help="in place of a mix's: 10,20,50")
    parser.add_argument("--fractions", help="in place of a mix's: 0,0.4,1")
    parser.add_argument("--sizes", help="in place of the bundle's own: 256x256,512x512")
    parser.add_argument(
        "--loads",
        default="0.3,0.5,0.7,0.9,1.1",
        help="shares of what one request at a time can do (default %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals in each window (default 15)")
    parser.add_argument(
        "--limits",
        default="4x+200ms,8x+200ms,1000ms,2000ms",
        help="of latency; Nx is N times the request alone, N ms at least (default %(default)s)",
    )
    parser.add_argument("--most", type=int, default=8, help="requests in a batch of LitServe's (default 8)")
    parser.add_argument(
        "--wait-ms", type=float, default=5.0, help="that LitServe waits for a batch to fill (default 5)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads of the engines (default 1: clients and fronts need some too)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="one short window of two loads: that it runs, not what it costs"
    )
    parser.add_argument("--name", default="cpu", help="of the files (default cpu)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--scratch", type=Path, default=Path("build/serving"), help="unfinished work is kept here")
    args = parser.parse_args(argv)
    if args.quick:
        args.loads, args.seconds, args.mixes = "0.5,1", min(args.seconds, 2.0), "mixed"
    command = shlex.join(["python", "benchmarks/serving.py", *(sys.argv[1:] if argv is None else argv)])
    return run_script(lambda: run(args, command))


def run(args: argparse.Namespace, command: str) -> None:
    names, known = chosen_contenders(args.contenders), known_mixes(args)
    mixes = chosen_mixes(args.mixes, known)
    limits = [Limit.parse(part) for part in args.limits.split(",")]
    shares = chosen_loads(args)
    trace = () if args.trace is None else tuple(read_trace(args.trace))
    bundle = open_bundle(args.bundle)
    args.out.mkdir(parents=True, exist_ok=True)
    place = args.out / f"serving-{args.name}"
    check_plot(place.with_suffix(".png"), option="--out")
    machine = describe_machine()
    what = {
        "weights": weights_of(bundle.manifest),
        "versions": {**machine.versions, **{name: package_version(name) or "" for name in ("litserve", "diffusers")}},
        **{key: getattr(args, key) for key in ("device", "threads", "arrivals", "seconds", "seed", "most", "wait_ms")},
        "trace": None if not trace else digest(msgspec.to_builtins(trace)),
        "told": str(limits[0]),
        "compared_with": names[0],
    }
    key = {**what, "processor": machine.processor, "cores": machine.cores, "mixes": msgspec.to_builtins(known)}
    folder = args.scratch / digest(key)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        clients: dict[str, Client] = {}

        def client(name: str) -> Client:
            if name not in clients:
                log(f"{name}: starting")
                setup = Setup(
                    contender=name,
                    bundle=str(args.bundle.resolve()),
                    device=args.device,
                    threads=args.threads,
                    most=args.most,
                    wait=args.wait_ms / 1e3,
                )
                clients[name] = Client(setup, folder / f"{name}.log")
                stack.callback(clients[name].close)
            return clients[name]

        measurement = Measurement(
            manifest=bundle.manifest,
            names=names,
            mixes=mixes,
            arrivals=args.arrivals,
            trace=trace,
            seconds=args.seconds,
            seed=args.seed,
            limits=limits,
            folder=folder,
            client=client,
        )
        compared = measurement.compare()
        alone = dict(compared.alone)
        capacities = {mix: measurement.capacity(mix, alone) for mix in mixes}
        loads = [Load(mix=mix, share=share, rate=share * capacities[mix]) for mix in mixes for share in shares]
        if args.record is not None:
            write_trace(args.record, measurement.asks(loads[-1], alone))
            log(f"written: {args.record}")
            return
        windows = measure(measurement, loads, alone)
    document = {
        "bundle": bundle.manifest.name,
        "command": command,
        "machine": msgspec.to_builtins(machine),
        **what,
        "tolerance": TOLERANCE,
        "attained": ATTAINED,
        "contenders": [
            {"name": name, "what": CONTENDERS[name], "largest_difference": compared.differences[name]} for name in names
        ],
        "mixes": [
            {
                "name": mix,
                "mix": msgspec.to_builtins(mixes[mix]),
                "capacity": capacities[mix],
                **held(mix, windows, limits),
                "loads": [
                    {
                        "load": load.share,
                        "rate": load.rate,
                        "contenders": {name: figures(window, limits, args.seconds) for name, window in found.items()},
                    }
                    for load, found in windows.items()
                    if load.mix == mix
                ],
            }
            for mix in mixes
        ],
    }
    write_record(place.with_suffix(".json"), document)
    write_text(place.with_suffix(".md"), markdown(document))
    plot(place.with_suffix(".png"), document)
    print(markdown(document), end="")


Windows = Mapping[Load, Mapping[str, Window]]


def measure(measurement: Measurement, loads: Sequence[Load], alone: Mapping[Kind, float]) -> Windows:
    """All contenders under each load in turn, another one after the first each time; those that can't keep up are left
    out of larger loads. The first contender is not, and comes first: the others are compared with its pictures."""
    names = list(measurement.names)
    windows: dict[Load, dict[str, Window]] = {}
    full: set[tuple[str, str]] = set()
    with progress_bar("loading", len(loads) * len(names), counted="windows") as bar:
        for index, load in enumerate(loads):
            asks = measurement.asks(load, alone)
            others = names[1:]
            order = names[:1] + [others[(index + i) % len(others)] for i in range(len(others))]
            windows[load] = {}
            for name in order:
                bar.update(text=f"{load.mix} at load {load.share:g}: {name}")
                if (load.mix, name) not in full:
                    windows[load][name] = window = measurement.window(load, name, asks, alone)
                    if name != names[0] and measurement.given_up(window):
                        full.add((load.mix, name))
                bar.advance()
    return {load: {name: found[name] for name in names if name in found} for load, found in windows.items()}


def held(mix: str, windows: Windows, limits: Sequence[Limit]) -> dict[str, Any]:
    """For each limit the largest rate at which every contender holds it, and by how much ours is above the others'."""
    rates: dict[str, dict[str, Any]] = {}
    gains: dict[str, dict[str, str]] = {}
    for limit in limits:
        points: dict[str, dict[float, float]] = {}
        for load, found in windows.items():
            for name, window in found.items():
                if load.mix == mix:
                    points.setdefault(name, {})[load.rate] = strain(window.served, limit)
        best = {name: sustained(each) for name, each in points.items()}
        rates[str(limit)] = {n: {"rate": each.rate, "bound": each.bound, "text": str(each)} for n, each in best.items()}
        for name, theirs in best.items():
            if OURS in best and not name.startswith(OURS):
                gains.setdefault(name, {})[str(limit)] = best[OURS].over(theirs)
    return {"sustained": rates, "gain": gains}


# --- the command line


def chosen_contenders(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CONTENDERS:
            raise unknown_name("contender", name, CONTENDERS)
    if len(set(names)) != len(names):
        raise BadInput(f"--contenders {text} names one twice", hint=f"e.g. --contenders {','.join(CONTENDERS)}")
    return names


def known_mixes(args: argparse.Namespace) -> dict[str, Mix]:
    """All of them, with what the command line changes."""
    changes: dict[str, Any] = {}
    if args.steps is not None:
        changes["steps"] = tuple(parse_numbers(args.steps, what="steps", example="--steps 10,20,50"))
    if args.fractions is not None:
        changes["fractions"] = parse_fractions(args.fractions)
    if args.sizes is not None:
        pixels = [parse_pixels(size) for size in args.sizes.split(",")]
        changes["sizes"] = tuple((height, width) for width, height in pixels)
    return {name: msgspec.structs.replace(mix, **changes) for name, mix in MIXES.items()}


def chosen_mixes(text: str, known: Mapping[str, Mix]) -> dict[str, Mix]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise unknown_name("mix", name, known)
    return {name: known[name] for name in names}


def chosen_loads(args: argparse.Namespace) -> list[float]:
    try:
        loads = sorted({float(part) for part in args.loads.split(",")})
    except ValueError:
        loads = [0.0]
    if not 0 < loads[0] <= loads[-1] <= 100 or not 0 < args.seconds <= 1e5 or not 1 <= args.most <= 1024:
        raise BadInput(
            f"--loads {args.loads} --seconds {args.seconds:g} --most {args.most}; allowed are loads up to 100, seconds "
            "above 0 and 1 to 1024 requests",
            hint="e.g. --loads 0.5,1 --seconds 15 --most 8",
        )
    if (args.arrivals == "trace") != (args.trace is not None):
        raise BadInput(
            f"--arrivals {args.arrivals} with --trace {args.trace}: a trace is one kind of arrivals",
            hint="use --arrivals trace --trace FILE",
        )
    return loads


if __name__ == "__main__":
    sys.exit(main())
