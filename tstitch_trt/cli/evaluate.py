"""``tstitch-trt evaluate``: how good the pictures of a list of schedules are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import Command, command_line, json_option, traceback_option
from tstitch_trt.cli._options import bundle_argument, load_runtime, runtime_options

if TYPE_CHECKING:
    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_engines.bundle.manifest import Manifest
    from tstitch_trt.runtime.step_graphs import GraphMode
    from tstitch_trt.study.records import Evaluation, Setting

__all__ = ["command"]

EXAMPLES = """
tstitch-trt evaluate fashion.bundle
tstitch-trt evaluate fashion.bundle --fractions 0,0.4,1 --orders small-first --samples 500 --json
tstitch-trt evaluate fashion.bundle --schedule large:10,small:30,large:10 --schedule small:0.4,large --steps 50
tstitch-trt evaluate fashion.bundle --fractions 0 --steps 10,20,50 --solver ddim,dpmpp-2m --plot steps.png
tstitch-trt evaluate dit.bundle --reference imagenet256.npz --features inception.onnx --npz samples
tstitch-trt evaluate sd15.bundle --metrics psnr,latent_error --prompts prompts.txt --samples 64
"""

_FILE = click.Path(path_type=Path)


@click.command("evaluate", cls=Command, examples=EXAMPLES)
@bundle_argument
@click.option("--reference", type=_FILE, metavar="FILE.npz", help="Real pictures or statistics. [the bundle's own]")
@click.option("--features", type=_FILE, metavar="FILE", help="Feature network, ONNX or TorchScript. [the bundle's own]")
@click.option(
    "--features-option",
    "features_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="How to call it: size=299, range=0:1, output=NAME, channels=3. May be repeated.",
)
@click.option(
    "--metrics",
    metavar="LIST",
    help="fid, kid, precision, recall, accuracy, psnr, lpips, clip, latent_error. [those that need nothing more]",
)
@click.option("--lpips", type=_FILE, metavar="FILE", help="LPIPS network: two batches of pictures to distances.")
@click.option("--clip", type=_FILE, metavar="DIR", help="A CLIP model's folder, for bundles that draw from text.")
@click.option(
    "--fractions",
    metavar="LIST",
    help="Shares of the steps on the first member. [0:1:0.1; none with --schedule]",
)
@click.option(
    "--orders",
    default="small-first,large-first",
    show_default=True,
    metavar="LIST",
    help="Which member starts, for --fractions.",
)
@click.option("--schedule", "schedules", multiple=True, metavar="TEXT", help="A schedule more. May be repeated.")
@click.option("--steps", metavar="LIST", help="Numbers of steps. [bundle's default]")
@click.option("--solver", metavar="LIST", help="Solvers. [bundle's default]")
@click.option("--guidance", type=float, metavar="G", help="Guidance scale; 1 is none. [bundle's default]")
@click.option("--samples", type=click.IntRange(2), default=2000, show_default=True, metavar="N", help="Per setting.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S", help="Of the first picture.")
@click.option("--prompts", type=_FILE, metavar="FILE", help="What a text bundle draws, one a line. [made up]")
@click.option(
    "--time",
    "rounds",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    metavar="N",
    help="Rounds in which each setting is timed.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, metavar="B", help="Images per timed trajectory."
)
@click.option("--resamples", type=click.IntRange(2), default=200, show_default=True, metavar="N", help="For intervals.")
@click.option("--npz", type=_FILE, metavar="DIR", help="Write the pictures of each setting, as ADM's evaluator reads.")
@click.option("--work", type=_FILE, metavar="DIR", help="Unfinished work. [in the cache directory]")
@click.option("--plot", type=_FILE, metavar="FILE.png", help="Draw each metric against the fraction and the time.")
@runtime_options
@json_option
@traceback_option
def command(
    bundle: Path,
    reference: Path | None,
    features: Path | None,
    features_options: tuple[str, ...],
    metrics: str | None,
    lpips: Path | None,
    clip: Path | None,
    fractions: str | None,
    orders: str,
    schedules: tuple[str, ...],
    steps: str | None,
    solver: str | None,
    guidance: float | None,
    samples: int,
    seed: int,
    prompts: Path | None,
    rounds: int,
    batch: int,
    resamples: int,
    npz: Path | None,
    work: Path | None,
    plot: Path | None,
    device: str,
    backend: str | None,
    threads: int | None,
    graph: GraphMode,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Draw pictures of BUNDLE over a list of schedules and measure how good they are.

    All settings share seeds and labels or prompts. Every value comes with a 95 % interval by resampling. The record is
    kept in the bundle (studies/); asked again with more schedules or metrics, it is extended. Stop it at any time: the
    same command goes on from the last finished batch.

    psnr, lpips and latent_error compare with what the last member alone draws from the same seeds; fid, kid, precision
    and recall compare with real pictures.
    """
    from tstitch_engines.bundle.cache import default_root
    from tstitch_trt.cli._parsing import parse_pairs
    from tstitch_trt.files import read_lines, require_parent
    from tstitch_trt.plots.figure import check_plot
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.study.evaluate.claim import claims_of
    from tstitch_trt.study.evaluate.evaluate import evaluate
    from tstitch_trt.study.image_set import ImageSet, prompts_for
    from tstitch_trt.study.quality.network import NetworkOptions
    from tstitch_trt.study.quality.scorer import Scorer
    from tstitch_trt.study.store import save_study

    options = NetworkOptions.parse(parse_pairs(features_options, option="--features-option", value="VALUE"))
    if plot is not None:
        check_plot(plot)
    if npz is not None:
        require_parent(npz, option="--npz")
        npz.mkdir(exist_ok=True)
    texts = [] if prompts is None else read_lines(prompts, option="--prompts")
    runtime = load_runtime(bundle, device=device, backend=backend, threads=threads, graph=graph, rebuild=rebuild)
    with runtime:
        manifest = runtime.manifest
        names = _list(metrics) if metrics else _usual_metrics(runtime.bundle, features, reference, lpips, clip)
        _check_used(names, reference=reference, features=features, lpips=lpips, clip=clip, options=features_options)
        place = work or default_root() / "evaluate"
        scorer = Scorer.of(
            runtime.bundle,
            names,
            reference=reference,
            features=features,
            options=options,
            lpips=lpips,
            clip=clip,
            threads=runtime.threads,
            cache=place / "references",
        )
        images = ImageSet(samples, seed, prompts_for(manifest, texts))
        settings = _settings(manifest, fractions, orders, schedules, steps, solver, guidance)
        for note in scorer.notes(samples):
            log(f"note: {note}")
        with _resumable(), progress_bar("drawing") as bar:
            found = evaluate(
                runtime,
                scorer,
                settings,
                images,
                work=place,
                npz=npz,
                rounds=rounds,
                batch=batch,
                resamples=resamples,
                threads=runtime.threads,
                command=command_line(click.get_current_context()),
                progress=bar,
            )
        record = save_study(runtime.bundle, found, key=found.key)
    log(f"record: {record}")
    members = tuple(manifest.members)
    if plot is not None:
        from tstitch_trt.plots.evaluation import plot_evaluation

        plot_evaluation(plot, found, members)
        log(f"plot: {plot}")
    if as_json:
        from tstitch_trt.cli._text import print_json

        print_json(found)
        return
    _print(found)
    for claim in claims_of(found, members, "fid"):
        faster = f", {claim.speedup:.2f} times as fast" if claim.speedup else ""
        click.echo(
            f"\n{claim.solver}, {claim.steps} steps: up to {claim.fraction:.0%} of the steps on {members[0]!r} "
            f"({claim.schedule}) fid stays within {members[-1]!r}'s interval, at most {claim.large.high:.3f}: "
            f"{claim.value:.3f}{faster}"
        )


@contextmanager
def _resumable() -> Iterator[None]:
    from tstitch_trt.progress import log

    try:
        yield
    except KeyboardInterrupt:
        log("the same command goes on from here")
        raise


def _check_used(
    metrics: list[str],
    *,
    reference: Path | None,
    features: Path | None,
    lpips: Path | None,
    clip: Path | None,
    options: tuple[str, ...],
) -> None:
    """Raises ``BadInput`` for what was given and would not be heeded."""
    from tstitch_engines.errors import BadInput

    real = {"fid", "kid", "precision", "recall"}
    needs = {
        "--reference": (reference, real),
        "--features": (features, real | {"accuracy"}),
        "--lpips": (lpips, {"lpips"}),
        "--clip": (clip, {"clip"}),
    }
    for option, (given, served) in needs.items():
        if given is not None and not served & set(metrics):
            raise BadInput(
                f"{option} was given, and none of the metrics {', '.join(metrics)} needs it",
                hint=f"leave it out, or add to --metrics: {', '.join(sorted(served))}",
            )
    if options and features is None:
        raise BadInput(
            f"--features-option {options[0]} was given without --features",
            hint="the bundle's own network needs none",
        )


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _usual_metrics(
    bundle: Bundle, features: Path | None, reference: Path | None, lpips: Path | None, clip: Path | None
) -> list[str]:
    """What can be measured with what there is."""
    from tstitch_trt.progress import log
    from tstitch_trt.study.quality.real_images import knows_pictures

    manifest, found = bundle.manifest, []
    real = reference
    if real is None and manifest.quality is not None and features is None:
        real = bundle.path(manifest.quality.reference)
    if real is not None and (features is not None or manifest.quality is not None):
        found.append("fid")
        if knows_pictures(real) or not real.is_file():  # a missing one is refused where it is read
            found += ["kid", "precision", "recall"]
        else:
            log(f"note: kid, precision and recall are left out: {real.name} has statistics alone, no single pictures")
    if manifest.quality is not None:
        found.append("accuracy")
    if lpips is not None:
        found.append("lpips")
    if clip is not None:
        found.append("clip")
    if manifest.decoder.kind != "none":
        found.append("psnr")
    return [*found, "latent_error"]


def _settings(
    manifest: Manifest,
    fractions: str | None,
    orders: str,
    schedules: tuple[str, ...],
    steps: str | None,
    solver: str | None,
    guidance: float | None,
) -> list[Setting]:
    from tstitch_engines.errors import BadInput
    from tstitch_trt.cli._parsing import parse_fractions, parse_numbers
    from tstitch_trt.study.settings import fraction_settings, setting_of

    shares = parse_fractions(fractions) if fractions else () if schedules else parse_fractions("0:1:0.1")
    counts = [manifest.defaults.steps] if steps is None else parse_numbers(steps, what="steps", example="--steps 20,50")
    if any(count < 1 for count in counts):
        raise BadInput(f"--steps {steps}; allowed are numbers from 1 on", hint="e.g. --steps 20,50")
    found = []
    for name in [manifest.defaults.solver] if solver is None else _list(solver):
        for count in counts:
            found += fraction_settings(manifest, shares, _list(orders), steps=count, solver=name, guidance=guidance)
            found += [
                setting_of(manifest, schedule=text, steps=count, solver=name, guidance=guidance) for text in schedules
            ]
    return found


def _print(found: Evaluation) -> None:
    from tstitch_trt.cli._text import print_table

    click.echo(
        f"{found.bundle}: {found.samples} samples per setting, {found.backend} on {found.device}; values with their "
        f"{found.level:.0%} intervals\n"
    )
    header = ["solver", "steps", "guidance", "schedule", *found.metrics]
    timed = any(point.ms for point in found.points)
    if timed:
        header.append("ms per batch")
    rows = []
    for point in found.points:
        row = [point.setting.solver, str(point.setting.steps), f"{point.setting.guidance:g}", point.setting.schedule]
        for name in found.metrics:
            measure = point.measures.get(name)
            row.append("" if measure is None else f"{measure.value:.4g} [{measure.low:.4g}, {measure.high:.4g}]")
        if timed:
            row.append(f"{point.ms:.1f}" if point.ms else "")
        rows.append(row)
    print_table(header, rows)
    for note in found.notes:
        click.echo(f"note: {note}")
