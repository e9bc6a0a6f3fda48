"""``tstitch-trt search``: the Pareto set of cost and quality over schedules, step counts and solvers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import command_line, option, tstitch_command
from tstitch_trt.cli._options import LoadOptions, PromptsFile, QualityOptions

if TYPE_CHECKING:
    from tstitch_trt.study.records import Search

__all__ = ["command"]

EXAMPLES = """
tstitch-trt search fashion.bundle
tstitch-trt search fashion.bundle --steps 10,20,50 --solvers ddim,dpmpp-2m --samples 2000 --plot search.png
tstitch-trt search fashion.bundle --metric latent_error --samples 64 --trials 12 --budget-minutes 5 --json
tstitch-trt search sd15.bundle --metric latent_error --steps 10,25 --samples 16 --prompts prompts.txt
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    metric: str | None = option(
        "fid, kid, precision, recall, accuracy, lpips, clip or latent_error. [fid where the bundle has a network]",
        "NAME",
    )
    steps: str | None = option("Step counts to search over. [a fifth, two fifths, all of the default]", "LIST")
    solvers: str | None = option("Solvers to search over. [bundle's default]", "LIST")
    fractions: str = option("Shares of the steps on each of the smaller members.", "LIST", default="0.2:0.8:0.2")
    guidance: float | None = option("Guidance scale; 1 is none. [bundle's default]", "G")
    samples: int = option("Samples of each setting that no other beats.", "N", default=1000, least=1)
    seed: int = option("Seed of the first sample.", "S", default=0, least=0)
    batch: int | None = option("Images in the request whose time is compared. [8]", "B", least=1)
    margin: float | None = option(
        "The largest loss that counts as no worse, as a share of the last member's own value. [0.05]", "SHARE"
    )
    trials: int | None = option("The most candidates, chosen at random. [all]", "N", least=0)
    budget_minutes: float | None = option("Start no further round of samples after this time.", "M")
    work: Path | None = option("Where samples are kept. [the cache directory]", "DIR")
    plot: Path | None = option("Draw quality against cost.", "FILE.png")


@tstitch_command("search", EXAMPLES, wanted=Options, texts=PromptsFile, quality=QualityOptions, load=LoadOptions)
def command(
    bundle: Path, wanted: Options, texts: PromptsFile, quality: QualityOptions, load: LoadOptions, as_json: bool
) -> None:
    """Find the settings of BUNDLE that no other beats in both time and quality.

    Candidates are schedules of two and three members, large-small-large, and the last member alone in fewer steps,
    which a stitched schedule has to beat. Time is predicted by the bundle's calibration of this machine (tstitch-trt
    calibrate), quality is measured. All candidates begin with few samples. One that is clearly worse than another that
    costs no more is dropped; the others get twice as many samples, and so on. What is left is compared by the upper
    95 % bound of its loss against the last member alone, paired by seed. The result is kept in the bundle and used by
    --budget-ms, unless its samples are too few to tell any schedule from the last member alone.

    You can stop at any time: the same command goes on with the samples that were drawn.
    """
    from tstitch_engines.bundle.cache import default_root
    from tstitch_trt.cli._parsing import parse_fractions, parse_numbers
    from tstitch_trt.cli._text import print_result
    from tstitch_trt.plots.figure import check_plot
    from tstitch_trt.plots.search import plot_search
    from tstitch_trt.progress import progress_bar
    from tstitch_trt.study.noninferiority import check_margin
    from tstitch_trt.study.records import MARGIN
    from tstitch_trt.study.search.search import check_search, search, usual_metric
    from tstitch_trt.study.store import save_study

    check_search(wanted.metric, wanted.samples)
    margin = MARGIN if wanted.margin is None else check_margin(wanted.margin, "--margin")
    quality.network()
    shares = parse_fractions(wanted.fractions)
    steps = None if wanted.steps is None else parse_numbers(wanted.steps, what="steps", example="--steps 10,20,50")
    prompts, minutes = texts.texts(), wanted.budget_minutes
    check_plot(wanted.plot)
    with load.open(bundle) as runtime, progress_bar("searching") as bar:
        metric = wanted.metric or usual_metric(runtime.manifest)
        study = search(
            runtime,
            quality.scorer(runtime.bundle, metric, threads=load.threads or 0, limits=load.limits()),
            work=wanted.work or default_root() / "search",
            samples=wanted.samples,
            seed=wanted.seed,
            batch=wanted.batch,
            steps=steps,
            solvers=None if wanted.solvers is None else [part.strip() for part in wanted.solvers.split(",")],
            fractions=shares,
            guidance=wanted.guidance,
            prompts=prompts,
            trials=wanted.trials,
            budget_s=None if minutes is None else 60 * minutes,
            margin=margin,
            command=command_line(),
            progress=bar,
        )
        record = save_study(runtime.bundle, study, key=study.key)
    print_result(study, as_json, _print, record=record, plot=wanted.plot, draw=plot_search)


def _print(study: Search) -> None:
    from tstitch_trt.cli._text import print_table

    click.echo(
        f"{study.bundle}: {study.metric} of {study.samples} samples, time predicted of {study.batch} images, "
        f"{len(study.points)} candidates, {sum(p.dropped for p in study.points)} of them dropped early\n"
    )
    rows = []
    for p in study.points:
        values = (f"{value:.4g}" for value in (p.quality.value, p.quality.low, p.quality.high))
        samples = f"{p.samples}" + (" (dropped)" if p.dropped else "")
        how = (p.kind, p.setting.solver, str(p.setting.steps), p.setting.schedule)
        rows.append(("*" if p.front else "", f"{p.cost_ms:.1f}", *values, samples, *how))
    print_table(("front", "ms", study.metric, "low", "high", "samples", "kind", "solver", "steps", "schedule"), rows)
    for note in study.notes:
        click.echo(f"\nnote: {note}")
