"""Everything that is claimed of CUDA, measured on a GPU: one command, one JSON per part, resumable.

    python benchmarks/gpu.py --out benchmarks/results/h200          # goes on where it stopped
    python benchmarks/gpu.py --out DIR --parts tests,'dit-s-xl-256-*' --budget-minutes 9
    python benchmarks/gpu.py --out DIR --list
    python benchmarks/gpu.py --out DIR --report
    python benchmarks/gpu.py --out DIR --smoke                      # tiny models, without a GPU: proves the script

Each part runs in a process of its own and is ended when its time is over; what it measured by then is kept, and the
same command takes it up again. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
try:
    import tstitch_trt  # noqa: F401
except ImportError:  # not installed: run from the checkout
    sys.path[:0] = [str(ROOT), str(ROOT / "export"), str(ROOT / "engines")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

from gpubench.cases import CONTENDERS, dit_cases, part_names  # noqa: E402
from gpubench.record import FINISHED, Context, Part, place_of, read_part  # noqa: E402
from gpubench.report import report  # noqa: E402
from gpubench.script import parser_of, run_script, share_inductor_cache  # noqa: E402
from gpubench.supervise import default_device, run_part  # noqa: E402

from tstitch_engines.errors import BadInput, unknown_name  # noqa: E402
from tstitch_trt.progress import log  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    return run_script(lambda: _child(args, given) if args.child else _main(args, given))


def _main(args: argparse.Namespace, given: list[str]) -> int:
    names = _chosen(args.parts, part_names(smoke=args.smoke))
    for name in args.contenders:
        if name not in CONTENDERS:
            raise unknown_name("contender", name, CONTENDERS)
    if not args.budget_minutes > 0 or args.rounds < 1:
        raise BadInput(
            f"--budget-minutes {args.budget_minutes:g} --rounds {args.rounds}; allowed: more than 0, and 1 or more",
            hint="leave them out for 9 and 5",
        )
    _sites(args.rtx_site)
    if args.list:
        for name in names:
            print(f"{name}\t{_state(args.out, name)}")
        return 0
    code = 0 if args.report else _run(args, names, given)
    print(report(args.out, part_names(smoke=args.smoke), smoke=args.smoke))
    return code


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files and report.md")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "build" / "gpubench", help="checkpoints, bundles, caches"
    )
    parser.add_argument("--parts", default="*", help="names or patterns, separated by commas (default: all)")
    parser.add_argument("--list", action="store_true", help="say what the parts are and how far they are")
    parser.add_argument("--report", action="store_true", help="only write report.md from the JSON files")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps; runs without a GPU")
    parser.add_argument("--again", action="store_true", help="forget what the chosen parts have measured")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="time of each part per run (default 9)")
    parser.add_argument("--total-minutes", type=float, help="start no part after this long, and cut the last short")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--contenders", type=_words, default=(), help=f"some of {', '.join(CONTENDERS)}")
    parser.add_argument("--device", help="cuda:N or cpu (default: cuda:0 where there is one)")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four idx.gz files, for the part train")
    parser.add_argument("--train-minutes", type=float, default=12.0, help="training of the large member (default 12)")
    parser.add_argument("--rtx-site", action="append", default=[], metavar="VERSION=DIR", help="unpacked RTX wheels")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _chosen(text: str, known: tuple[str, ...]) -> list[str]:
    """The parts that ``text`` names, in the order of their worth. Raises ``UnknownName``."""
    found: set[str] = set()
    for word in _words(text):
        matching = fnmatch.filter(known, word)
        if not matching:
            raise unknown_name("part", word, known, hint="(--list says more; patterns such as 'dit-*' are allowed)")
        found.update(matching)
    return [name for name in known if name in found]


def _sites(given: list[str]) -> dict[str, Path]:
    """``VERSION=DIR`` by version. Raises ``BadInput``."""
    found = {}
    for text in given:
        version, _, folder = text.partition("=")
        if not version or not Path(folder or "missing/").is_dir():
            raise BadInput(
                f"--rtx-site {text!r}; allowed is VERSION=DIR with an existing folder",
                hint=f"--rtx-site {version or '1.6.1'}=DIR, where DIR holds that version's unpacked wheels",
            )
        found[version] = Path(folder).resolve()
    return found


def _state(out: Path, name: str) -> str:
    part = read_part(out / f"{name}.json")
    if part is None:
        return "to do"
    return str(part.get("reason", part["status"])) if part["status"] == "not run" else str(part["status"])


# --- the parent: one process per part


def _run(args: argparse.Namespace, names: list[str], given: list[str]) -> int:
    share_inductor_cache(args.scratch)
    started, failed = time.monotonic(), False
    device = args.device or default_device()
    for name in names:
        path = args.out / f"{name}.json"
        before = read_part(path)
        if args.again and before is not None:
            path.unlink()
        elif before is not None and before["status"] in FINISHED and _same(before, args, device):
            log(f"{name}: done before")
            continue
        seconds = 60 * args.budget_minutes
        if args.total_minutes is not None:
            seconds = min(seconds, 60 * args.total_minutes - (time.monotonic() - started))
            if seconds < 1:
                log(f"{name}: put off, the {args.total_minutes:g} minutes are over")
                continue
        log(f"{name} ...")
        part, problem = run_part(given, args.out, name, device, seconds)
        log(f"{name}: {_state(args.out, name)}" + (f" ({problem})" if problem else ""))
        entries = [] if part is None else part["entries"].values()
        failed |= part is None or part["status"] == "failed" or any(e["status"] == "failed" for e in entries)
    return 1 if failed else 0


def _same(part: dict[str, Any], args: argparse.Namespace, device: str) -> bool:
    """Whether it was measured in this way, on such a machine, with every contender that is wanted now."""
    lacking = set(part.get("left_out", ())) & set(args.contenders or CONTENDERS)
    same = {"smoke": args.smoke, **place_of(device)}
    return all(part.get(key) == value for key, value in same.items()) and not lacking


# --- the child: one part


def _child(args: argparse.Namespace, given: list[str]) -> int:
    name = args.child
    deadline = float(os.environ.get("GPUBENCH_DEADLINE", time.time() + 60 * args.budget_minutes))
    words = given[: given.index("--child") - 2]  # as the user gave them
    context = Context(
        out=args.out.resolve(),
        scratch=args.scratch.resolve() / ("smoke" if args.smoke else "full"),
        smoke=args.smoke,
        device=args.device,
        deadline=time.monotonic() + deadline - time.time(),
        rounds=1 if args.smoke else args.rounds,
        only=args.contenders,
        command=shlex.join(["python", "benchmarks/gpu.py", *words]),
        data=args.data,
        train_minutes=args.train_minutes,
        rtx_sites=_sites(args.rtx_site),
    )
    os.environ.setdefault("TSTITCH_TRT_CACHE", str(context.scratch / "cache"))
    work, case = _work(context, name)
    part = Part(context, name, case)
    try:
        part.finish(lambda: work(context, part))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # it is in the record
        log(f"{name}: {type(error).__name__}: {error}")
        return 1
    return 0


def _work(context: Context, name: str) -> tuple[Callable[[Context, Part], None], dict[str, object]]:
    """What the part does, and the settings under which what it measured before still counts."""
    from gpubench import ceilings, commands, dit, first_parts, kernels, rtx, segments, soak

    for case in dit_cases(smoke=context.smoke):
        if case.name == name:
            return partial(dit.run_case, case=case), case.as_dict()
    works: dict[str, Callable[[Context, Part], None]] = {
        "tests": commands.tests_part,
        "sanitizer": commands.sanitizer_part,
        "rtx": rtx.rtx_part,
        "ceilings": ceilings.ceiling_parts,
        "segments": segments.segments_part,
        "soak": soak.soak_part,
        "kernels": kernels.kernel_part,
        "train": commands.train_part,
        **first_parts.PARTS,
    }
    return works[name], {}


if __name__ == "__main__":
    sys.exit(main())
