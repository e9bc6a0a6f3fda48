"""``tstitch-trt quantise``: a bundle with one member in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import Command, json_option, traceback_option
from tstitch_trt.cli._options import bundle_argument, step_options

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Member

__all__ = ["command"]

EXAMPLES = """
tstitch-trt quantise fashion.bundle --member large --mode int8 -o fashion-int8.bundle
tstitch-trt quantise fashion.bundle --member large --mode fp8 -o fashion-fp8.bundle
tstitch-trt quantise fashion.bundle --member large --mode int8 --keep 'blocks.0.*' -o fashion-int8.bundle --json
tstitch-trt quantise fashion.bundle --member large --mode int8 --schedule small:0.4,large -o fashion-int8.bundle
tstitch-trt quantise sd15.bundle --member large --mode int8 --prompts prompts.txt --samples 512 -o sd15-int8.bundle
"""


@click.command("quantise", cls=Command, examples=EXAMPLES)
@bundle_argument
@click.option("--member", required=True, metavar="NAME", help="The member to quantise.")
@click.option("--mode", required=True, metavar="MODE", help="int8, or fp8 (compute capability 8.9 or newer).")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The new bundle's directory."
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="N",
    help="Recorded inputs that set the ranges, spread evenly over all noise levels.",
)
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="TEXT",
    help="A schedule to calibrate for. May be repeated. [the member alone, and the bundle's default]",
)
@step_options
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="S", help="Of the trajectories.")
@click.option(
    "--calibration",
    default="max",
    show_default=True,
    metavar="METHOD",
    help="How ranges are set: max, or (int8) entropy.",
)
@click.option(
    "--high-precision",
    default="fp16",
    show_default=True,
    metavar="P",
    help="What the layers that are not quantised compute in: fp16, bf16 or fp32.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="LAYER",
    help="A layer to leave in high precision, by name or pattern ('blocks.0.*'). May be repeated.",
)
@click.option("--prompt", multiple=True, metavar="TEXT", help="What a text bundle draws meanwhile. May be repeated.")
@click.option(
    "--prompts", "prompts_file", type=click.Path(path_type=Path), metavar="FILE", help="More of them, one a line."
)
@click.option(
    "--threads", type=click.IntRange(0), default=0, metavar="N", help="CPU threads. [$OMP_NUM_THREADS, or all cores]"
)
@json_option
@traceback_option
def command(
    bundle: Path,
    member: str,
    mode: str,
    output: Path,
    samples: int,
    schedules: tuple[str, ...],
    steps: int | None,
    solver: str | None,
    guidance: float | None,
    seed: int,
    calibration: str,
    high_precision: str,
    keep: tuple[str, ...],
    prompt: tuple[str, ...],
    prompts_file: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Quantise one member of BUNDLE to 8 bits, as a new bundle, and report what that costs.

    The bundle is walked with guidance for several seeds and labels or prompts (made up where none are given), and the
    member's own inputs at every noise level set the ranges of its activations. Quantised are the matrix products of its
    blocks; embedders, modulation, the attention's own products, convolutions, first and last layer stay in high
    precision. The loss is measured on other seeds, by noise level, and kept in the manifest. Needs the extra "quant"
    (nvidia-modelopt).

    The new bundle has an ONNX Runtime engine of the member. Others are compiled from it: tstitch-trt build DIR
    --backend tensorrt-rtx, for fp8 with --option compute-capabilities=8.9,12.0.
    """
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.files import read_lines
    from tstitch_trt.progress import progress_bar
    from tstitch_trt.quantise.quantise import quantise

    with progress_bar(f"quantising {member}", logs=("tstitch_engines", "tstitch_export", "tstitch_trt")) as bar:
        manifest = quantise(
            bundle,
            member=member,
            mode=mode,
            output=output,
            samples=samples,
            steps=steps,
            solver=solver,
            guidance=guidance,
            schedules=schedules,
            seed=seed,
            calibration=calibration,
            high_precision=high_precision,
            keep=keep,
            prompts=[*prompt, *([] if prompts_file is None else read_lines(prompts_file, option="--prompts"))],
            threads=threads,
            progress=bar,
        )
    done = manifest.members[member]
    if as_json:
        print_json({"bundle": str(output), "member": member, "precision": done.precision, **_document(done)})
        return
    _print(output, member, done)


def _document(member: Member) -> dict[str, object]:
    import msgspec

    document: dict[str, object] = msgspec.to_builtins(member.quantisation)
    return document


def _print(output: Path, name: str, member: Member) -> None:
    from tstitch_trt.cli._text import print_table
    from tstitch_trt.progress import log

    made = member.quantisation
    assert made is not None
    kept = f", {len(made.kept)} kept in {made.high_precision}" if made.kept else ""
    log(
        f"member {name}: {len(made.layers)} layers in {member.precision}{kept}, all others in {made.high_precision}; "
        f"ranges ({made.method}) of {made.rows} inputs, timesteps {made.timesteps[0]:g} to {made.timesteps[1]:g}, over "
        f"{' and '.join(made.schedules)}"
    )
    print_table(
        ("timesteps", "inputs", "rel L2", "cosine", "max abs"),
        [
            (
                f"{level.timesteps[0]:g} to {level.timesteps[1]:g}",
                str(level.rows),
                f"{level.rel_l2:.1e}",
                f"{level.cosine:.6f}",
                f"{level.max_abs:.1e}",
            )
            for level in made.loss
        ],
    )
    spread = ", ".join(f"{value:.1e}" for value in made.latents)
    click.echo(f"final latents over {made.latents_schedule}, relative L2 of {len(made.latents)} seeds: {spread}")
    click.echo(output)
