"""``tstitch-trt calibrate``: what sampling costs on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import LoadOptions

if TYPE_CHECKING:
    from tstitch_trt.study.records import Calibration

__all__ = ["command"]

EXAMPLES = """
tstitch-trt calibrate fashion.bundle
tstitch-trt calibrate fashion.bundle --batch 1,8,16 --threads 1 --plot cost.png
tstitch-trt calibrate fashion.bundle --repeats 15 --checks 40 --json
tstitch-trt calibrate sd15.bundle --device cuda --batch 1,4 --size 512x512,768x512
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    batch: str | None = option("Images per engine call to measure, e.g. 1,4,8. [powers of two and the most]", "LIST")
    size: str | None = option("Sizes in pixels, for bundles that have several. [the bundle's own]", "WxH,...")
    repeats: int = option("Measured rounds.", "N", default=7, least=1)
    checks: int = option("Random schedules to compare the prediction with.", "N", default=20, least=1)
    seed: int = option("Seed of the random schedules.", "S", default=0)
    plot: Path | None = option("Draw measured against predicted.", "FILE.png")

    def again(self, command: str) -> str:
        """``command`` with these options."""
        options = {name: getattr(self, name) for name in ("batch", "size", "repeats", "checks", "seed")}
        return " ".join([command, *(f"--{name} {value}" for name, value in options.items() if value is not None)])


@tstitch_command("calibrate", EXAMPLES, measured=Measured, load=LoadOptions)
def command(bundle: Path, measured: Measured, load: LoadOptions, as_json: bool) -> None:
    """Measure what sampling from BUNDLE costs on this machine, and keep it in the bundle.

    The time of a trajectory is modelled as the sum of its members' steps and an overhead. The model is fitted to
    trajectories of each member, guided and unguided, at several batches, and checked on random schedules that it was
    not fitted on. --budget-ms (of sample and bench) and search use it; a calibration of another machine, library
    version, backend, device or number of threads is never used. Run it when the machine is as busy as it will be.
    """
    from tstitch_trt.cli._parsing import parse_numbers, parse_pixels
    from tstitch_trt.cli._text import print_result
    from tstitch_trt.plots.calibration import plot_calibration
    from tstitch_trt.plots.figure import check_plot
    from tstitch_trt.progress import progress_bar
    from tstitch_trt.study.budget import Conditions
    from tstitch_trt.study.calibrate.calibrate import calibrate
    from tstitch_trt.study.store import save_study

    batch = measured.batch
    batches = None if batch is None else parse_numbers(batch, what="batch", example="--batch 1,4,8")
    check_plot(measured.plot)
    with load.open(bundle) as runtime:
        sizes = None
        if measured.size is not None:
            pixels = [parse_pixels(part) for part in measured.size.split(",")]
            sizes = [runtime.limits.latent_size(height, width) for width, height in pixels]
        with progress_bar("warming up") as bar:
            found = calibrate(
                runtime,
                batches=batches,
                sizes=sizes,
                repeats=measured.repeats,
                checks=measured.checks,
                seed=measured.seed,
                command=measured.again(Conditions.here(runtime.setup).command(bundle.name)),
                progress=bar,
            )
        file = save_study(runtime.bundle, found, key=Conditions.of(found).key)
    print_result(found, as_json, _print, record=file, plot=measured.plot, draw=plot_calibration)


def _print(found: Calibration) -> None:
    from tstitch_trt.cli._text import fixed, print_table

    threads = f"{found.threads} threads" if found.threads else "all threads"
    click.echo(f"{found.bundle}: {found.backend} on {found.device}, {threads}, {found.repeats} rounds")
    click.echo(f"{found.machine.processor}, {found.machine.cores} cores, load {found.machine.load:g}\n")
    rows = []
    for c in found.steps:
        what = (c.member, "yes" if c.guided else "no", str(c.batch), f"{c.width}x{c.height}")
        rows.append((*what, *fixed(3, c.ms, c.p10_ms, c.p90_ms)))
    print_table(("member", "guided", "images", "latent", "step ms", "p10", "p90"), rows)
    click.echo()
    print_table(
        ("images", "latent", "overhead ms", "per switch ms"),
        [(str(o.batch), f"{o.width}x{o.height}", *fixed(3, o.ms, o.switch_ms)) for o in found.overheads],
    )
    click.echo()
    rows = []
    for check in found.checks:
        within = "" if check.guidance_interval is None else " in {}:{}".format(*check.guidance_interval)
        settings = (check.schedule, f"{check.guidance:g}{within}", str(check.batch))
        rows.append((*settings, *fixed(1, check.predicted_ms, check.measured_ms), f"{100 * check.error:+.1f} %"))
    print_table(("check", "guidance", "images", "predicted ms", "measured ms", "error"), rows)
    click.echo(
        f"\nerror over {len(found.checks)} random schedules: median {100 * found.median_error:.1f} %, "
        f"worst {100 * found.worst_error:.1f} %; 98 of 100 runs take at most {found.upper_ratio:.3f} of the prediction"
    )
