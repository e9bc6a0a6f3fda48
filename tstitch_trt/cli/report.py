"""``tstitch-trt report``: one page of what is known of a bundle."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import command_line, option, tstitch_command
from tstitch_trt.cli._options import LoadOptions, StepOptions, rounding_option

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest
    from tstitch_trt.study.gather import Studies

__all__ = ["command"]

EXAMPLES = """
tstitch-trt report fashion.bundle -o report.html
tstitch-trt report fashion.bundle -o bags.html --fractions 0,0.4,1 --labels Bag,Sneaker --seed 7 --steps 20
tstitch-trt report sd15.bundle -o fox.html --prompt "a red fox in the snow" --prompt "a bear" --fractions 0:1:0.5
tstitch-trt report sd15.bundle -o studies.html --no-samples
"""
_MOST_PROMPTS = 6


@dataclass(frozen=True, kw_only=True)
class Columns:
    output: Path = option("The file to write.", "FILE.html", "-o", "--output", default=Path("report.html"))
    fractions: str = option(
        "Rows of samples: START:STOP:STEP or a list such as 0,0.4,1: shares of the steps on the first member.",
        "LIST",
        default="0:1:0.25",
    )
    rounding: str | None = rounding_option()
    labels: str | None = option("Columns: classes, e.g. 3,5,0-9 or Bag. [the first ten]", "LIST")
    prompts: tuple[str, ...] = option(
        "A prompt, for a column of samples of a text bundle. [those of the studies]", "TEXT", "--prompt"
    )
    seed: int = option("Seed of all columns.", "S", default=0, least=0)
    no_samples: bool = option("Draw no samples; report the studies alone.")


@tstitch_command("report", EXAMPLES, wanted=Columns, step=StepOptions, load=LoadOptions)
def command(bundle: Path, wanted: Columns, step: StepOptions, load: LoadOptions, as_json: bool) -> None:
    """Write one self-contained page about BUNDLE: samples by fraction, and all measurements of it.

    The samples are drawn now, with the same seeds in every row. Time, quality, divergence, order, cost and the search
    come from the studies in the bundle (calibrate, profile, evaluate, search). For what was not measured, the page
    names the command. The page loads nothing and needs no JavaScript. Plots need matplotlib:
    pip install "tstitch-trt[plot]".
    """
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_trt.cli._parsing import parse_fractions
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.files import require_output, write_text
    from tstitch_trt.plots.figure import require_matplotlib
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.report.page import Page, render
    from tstitch_trt.report.samples import draw_samples
    from tstitch_trt.study.gather import gather
    from tstitch_trt.study.machine import describe_machine
    from tstitch_trt.study.store import now

    output, no_samples = wanted.output, wanted.no_samples
    require_output(output, ".html", ".htm", option="-o")
    points = parse_fractions(wanted.fractions)
    quick = no_samples and load.require_signature is None
    opened = open_bundle(
        bundle,
        verify="size" if quick else "full",
        engines=not load.rebuild and not no_samples,
        require_signature=load.require_signature,
    )
    studies = gather(opened)
    if studies.used():
        require_matplotlib()
    asked, reason = _asked(opened.manifest, studies, wanted.labels, wanted.prompts)
    samples = None
    if no_samples:
        reason = "No samples were drawn for this page (--no-samples)."
    elif asked is not None:
        with load.open(bundle) as runtime, progress_bar("drawing") as bar:
            opened = runtime.bundle
            samples = draw_samples(
                runtime,
                fractions=points,
                pictures=asked | {"seed": wanted.seed},
                settings=asdict(step) | {"rounding": wanted.rounding},
                progress=bar,
            )
    made, again = now(), command_line(without=("as_json",))
    text = render(opened, Page(str(bundle), studies, samples, reason, again, made, describe_machine()))
    write_text(output, text)
    for study, differing in studies.stale:
        log(
            f"stale, not used: {type(study).__name__.lower()} of {study.made} (other weights of {', '.join(differing)})"
        )
    if as_json:
        from tstitch_trt.cli._documents import ReportOutput, StaleStudy, UsedStudy

        print_json(
            ReportOutput(
                report=str(output),
                bytes=len(text.encode()),
                bundle=str(bundle),
                made=made,
                images=0 if samples is None else len(samples.rows) * len(samples.asked),
                studies=[UsedStudy(study=s.kind, made=s.made) for s in studies.used()],
                stale=[StaleStudy(study=s.kind, made=s.made, members=list(names)) for s, names in studies.stale],
            )
        )
        return
    click.echo(output)


def _asked(
    manifest: Manifest, studies: Studies, labels: str | None, prompts: tuple[str, ...]
) -> tuple[dict[str, Any] | None, str]:
    """The keywords of ``Runtime.sample`` for the columns, or ``None`` and why there are none. Raises ``BadInput``."""
    from tstitch_trt.report.samples import undrawable
    from tstitch_trt.request.labels import parse_labels

    conditioning = manifest.conditioning
    if conditioning.kind == "class" and prompts:
        raise BadInput(f"--prompt {prompts[0]!r}: this bundle draws classes", hint="name them: --labels 0-9")
    if conditioning.kind == "text" and labels is not None:
        raise BadInput(f"--labels {labels!r}: this bundle draws from text", hint='write --prompt "a red fox"')
    if (reason := undrawable(manifest)) is not None:
        return None, reason
    if conditioning.kind == "class":
        shown = f"0-{min(conditioning.classes, 10) - 1}" if labels is None else labels
        return {"labels": parse_labels(shown, classes=conditioning.classes, names=conditioning.names)}, ""
    texts = list(prompts) or list(studies.prompts()[:_MOST_PROMPTS])
    return ({"prompt": texts}, "") if texts else (None, "No prompt was given (--prompt TEXT), and no study has any.")
