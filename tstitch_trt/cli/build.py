"""``tstitch-trt build``: a recipe and its checkpoints become a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._completion import complete_recipe
from tstitch_trt.cli._options import LimitOptions, lora_texts, signature_option

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest, Precision
    from tstitch_engines.progress import Progress
    from tstitch_engines.spec import Range

__all__ = ["command"]

_VERBOSITY = "profiling-verbosity"  # the option of the backends

EXAMPLES = """
tstitch-trt build --list
tstitch-trt build --template
tstitch-trt build fashion -o fashion.bundle
tstitch-trt build fashion --batch 1:8:32 --json
tstitch-trt build fashion.bundle --backend tensorrt-rtx
tstitch-trt build fashion --backend tensorrt-rtx --option compute-capabilities=8.9,12.0
tstitch-trt build dit --member small=S.pt --member large=XL.pt --precision fp16 --option opset=22
tstitch-trt build fashion.bundle --backend tensorrt-rtx --profiling-verbosity detailed
tstitch-trt build dit-256 --member small=DiT-S.pt --member large=DiT-XL.pt -o dit-256.bundle
tstitch-trt build dit-256 --member small=S.pt --member large=XL.pt --precision large=bf16 --device cuda
tstitch-trt build dit --member small=S.pt --member large=XL.pt --option small.num_heads=4
tstitch-trt build sd15-bksdm-tiny --member small=bk-sdm-tiny --member large=stable-diffusion-v1-5 --precision fp16
tstitch-trt build sd15-bksdm-tiny --member small=nota-ai/bk-sdm-tiny@main --member large=stable-diffusion-v1-5
tstitch-trt build sd15-bksdm-tiny --member small=tiny/unet --member large=sd15/unet --height 512:512:768
tstitch-trt build sd15-bksdm-tiny --member small=TINY --member large=SD15 --lora large=style.safetensors:0.8
tstitch-trt build sd15-bksdm-tiny --member small=TINY --member large=SD15 --part controlnet=controlnet-canny
"""


@dataclass(frozen=True, kw_only=True)
class Options(LimitOptions):
    list_recipes: bool = option("List the recipes that come with the package.", None, "--list")
    show_template: bool = option("Print a commented recipe to start your own from.", None, "--template")
    members: tuple[str, ...] = option(
        "A member's checkpoint: .safetensors, .pt, .pth, a diffusers folder, or a Hugging Face repository, "
        "ORG/NAME[/PATH][@REVISION]. May be repeated.",
        "NAME=CHECKPOINT",
        "--member",
    )
    parts: tuple[str, ...] = option(
        "A checkpoint of text_encoder, text_encoder_2, vae_decoder, vae_encoder or controlnet, in place of the one in "
        "a member's pipeline; a path or a repository, as for --member. May be repeated.",
        "NAME=CHECKPOINT",
        "--part",
    )
    loras: tuple[str, ...] = option(
        "A LoRA fused into a member or text encoder before the export, by default with weight 1; FILE may be in a "
        "Hugging Face repository. May be repeated.",
        "NAME=FILE[:WEIGHT]",
        "--lora",
    )
    backend: str = option("onnxruntime, tensorrt, tensorrt-rtx or torch.", "NAME", default="onnxruntime")
    precisions: tuple[str, ...] = option(
        "fp32, fp16 (11 bits, up to 65504) or bf16 (8 bits, the range of fp32), for all members or one. May be "
        "repeated. [fp32]",
        "P | NAME=P",
        "--precision",
    )
    batch: str | None = option(
        "Batch sizes of the engines, in rows; they are tuned for OPT. An image takes one row, with guidance two. "
        "[1:16:16, without guidance 1:8:16; or the BUNDLE's]",
        "MIN:OPT:MAX",
    )
    height: str | None = option("Heights of the pictures, in pixels. [the models' native one]", "MIN:OPT:MAX")
    width: str | None = option("Widths of the pictures, in pixels. [the models' native one]", "MIN:OPT:MAX")
    tokens: str | None = option(
        "Lengths of prompts in tokens; longer ones go in chunks of 77. [77:77:231]", "MIN:OPT:MAX"
    )
    device: str = option(
        "Where to compile: cpu, cuda or cuda:N. tensorrt-rtx compiles on cpu for a list of GPUs, on cuda for that GPU.",
        "NAME",
        default="cpu",
    )
    options: tuple[str, ...] = option(
        "An option of the backend, or as MEMBER.NAME of a member or part. If a checkpoint does not say how it was "
        "trained, MEMBER.prediction=eps|v|x0, MEMBER.noise and MEMBER.zero_snr do. opset=20 to 23 sets the ONNX opset "
        "[20 for fp32, else 23]. May be repeated.",
        "NAME=VALUE",
        "--option",
    )
    profiling_verbosity: Literal["none", "names", "detailed"] | None = option(
        "How much TensorRT engines say about their layers; inspect --layers needs detailed. [names]"
    )
    require_signature: Path | None = signature_option()
    fresh: bool = option("Export and compile everything again, even what did not change.")
    output: Path | None = option("The bundle's directory. [RECIPE.bundle, or BUNDLE]", "DIR", "-o", "--output")

    def ranges(self) -> dict[str, Range | None]:
        """Batch, height, width and tokens, ``None`` where nothing was said."""
        from tstitch_engines.spec import Range

        said = {"batch": self.batch, "height": self.height, "width": self.width, "tokens": self.tokens}
        return {name: None if text is None else Range.parse(text, option=f"--{name}") for name, text in said.items()}


@tstitch_command("build", EXAMPLES, bundle=False, given=Options)
@click.argument("source", metavar="RECIPE|BUNDLE", required=False, shell_complete=complete_recipe)
def command(source: str | None, given: Options, as_json: bool) -> None:
    """Build RECIPE (a name, or the path of a .toml file) into a bundle, or BUNDLE's engines for one more backend.

    From a BUNDLE, its own ONNX is compiled, without checkpoints or torch. Batch sizes and options that you leave out
    are those of the engines that it has. -o writes another bundle and leaves this one as it is.

    Parts that did not change come from the cache or from the old bundle, so an interrupted build resumes where it
    stopped. An old bundle stays in place until the new one is complete.
    """
    from tstitch_export.planning.recipe import recipe_names
    from tstitch_trt.cli._parsing import parse_pairs
    from tstitch_trt.cli._text import print_json, size
    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.runtime.memory import larger_than_free

    if given.list_recipes:
        _list(as_json)
        return
    if given.show_template:
        from tstitch_export.planning.recipe import template

        click.echo(template(), nl=False)
        return
    if source is None:
        raise BadInput(
            f"build needs a RECIPE or a BUNDLE, got nothing; known: {', '.join(recipe_names())}",
            hint="write e.g. tstitch-trt build fashion; tstitch-trt build --list describes them",
        )
    checkpoints = parse_pairs(given.members, option="--member", value="CHECKPOINT")
    folders = parse_pairs(given.parts, option="--part", value="CHECKPOINT")
    options = parse_pairs(given.options, option="--option", value="VALUE")
    changes: dict[str, str] = {_VERBOSITY: given.profiling_verbosity} if given.profiling_verbosity else {}
    if changes and options.get(_VERBOSITY, given.profiling_verbosity) != given.profiling_verbosity:
        raise BadInput(
            f"--profiling-verbosity {given.profiling_verbosity} and --option {_VERBOSITY}={options[_VERBOSITY]} "
            "contradict each other",
            hint="give one of them",
        )
    ranges = given.ranges()
    precision = _precision(given.precisions)
    from_bundle = source not in recipe_names() and Path(source).is_dir()
    place = given.output or Path(source if from_bundle else f"{Path(source).stem}.bundle")
    of_the_export = {
        "--member": given.members, "--part": given.parts, "--lora": given.loras, "--precision": given.precisions,
        "--option": [text for text in given.options if text.startswith("opset=")],
    }  # fmt: skip
    for name, texts in of_the_export.items() if from_bundle else ():
        if texts:
            raise BadInput(
                f"{name} {texts[0]} decides what is exported, and {source} is a bundle, whose ONNX is exported",
                hint=f"leave out {name}, or build from the recipe",
            )
    if given.require_signature is not None and not from_bundle:
        raise BadInput(
            f"--require-signature {given.require_signature}: {source} is a recipe, and bundles are signed",
            hint="leave it out, or build from a bundle",
        )
    with progress_bar(f"building {source}", logs=("tstitch_engines", "tstitch_export")) as bar:
        if from_bundle:
            manifest = _recompile(Path(source), given, ranges, options, changes, bar)
        else:
            from tstitch_export.build import build

            manifest = build(
                source,
                members=checkpoints,
                parts=folders,
                output=place,
                backend=given.backend,
                precision=precision,
                profile=ranges.pop("batch"),
                **ranges,
                device=given.device,
                options=options | changes | {f"{name}.lora": text for name, text in lora_texts(given.loras).items()},
                fresh=given.fresh,
                progress=bar,
                time_limit=given.time_limit,
                memory_limit=given.memory_limit,
            )
    if given.device == "cpu" and (note := larger_than_free(manifest, given.backend)) is not None:
        log(note)
    if as_json:
        from msgspec import structs

        from tstitch_trt.cli._documents import BuildOutput

        print_json(BuildOutput(**structs.asdict(manifest), bundle=str(place)))
        return
    files = manifest.components()
    log(f"{manifest.name}: {', '.join(manifest.members)}; {len(files)} files, {size(sum(f.bytes for f in files))}")
    click.echo(place)


def _recompile(
    source: Path,
    given: Options,
    ranges: dict[str, Range | None],
    texts: dict[str, str],
    changes: dict[str, str],
    progress: Progress,
) -> Manifest:
    from tstitch_engines.backends import open_backend
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_engines.compile.bundle import recompile
    from tstitch_export.families.options import typed
    from tstitch_export.planning.sizes import in_latents

    backend = given.backend
    known, what = open_backend(backend).options, f"backend {backend!r}"
    options = typed(texts, known, what=what) if texts else None
    bundle = open_bundle(source, engines=False, require_signature=given.require_signature)
    profile = {"B": ranges["batch"], "T": ranges["tokens"]}
    for dim, side in (("H", "height"), ("W", "width")):
        profile[dim] = in_latents(ranges[side], bundle.manifest.decoder.factor, side)
    return recompile(
        bundle,
        backend=backend,
        device=given.device,
        profile={dim: found for dim, found in profile.items() if found is not None},
        options=options,
        changes=typed(changes, known, what=what),
        output=given.output,
        fresh=given.fresh,
        progress=progress,
        limits=given.limits(),
    ).manifest


def _list(as_json: bool) -> None:
    from tstitch_export.planning.recipe import load_recipe, recipe_names
    from tstitch_trt.cli._text import print_json, print_table

    recipes = [load_recipe(name)[0] for name in recipe_names()]
    if as_json:
        from tstitch_trt.cli._documents import RecipeEntry

        print_json([RecipeEntry(name=r.name, members=list(r.members), description=r.description) for r in recipes])
        return
    print_table(("recipe", "members", "description"), [(r.name, ", ".join(r.members), r.description) for r in recipes])


def _precision(texts: tuple[str, ...]) -> Precision | dict[str, Precision]:
    """One for all, or one by member; ``build`` checks the values."""
    from tstitch_trt.cli._parsing import parse_pairs

    common = [text for text in texts if "=" not in text]
    if not common:
        return parse_pairs(texts, option="--precision", value="PRECISION") or "fp32"  # type: ignore[return-value]
    if len(texts) > 1:
        raise BadInput(
            f"--precision {' and '.join(texts)}: one for all members can't be combined with others",
            hint="give one --precision P, or one --precision NAME=P per member (fp32 where none is given)",
        )
    return common[0]  # type: ignore[return-value]
