"""``tstitch-trt search``: the Pareto set of cost and quality over schedules, step counts and solvers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import Command, command_line, json_option, traceback_option
from tstitch_trt.cli._options import bundle_argument, load_runtime, runtime_options

if TYPE_CHECKING:
    from tstitch_trt.runtime.step_graphs import GraphMode
    from tstitch_trt.study.records import Search

__all__ = ["command"]

EXAMPLES = """
tstitch-trt search fashion.bundle
tstitch-trt search fashion.bundle --steps 10,20,50 --solvers ddim,dpmpp-2m --samples 2000 --plot search.png
tstitch-trt search fashion.bundle --metric latent_error --samples 64 --trials 12 --budget-minutes 5 --json
tstitch-trt search sd15.bundle --metric latent_error --steps 10,25 --samples 16 --prompts prompts.txt
"""

_FILE = click.Path(path_type=Path)


@click.command("search", cls=Command, examples=EXAMPLES)
@bundle_argument
@click.option(
    "--metric",
    metavar="NAME",
    help="fid, kid, precision, recall, accuracy, lpips, clip or latent_error. [fid where the bundle has a network]",
)
@click.option("--steps", metavar="LIST", help="Step counts to search over. [a fifth, two fifths, all of the default]")
@click.option("--solvers", metavar="LIST", help="Solvers to search over. [bundle's default]")
@click.option(
    "--fractions",
    default="0.2:0.8:0.2",
    show_default=True,
    metavar="LIST",
    help="Shares of the steps on each of the smaller members.",
)
@click.option("--guidance", type=float, metavar="G", help="Guidance scale; 1 is none. [bundle's default]")
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    metavar="N",
    help="Of each that is not beaten.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S", help="Of the first sample.")
@click.option("--prompts", type=_FILE, metavar="FILE", help="What a text bundle draws, one text a line. [made up]")
@click.option("--batch", type=click.IntRange(1), metavar="B", help="Images of the request whose cost counts. [8]")
@click.option("--trials", type=click.IntRange(0), metavar="N", help="At most so many candidates, at random. [all]")
@click.option("--budget-minutes", type=float, metavar="M", help="Begin no round of samples after so long.")
@click.option("--reference", type=_FILE, metavar="FILE.npz", help="Real pictures or statistics. [the bundle's own]")
@click.option("--features", type=_FILE, metavar="FILE", help="Feature network, ONNX or TorchScript. [the bundle's own]")
@click.option(
    "--features-option",
    "features_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="How to call it: size=299, range=0:1, output=NAME, channels=3. May be repeated.",
)
@click.option("--lpips", type=_FILE, metavar="FILE", help="LPIPS network: two batches of pictures to distances.")
@click.option("--clip", type=_FILE, metavar="DIR", help="A CLIP model's folder, for bundles that draw from text.")
@click.option("--work", type=_FILE, metavar="DIR", help="Samples that were drawn. [in the cache directory]")
@click.option("--plot", type=_FILE, metavar="FILE.png", help="Draw quality against cost.")
@runtime_options
@json_option
@traceback_option
def command(
    bundle: Path,
    metric: str | None,
    steps: str | None,
    solvers: str | None,
    fractions: str,
    guidance: float | None,
    samples: int,
    seed: int,
    prompts: Path | None,
    batch: int | None,
    trials: int | None,
    budget_minutes: float | None,
    reference: Path | None,
    features: Path | None,
    features_options: tuple[str, ...],
    lpips: Path | None,
    clip: Path | None,
    work: Path | None,
    plot: Path | None,
    device: str,
    backend: str | None,
    threads: int | None,
    graph: GraphMode,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Find the settings of BUNDLE that no other beats in both time and quality.

    Candidates are two- and three-member schedules, large-small-large, and the last member alone in fewer steps, which
    is what a stitched schedule has to beat. Time is predicted by the bundle's calibration of this machine (tstitch-trt
    calibrate), quality is measured. All begin with few samples; one that is clearly worse than another that costs no
    more is dropped, and the samples of the others are doubled. The set is kept in the bundle and used by --budget-ms.

    Stop it at any time: the same command goes on with the samples that were drawn.
    """
    from tstitch_engines.bundle.cache import default_root
    from tstitch_trt.cli._parsing import parse_fractions, parse_numbers, parse_pairs
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.files import read_lines
    from tstitch_trt.plots.figure import check_plot
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.study.quality.network import NetworkOptions
    from tstitch_trt.study.quality.scorer import Scorer
    from tstitch_trt.study.search.search import check_search, search, usual_metric
    from tstitch_trt.study.store import save_study

    check_search(metric, samples)
    options = NetworkOptions.parse(parse_pairs(features_options, option="--features-option", value="VALUE"))
    shares = parse_fractions(fractions)
    counts = None if steps is None else parse_numbers(steps, what="steps", example="--steps 10,20,50")
    texts = [] if prompts is None else read_lines(prompts, option="--prompts")
    if plot is not None:
        check_plot(plot)
    with (
        load_runtime(bundle, device=device, backend=backend, threads=threads, graph=graph, rebuild=rebuild) as runtime,
        progress_bar("searching") as bar,
    ):
        scorer = Scorer.of(
            runtime.bundle,
            metric or usual_metric(runtime.manifest),
            reference=reference,
            features=features,
            options=options,
            lpips=lpips,
            clip=clip,
            threads=threads or 0,
        )
        study = search(
            runtime,
            scorer,
            work=work or default_root() / "search",
            samples=samples,
            seed=seed,
            batch=batch,
            steps=counts,
            solvers=None if solvers is None else [part.strip() for part in solvers.split(",")],
            fractions=shares,
            guidance=guidance,
            prompts=texts,
            trials=trials,
            budget_s=None if budget_minutes is None else 60 * budget_minutes,
            command=command_line(click.get_current_context()),
            progress=bar,
        )
        place = save_study(runtime.bundle, study)
    if plot is not None:
        from tstitch_trt.plots.search import plot_search

        plot_search(plot, study)
        log(f"plot: {plot}")
    log(f"record: {place}")
    if as_json:
        print_json(study)
    else:
        _print(study)


def _print(study: Search) -> None:
    from tstitch_trt.cli._text import print_table

    click.echo(
        f"{study.bundle}: {study.metric} of {study.samples} samples, time predicted of {study.batch} images, "
        f"{len(study.points)} candidates, {sum(p.dropped for p in study.points)} of them dropped early\n"
    )
    print_table(
        ("front", "ms", study.metric, "low", "high", "samples", "kind", "solver", "steps", "schedule"),
        [
            (
                "*" if p.front else "",
                f"{p.cost_ms:.1f}",
                f"{p.quality.value:.4g}",
                f"{p.quality.low:.4g}",
                f"{p.quality.high:.4g}",
                f"{p.samples}" + (" (dropped)" if p.dropped else ""),
                p.kind,
                p.setting.solver,
                str(p.setting.steps),
                p.setting.schedule,
            )
            for p in study.points
        ],
    )
    for note in study.notes:
        click.echo(f"\nnote: {note}")
