"""The options that say how to walk a trajectory, shared by the commands that sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tstitch_trt.graphs import GraphMode
    from tstitch_trt.runtime import Runtime

__all__ = [
    "budget_option",
    "bundle_argument",
    "load_runtime",
    "parse_budgets",
    "rebuild_option",
    "runtime_options",
    "step_options",
]

F = TypeVar("F", bound=Callable[..., Any])


def bundle_argument(function: F) -> F:
    return click.argument("bundle", type=click.Path(path_type=Path))(function)


def runtime_options(function: F) -> F:
    """Where and with what to run."""
    for option in (
        rebuild_option,
        click.option(
            "--graph",
            type=click.Choice(("auto", "step", "segment", "off")),
            default="auto",
            show_default=True,
            help="Replay recorded CUDA graphs of a step, of all equal steps in a row, or none.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(0),
            metavar="N",
            help="CPU threads of engines on the CPU. [$OMP_NUM_THREADS, or all cores]",
        ),
        click.option(
            "--backend", metavar="NAME", help="Backend whose engine to load (default: the one the bundle has)."
        ),
        click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N."),
    ):
        function = option(function)
    return function


def rebuild_option(function: F) -> F:
    return click.option(
        "--rebuild",
        is_flag=True,
        help="First compile engines again that are missing, damaged or don't fit this machine.",
    )(function)


def load_runtime(
    bundle: Path, *, device: str, backend: str | None, threads: int | None, graph: GraphMode, rebuild: bool
) -> Runtime:
    """The runtime of ``runtime_options``; with ``rebuild`` under a progress bar."""
    import tstitch_trt
    from tstitch_trt.progress import progress

    if not rebuild:
        return tstitch_trt.load(bundle, device=device, backend=backend, threads=threads, graph=graph)
    with progress("checking engines", 1, logs=("tstitch_engines", "tstitch_trt")) as bar:
        return tstitch_trt.load(
            bundle,
            device=device,
            backend=backend,
            threads=threads,
            graph=graph,
            rebuild=True,
            progress=lambda phase, share: bar.update(done=share, text=phase),
        )


def budget_option(text: str) -> Callable[[F], F]:
    """``--budget-ms``, with ``text`` for its help."""
    return click.option("--budget-ms", metavar="MS", help=text)


def parse_budgets(text: str | None) -> tuple[float, ...]:
    """``"200,500"`` -> milliseconds. Raises ``BadInput``."""
    from tstitch_engines.errors import BadInput
    from tstitch_trt.cost.budget import check_budget

    if text is None:
        return ()
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"--budget-ms {text!r} is no number of milliseconds", hint="e.g. --budget-ms 500") from None
    for budget in found:
        check_budget(budget)
    return found


def step_options(function: F) -> F:
    """Steps, solver and guidance; ``None`` leaves the choice to the bundle."""
    for option in (
        click.option(
            "--guidance", type=float, metavar="G", help="Classifier-free guidance scale; 1 is none. [bundle's default]"
        ),
        click.option(
            "--solver", metavar="NAME", help="ddim, ddpm, euler, dpmpp-2m, ... an unknown name lists them all."
        ),
        click.option("--steps", type=click.IntRange(1), metavar="N", help="Denoising steps. [bundle's default]"),
    ):
        function = option(function)
    return function
