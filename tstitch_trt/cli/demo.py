"""``tstitch-trt demo``: the built-in pair, stitched at several points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import Command, json_option, traceback_option

if TYPE_CHECKING:
    from tstitch_trt.demo import Demo

__all__ = ["command"]

EXAMPLES = """
tstitch-trt demo
tstitch-trt demo --samples 20 --steps 10 -o quick.png
tstitch-trt demo --bundle fashion.bundle --guidance 1.5 --json
"""


@click.command("demo", cls=Command, examples=EXAMPLES)
@click.option(
    "--samples", type=click.IntRange(10), default=100, show_default=True, metavar="N", help="Images scored per point."
)
@click.option("--steps", type=click.IntRange(4), default=20, show_default=True, metavar="N", help="Denoising steps.")
@click.option("--guidance", type=float, metavar="G", help="Guidance scale; 1 is none. [the pair's default]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S", help="Seed of all images.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("tstitch-demo.png"),
    show_default=True,
    metavar="FILE.png",
    help="The grid.",
)
@click.option(
    "--bundle", type=click.Path(path_type=Path), metavar="DIR", help="Where the built bundle is kept. [user cache]"
)
@click.option(
    "--threads", type=click.IntRange(0), default=0, metavar="N", help="CPU threads. [$OMP_NUM_THREADS, or all cores]"
)
@json_option
@traceback_option
def command(
    samples: int,
    steps: int,
    guidance: float | None,
    seed: int,
    output: Path,
    bundle: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Build the built-in Fashion-MNIST pair for this CPU and draw it at five stitch points.

    Needs no GPU, no torch and no network. Rows of the grid are shares of the steps on the small member, columns the
    ten classes; all rows start from the same noise. The table has the time and the quality of each row.
    """
    from tstitch_trt.demo import draw, run
    from tstitch_trt.images.grid import save_png
    from tstitch_trt.images.write import METADATA_KEY, kind_of
    from tstitch_trt.progress import log, progress_bar

    if kind_of(output) != "png":
        from tstitch_engines.errors import BadInput

        raise BadInput(
            f"-o {str(output)!r} is no .png file; the demo draws one grid", hint="write e.g. -o tstitch-demo.png"
        )
    import msgspec

    import tstitch_trt

    place = _bundle(bundle)
    runtime = tstitch_trt.load(place, threads=threads)
    try:
        with progress_bar("drawing") as bar:
            figures, pictures = run(
                runtime,
                steps=steps,
                samples=samples,
                guidance=runtime.manifest.defaults.guidance if guidance is None else guidance,
                seed=seed,
                progress=bar,
            )
        image = draw(figures, pictures, runtime.manifest.conditioning.names)
    finally:
        runtime.close()
    save_png(output, image, {METADATA_KEY: msgspec.json.encode(figures).decode(), "Software": "tstitch-trt"})
    if as_json:
        from tstitch_trt.cli._text import print_json

        print_json({"bundle_path": str(place), "grid": str(output), **msgspec.to_builtins(figures)})
        return
    _print(figures)
    click.echo(output)
    log(f"the bundle is {place}; go on with: tstitch-trt sample {place} --labels 0-9 --fraction 0.4")


def _bundle(wanted: Path | None) -> Path:
    """The built-in pair's bundle, built or brought up to date. Unchanged parts come from the cache."""
    from tstitch_engines.bundle.cache import default_root
    from tstitch_export.build import build
    from tstitch_trt.progress import progress_bar
    from tstitch_trt.study.machine import version

    place = wanted or default_root() / f"fashion-{version()}.bundle"
    place.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("building the built-in pair") as bar:
        build("fashion", output=place, progress=bar)
    return place


def _print(figures: Demo) -> None:
    from tstitch_trt.cli._text import print_table

    click.echo(
        f"{figures.bundle}: {figures.steps} {figures.solver} steps, guidance {figures.guidance:g}, "
        f"{figures.samples} images per row on {figures.machine.processor}, {figures.machine.cores} cores"
    )
    print_table(
        ("fraction", "steps", "ms/image", "speed-up", "accuracy", "Fréchet distance"),
        [
            (
                f"{p.fraction:g}",
                " + ".join(f"{steps} {name}" for name, steps in p.members.items()),
                f"{p.ms_per_image:.1f}",
                f"{p.speedup:.2f}",
                f"{p.accuracy:.3f}",
                f"{p.frechet:.3f}",
            )
            for p in figures.points
        ],
    )
    click.echo(
        "Fréchet distance in the features of the bundle's own classifier, against held-out images; "
        f"{figures.samples} samples bias it upwards, so compare the rows with each other only."
    )
