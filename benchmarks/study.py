"""The tables of a study: what ``tstitch-trt evaluate``, ``profile``, ``search`` and ``calibrate`` keep in a bundle.

    tstitch-trt evaluate build/fashion.bundle --guidance 1
    python benchmarks/study.py build/fashion.bundle

Copies the bundle's studies to ``--out`` and writes ``study.md`` beside them: T-Stitch's table in both orders, other
orders at equal cost, the large member alone in fewer steps, solvers and step counts. Measures nothing itself. See
``benchmarks/README.md``.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from gpubench.script import parser_of, run_script

from tstitch_engines.bundle.bundle import STUDIES, Bundle, open_bundle
from tstitch_engines.errors import BadInput
from tstitch_trt.files import write_text
from tstitch_trt.study.evaluate.claim import Claim, claimed_metric, claims_of
from tstitch_trt.study.noninferiority import Judgement, judge
from tstitch_trt.study.records import Calibration, Divergence, Evaluation, Measure, Point
from tstitch_trt.study.settings import share_in_order
from tstitch_trt.study.store import differing_weights, load_studies

METRICS: Final = ("fid", "kid", "precision", "recall", "accuracy")
NAMES: Final = {"fid": "Fréchet distance", "kid": "kernel distance"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "study")
    args = parser.parse_args(argv)
    return run_script(lambda: run(args.bundle, args.out))


def run(place: Path, out: Path) -> None:
    bundle = open_bundle(place)
    text = tables(bundle)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted((bundle.root / STUDIES).glob("*.json")):
        shutil.copyfile(file, out / file.name)
    write_text(out / "study.md", text)
    sys.stdout.write(text)


def tables(bundle: Bundle) -> str:
    """Of the studies of the bundle's own weights. Raises ``BadInput`` where nothing was evaluated."""
    manifest = bundle.manifest
    found = [e for e in load_studies(bundle, Evaluation) if not differing_weights(manifest, e)]
    found.sort(key=lambda evaluation: -evaluation.samples)
    if not found:
        raise BadInput(
            f"{bundle.root} has no evaluation of its own weights", hint=f"run: tstitch-trt evaluate {bundle.root}"
        )
    members = tuple(manifest.members)
    parts = [part for evaluation in found for part in _of_evaluation(evaluation, members)]
    for divergence in sorted(load_studies(bundle, Divergence), key=lambda study: -len(study.seeds))[:1]:
        parts += _of_divergence(divergence)
    for calibration in load_studies(bundle, Calibration):
        parts += _of_calibration(calibration)
    return "\n".join(parts) + "\n"


def _of_evaluation(evaluation: Evaluation, members: Sequence[str]) -> list[str]:
    machine = evaluation.machine
    parts = [
        f"## {evaluation.samples:,} samples a point\n",
        f"Seeds from {evaluation.seed}; {evaluation.reference.get('count', 0):,} reference pictures; in brackets the "
        f"{evaluation.level:.0%} interval of {evaluation.resamples} resamples. {evaluation.backend} on "
        f"{machine.processor}, {evaluation.made}.\n",
        *(f"{note}.\n" for note in evaluation.notes),
    ]
    points = evaluation.points
    most = max(point.setting.steps for point in points)
    ((solver, steps), _), *_ = Counter((p.setting.solver, p.setting.steps) for p in points).most_common(1)
    alike = [p for p in points if (p.setting.solver, p.setting.steps) == (solver, steps)]
    shares = {order: _by_share(alike, members, order) for order in ("small-first", "large-first")}
    ordered = [p for order in shares.values() for p in order]
    for order, mine in shares.items():
        if len(mine) > 2:
            parts += [f"### {order}, {solver}, {steps} steps\n", _table(mine, _share(members), members[0])]
    others = [p for p in alike if p not in ordered]
    if others:
        parts += ["### Other orders\n", _table(others, lambda p: f"`{_short(p)}`", "schedule")]
    fewer = [p for p in points if set(p.setting.members) == {members[-1]} and p.setting.solver == solver]
    if len(fewer) > 2:
        title = f"### {members[-1]} alone in fewer steps, {solver}\n"
        fewer.sort(key=lambda point: -point.setting.steps)
        parts += [title, _table(fewer, lambda p: f"{p.setting.steps}", "steps"), _against_the_first(fewer, evaluation)]
    rest = [p for p in points if len({q.setting.solver for q in points}) > 1 and p.setting.steps <= most]
    if rest:
        parts += ["### Solvers and step counts\n", _table(rest, _full(members), f"solver, steps, {members[0]}'s share")]
    for claim in claims_of(evaluation, members):
        parts.append(f"{claim.text(members[0], members[-1], NAMES.get(claim.metric, claim.metric))}.\n")
        parts.append(_trials(claim, members[0]))
    return parts


def _by_share(points: Iterable[Point], members: Sequence[str], order: str) -> list[Point]:
    shares = [(share_in_order(point.setting, members, order), point) for point in points]
    return [point for _, point in sorted(((s, p) for s, p in shares if s is not None), key=lambda pair: pair[0])]


def _share(members: Sequence[str]) -> Callable[[Point], str]:
    return lambda point: f"{point.setting.members.get(members[0], 0) / point.setting.rows:.0%}"


def _full(members: Sequence[str]) -> Callable[[Point], str]:
    share = _share(members)
    return lambda point: f"{point.setting.solver}, {point.setting.steps}, {share(point)}"


def _trials(claim: Claim, first: str) -> str:
    """The test fraction by fraction."""
    return _judgements(first, {f"{trial.fraction:.0%}": trial.judgement for trial in claim.trials})


def _against_the_first(points: Sequence[Point], evaluation: Evaluation) -> str:
    """The same test of fewer steps."""
    metric = claimed_metric(evaluation)
    known = [point for point in points if metric is not None and metric in point.measures]
    if metric is None or len(known) < 2:
        return ""
    first, *others = ((f"{point.setting.steps}", point.measures[metric]) for point in known)
    samples, margin = evaluation.samples, evaluation.margin
    found = {steps: judge(metric, m, first[1], samples=samples, margin=margin) for steps, m in others}
    return _judgements(f"{NAMES.get(metric, metric)} against {first[0]} steps", found)


def _judgements(title: str, found: Mapping[str, Judgement | None]) -> str:
    """Nothing where the record keeps no resamples to compare."""
    if not any(found.values()):
        return ""
    rows = [f"| {title} | difference | at most (95 %) | margin | |", "|---|---|---|---|---|"]
    for name, one in found.items():
        cells = [""] * 4
        if one is not None:
            cells = [f"{one.difference:+.3g}", f"{one.upper:+.3g}", f"{one.margin:.3g}", one.verdict]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _short(point: Point) -> str:
    """The schedule; a long one that alternates by its first members and their counts."""
    text = point.setting.schedule
    if text.count(",") <= 4:
        return text
    counts = ", ".join(f"{count} {name}" for name, count in point.setting.members.items())
    return f"{','.join(text.split(',')[:4])},... ({counts})"


def _table(points: Sequence[Point], first: Callable[[Point], str], title: str) -> str:
    metrics = [name for name in METRICS if any(name in point.measures for point in points)]
    timed = any(point.ms for point in points)
    header = [title, *(NAMES.get(name, name) for name in metrics), *(["ms per image"] if timed else [])]
    rows = [header, ["---"] * len(header)]
    for point in points:
        cells = [_measure(point.measures.get(name)) for name in metrics]
        rows.append([first(point), *cells, *([f"{point.ms / point.batch:.1f}" if point.ms else ""] if timed else [])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _measure(measure: Measure | None) -> str:
    return "" if measure is None else f"{measure.value:.4g} [{measure.low:.4g}, {measure.high:.4g}]"


def _of_divergence(study: Divergence) -> list[str]:
    rows = ["| order | schedule | relative L2 of the final latents (p10 to p90) |", "|---|---|---|"]
    rows += [
        f"| {t.order} | `{t.schedule}` | {t.latent_error:.3g} ({t.p10:.3g} to {t.p90:.3g}) |" for t in study.orders
    ]
    title = f"## Orders, {len(study.seeds)} seeds, {study.steps} {study.solver} steps\n"
    return [title, "\n".join(rows) + "\n", f"Suggested: `{study.suggested}`. {study.reason}\n"]


def _of_calibration(study: Calibration) -> list[str]:
    conditions = f"{study.backend} on {study.machine.processor}, {study.threads or 'all'} threads"
    errors = f"error {study.median_error:.1%} in the median, {study.worst_error:.1%} at worst"
    text = f"{len(study.checks)} random schedules, {conditions}, load {study.machine.load:g}: {errors}.\n"
    return ["## Predicted against measured\n", text]


if __name__ == "__main__":
    sys.exit(main())
