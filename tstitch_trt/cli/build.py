"""``tstitch-trt build``: a recipe and its checkpoints become a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import Command, json_option, traceback_option
from tstitch_trt.cli._options import lora_texts

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest, Precision
    from tstitch_engines.progress import Progress
    from tstitch_engines.spec import Range

__all__ = ["command"]

EXAMPLES = """
tstitch-trt build --list
tstitch-trt build --template
tstitch-trt build fashion -o fashion.bundle
tstitch-trt build fashion --batch 1:8:32 --json
tstitch-trt build fashion.bundle --backend tensorrt-rtx
tstitch-trt build fashion --backend tensorrt-rtx --option compute-capabilities=8.9,12.0
tstitch-trt build dit-256 --member small=DiT-S.pt --member large=DiT-XL.pt -o dit-256.bundle
tstitch-trt build dit-256 --member small=S.pt --member large=XL.pt --precision large=bf16 --device cuda
tstitch-trt build sd15-bksdm-tiny --member small=bk-sdm-tiny --member large=stable-diffusion-v1-5 --precision fp16
tstitch-trt build sd15-bksdm-tiny --member small=tiny/unet --member large=sd15/unet --height 512:512:768
tstitch-trt build sd15-bksdm-tiny --member small=TINY --member large=SD15 --lora large=style.safetensors:0.8
tstitch-trt build sd15-bksdm-tiny --member small=TINY --member large=SD15 --part controlnet=controlnet-canny
"""


@click.command("build", cls=Command, examples=EXAMPLES)
@click.argument("source", metavar="RECIPE|BUNDLE", required=False)
@click.option("--list", "list_recipes", is_flag=True, help="List the recipes that come with the package.")
@click.option("--template", "show_template", is_flag=True, help="Write a commented recipe to start one's own from.")
@click.option(
    "--member",
    "members",
    multiple=True,
    metavar="NAME=CHECKPOINT",
    help="A member's checkpoint: .safetensors, .pt, .pth or a diffusers folder. May be repeated.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    metavar="NAME=FOLDER",
    help="text_encoder, text_encoder_2, vae_decoder, vae_encoder or controlnet, where the members' pipeline folders "
    "don't have it. May be repeated.",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="NAME=FILE[:WEIGHT]",
    help="A LoRA fused into a member or text encoder before the export, by default with weight 1. May be repeated.",
)
@click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    metavar="NAME",
    help="onnxruntime, tensorrt, tensorrt-rtx or torch.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    metavar="P | NAME=P",
    help="fp32, fp16 or bf16, for all members or one. May be repeated. [fp32]",
)
@click.option(
    "--batch",
    metavar="MIN:OPT:MAX",
    help="Batch sizes of the engines; with guidance one image takes two places. [1:8:16, or the BUNDLE's]",
)
@click.option("--height", metavar="MIN:OPT:MAX", help="Heights of the pictures, in pixels. [the models' native one]")
@click.option("--width", metavar="MIN:OPT:MAX", help="Widths of the pictures, in pixels. [the models' native one]")
@click.option(
    "--tokens", metavar="MIN:OPT:MAX", help="Lengths of prompts in tokens; longer ones go in chunks of 77. [77:77:231]"
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="cpu, cuda or cuda:N. tensorrt-rtx compiles on cpu for a list of GPUs and on cuda for that one.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the backend, or MEMBER.NAME of a member's family. May be repeated.",
)
@click.option("--fresh", is_flag=True, help="Make everything again, also what did not change.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle's directory. [RECIPE.bundle, or BUNDLE]",
)
@json_option
@traceback_option
def command(
    source: str | None,
    list_recipes: bool,
    show_template: bool,
    members: tuple[str, ...],
    parts: tuple[str, ...],
    loras: tuple[str, ...],
    backend: str,
    precisions: tuple[str, ...],
    batch: str | None,
    height: str | None,
    width: str | None,
    tokens: str | None,
    device: str,
    options: tuple[str, ...],
    fresh: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Build RECIPE (a name, or the path of a .toml file) into a bundle, or BUNDLE's engines for one more backend.

    From a BUNDLE its own ONNX is compiled, without checkpoints or torch; batch sizes and options that are not given
    are those of the engines it has, and -o writes another bundle in place of changing this one.

    Every unchanged part is taken from the cache or from the bundle that is replaced, so an interrupted build goes on
    where it stopped. The bundle appears whole or not at all; an old one stays until the new one is complete.
    """
    from tstitch_engines.spec import Range
    from tstitch_export.planning.recipe import recipe_names
    from tstitch_trt.cli._parsing import parse_pairs

    if list_recipes:
        _list(as_json)
        return
    if show_template:
        from tstitch_export.planning.recipe import template

        click.echo(template(), nl=False)
        return
    if source is None:
        raise BadInput(
            f"build needs a RECIPE or a BUNDLE, got nothing; known: {', '.join(recipe_names())}",
            hint="write e.g. tstitch-trt build fashion; tstitch-trt build --list describes them",
        )
    checkpoints = parse_pairs(members, option="--member", value="CHECKPOINT")
    folders = parse_pairs(parts, option="--part", value="FOLDER")
    profile = None if batch is None else Range.parse(batch)
    chosen = parse_pairs(options, option="--option", value="VALUE")
    ranges = {name: None if text is None else Range.parse(text, option=f"--{name}")
              for name, text in (("height", height), ("width", width), ("tokens", tokens))}  # fmt: skip
    precision = _precision(precisions)
    from_bundle = source not in recipe_names() and Path(source).is_dir()
    place = output or Path(source if from_bundle else f"{Path(source).stem}.bundle")
    if from_bundle:
        for option, given in (
            ("--member", members), ("--part", parts), ("--lora", loras), ("--precision", precisions),
        ):  # fmt: skip
            if given:
                raise BadInput(
                    f"{option} {given[0]} decides what is exported, and {source} is a bundle, whose ONNX is exported",
                    hint=f"leave out {option}, or build from the recipe",
                )

    from tstitch_trt.cli._text import print_json, size
    from tstitch_trt.progress import log, progress_bar

    with progress_bar(f"building {source}", logs=("tstitch_engines", "tstitch_export")) as bar:
        if from_bundle:
            ranges = {"batch": profile, **ranges}
            manifest = _recompile(Path(source), backend, device, ranges, chosen, output, fresh, bar)
        else:
            from tstitch_export.build import build

            manifest = build(
                source,
                members={name: Path(path) for name, path in checkpoints.items()},
                parts={name: Path(path) for name, path in folders.items()},
                output=place,
                backend=backend,
                precision=precision,
                profile=profile or Range(1, 8, 16),
                **ranges,
                device=device,
                options={**chosen, **{f"{name}.lora": text for name, text in lora_texts(loras).items()}},
                fresh=fresh,
                progress=bar,
            )
    if as_json:
        import msgspec

        document: dict[str, Any] = msgspec.to_builtins(manifest)
        print_json({"bundle": str(place), **document})
        return
    files = manifest.components()
    log(f"{manifest.name}: {', '.join(manifest.members)}; {len(files)} files, {size(sum(f.bytes for f in files))}")
    click.echo(place)


def _recompile(
    source: Path,
    backend: str,
    device: str,
    ranges: dict[str, Range | None],
    options: dict[str, str],
    output: Path | None,
    fresh: bool,
    progress: Progress,
) -> Manifest:
    from tstitch_engines.backends import open_backend
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_engines.compile.bundle import recompile
    from tstitch_export.families.options import typed
    from tstitch_export.planning.sizes import in_latents

    settings = typed(options, open_backend(backend).options, what=f"backend {backend!r}") if options else None
    bundle = open_bundle(source, engines=False)
    profile = {"B": ranges["batch"], "T": ranges["tokens"]}
    for dim, side in (("H", "height"), ("W", "width")):
        profile[dim] = in_latents(ranges[side], bundle.manifest.decoder.factor, side)
    return recompile(
        bundle,
        backend=backend,
        device=device,
        profile={dim: found for dim, found in profile.items() if found is not None},
        options=settings,
        output=output,
        fresh=fresh,
        progress=progress,
    ).manifest


def _list(as_json: bool) -> None:
    from tstitch_export.planning.recipe import load_recipe, recipe_names
    from tstitch_trt.cli._text import print_json, print_table

    recipes = [load_recipe(name)[0] for name in recipe_names()]
    if as_json:
        print_json([{"name": r.name, "members": list(r.members), "description": r.description} for r in recipes])
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
