"""``tstitch-trt verify``: every engine of a bundle against ONNX Runtime and PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_engines.errors import FailedWork
from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import LimitOptions, rebuild_option, signature_option, threads_option, trust_option

if TYPE_CHECKING:
    from tstitch_trt.verify.verify import Comparison, Verification

__all__ = ["command"]

EXAMPLES = """
tstitch-trt verify fashion.bundle
tstitch-trt verify fashion.bundle --backend tensorrt-rtx --device cuda:1 --samples 16
tstitch-trt verify fashion.bundle --members large --layers
tstitch-trt verify fashion.bundle --backend tensorrt --layers
tstitch-trt verify dit.bundle --member small=DiT-S --member large=DiT-XL
tstitch-trt verify sd.bundle --members large,vae_decoder --member large=SD15 --part vae_decoder=SD15
tstitch-trt verify fashion.bundle --json
"""


@dataclass(frozen=True, kw_only=True)
class Checks(LimitOptions):
    backend: str | None = option("Engines of this backend only.", "NAME")
    members: str | None = option("Engines of these members and parts only.", "A,B")
    samples: int = option("Number of random and of recorded inputs for each batch size.", "N", default=2, least=1)
    device: str = option(
        "Where to run engines for GPUs: cuda or cuda:N; with cpu they are not run.", "NAME", default="cuda"
    )
    checkpoints: tuple[str, ...] = option(
        "What a member was made from, a path or a Hugging Face repository, for PyTorch to run. Published DiTs need "
        "none. May be repeated.",
        "NAME=CHECKPOINT",
        "--member",
    )
    parts: tuple[str, ...] = option(
        "What a part (text_encoder, vae_decoder...) was made from, for PyTorch to run. May be repeated.",
        "NAME=CHECKPOINT",
        "--part",
    )
    rebuild: bool = rebuild_option()
    trust: bool = trust_option()
    require_signature: Path | None = signature_option()
    layers: bool = option(
        "Also name the first layer that differs, where layers can be seen, and list the compiled layers of TensorRT "
        "engines with what may cost time in them."
    )
    threads: int | None = threads_option("CPU threads of engines and references.")


@tstitch_command("verify", EXAMPLES, checks=Checks)
def command(bundle: Path, checks: Checks, as_json: bool) -> None:
    """Compare every engine of BUNDLE with ONNX Runtime and PyTorch.

    Inputs are random, and those of a short guided trajectory over all noise levels. Each engine runs at its smallest,
    tuned and largest batch, and at its smallest and largest size if it takes several. Parts (text encoders, VAE,
    ControlNet) are compared like members, on the inputs that a prompt and its picture give them.

    An engine that can't run here is listed as not checked, with the reason; its identity and the header of its plan are
    still checked. The exit code is 1 when an engine fails. With --rebuild, engines that do not fit this machine are
    compiled again first, for every backend that runs here.
    """
    from tstitch_engines.backends import for_gpu
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_engines.compile.bundle import compile_command
    from tstitch_trt.cli._parsing import parse_pairs
    from tstitch_trt.cli._text import print_result
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.verify.verify import verify

    listed = checks.members
    sources = parse_pairs(checks.checkpoints, option="--member", value="CHECKPOINT")
    sources |= parse_pairs(checks.parts, option="--part", value="CHECKPOINT")
    with progress_bar("verifying", logs=("tstitch_engines", "tstitch_trt") if checks.rebuild else ()) as bar:
        result = verify(
            bundle,
            backend=checks.backend,
            members=None if listed is None else [part.strip() for part in listed.split(",") if part.strip()],
            samples=checks.samples,
            threads=checks.threads or 0,
            layers=checks.layers,
            device=checks.device,
            checkpoints=sources,
            rebuild=checks.rebuild,
            trust=checks.trust,
            require_signature=checks.require_signature,
            progress=bar,
            time_limit=checks.time_limit,
            memory_limit=checks.memory_limit,
        )
    print_result(result, as_json, _print)
    failed = result.of("failed")
    if failed:
        reasons = "; ".join(f"the {c.backend} engine of {c.kind} {c.member!r}: {c.reason}" for c in failed)
        first = failed[0]
        on = checks.device if for_gpu(first.backend, first.arch) else "cpu"
        again = compile_command(open_bundle(bundle, verify="size", engines=False), first.backend, on)
        raise FailedWork(
            f"{len(failed)} of {len(result.engines)} engines failed: {reasons}",
            hint=f"compile them again: {again} --fresh",
        )
    if not result.of("passed"):
        log("no engine was run: none of those asked for can run on this machine")


def _print(result: Verification) -> None:
    from tstitch_trt.cli._layers import print_layers
    from tstitch_trt.cli._text import print_entries, print_table

    left_out = {name: text for name, text in result.references.items() if text.startswith("left out")}
    references = ", ".join(f"{name} {text}" for name, text in result.references.items() if name not in left_out)
    click.echo(f"{result.bundle}: {len(result.engines)} engines" + (f", against {references}" if references else ""))
    for name, text in left_out.items():
        click.echo(f"  {name} {text}")
    for check in result.engines:
        click.echo()
        limit = f"{check.limit:.0e}: {check.limit_reason}" if check.comparisons else ""
        print_entries(
            f"{check.kind} {check.member}: {check.backend} {check.backend_version} for {check.arch}, "
            f"{check.precision}, identity {check.identity[:16]}: {check.status}",
            [("plan", check.plan or ""), ("reason", check.reason or ""), ("limit", limit)],
        )
        if check.comparisons:
            print_table(
                ("against", "inputs", "batch", "sizes", "tensor", "max abs", "max rel", "rel L2", "result"),
                [_row(c) for c in check.comparisons],
            )
        if check.layers is not None:
            print_layers(f"compiled layers of {check.kind} {check.member}", check.layers)
    for layer in result.layers:
        click.echo()
        kind = next(check.kind for check in result.engines if check.member == layer.member)
        click.echo(f"{kind} {layer.member}, {layer.compared}: {layer.tensors} tensors, limit {layer.limit:.0e}")
        if layer.first is not None:
            first = layer.first
            click.echo(
                f"  first that differs: {first.op} {first.node} (node {first.position} of {first.nodes}), "
                f"tensor {first.tensor}: {first.error}"
            )
        else:
            click.echo(f"  {layer.reason or 'none differs'}")


def _row(c: Comparison) -> tuple[str, ...]:
    sizes = " ".join(f"{name}={size}" for name, size in c.sizes.items())
    result = "passed" if c.passed else "FAILED"
    errors = (c.error.max_abs, c.error.max_rel, c.error.rel_l2)
    shown = ("nan" if error is None else f"{error:.1e}" for error in errors)
    return (c.against, c.inputs, str(c.batch), sizes or "fixed", c.tensor, *shown, result)
