"""``tstitch-trt bench``: what the engines cost and what the runtime adds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tstitch_trt.cli._command import Command, json_option, traceback_option
from tstitch_trt.cli._options import (
    budget_option,
    bundle_argument,
    load_runtime,
    parse_budgets,
    runtime_options,
    step_options,
)

if TYPE_CHECKING:
    from tstitch_trt.bench.bench import Bench
    from tstitch_trt.runtime.step_graphs import GraphMode

__all__ = ["command"]

EXAMPLES = """
tstitch-trt bench fashion.bundle
tstitch-trt bench fashion.bundle --fractions 0:1:0.1 --steps 50 --batch 8 --plot latency.png
tstitch-trt bench fashion.bundle --fractions 0,0.4,1 --repeats 9 --json
tstitch-trt bench fashion.bundle --budget-ms 200,400 --repeats 20
tstitch-trt bench fashion.bundle --fractions 0 --steps 20 --against torch
"""


@click.command("bench", cls=Command, examples=EXAMPLES)
@bundle_argument
@click.option(
    "--fractions",
    metavar="LIST",
    help="START:STOP:STEP or a list such as 0,0.4,1: shares of the steps on the first member. [0:1:0.25]",
)
@budget_option("Measure what is chosen for budgets, e.g. 200,500, and how often they are met (after: calibrate).")
@step_options
@click.option("--batch", type=click.IntRange(1), metavar="B", help="Images per trajectory, in one engine call. [8]")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Measured rounds.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, metavar="N", help="Rounds left out.")
@click.option("--against", type=click.Choice(["torch"]), help="The same loop in PyTorch eager on the same weights.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw time against fraction.")
@runtime_options
@json_option
@traceback_option
def command(
    bundle: Path,
    fractions: str | None,
    budget_ms: str | None,
    batch: int | None,
    repeats: int,
    warmup: int,
    against: str | None,
    plot: Path | None,
    device: str,
    backend: str | None,
    threads: int | None,
    graph: GraphMode,
    rebuild: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure BUNDLE: engines alone, step kernels, and trajectories at several fractions.

    Bare engine calls and trajectories are measured alternately, so that what the runtime adds (overhead, 1 = nothing)
    is honest on a busy machine too. All times are in milliseconds.
    """
    from tstitch_trt.bench.bench import measure
    from tstitch_trt.cli._parsing import parse_fractions
    from tstitch_trt.plots.figure import check_plot, plot_bench
    from tstitch_trt.progress import log, progress_bar

    budgets = parse_budgets(budget_ms)
    points = parse_fractions(fractions or "0:1:0.25") if fractions or not budgets else ()
    if plot is not None:
        check_plot(plot)

    runtime = load_runtime(bundle, device=device, backend=backend, threads=threads, graph=graph, rebuild=rebuild)
    try:
        baseline = None
        if against is not None:
            from tstitch_trt.bench.torch_eager import EagerTorch

            baseline = EagerTorch.of(runtime.bundle, threads=runtime.threads)
        with progress_bar("warming up") as bar:
            result = measure(
                runtime,
                fractions=points,
                budgets=budgets,
                batch=batch,
                repeats=repeats,
                warmup=warmup,
                threads=runtime.threads,
                baseline=baseline,
                progress=bar,
                **settings,
            )
    finally:
        runtime.close()
    if plot is not None:
        plot_bench(plot, result)
        log(f"plot: {plot}")
    if as_json:
        from tstitch_trt.cli._text import print_json

        print_json(result)
    else:
        _print(result)


def _print(bench: Bench) -> None:
    from tstitch_trt.cli._text import print_table, size

    click.echo(
        f"{bench.bundle}: {bench.backend} on {bench.device}, batch {bench.batch}, {bench.steps} {bench.solver} steps, "
        f"median of {bench.repeats} rounds"
    )
    click.echo(f"{bench.machine.processor}, {bench.machine.cores} cores, load {bench.machine.load:g}\n")
    print_table(
        ("member", "guided", "step ms", "p10", "p90"),
        [
            (m.name, "yes" if m.guided else "no", f"{m.step_ms:.3f}", f"{m.p10_ms:.3f}", f"{m.p90_ms:.3f}")
            for m in bench.members
        ],
    )
    click.echo()
    print_table(
        ("fraction", "schedule", "ms", "p10", "p90", "predicted", "measured/predicted", "overhead", "images/s"),
        [
            (
                f"{t.fraction:g}",
                t.schedule,
                f"{t.ms:.1f}",
                f"{t.p10_ms:.1f}",
                f"{t.p90_ms:.1f}",
                f"{t.predicted_ms:.1f}",
                f"{t.measured_over_predicted:.3f}",
                f"{t.overhead:.3f}",
                f"{t.images_per_second:.2f}",
            )
            for t in bench.trajectories
        ],
    )
    if any(t.budget for t in bench.trajectories):
        click.echo()
        print_table(
            ("budget ms", "schedule", "chosen by", "predicted", "at most", "measured", "met"),
            [
                (
                    f"{t.budget.budget_ms:g}",
                    f"{t.schedule} ({t.budget.solver}, {t.budget.steps} steps)",
                    f"{t.budget.source}: {t.budget.metric} {t.budget.quality:.4g}",
                    f"{t.budget.predicted_ms:.1f}",
                    f"{t.budget.upper_ms:.1f}",
                    f"{t.ms:.1f}",
                    f"{t.budget.met} of {t.budget.runs}",
                )
                for t in bench.trajectories
                if t.budget is not None
            ],
        )
    if bench.against is not None:
        click.echo()
        print_table(
            ("fraction", f"{bench.against.name} ms", "p10", "p90", "ours is faster by", "latents differ by"),
            [
                (
                    f"{t.fraction:g}",
                    f"{t.ms:.1f}",
                    f"{t.p10_ms:.1f}",
                    f"{t.p90_ms:.1f}",
                    f"{t.speedup:.2f}",
                    f"{t.relative_difference:.1e}",
                )
                for t in bench.against.trajectories
            ],
        )
        click.echo(f"{bench.against.name} {bench.against.version} on {bench.against.threads} threads")
    click.echo(
        f"\noverhead {bench.overhead:.3f} (trajectories over bare engine calls), step kernels "
        f"{1e3 * bench.step_kernels_ms:.1f} us per step, load {bench.load_ms:.0f} ms, "
        f"peak memory {size(bench.peak_memory_bytes)}"
    )
    if any(bench.jit_ms.values()):
        click.echo("compiled: " + ", ".join(f"{name} {ms / 1e3:.1f} s" for name, ms in bench.jit_ms.items()))
    click.echo(f"graphs: {bench.graph}")
    click.echo("device memory: " + ", ".join(f"{what} {size(nbytes)}" for what, nbytes in bench.memory.items()))
