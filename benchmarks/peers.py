"""The same pair, schedule and seeds through PyTorch, torch.compile, diffusers and this package, side by side.

    tstitch-trt build fashion -o build/fashion.bundle
    python benchmarks/peers.py build/fashion.bundle --threads 1

Every contender is given the weights of the bundle, the same noise and the same labels, and the same number of threads.
First the final latents of each are compared with ours at every fraction; who differs ends the run, before anything is
timed. Then all are timed in turn in every round. Writes ``peers.json``, ``peers.md`` and ``peers.png``. Stop it at any
time: the same command goes on after the last finished round. See ``benchmarks/README.md``.

Contenders, of which ``--contenders`` names some: ``ours:BACKEND`` with ``+OPTION=VALUE`` for an option of that backend
(the first of them is what the others are compared with), ``torch-eager``, ``torch-compile``, ``diffusers``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from gpubench.ceilings import synchronize
from gpubench.contenders import Contender, Work, make_contender, need_contenders
from gpubench.diffusers_trajectory import SOLVERS
from gpubench.peers_report import markdown, plot
from gpubench.script import parser_of, run_script, share_inductor_cache, write_record
from gpubench.trajectories import error_of

from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.identity import digest, model_digest
from tstitch_engines.errors import BadInput, FailedWork
from tstitch_trt.cli._parsing import parse_fractions
from tstitch_trt.files import write_text
from tstitch_trt.plots.figure import check_plot
from tstitch_trt.progress import log, progress_bar
from tstitch_trt.study.machine import describe_machine, package_version
from tstitch_trt.study.statistics import spread

CONTENDERS: Final = ("ours:onnxruntime", "ours:torch+compile=default", "torch-eager", "torch-compile", "diffusers")

# Relative L2 difference of final latents from ours up to which a contender has done the same work. All compute in
# float32, whose rounding costs 1e-7 to 1e-5; diffusers also keeps its noise schedule in float32, which costs up to 3e-4
# (squared-cosine, in the last step). Other work, such as the wrong class or timestep, is off by 1e-2 and more.
TOLERANCE: Final = 1e-3

_SETTLE_SECONDS: Final = 0.05  # threads of the one before spin for a while and would slow the next

Round = dict[str, Any]  # {"load": the load average at its start, "ms": {fraction: {contender: milliseconds}}}


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads of every contender (default: all cores)")
    parser.add_argument("--batch", type=int, default=8, help="images per trajectory (default 8)")
    parser.add_argument("--steps", type=int, default=50, help="default 50")
    parser.add_argument("--solver", choices=SOLVERS, default="ddim", help="default ddim")
    parser.add_argument("--fractions", default="0,0.4,1", help="the first member's shares (default 0,0.4,1)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale (default 1, none)")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "peers")
    parser.add_argument("--scratch", type=Path, default=Path("build/peers"), help="unfinished work is kept here")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/peers.py", *(sys.argv[1:] if argv is None else argv)])
    return run_script(lambda: run(args, command))


def run(args: argparse.Namespace, command: str) -> None:
    if min(args.repeats, args.batch, 1 if args.threads is None else args.threads) < 1:
        raise BadInput(
            f"--repeats {args.repeats} --batch {args.batch} --threads {args.threads}; allowed is 1 or more of each",
            hint="leave them out for 9, 8 and all cores",
        )
    names = tuple(args.contenders.split(","))
    need_contenders(names)
    args.out.mkdir(parents=True, exist_ok=True)
    check_plot(args.out / "peers.png", option="--out")
    machine = describe_machine()  # before this process itself loads the machine
    bundle = open_bundle(args.bundle)
    work = Work(
        bundle=bundle,
        device=args.device,
        threads=args.threads or machine.cores,
        batch=args.batch,
        seed=args.seed,
        fractions=parse_fractions(args.fractions),
        settings={"steps": args.steps, "solver": args.solver, "guidance": args.guidance},
        scratch=args.scratch,
    )
    what = {
        "weights": {name: model_digest(member.onnx) for name, member in bundle.manifest.members.items()},
        "versions": {**machine.versions, "diffusers": package_version("diffusers") or "not installed"},
        **{key: getattr(work, key) for key in ("device", "threads", "batch", "seed", "fractions")},
        **work.settings,
        "contenders": names,
    }
    place = {"processor": machine.processor, "cores": machine.cores, "gpus": machine.gpus}
    folder = args.scratch / digest({**what, **place})[:16]
    folder.mkdir(parents=True, exist_ok=True)
    share_inductor_cache(args.scratch)

    made: list[Contender] = []
    with work.torch_threads():
        try:
            for name in names:
                log(f"{name}: getting ready")
                made.append(make_contender(name, work))
            ours = next(contender for contender in made if contender.ours)
            differences = compare(made, ours, work.fractions)
            rounds = measure(made, work, args.repeats, folder / "rounds.json")
        finally:
            for contender in made:
                contender.close()

    document = {
        "bundle": bundle.manifest.name,
        **what,
        "command": command,
        "machine": msgspec.to_builtins(machine),
        "repeats": args.repeats,
        "loads": [one["load"] for one in rounds],
        "schedules": {
            f"{fraction:g}": ",".join(f"{run.name}:{run.stop - run.start}" for run in plan.schedule.segments)
            for fraction, plan in work.plans.items()
        },
        "tolerance": TOLERANCE,
        "compared_with": ours.name,
        "contenders": [row(contender, ours, work, differences[contender.name], rounds) for contender in made],
    }
    write_record(args.out / "peers.json", document)
    write_text(args.out / "peers.md", markdown(document))
    plot(args.out / "peers.png", document)
    print(markdown(document), end="")


def compare(made: Sequence[Contender], ours: Contender, fractions: Sequence[float]) -> dict[str, dict[float, float]]:
    """Contender -> fraction -> relative L2 difference of its final latents from ours. Raises ``FailedWork``.

    These are the first walks: what is compiled when it is first used is compiled here.
    """
    log(f"comparing latents with those of {ours.name}")
    want = {f: ours.first(f) for f in fractions}
    found: dict[str, dict[float, float]] = {}
    for contender in made:
        found[contender.name] = differences = {}
        for fraction in fractions:
            latents = want[fraction] if contender is ours else contender.first(fraction)
            differences[fraction] = error = error_of(latents, want[fraction])
            if not error <= TOLERANCE:
                raise FailedWork(
                    f"{contender.name} draws other latents than {ours.name} at fraction {fraction:g}: relative "
                    f"difference {error:.2e}; allowed is {TOLERANCE:.0e}, else the times compare different work",
                    hint="compare one call of each member: tstitch-trt verify BUNDLE; or leave it out of --contenders",
                )
    return found


def measure(made: Sequence[Contender], work: Work, repeats: int, path: Path) -> list[Round]:
    """Rounds of timed walks, those at ``path`` included: at each fraction all contenders in turn, another one first in
    each round. One round is not kept: after a start everything is cold."""
    rounds: list[Round] = json.loads(path.read_text()) if path.is_file() else []
    if rounds:
        log(f"going on after {min(len(rounds), repeats)} of {repeats} rounds in {path.parent}")
    if len(rounds) >= repeats:
        return rounds[:repeats]
    walks = (repeats - len(rounds) + 1) * len(made) * len(work.fractions)
    with progress_bar("warming up", walks, counted="runs") as bar:
        for index in range(len(rounds) - 1, repeats):
            kept = index >= len(rounds)
            order = [made[(index + i) % len(made)] for i in range(len(made))]
            load = round(os.getloadavg()[0], 2)
            times: dict[str, dict[str, float]] = {}
            for fraction in work.fractions:
                for contender in order:
                    bar.update(text=f"round {index + 1} of {repeats}" if kept else "warming up")
                    times.setdefault(f"{fraction:g}", {})[contender.name] = timed(contender, fraction, work.device)
                    bar.advance()
            if kept:
                rounds.append({"load": load, "ms": times})
                write_text(path, json.dumps(rounds))
    return rounds


def timed(contender: Contender, fraction: float, device: str) -> float:
    """Milliseconds from the request, its noise on the device, until the latents lie there."""
    time.sleep(_SETTLE_SECONDS)
    synchronize(device)
    start = time.perf_counter()
    contender.walk(fraction)
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def row(
    contender: Contender, ours: Contender, work: Work, differences: dict[float, float], rounds: list[Round]
) -> dict[str, Any]:
    trajectories = []
    for fraction, difference in differences.items():
        times = [one["ms"][f"{fraction:g}"] for one in rounds]
        ms, low, high = spread(each[contender.name] for each in times)
        ratio, ratio_low, ratio_high = spread(each[contender.name] / each[ours.name] for each in times)
        trajectories.append(
            {
                "fraction": fraction,
                "relative_difference": difference,
                "ms": ms,
                "p10_ms": low,
                "p90_ms": high,
                "images_per_second": 1e3 * work.batch / ms,
                "speedup_of_ours": ratio,
                "p10_speedup": ratio_low,
                "p90_speedup": ratio_high,
                "rounds_ms": [round(each[contender.name], 3) for each in times],
            }
        )
    return {"name": contender.name, "what": contender.what, **contender.costs(), "trajectories": trajectories}


if __name__ == "__main__":
    sys.exit(main())
