"""``tstitch-trt sample``: images from a bundle."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_engines.errors import BadInput, NotFinite
from tstitch_trt.cli._bulk import BulkOptions
from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import (
    LoadOptions,
    PictureOptions,
    ProfileOptions,
    StepOptions,
    lora_texts,
    parse_budgets,
    rounding_option,
)
from tstitch_trt.cli._settings import drawn_with

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tstitch_engines.bundle.manifest import Conditioning, Manifest
    from tstitch_trt.request.options import SampleKeywords
    from tstitch_trt.runtime.result import FailedImage, Result
    from tstitch_trt.runtime.vae import Tile

__all__ = ["command"]

EXAMPLES = """
tstitch-trt sample fashion.bundle --labels 0-9 -o grid.png
tstitch-trt sample fashion.bundle --labels 0-9 -n 40 --fraction 0.4 --guidance 1.5 --seed 7 -o grid.png
tstitch-trt sample fashion.bundle --labels Bag,Sneaker --schedule small:20,large:30 --steps 50 -o bags
tstitch-trt sample fashion.bundle --labels 0-9 -n 100 --steps 20 -o samples.npz --json
tstitch-trt sample fashion.bundle --labels 0-9 --budget-ms 500 -o grid.png
tstitch-trt sample fashion.bundle --labels 0-9 --fraction 0.4 --profile trace.json
tstitch-trt sample fashion.bundle --labels 3,5 --latents-out latents.npy -o pair.png
tstitch-trt sample fashion.bundle --labels 3,5 --fraction 1 --latents-in latents.npy -o again.png
tstitch-trt sample sd15.bundle --prompt "a red fox in the snow" --negative blurry --size 768x512 -o fox.png
tstitch-trt sample sd15.bundle --prompt "a red fox" --prompt "a bear" -n 8 --fraction 0.4 --seed 7 -o animals
tstitch-trt sample sd15.bundle --prompt "an oil painting" --image photo.jpg --resize --strength 0.6 -o painting.png
tstitch-trt sample sd15.bundle --prompt "a clear sky" --image photo.png --mask sky.png -o clear.png
tstitch-trt sample sd15.bundle --prompt "a house" --control edges.png --control-scale 0.8 -o house.png
tstitch-trt sample sd15.bundle --backend torch --prompt "a fox" --lora large=style.safetensors:0.8 -o styled.png
tstitch-trt sample sdxl.bundle --prompt-embeds prompt.npz --latents-out latents.npy
tstitch-trt sample fashion.bundle --labels 0-9 -n 50000 --ray -o samples.npz
"""
DEFAULT_LABELS = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    labels: str | None = option("Classes: numbers, ranges and names, e.g. 3,5,0-9 or Bag. [one of each]", "LIST")
    count: int | None = option("Number of images; labels or prompts are repeated in turn.", "N", "-n", least=1)
    seed: int | None = option("Image i has the seed S + i. [0]", "S", least=0)
    seeds: str | None = option("One seed for each image, e.g. 1,2,5-9, in place of --seed.", "LIST")
    output: Path | None = option(
        "A grid, a folder with one PNG per image, or an array arr_0, uint8 NHWC. [samples.png]",
        "FILE.png|DIR|FILE.npz",
        "-o",
        "--output",
    )


@dataclass(frozen=True, kw_only=True)
class SpecialOptions:
    budget_ms: str | None = option(
        "Choose the best schedule whose steps take at most this long for all images; needs tstitch-trt calibrate.", "MS"
    )
    loras: tuple[str, ...] = option(
        "A LoRA for a member or text encoder whose engine can take other weights (backend torch); FILE may be in a "
        "Hugging Face repository. May be repeated.",
        "NAME=FILE[:WEIGHT]",
        "--lora",
    )
    partial: bool = option("If an image becomes NaN, write the others, name it, and exit with 1.")
    latents_in: Path | None = option("Start from these latents.", "FILE.npy")
    latents_out: Path | None = option("Write the final latents.", "FILE.npy")


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """The keywords of ``PlanOptions`` that ``StepOptions`` does not have."""

    fraction: float | None = option("Share of the steps on the first member, 0 to 1.", "R")
    schedule: str | None = option("Members over the steps, e.g. small:0.4,large or high@t>=875,low.", "TEXT")
    rounding: str | None = rounding_option()
    spacing: str | None = option("Where the steps lie: leading, linspace, trailing, dit or uniform.", "NAME")
    sigmas: str | None = option("Space the steps in sigma instead: karras or exponential.", "NAME")
    eta: float | None = option("Share of the noise that is drawn anew, 0 to 1. [the solver's own]", "E")
    variance: str | None = option("Variance of DDPM: fixed-small, fixed-large or learned.", "NAME")
    history: str | None = option(
        "What a multistep solver does with its history when the member changes: keep or reset. [keep]", "RULE"
    )
    guidance_rescale: float | None = option("Rescale the guided estimate (arXiv 2305.08891). [0]", "R")
    guidance_interval: str | None = option("Guide the steps FIRST to STOP - 1 only.", "FIRST:STOP")
    guided_channels: int | None = option("Guide the first K channels only.", "K", least=1)


@tstitch_command(
    "sample", EXAMPLES, what=Options, picture=PictureOptions, step=StepOptions, plan=PlanFlags, special=SpecialOptions,
    load=LoadOptions, bulk=BulkOptions, profile=ProfileOptions,
)  # fmt: skip
def command(
    bundle: Path,
    what: Options,
    picture: PictureOptions,
    step: StepOptions,
    plan: PlanFlags,
    special: SpecialOptions,
    load: LoadOptions,
    bulk: BulkOptions,
    profile: ProfileOptions,
    as_json: bool,
) -> None:
    """Draw images from BUNDLE: by class with --labels, from text with --prompt.

    Without --labels a class bundle draws one image of each class, ten at most. Options that you leave out have the
    bundle's defaults. PNG files keep the settings that they were drawn with.

    With --ray, run an interrupted command again and it goes on where it stopped. The number of workers does not change
    the pictures.
    """
    from msgspec import UNSET, structs, to_builtins

    from tstitch_engines.trace import span
    from tstitch_trt.cli._drawn import ChosenBudget, DrawnRun, SampleOutput
    from tstitch_trt.cli._parsing import parse_interval, parse_numbers
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.files import load_array, require_output, save_array
    from tstitch_trt.images.write import kind_of, write_images
    from tstitch_trt.plan.options import PlanOptions
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.study.calibrate.trials import warm_up

    bulk.check()
    budgets = parse_budgets(special.budget_ms)
    if len(budgets) > 1:
        raise BadInput(
            f"--budget-ms {special.budget_ms!r} are {len(budgets)} budgets; allowed is one", hint="--budget-ms 500"
        )
    swapped, latents_out, output = lora_texts(special.loras), special.latents_out, what.output
    interval = None if plan.guidance_interval is None else parse_interval(plan.guidance_interval)
    options = PlanOptions.from_keywords({**asdict(step), **asdict(plan), "guidance_interval": interval})
    seeds = None if what.seeds is None else parse_numbers(what.seeds, what="seed", example="--seeds 1,2,5-9")
    if latents_out is not None:
        require_output(latents_out, ".npy", option="--latents-out")
    if output is not None:
        kind_of(output)
    tile = picture.tiles()
    start = None if special.latents_in is None else load_array(special.latents_in, option="--latents-in")

    def request(manifest: Manifest) -> SampleKeywords:
        asked: SampleKeywords = {
            **options.explicit(), **picture.keywords(manifest), "labels": what.labels, "n": what.count,
            "seed": what.seed, "seeds": seeds, "latents": start,
        }  # fmt: skip
        if what.labels is None and seeds is None and start is None:
            asked["labels"] = _default_labels(manifest.conditioning, what.count)
        return asked

    if bulk.ray:
        if profile.profile is not None:
            raise BadInput(
                f"--profile {profile.profile} records this process, and --ray draws in others",
                hint="profile a run without --ray",
            )
        _draw_in_bulk(bundle, what, special, request, load, bulk, tile=tile, kept=picture.kept(), as_json=as_json)
        return
    profile.start()
    with load.open(bundle) as runtime:
        manifest = runtime.manifest
        target = _target(manifest, output, latents_out)
        asked = request(manifest)
        for name, text in swapped.items():
            runtime.swap_lora(name, text)
        if budgets:
            chosen = runtime.within_budget(budgets[0], **asked)
            log(str(chosen))
            warm_up(runtime, chosen)
        with progress_bar("sampling", counted="steps") as bar:
            result = runtime.sample(
                decode=target is not None,
                tile=tile,
                callback=lambda e: bar.update(
                    done=(e.chunk - 1) * e.steps + e.step, total=e.chunks * e.steps, text=f"sampling on {e.member}"
                ),
                latency_budget_ms=budgets[0] if budgets else None,
                partial=special.partial,
                **asked,
            )

    where = {"bundle": bundle.name, "device": load.device, "backend": runtime.backend_name}
    settings, images = drawn_with(manifest, result, where=where, kept=picture.kept())
    budget, total_ms = result.budget, result.total_ms
    done = DrawnRun(
        **structs.asdict(settings),
        timings=list(result.timings),
        total_ms=total_ms,
        budget=UNSET if budget is None else ChosenBudget(**structs.asdict(budget), met=total_ms <= budget.budget_ms),
        failed=list(result.failed) or UNSET,
    )
    drawn = list(result.drawn)
    each = [images[image] for image in drawn]
    written: list[Path] = []
    if latents_out is not None:
        with span("write latents", images=len(drawn)):
            save_array(latents_out, result.latents[drawn])
    if target is not None and result.images is not None:
        with span("write pictures", images=len(drawn)):
            written = write_images(target, result.images[drawn], to_builtins(done), to_builtins(each))
    if as_json:
        files, latents = [str(file) for file in written], None if latents_out is None else str(latents_out)
        print_json(SampleOutput(**structs.asdict(done), images=each, files=files, latents=latents))
    else:
        _tell(result)
        for path in (target, latents_out):
            if path is not None:
                click.echo(path)
    if result.failed:
        raise _not_drawn(result.failed, len(result.seeds))


def _not_drawn(failed: Sequence[FailedImage], images: int) -> NotFinite:
    return NotFinite(
        f"{len(failed)} of {images} images were not drawn: " + "; ".join(str(each) for each in failed[:5]),
        hint="the others were written; an fp16 engine that makes NaN is built again with --precision MEMBER=fp32",
    )


def _draw_in_bulk(
    path: Path, what: Options, special: SpecialOptions, request: Callable[[Manifest], SampleKeywords],
    load: LoadOptions, bulk: BulkOptions, *, tile: Tile, kept: Mapping[str, object], as_json: bool,
) -> None:  # fmt: skip
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_trt.cli._drawn import BulkOutput
    from tstitch_trt.cli._text import print_json

    for flag, value, instead in (
        ("--latents-out", special.latents_out, "leave out --ray, or write pictures alone"),
        ("--budget-ms", special.budget_ms, "say --schedule or --fraction: a budget is for all images at once"),
    ):
        if value is not None:
            raise BadInput(f"{flag} {value} can't be had with --ray, which draws in shards", hint=instead)
    opened = open_bundle(path, require_signature=load.require_signature)
    output = _target(opened.manifest, what.output or Path("samples"), None)
    assert output is not None
    drawn = bulk.draw(
        opened, output, request(opened.manifest), load, tile=tile, partly=special.partial,
        loras=lora_texts(special.loras), kept=kept,
    )  # fmt: skip
    if as_json:
        counts = {"images": drawn.images, "before": drawn.before, "shards": drawn.shards}
        print_json(BulkOutput(files=[str(output)], **counts, failed=list(drawn.failed)))
    else:
        click.echo(output)
    if drawn.failed:
        raise _not_drawn(drawn.failed, drawn.images)


def _tell(result: Result) -> None:
    """How long it took, and whether a budget was met."""
    from tstitch_trt.cli._text import counted
    from tstitch_trt.progress import log

    log(
        f"{counted(len(result.drawn), 'image')}, {counted(len(result.schedule.names), 'step')}, "
        f"schedule {result.schedule.text} in {result.total_ms / 1e3:.2f} s "
        f"({result.total_ms / len(result.seeds):.1f} ms per image): "
        + ", ".join(f"{part.member} {counted(part.steps, 'step')} {part.ms:.0f} ms" for part in result.timings)
    )
    if result.budget is not None:
        over = result.total_ms - result.budget.budget_ms
        met = "met" if over <= 0 else f"missed by {over:.1f} ms"
        log(f"the budget of {result.budget.budget_ms:.10g} ms is {met}: {result.total_ms:.1f} ms")


def _target(manifest: Manifest, output: Path | None, latents_out: Path | None) -> Path | None:
    """Where the images go, or ``None`` when only latents were asked for."""
    if manifest.decoder.kind != "none":
        return output if output is not None or latents_out is not None else Path("samples.png")
    if output is not None or latents_out is None:
        raise BadInput(
            f"bundle {manifest.name!r} has no decoder, so it gives latents and no images",
            hint="write the latents: --latents-out latents.npy, without -o",
        )
    return None


def _default_labels(conditioning: Conditioning, count: int | None) -> str | None:
    """One of each class, and of the first ten where there are more."""
    if conditioning.kind != "class":
        return None
    if count is not None:
        raise BadInput(
            f"-n {count} says how many images but not of which classes",
            hint=f"add the classes to go round: --labels 0-{conditioning.classes - 1}",
        )
    return f"0-{min(conditioning.classes, DEFAULT_LABELS) - 1}"
