"""``tstitch-trt demo``: the built-in pair, stitched at several points."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import threads_option

if TYPE_CHECKING:
    from tstitch_trt.demo import Demo

__all__ = ["command"]

EXAMPLES = """
tstitch-trt demo
tstitch-trt demo --samples 20 --steps 10 -o quick.png
tstitch-trt demo --bundle fashion.bundle --guidance 1.5 --json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    samples: int = option("Images scored per point.", "N", default=100, least=10)
    steps: int = option("Denoising steps.", "N", default=20, least=4)
    guidance: float | None = option("Guidance scale; 1 is none. [the pair's default]", "G")
    seed: int = option("Seed of all images.", "S", default=0, least=0)
    output: Path = option("The picture to write.", "FILE.png", "-o", "--output", default=Path("tstitch-demo.png"))
    bundle: Path | None = option("Where the bundle is kept. [the user's cache]", "DIR")
    threads: int | None = threads_option()


@tstitch_command("demo", EXAMPLES, bundle=False, options=Options)
def command(options: Options, as_json: bool) -> None:
    """Build the built-in Fashion-MNIST pair for this CPU and draw it at five stitch points.

    Needs no GPU, no PyTorch and no network. The picture has a row for each share of the steps on the small member and a
    column for each of the ten classes; all rows start from the same noise. The table has time and quality of each row.
    """
    import msgspec

    import tstitch_trt
    from tstitch_engines.bundle.cache import default_root
    from tstitch_engines.version import VERSION
    from tstitch_export.build import build
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.demo import draw, run
    from tstitch_trt.files import require_output
    from tstitch_trt.images.grid import save_png
    from tstitch_trt.images.write import METADATA_KEY
    from tstitch_trt.progress import log, progress_bar

    output, guidance = options.output, options.guidance
    require_output(output, ".png", option="-o")
    place = options.bundle or default_root() / f"fashion-{VERSION}.bundle"
    place.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("building the built-in pair") as bar:  # what did not change comes from the cache
        build("fashion", output=place, progress=bar)
    with tstitch_trt.load(place, threads=options.threads) as runtime:
        with progress_bar("drawing") as bar:
            figures, pictures = run(
                runtime,
                steps=options.steps,
                samples=options.samples,
                guidance=runtime.manifest.defaults.guidance if guidance is None else guidance,
                seed=options.seed,
                progress=bar,
            )
        image = draw(figures, pictures, runtime.manifest.conditioning.names)
    save_png(output, image, {METADATA_KEY: msgspec.json.encode(figures).decode(), "Software": "tstitch-trt"})
    if as_json:
        from tstitch_trt.cli._documents import DemoOutput

        print_json(DemoOutput(**msgspec.structs.asdict(figures), bundle_path=str(place), grid=str(output)))
        return
    _print(figures)
    click.echo(output)
    log(f"the bundle is {place}; go on with: tstitch-trt sample {place} --labels 0-9 --fraction 0.4")


def _print(figures: Demo) -> None:
    from tstitch_trt.cli._text import fixed, print_table
    from tstitch_trt.study.fractions import counts_text

    click.echo(
        f"{figures.bundle}: {figures.steps} {figures.solver} steps, guidance {figures.guidance:g}, "
        f"{figures.samples} images per row on {figures.machine.processor}, {figures.machine.cores} cores"
    )
    rows = []
    for p in figures.points:
        quality = fixed(3, p.accuracy, p.frechet)
        rows.append((f"{p.fraction:g}", counts_text(p.members), f"{p.ms_per_image:.1f}", f"{p.speedup:.2f}", *quality))
    print_table(("fraction", "steps", "ms/image", "speed-up", "accuracy", "Fréchet distance"), rows)
    click.echo(
        "Fréchet distance in the features of the bundle's own classifier, against held-out images; "
        f"{figures.samples} samples bias it upwards, so compare the rows with each other only.\n{figures.claim}"
    )
