"""``tstitch-trt evaluate``: how good the pictures of a list of schedules are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import command_line, option, tstitch_command
from tstitch_trt.cli._options import LoadOptions, PromptsFile, QualityOptions, rounding_option

if TYPE_CHECKING:
    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_engines.bundle.manifest import Manifest
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


@dataclass(frozen=True, kw_only=True)
class Options:
    metrics: str | None = option(
        "fid, kid, precision, recall, accuracy, psnr, lpips, clip, latent_error. [those that need nothing more]", "LIST"
    )
    fractions: str | None = option("Shares of the steps on the first member. [0:1:0.1; none with --schedule]", "LIST")
    rounding: str | None = rounding_option(" --fractions")
    orders: str = option("Which member starts, for --fractions.", "LIST", default="small-first,large-first")
    schedules: tuple[str, ...] = option("One more schedule. May be repeated.", "TEXT", "--schedule")
    steps: str | None = option("Numbers of steps. [bundle's default]", "LIST")
    solver: str | None = option("Solvers. [bundle's default]", "LIST")
    guidance: float | None = option("Guidance scale; 1 is none. [bundle's default]", "G")
    samples: int = option("Samples of each setting.", "N", default=2000, least=2)
    seed: int = option("Seed of the first picture.", "S", default=0, least=0)
    time: int = option("Rounds in which each setting is timed.", "N", default=3, least=0)
    batch: int = option("Images per timed trajectory.", "B", default=8, least=1)
    resamples: int = option("Resamples for the intervals.", "N", default=200, least=2)
    margin: float | None = option(
        "The largest loss that counts as no worse, as a share of the last member's own value. [0.05]", "SHARE"
    )
    npz: Path | None = option("Write the pictures of each setting, as ADM's evaluator reads.", "DIR")
    work: Path | None = option("Where unfinished work is kept. [the cache directory]", "DIR")
    plot: Path | None = option("Draw each metric against the fraction and the time.", "FILE.png")

    def settings(self, manifest: Manifest) -> list[Setting]:
        from tstitch_trt.cli._parsing import parse_fractions, parse_numbers
        from tstitch_trt.study.settings import fraction_settings, setting_of

        default = "" if self.schedules else "0:1:0.1"
        shares = parse_fractions(self.fractions or default) if self.fractions or default else ()
        counts = [manifest.defaults.steps]
        if self.steps is not None:
            counts = parse_numbers(self.steps, what="steps", example="--steps 20,50")
        if self.rounding is not None and not shares:
            raise BadInput(
                f"--rounding {self.rounding} is for --fractions, and none are given", hint="leave --rounding out"
            )
        if any(count < 1 for count in counts):
            raise BadInput(f"--steps {self.steps}; allowed are numbers from 1 on", hint="e.g. --steps 20,50")
        orders, scale, found = _list(self.orders), self.guidance, []
        for name in [manifest.defaults.solver] if self.solver is None else _list(self.solver):
            for count in counts:
                found += fraction_settings(
                    manifest, shares, orders, steps=count, solver=name, guidance=scale, rounding=self.rounding
                )
                found += [
                    setting_of(manifest, schedule=text, steps=count, solver=name, guidance=scale)
                    for text in self.schedules
                ]
        return found


@tstitch_command("evaluate", EXAMPLES, quality=QualityOptions, wanted=Options, texts=PromptsFile, load=LoadOptions)
def command(
    bundle: Path, quality: QualityOptions, wanted: Options, texts: PromptsFile, load: LoadOptions, as_json: bool
) -> None:
    """Draw pictures of BUNDLE over a list of schedules and measure how good they are.

    All settings share seeds and labels or prompts. Every value has a 95 % interval by resampling. The record is kept in
    the bundle (studies/), and a later call with more schedules or metrics extends it. You can stop at any time: the
    same command goes on from the last finished batch.

    psnr, lpips and latent_error compare with what the last member alone draws from the same seeds in the most steps.
    fid, kid, precision and recall compare with real pictures.

    The Fréchet distance, or the first quality metric if that was not measured, is tested in the order of the fractions,
    up to the first that does not pass. A fraction is no worse than the last member alone if the upper 95 % bound of the
    difference, paired by seed, is below the margin. If the samples are too few to tell, nothing is claimed, and the
    output says how many would do.
    """
    from msgspec import structs

    from tstitch_engines.bundle.cache import default_root
    from tstitch_trt.cli._documents import ClaimText, EvaluateOutput
    from tstitch_trt.cli._text import print_result
    from tstitch_trt.files import require_parent
    from tstitch_trt.plots.evaluation import plot_evaluation
    from tstitch_trt.plots.figure import check_plot
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.study.evaluate.claim import claims_of
    from tstitch_trt.study.evaluate.evaluate import evaluate
    from tstitch_trt.study.image_set import ImageSet, prompts_for
    from tstitch_trt.study.noninferiority import check_margin
    from tstitch_trt.study.records import MARGIN
    from tstitch_trt.study.store import save_study

    quality.network()
    margin = MARGIN if wanted.margin is None else check_margin(wanted.margin, "--margin")
    check_plot(wanted.plot)
    if wanted.npz is not None:
        require_parent(wanted.npz, option="--npz")
        wanted.npz.mkdir(exist_ok=True)
    prompts = texts.texts()
    with load.open(bundle) as runtime:
        manifest = runtime.manifest
        metrics = _list(wanted.metrics) if wanted.metrics else _usual_metrics(runtime.bundle, quality)
        _check_used(metrics, quality)
        place = wanted.work or default_root() / "evaluate"
        scorer = quality.scorer(
            runtime.bundle, metrics, threads=runtime.threads, limits=load.limits(), cache=place / "references"
        )
        images = ImageSet(wanted.samples, wanted.seed, prompts_for(manifest, prompts))
        settings = wanted.settings(manifest)
        for note in scorer.notes(wanted.samples):
            log(f"note: {note}")
        try:
            with progress_bar("drawing") as bar:
                found = evaluate(
                    runtime,
                    scorer,
                    settings,
                    images,
                    work=place,
                    npz=wanted.npz,
                    rounds=wanted.time,
                    batch=wanted.batch,
                    resamples=wanted.resamples,
                    margin=margin,
                    threads=runtime.threads,
                    command=command_line(),
                    progress=bar,
                )
        except KeyboardInterrupt:
            log("the same command goes on from here")
            raise
        record = save_study(runtime.bundle, found, key=found.key)
    members = tuple(manifest.members)
    claims = claims_of(found, members)
    said = [claim.text(repr(members[0]), repr(members[-1]), claim.metric) for claim in claims]
    print_result(
        found,
        as_json,
        partial(_print, claims=said),
        record=record,
        plot=wanted.plot,
        draw=partial(plot_evaluation, members=members),
        document=EvaluateOutput(
            **structs.asdict(found),
            claims=tuple(ClaimText(**structs.asdict(c), sentence=text) for c, text in zip(claims, said, strict=True)),
        ),
    )


def _check_used(metrics: list[str], given: QualityOptions) -> None:
    """Raises ``BadInput`` for an option that none of the metrics uses."""
    real = {"fid", "kid", "precision", "recall"}
    needs = {
        "--reference": (given.reference, real),
        "--features": (given.features, real | {"accuracy"}),
        "--lpips": (given.lpips, {"lpips"}),
        "--clip": (given.clip, {"clip"}),
    }
    for name, (file, served) in needs.items():
        if file is not None and not served & set(metrics):
            raise BadInput(
                f"{name} was given, and none of the metrics {', '.join(metrics)} needs it",
                hint=f"leave it out, or add to --metrics: {', '.join(sorted(served))}",
            )
    if given.features_options and given.features is None:
        raise BadInput(
            f"--features-option {given.features_options[0]} was given without --features",
            hint="the bundle's own network needs none",
        )


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _usual_metrics(bundle: Bundle, given: QualityOptions) -> list[str]:
    """What can be measured with what there is."""
    from tstitch_trt.progress import log
    from tstitch_trt.study.quality.real_images import knows_pictures

    manifest, found = bundle.manifest, []
    real = given.reference
    if real is None and manifest.quality is not None and given.features is None:
        real = bundle.path(manifest.quality.reference)
    if real is not None and (given.features is not None or manifest.quality is not None):
        found.append("fid")
        if knows_pictures(real) or not real.is_file():  # a missing one is refused where it is read
            found += ["kid", "precision", "recall"]
        else:
            log(f"note: kid, precision and recall are left out: {real.name} has statistics alone, no single pictures")
    needs = {"accuracy": manifest.quality, "lpips": given.lpips, "clip": given.clip}
    found += [name for name, needed in needs.items() if needed is not None]
    if manifest.decoder.kind != "none":
        found.append("psnr")
    return [*found, "latent_error"]


def _print(found: Evaluation, claims: list[str]) -> None:
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
    for text in claims:
        click.echo(f"\n{text}")
