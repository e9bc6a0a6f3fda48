"""``tstitch-trt profile``: how far the members of a bundle are apart, and a schedule that follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import Command, command_line, json_option, traceback_option
from tstitch_trt.cli._options import bundle_argument, load_runtime, runtime_options, step_options

if TYPE_CHECKING:
    from tstitch_trt.runtime.step_graphs import GraphMode
    from tstitch_trt.study.records import Divergence

__all__ = ["command"]

EXAMPLES = """
tstitch-trt profile fashion.bundle
tstitch-trt profile fashion.bundle --samples 16 --steps 20 --plot divergence.png
tstitch-trt profile fashion.bundle --reference-member large --guidance 1 --json
tstitch-trt profile sd15.bundle --samples 4 --steps 20 --solver ddim --prompts prompts.txt
"""


@click.command("profile", cls=Command, examples=EXAMPLES)
@bundle_argument
@click.option("--reference-member", metavar="NAME", help="The member that others are compared with. [the last]")
@click.option(
    "--samples", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Seeds that are walked."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S", help="The first of them.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="What a text bundle draws, one text a line."
)
@step_options
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw divergence and orders.")
@runtime_options
@json_option
@traceback_option
def command(
    bundle: Path,
    reference_member: str | None,
    samples: int,
    seed: int,
    prompts: Path | None,
    steps: int | None,
    solver: str | None,
    guidance: float | None,
    plot: Path | None,
    device: str,
    backend: str | None,
    threads: int | None,
    graph: GraphMode,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Compare the members of BUNDLE step by step, and suggest a schedule.

    All members are run at every state of the reference member's trajectory, and their denoised estimates are compared.
    Then schedules with equal counts of small steps are run in several orders (small first, large first, interleaved),
    and the best order at more shares: the suggested share is the knee of the curve. The result is kept in the bundle.

    Latents near the reference's mean pictures that are alike. How good pictures are is measured by: tstitch-trt
    evaluate. Needs a solver without memory, such as ddim, which is also the default where the bundle's own has one.
    """
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.files import read_lines
    from tstitch_trt.plots.figure import check_plot
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.study.divergence.divergence import profile, profile_solver
    from tstitch_trt.study.store import save_study

    texts = [] if prompts is None else read_lines(prompts, option="--prompts")
    if plot is not None:
        check_plot(plot)
    runtime = load_runtime(bundle, device=device, backend=backend, threads=threads, graph=graph, rebuild=rebuild)
    try:
        usual = runtime.manifest.defaults.solver
        chosen = profile_solver(runtime.manifest, solver)
        if solver is None and chosen != usual:
            log(f"the bundle's own solver {usual} has a memory and can't be entered in the middle; using {chosen}")
        with progress_bar("profiling") as bar:
            study = profile(
                runtime,
                samples=samples,
                seed=seed,
                reference=reference_member,
                steps=steps,
                solver=chosen,
                guidance=guidance,
                prompts=texts,
                command=command_line(click.get_current_context()),
                progress=bar,
            )
        place = save_study(runtime.bundle, study)
    finally:
        runtime.close()
    if plot is not None:
        from tstitch_trt.plots.divergence import plot_divergence

        plot_divergence(plot, study)
        log(f"plot: {plot}")
    log(f"kept in {place}")
    if as_json:
        print_json(study)
    else:
        _print(study)


def _print(study: Divergence) -> None:
    from tstitch_trt.cli._text import print_table

    click.echo(
        f"{study.bundle}: distance from {study.reference} on its trajectory, {study.steps} {study.solver} steps, "
        f"guidance {study.guidance:g}, {len(study.seeds)} seeds\n"
    )
    shown = sorted({round(i * (study.steps - 1) / 9) for i in range(10)})
    print_table(
        ("member", "step", "timestep", "sigma", "relative L2", "p10", "p90", "cosine"),
        [
            (
                name,
                str(s.step + 1),
                f"{s.timestep:.4g}",
                f"{s.sigma:.4g}",
                f"{s.rel_l2:.4f}",
                f"{s.p10:.4f}",
                f"{s.p90:.4f}",
                f"{s.cosine:.5f}",
            )
            for name, steps in study.members.items()
            for s in steps
            if s.step in shown
        ],
    )
    click.echo()
    print_table(
        ("small steps", "order", "schedule", "latent error", "p10", "p90"),
        [
            (f"{t.share:.0%}", t.order, t.schedule, f"{t.latent_error:.4f}", f"{t.p10:.4f}", f"{t.p90:.4f}")
            for t in study.orders
        ],
    )
    click.echo(f"\nsuggested: {study.suggested}\n{study.reason}")
