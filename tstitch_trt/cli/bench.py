"""``tstitch-trt bench``: what the engines cost and what the runtime adds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import LoadOptions, ProfileOptions, StepOptions, parse_budgets, rounding_option

if TYPE_CHECKING:
    from tstitch_trt.bench.bench import Bench

__all__ = ["command"]

EXAMPLES = """
tstitch-trt bench fashion.bundle
tstitch-trt bench fashion.bundle --fractions 0:1:0.1 --steps 50 --batch 8 --plot latency.png
tstitch-trt bench fashion.bundle --fractions 0,0.4,1 --repeats 9 --json
tstitch-trt bench fashion.bundle --budget-ms 200,400 --repeats 20
tstitch-trt bench fashion.bundle --fractions 0 --steps 20 --against torch
tstitch-trt bench fashion.bundle --fractions 0.4 --repeats 1 --profile trace.json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    fractions: str | None = option(
        "START:STOP:STEP or a list such as 0,0.4,1: shares of the steps on the first member. [0:1:0.25]", "LIST"
    )
    rounding: str | None = rounding_option()
    budget_ms: str | None = option(
        "Measure what is chosen for budgets, e.g. 200,500, and how often they are met (after: calibrate).", "MS"
    )
    batch: int | None = option("Images per trajectory, in one engine call. [8]", "B", least=1)
    repeats: int = option("Measured rounds.", "N", default=5, least=1)
    warmup: int = option("Rounds that are not counted.", "N", default=1, least=0)
    against: Literal["torch"] | None = option("Measure the same loop in PyTorch eager too, with the same weights.")
    plot: Path | None = option("Draw time against fraction.", "FILE.png")


@tstitch_command("bench", EXAMPLES, wanted=Options, step=StepOptions, load=LoadOptions, profile=ProfileOptions)
def command(
    bundle: Path, wanted: Options, step: StepOptions, load: LoadOptions, profile: ProfileOptions, as_json: bool
) -> None:
    """Measure BUNDLE: engines alone, step kernels, and trajectories at several fractions.

    Bare engine calls and trajectories are measured in turn, so that the overhead of the runtime (1 is none) is right on
    a busy machine too. All times are in milliseconds.
    """
    from tstitch_trt.bench.bench import measure
    from tstitch_trt.cli._parsing import parse_fractions
    from tstitch_trt.cli._text import print_result
    from tstitch_trt.plots.bench import plot_bench
    from tstitch_trt.plots.figure import check_plot
    from tstitch_trt.progress import progress_bar

    budgets = parse_budgets(wanted.budget_ms)
    fractions = parse_fractions(wanted.fractions or "0:1:0.25") if wanted.fractions or not budgets else ()
    check_plot(wanted.plot)
    profile.start()
    with load.open(bundle) as runtime:
        baseline = None
        if wanted.against is not None:
            from tstitch_trt.bench.torch_eager import EagerTorch

            baseline = EagerTorch.of(runtime.bundle, threads=runtime.threads)
        with progress_bar("warming up") as bar:
            result = measure(
                runtime,
                fractions=fractions,
                budgets=budgets,
                batch=wanted.batch,
                repeats=wanted.repeats,
                warmup=wanted.warmup,
                threads=runtime.threads,
                baseline=baseline,
                progress=bar,
                rounding=wanted.rounding,
                **asdict(step),
            )
    print_result(result, as_json, _print, plot=wanted.plot, draw=plot_bench)


def _print(bench: Bench) -> None:
    from tstitch_trt.cli._text import fixed, print_table, size

    click.echo(
        f"{bench.bundle}: {bench.backend} on {bench.device}, batch {bench.batch}, {bench.steps} {bench.solver} steps, "
        f"median of {bench.repeats} rounds"
    )
    click.echo(f"{bench.machine.processor}, {bench.machine.cores} cores, load {bench.machine.load:g}\n")
    print_table(
        ("member", "guided", "step ms", "p10", "p90"),
        [(m.name, "yes" if m.guided else "no", *fixed(3, m.step_ms, m.p10_ms, m.p90_ms)) for m in bench.members],
    )
    click.echo()
    rows = []
    for t in bench.trajectories:
        times = fixed(1, t.ms, t.p10_ms, t.p90_ms, t.predicted_ms)
        ratios = fixed(3, t.measured_over_predicted, t.overhead)
        rows.append((f"{t.fraction:g}", t.schedule, *times, *ratios, f"{t.images_per_second:.2f}"))
    print_table(
        ("fraction", "schedule", "ms", "p10", "p90", "predicted", "measured/predicted", "overhead", "images/s"), rows
    )
    chosen = [(t, t.budget) for t in bench.trajectories if t.budget is not None]
    if chosen:
        click.echo()
        rows = []
        for t, budget in chosen:
            schedule = f"{t.schedule} ({budget.solver}, {budget.steps} steps)"
            source = f"{budget.source}: {budget.metric} {budget.quality:.4g}"
            times = fixed(1, budget.predicted_ms, budget.upper_ms, t.ms)
            rows.append((f"{budget.budget_ms:g}", schedule, source, *times, f"{budget.met} of {budget.runs}"))
        print_table(("budget ms", "schedule", "chosen by", "predicted", "at most", "measured", "met"), rows)
    if bench.against is not None:
        click.echo()
        rows = []
        for a in bench.against.trajectories:
            times = fixed(1, a.ms, a.p10_ms, a.p90_ms)
            rows.append((f"{a.fraction:g}", *times, f"{a.speedup:.2f}", f"{a.relative_difference:.1e}"))
        print_table(
            ("fraction", f"{bench.against.name} ms", "p10", "p90", "ours is faster by", "latents differ by"), rows
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
