"""``tstitch-trt verify``: every engine of a bundle against ONNX Runtime and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_engines.errors import FailedWork
from tstitch_trt.cli._command import Command, json_option, traceback_option
from tstitch_trt.cli._sampling import bundle_argument, rebuild_option

if TYPE_CHECKING:
    from tstitch_trt.caller import Error
    from tstitch_trt.verify import Comparison, Verification

__all__ = ["command"]

EXAMPLES = """
tstitch-trt verify fashion.bundle
tstitch-trt verify fashion.bundle --backend tensorrt-rtx --device cuda:1 --samples 16
tstitch-trt verify fashion.bundle --members large --layers
tstitch-trt verify dit.bundle --member small=DiT-S --member large=DiT-XL
tstitch-trt verify fashion.bundle --json
"""


@click.command("verify", cls=Command, examples=EXAMPLES)
@bundle_argument
@click.option("--backend", metavar="NAME", help="Engines of this backend only.")
@click.option("--members", metavar="A,B", help="Engines of these members only.")
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="N",
    help="Calls on random and on recorded inputs, each, per batch size.",
)
@click.option(
    "--device",
    default="cuda",
    show_default=True,
    metavar="NAME",
    help="Where engines for GPUs run: cuda, cuda:N, or cpu to leave them unchecked.",
)
@click.option(
    "--member",
    "checkpoints",
    multiple=True,
    metavar="NAME=CHECKPOINT",
    help="What a member was made from, for PyTorch to run. Published DiTs need none. May be repeated.",
)
@rebuild_option
@click.option("--layers", is_flag=True, help="Also name the first layer that differs, where layers can be seen.")
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="CPU threads of engines and references, 0 = all cores.",
)
@json_option
@traceback_option
def command(
    bundle: Path,
    backend: str | None,
    members: str | None,
    samples: int,
    device: str,
    checkpoints: tuple[str, ...],
    rebuild: bool,
    layers: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Compare every engine of BUNDLE with ONNX Runtime and PyTorch.

    Inputs are random ones, and those of a short trajectory of the bundle over all noise levels with guidance on, at the
    smallest, tuned and largest batch. An engine that can't run here is listed as not checked, with the reason; its
    identity and its plan's header are checked anyway. Exit code 1 when an engine fails. With --rebuild, engines of
    every backend that runs here are first compiled again where they don't fit.
    """
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.parsing import parse_pairs
    from tstitch_trt.progress import log, progress
    from tstitch_trt.verify import verify

    names = None if members is None else [part.strip() for part in members.split(",") if part.strip()]
    sources = parse_pairs(checkpoints, option="--member", value="CHECKPOINT")
    with progress("verifying", 1, logs=("tstitch_engines", "tstitch_trt") if rebuild else ()) as bar:
        result = verify(
            bundle,
            backend=backend,
            members=names,
            samples=samples,
            threads=threads,
            layers=layers,
            device=device,
            checkpoints={name: Path(path) for name, path in sources.items()},
            rebuild=rebuild,
            report=lambda share, text: bar.update(done=share, text=text),
        )
    if as_json:
        print_json(result)
    else:
        _print(result)
    failed = result.of("failed")
    if failed:
        listed = "; ".join(f"the {c.backend} engine of member {c.member!r}: {c.reason}" for c in failed)
        from tstitch_engines.bundle import open_bundle
        from tstitch_engines.identity import for_gpu

        first = failed[0]
        on = device if for_gpu(first.backend, first.arch) else "cpu"
        again = open_bundle(bundle, verify="size", engines=False).compile_command(first.backend, on)
        raise FailedWork(
            f"{len(failed)} of {len(result.engines)} engines failed: {listed}",
            hint=f"compile them again: {again} --fresh",
        )
    if not result.of("passed"):
        log("no engine was run: none of those asked for can run on this machine")


def _print(result: Verification) -> None:
    from tstitch_trt.cli._text import print_table

    references = ", ".join(f"{name} {version}" for name, version in result.references.items())
    click.echo(f"{result.bundle}: {len(result.engines)} engines" + (f", against {references}" if references else ""))
    for check in result.engines:
        click.echo()
        click.echo(
            f"member {check.member}: {check.backend} {check.backend_version} for {check.arch}, {check.precision}, "
            f"identity {check.identity[:16]}: {check.status}"
        )
        if check.plan is not None:
            click.echo(f"  {'plan':<10} {check.plan}")
        if check.reason is not None:
            click.echo(f"  {'reason':<10} {check.reason}")
        if check.comparisons:
            click.echo(f"  {'limit':<10} {check.limit:.0e}: {check.limit_reason}")
            print_table(
                ("against", "inputs", "batch", "tensor", "max abs", "max rel", "rel L2", "result"),
                [_row(c) for c in check.comparisons],
            )
    for layer in result.layers:
        click.echo()
        click.echo(f"member {layer.member}, {layer.compared}: {layer.tensors} tensors, limit {layer.limit:.0e}")
        if layer.first is not None:
            first = layer.first
            click.echo(
                f"  first that differs: {first.op} {first.node} (node {first.position} of {first.nodes}), "
                f"tensor {first.tensor}: {first.error}"
            )
        else:
            click.echo(f"  {layer.reason or 'none differs'}")


def _row(c: Comparison) -> tuple[str, ...]:
    return (c.against, c.inputs, str(c.batch), c.tensor, *_figures(c.error), "passed" if c.passed else "FAILED")


def _figures(error: Error) -> tuple[str, str, str]:
    figures = (error.max_abs, error.max_rel, error.rel_l2)
    first, second, third = ("nan" if figure is None else f"{figure:.1e}" for figure in figures)
    return first, second, third
