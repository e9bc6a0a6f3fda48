"""``tstitch-trt calibrate``: what sampling costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import Command, json_option, traceback_option
from tstitch_trt.cli._options import bundle_argument, load_runtime, runtime_options

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime
    from tstitch_trt.runtime.step_graphs import GraphMode
    from tstitch_trt.study.records import Calibration

__all__ = ["command"]

EXAMPLES = """
tstitch-trt calibrate fashion.bundle
tstitch-trt calibrate fashion.bundle --batch 1,8,16 --threads 1 --plot cost.png
tstitch-trt calibrate fashion.bundle --repeats 15 --checks 40 --json
tstitch-trt calibrate sd15.bundle --device cuda --batch 1,4 --size 512x512,768x512
"""


@click.command("calibrate", cls=Command, examples=EXAMPLES)
@bundle_argument
@click.option(
    "--batch",
    metavar="LIST",
    help="Images per engine call to measure, e.g. 1,4,8. [powers of two and the most]",
)
@click.option("--size", metavar="WxH,...", help="Sizes in pixels, for bundles that have several. [the bundle's own]")
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True, metavar="N", help="Measured rounds.")
@click.option(
    "--checks",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    metavar="N",
    help="Random schedules to compare the prediction with.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="S", help="Seed of the random schedules.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw measured against predicted.")
@runtime_options
@json_option
@traceback_option
def command(
    bundle: Path,
    batch: str | None,
    size: str | None,
    repeats: int,
    checks: int,
    seed: int,
    plot: Path | None,
    device: str,
    backend: str | None,
    threads: int | None,
    graph: GraphMode,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Measure what sampling from BUNDLE costs on this machine, and keep it in the bundle.

    The time of a trajectory is modelled as the sum of its members' steps and an overhead. The model is fitted to
    trajectories of each member, guided and unguided, at several batches, and checked on random schedules that it was
    not fitted on. --budget-ms (of sample and bench) and search use it; a calibration of another machine, library
    version, backend, device or number of threads is never used. Run it when the machine is as busy as it will be.
    """
    from tstitch_trt.cli._parsing import parse_numbers
    from tstitch_trt.plots.figure import check_plot, plot_calibration
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.study.budget import Conditions
    from tstitch_trt.study.calibrate.calibrate import calibrate
    from tstitch_trt.study.store import save_study

    batches = None if batch is None else parse_numbers(batch, what="batch", example="--batch 1,4,8")
    if plot is not None:
        check_plot(plot)
    runtime = load_runtime(bundle, device=device, backend=backend, threads=threads, graph=graph, rebuild=rebuild)
    try:
        sizes = None if size is None else _sizes(runtime, size)
        with progress_bar("warming up") as bar:
            found = calibrate(
                runtime,
                batches=batches,
                sizes=sizes,
                repeats=repeats,
                checks=checks,
                seed=seed,
                command=_again(batch, size, repeats, checks, seed, Conditions.here(runtime.setup).command(bundle.name)),
                progress=bar,
            )
        file = save_study(runtime.bundle, found, key=Conditions.of(found).key)
    finally:
        runtime.close()
    log(f"calibration: {file}")
    if plot is not None:
        plot_calibration(plot, found)
        log(f"plot: {plot}")
    if as_json:
        from tstitch_trt.cli._text import print_json

        print_json(found)
    else:
        _print(found)


def _sizes(runtime: Runtime, text: str) -> list[tuple[int, int]]:
    """Height and width of the latents. Raises ``BadInput``."""
    from tstitch_trt.cli._parsing import parse_pixels

    pixels = [parse_pixels(part) for part in text.split(",")]
    return [runtime.limits.latent_size(height, width) for width, height in pixels]


def _again(batch: str | None, size: str | None, repeats: int, checks: int, seed: int, command: str) -> str:
    options = {"--batch": batch, "--size": size, "--repeats": repeats, "--checks": checks, "--seed": seed}
    return " ".join([command, *(f"{name} {value}" for name, value in options.items() if value is not None)])


def _print(found: Calibration) -> None:
    from tstitch_trt.cli._text import print_table

    threads = f"{found.threads} threads" if found.threads else "all threads"
    click.echo(f"{found.bundle}: {found.backend} on {found.device}, {threads}, {found.repeats} rounds")
    click.echo(f"{found.machine.processor}, {found.machine.cores} cores, load {found.machine.load:g}\n")
    print_table(
        ("member", "guided", "images", "latent", "step ms", "p10", "p90"),
        [
            (
                cost.member,
                "yes" if cost.guided else "no",
                str(cost.batch),
                f"{cost.width}x{cost.height}",
                f"{cost.ms:.3f}",
                f"{cost.p10_ms:.3f}",
                f"{cost.p90_ms:.3f}",
            )
            for cost in found.steps
        ],
    )
    click.echo()
    print_table(
        ("images", "latent", "overhead ms", "per switch ms"),
        [(str(o.batch), f"{o.width}x{o.height}", f"{o.ms:.3f}", f"{o.switch_ms:.3f}") for o in found.overheads],
    )
    click.echo()
    print_table(
        ("check", "guidance", "images", "predicted ms", "measured ms", "error"),
        [
            (
                check.schedule,
                f"{check.guidance:g}"
                + ("" if check.guidance_interval is None else " in {}:{}".format(*check.guidance_interval)),
                str(check.batch),
                f"{check.predicted_ms:.1f}",
                f"{check.measured_ms:.1f}",
                f"{100 * check.error:+.1f} %",
            )
            for check in found.checks
        ],
    )
    click.echo(
        f"\nerror over {len(found.checks)} random schedules: median {100 * found.median_error:.1f} %, "
        f"worst {100 * found.worst_error:.1f} %; 98 of 100 runs take at most {found.upper_ratio:.3f} of the prediction"
    )
