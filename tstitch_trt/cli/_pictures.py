"""The options of ``sample`` that say what the picture is to be: texts, sizes and pictures to start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tstitch_engines.errors import BadInput, unknown_name

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest

__all__ = ["EMBEDDINGS", "picture_options", "picture_settings", "picture_wishes", "tile_of"]

F = TypeVar("F", bound=Callable[..., Any])

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_FILES = ("image", "mask", "control", "prompt_embeds")


def picture_options(function: F) -> F:
    """All of them; without one of them the bundle's own size is drawn from noise."""
    file = click.Path(path_type=Path)
    for option in (
        click.option("--control-scale", type=float, metavar="X", help="How much the ControlNet has to say. [1]"),
        click.option("--control", type=file, metavar="FILE", help="A picture for the ControlNet (edges, depth...)."),
        click.option("--resize", is_flag=True, help="Bring --image, --mask and --control to the picture's size."),
        click.option(
            "--mask", type=file, metavar="FILE", help="Paint only what is white here; keep the rest of --image."
        ),
        click.option(
            "--strength", type=float, metavar="S", help="Share of the steps run from --image. [0.8; 1 with --mask]"
        ),
        click.option("--image", type=file, metavar="FILE", help="A picture to start from."),
        click.option("--tile", metavar="auto|off|PIXELS", help="How the VAE takes pictures: whole or in tiles. [auto]"),
        click.option("--size", metavar="WxH", help="Width and height in pixels. [the bundle's own, or --image's]"),
        click.option(
            "--prompt-embeds",
            type=file,
            metavar="FILE.npz",
            help="Encoded prompts: prompt_embeds, MEMBER.prompt_embeds...",
        ),
        click.option("--negative", metavar="TEXT", help="What not to draw, with guidance."),
        click.option("--prompt", multiple=True, metavar="TEXT", help="What to draw; give it again for more, in turn."),
    ):
        function = option(function)
    return function


def picture_wishes(manifest: Manifest, options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of ``Runtime.sample`` for these options, which are taken out of ``options``. Reads the files."""
    from tstitch_trt.parsing import parse_pixels
    from tstitch_trt.pictures import read_mask, read_picture

    prompts, negative, size, resize = (options.pop(name) for name in ("prompt", "negative", "size", "resize"))
    strength, scale = options.pop("strength"), options.pop("control_scale")
    files: dict[str, Path | None] = {name: options.pop(name) for name in _FILES}
    if resize and not any(files[name] for name in ("image", "mask", "control")):
        raise BadInput("--resize was given without a picture", hint="leave it out, or add --image FILE")
    wishes: dict[str, Any] = {"strength": strength, "control_scale": scale, "negative_prompt": negative}
    if prompts:
        wishes["prompt"] = list(prompts)
    if (embeddings := files["prompt_embeds"]) is not None:
        wishes |= _embeddings(manifest, embeddings)
    target = None
    if size is not None:
        width, height = parse_pixels(size)
        wishes |= {"width": width, "height": height}
        target = (height, width)
    elif resize and files["image"] is None:
        target = (manifest.latent.height * manifest.decoder.factor, manifest.latent.width * manifest.decoder.factor)
    if (image := files["image"]) is not None:
        wishes["image"] = read_picture(image, size=target, resize=resize, what="--image")
        target = wishes["image"].shape[:2]
    if (mask := files["mask"]) is not None:
        wishes["mask"] = read_mask(mask, size=target, resize=resize, what="--mask")
    if (control := files["control"]) is not None:
        wishes["control"] = read_picture(control, size=target, resize=resize, what="--control")
    return {name: value for name, value in wishes.items() if value is not None}


def tile_of(text: str | None) -> Any:
    """``--tile`` as the keyword of ``Runtime.sample``, ``auto`` where it is not given. Raises ``BadInput``."""
    if text is None or text in ("auto", "off"):
        return text or "auto"
    if not text.isdigit():
        raise BadInput(f"--tile {text!r}; allowed are auto, off and a number of pixels", hint="e.g. --tile 512")
    return int(text)


def picture_settings(options: dict[str, Any]) -> dict[str, Any]:
    """What of the options is kept beside the pictures: texts and numbers, and the names of the files."""
    names = ("negative", "strength", "control_scale", *_FILES)
    said = {name: options[name] for name in names if options[name] is not None}
    return {name: value.name if isinstance(value, Path) else value for name, value in said.items()}


def _embeddings(manifest: Manifest, path: Path) -> dict[str, Any]:
    """Embeddings of a ``.npz``: arrays by name, or by ``MEMBER.NAME`` where the members' differ."""
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"is no .npz file: {error}"
        raise BadInput(
            f"--prompt-embeds {path} {problem}", hint="write it with numpy.savez(FILE, prompt_embeds=...)"
        ) from None
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        member, dot, key = name.rpartition(".")
        if key not in EMBEDDINGS:
            raise unknown_name("array", name, EMBEDDINGS, hint=f"(in {path})")
        if dot and member not in manifest.members:
            raise unknown_name("member", member, manifest.members, hint=f"({name!r} in {path})")
        if dot:
            found.setdefault(key, {})[member] = array
        else:
            found[key] = array
    return found
