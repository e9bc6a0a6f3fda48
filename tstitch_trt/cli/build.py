"""``tstitch-trt build``: a recipe and its checkpoints become a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import Command, json_option, traceback_option

if TYPE_CHECKING:
    from tstitch_engines.manifest import Precision

__all__ = ["command"]

EXAMPLES = """
tstitch-trt build --list
tstitch-trt build fashion -o fashion.bundle
tstitch-trt build fashion --batch 1:8:32 --json
tstitch-trt build fashion --backend tensorrt-rtx --option compute-capabilities=8.9,12.0
tstitch-trt build dit-256 --member small=DiT-S.pt --member large=DiT-XL.pt -o dit-256.bundle
tstitch-trt build dit-256 --member small=S.pt --member large=XL.pt --precision large=bf16 --device cuda
"""


@click.command("build", cls=Command, examples=EXAMPLES)
@click.argument("recipe", required=False)
@click.option("--list", "list_recipes", is_flag=True, help="List the recipes that come with the package.")
@click.option(
    "--member",
    "members",
    multiple=True,
    metavar="NAME=CHECKPOINT",
    help="A member's checkpoint: .safetensors, .pt, .pth or a diffusers folder. May be repeated.",
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
    default="1:8:16",
    show_default=True,
    metavar="MIN:OPT:MAX",
    help="Batch sizes of the engines; with guidance one image takes two places.",
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
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="The bundle's directory. [RECIPE.bundle]"
)
@json_option
@traceback_option
def command(
    recipe: str | None,
    list_recipes: bool,
    members: tuple[str, ...],
    backend: str,
    precisions: tuple[str, ...],
    batch: str,
    device: str,
    options: tuple[str, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Build RECIPE (a name, or the path of a .toml file) into a bundle.

    Every unchanged part is taken from the cache or from the bundle that is replaced, so an interrupted build goes on
    where it stopped. The bundle appears whole or not at all; an old one stays until the new one is complete.
    """
    from tstitch_engines.spec import Range
    from tstitch_export.recipe import recipe_names
    from tstitch_trt.parsing import parse_pairs

    if list_recipes:
        _list(as_json)
        return
    if recipe is None:
        raise BadInput(
            f"build needs a RECIPE, got nothing; known: {', '.join(recipe_names())}",
            hint="write e.g. tstitch-trt build fashion; tstitch-trt build --list describes them",
        )
    checkpoints = parse_pairs(members, option="--member", value="CHECKPOINT")
    place = output or Path(f"{Path(recipe).stem}.bundle")
    profile = Range.parse(batch)
    chosen = parse_pairs(options, option="--option", value="VALUE")
    precision = _precision(precisions)

    from tstitch_export.build import build
    from tstitch_trt.cli._text import print_json, size
    from tstitch_trt.progress import log, progress

    with progress(f"building {recipe}", 1, logs=("tstitch_engines", "tstitch_export")) as bar:
        manifest = build(
            recipe,
            members={name: Path(path) for name, path in checkpoints.items()},
            output=place,
            backend=backend,
            precision=precision,
            profile=profile,
            device=device,
            options=dict(chosen),
            progress=lambda phase, share: bar.update(done=share, text=phase),
        )
    if as_json:
        import msgspec

        document: dict[str, Any] = msgspec.to_builtins(manifest)
        print_json({"bundle": str(place), **document})
        return
    files = manifest.components()
    log(f"{manifest.name}: {', '.join(manifest.members)}; {len(files)} files, {size(sum(f.bytes for f in files))}")
    click.echo(place)


def _list(as_json: bool) -> None:
    from tstitch_export.recipe import load_recipe, recipe_names
    from tstitch_trt.cli._text import print_json, print_table

    recipes = [load_recipe(name)[0] for name in recipe_names()]
    if as_json:
        print_json([{"name": r.name, "members": list(r.members), "description": r.description} for r in recipes])
        return
    print_table(("recipe", "members", "description"), [(r.name, ", ".join(r.members), r.description) for r in recipes])


def _precision(texts: tuple[str, ...]) -> Precision | dict[str, Precision]:
    """One for all, or one by member; ``build`` checks the values."""
    from tstitch_trt.parsing import parse_pairs

    common = [text for text in texts if "=" not in text]
    if not common:
        return parse_pairs(texts, option="--precision", value="PRECISION") or "fp32"  # type: ignore[return-value]
    if len(texts) > 1:
        raise BadInput(
            f"--precision {' and '.join(texts)}: one for all members can't be combined with others",
            hint="give one --precision P, or one --precision NAME=P per member (fp32 where none is given)",
        )
    return common[0]  # type: ignore[return-value]
