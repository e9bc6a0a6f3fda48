"""``tstitch-trt quantise``: a bundle with one member in 8 bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import LimitOptions, PromptsFile, StepOptions, signature_option, threads_option

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


@dataclass(frozen=True, kw_only=True)
class Options(LimitOptions):
    member: str = option("The member to quantise.", "NAME", required=True)
    mode: str = option("int8, or fp8 (compute capability 8.9 or newer).", "MODE", required=True)
    output: Path = option("The new bundle's directory.", "DIR", "-o", "--output", required=True)
    samples: int = option(
        "Recorded inputs that set the ranges, spread evenly over all noise levels.", "N", default=256, least=1
    )
    schedules: tuple[str, ...] = option(
        "A schedule to calibrate for. May be repeated. [the member alone, and the bundle's default]",
        "TEXT",
        "--schedule",
    )
    seed: int = option("Seed of the trajectories.", "S", default=0, least=0)
    calibration: str = option("How ranges are set: max, or (int8) entropy.", "METHOD", default="max")
    high_precision: str = option(
        "What the layers that are not quantised compute in: fp16, bf16 or fp32.", "P", default="fp16"
    )
    require_signature: Path | None = signature_option()
    keep: tuple[str, ...] = option(
        "A layer to leave in high precision, by name or pattern ('blocks.0.*'). May be repeated.", "LAYER"
    )


@dataclass(frozen=True, kw_only=True)
class Prompts(PromptsFile):
    prompt: tuple[str, ...] = option("A prompt to calibrate with, for text bundles. May be repeated.", "TEXT")
    threads: int | None = threads_option()


@tstitch_command("quantise", EXAMPLES, wanted=Options, step=StepOptions, texts=Prompts)
def command(bundle: Path, wanted: Options, step: StepOptions, texts: Prompts, as_json: bool) -> None:
    """Quantise one member of BUNDLE to 8 bits, as a new bundle, and report what that costs.

    The bundle draws with guidance for several seeds and labels or prompts (made up where none are given). The member's
    own inputs at every noise level set the ranges of its activations. The matrix products of its blocks are quantised.
    Embedders, modulation, the products inside attention, convolutions, and the first and last layer stay in high
    precision. The loss is measured on other seeds, by noise level, and kept in the manifest. Needs the extra "quant"
    (nvidia-modelopt).

    The new bundle has an ONNX Runtime engine of the member. Compile others from it: tstitch-trt build DIR --backend
    tensorrt-rtx, for fp8 with --option compute-capabilities=8.9,12.0.
    """
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.progress import progress_bar
    from tstitch_trt.quantise.quantise import quantise

    member, output = wanted.member, wanted.output
    with progress_bar(f"quantising {member}", logs=("tstitch_engines", "tstitch_export", "tstitch_trt")) as bar:
        manifest = quantise(
            bundle,
            **asdict(wanted),
            **asdict(step),
            prompts=[*texts.prompt, *texts.texts()],
            threads=texts.threads or 0,
            progress=bar,
        )
    done = manifest.members[member]
    if as_json:
        from msgspec import structs

        from tstitch_trt.cli._documents import QuantiseOutput

        assert done.quantisation is not None
        made = structs.asdict(done.quantisation)
        print_json(QuantiseOutput(**made, bundle=str(output), member=member, precision=done.precision))
        return
    _print(output, member, done)


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
    rows = []
    for loss in made.loss:
        timesteps = f"{loss.timesteps[0]:g} to {loss.timesteps[1]:g}"
        rows.append((timesteps, str(loss.rows), f"{loss.rel_l2:.1e}", f"{loss.cosine:.6f}", f"{loss.max_abs:.1e}"))
    print_table(("timesteps", "inputs", "rel L2", "cosine", "max abs"), rows)
    spread = ", ".join(f"{value:.1e}" for value in made.latents)
    click.echo(f"final latents over {made.latents_schedule}, relative L2 of {len(made.latents)} seeds: {spread}")
    click.echo(output)
