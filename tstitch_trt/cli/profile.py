"""``tstitch-trt profile``: how far the members of a bundle are apart, and a schedule that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import command_line, option, tstitch_command
from tstitch_trt.cli._options import LoadOptions, PromptsFile, StepOptions

if TYPE_CHECKING:
    from tstitch_trt.study.records import Divergence

__all__ = ["command"]

EXAMPLES = """
tstitch-trt profile fashion.bundle
tstitch-trt profile fashion.bundle --samples 16 --steps 20 --plot divergence.png
tstitch-trt profile fashion.bundle --reference-member large --guidance 1 --json
tstitch-trt profile sd15.bundle --samples 4 --steps 20 --solver ddim --prompts prompts.txt
"""


@dataclass(frozen=True, kw_only=True)
class Walked:
    reference_member: str | None = option("The member that others are compared with. [the last]", "NAME")
    samples: int = option("Number of seeds.", "N", default=8, least=1)
    seed: int = option("The first seed.", "S", default=0, least=0)
    plot: Path | None = option("Draw divergence and orders.", "FILE.png")


@tstitch_command("profile", EXAMPLES, walked=Walked, texts=PromptsFile, step=StepOptions, load=LoadOptions)
def command(
    bundle: Path, walked: Walked, texts: PromptsFile, step: StepOptions, load: LoadOptions, as_json: bool
) -> None:
    """Compare the members of BUNDLE step by step, and suggest a schedule.

    All members run at every state of the reference member's trajectory, and their denoised estimates are compared. Then
    schedules with equal counts of small steps run in several orders (small first, large first, interleaved), and the
    best order at more shares. The suggested share is the knee of the curve. The result is kept in the bundle.

    This compares latents: if they are close to the reference's, the pictures look alike. To measure how good pictures
    are, use tstitch-trt evaluate.

    The solver must be a single-step one. If the bundle's own is multistep, ddim is the default.
    """
    from tstitch_trt.cli._text import print_result
    from tstitch_trt.plots.divergence import plot_divergence
    from tstitch_trt.plots.figure import check_plot
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.study.divergence.divergence import profile, profile_solver
    from tstitch_trt.study.store import save_study

    prompts = texts.texts()
    check_plot(walked.plot)
    with load.open(bundle) as runtime:
        usual = runtime.manifest.defaults.solver
        chosen = profile_solver(runtime.manifest, step.solver)
        if step.solver is None and chosen != usual:
            log(f"the bundle's own solver {usual} has a memory and can't be entered in the middle; using {chosen}")
        with progress_bar("profiling") as bar:
            study = profile(
                runtime,
                samples=walked.samples,
                seed=walked.seed,
                reference=walked.reference_member,
                steps=step.steps,
                solver=chosen,
                guidance=step.guidance,
                prompts=prompts,
                command=command_line(),
                progress=bar,
            )
        record = save_study(runtime.bundle, study, key=study.key)
    print_result(study, as_json, _print, record=record, plot=walked.plot, draw=plot_divergence)


def _print(study: Divergence) -> None:
    from tstitch_trt.cli._text import fixed, print_table

    click.echo(
        f"{study.bundle}: distance from {study.reference} on its trajectory, {study.steps} {study.solver} steps, "
        f"guidance {study.guidance:g}, {len(study.seeds)} seeds\n"
    )
    shown = sorted({round(i * (study.steps - 1) / 9) for i in range(10)})
    rows = [
        (name, str(s.step + 1), f"{s.timestep:.4g}", "inf" if s.sigma is None else f"{s.sigma:.4g}",
         *fixed(4, s.rel_l2, s.p10, s.p90), f"{s.cosine:.5f}")
        for name, steps in study.members.items()
        for s in steps
        if s.step in shown
    ]  # fmt: skip
    print_table(("member", "step", "timestep", "sigma", "relative L2", "p10", "p90", "cosine"), rows)
    click.echo()
    print_table(
        ("small steps", "order", "schedule", "latent error", "p10", "p90"),
        [(f"{t.share:.0%}", t.order, t.schedule, *fixed(4, t.latent_error, t.p10, t.p90)) for t in study.orders],
    )
    click.echo(f"\nsuggested: {study.suggested}\n{study.reason}")
