"""The options that say how to walk a trajectory, shared by the commands that sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tstitch_engines.errors import BadInput, unknown_name

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime
    from tstitch_trt.runtime.step_graphs import GraphMode

__all__ = [
    "EMBEDDINGS",
    "budget_option",
    "bundle_argument",
    "load_runtime",
    "lora_texts",
    "parse_budgets",
    "picture_options",
    "picture_settings",
    "picture_wishes",
    "rebuild_option",
    "runtime_options",
    "step_options",
    "tile_of",
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
    from tstitch_trt.progress import progress_bar

    if not rebuild:
        return tstitch_trt.load(bundle, device=device, backend=backend, threads=threads, graph=graph)
    with progress_bar("checking engines", logs=("tstitch_engines", "tstitch_trt")) as bar:
        return tstitch_trt.load(
            bundle,
            device=device,
            backend=backend,
            threads=threads,
            graph=graph,
            rebuild=True,
            progress=bar,
        )


def budget_option(text: str) -> Callable[[F], F]:
    """``--budget-ms``, with ``text`` for its help."""
    return click.option("--budget-ms", metavar="MS", help=text)


def parse_budgets(text: str | None) -> tuple[float, ...]:
    """``"200,500"`` -> milliseconds. Raises ``BadInput``."""
    from tstitch_engines.errors import BadInput
    from tstitch_trt.runtime.chooser import check_budget

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
    from tstitch_trt.cli._parsing import parse_pixels
    from tstitch_trt.images.read import read_mask, read_picture

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


def lora_texts(given: tuple[str, ...]) -> dict[str, str]:
    """``FILE[:WEIGHT],...`` by name, a list of them where a name comes more than once."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not (equals and name and file):
            raise BadInput(f"--lora {text!r} is not NAME=FILE[:WEIGHT]", hint="e.g. --lora large=style.safetensors:0.8")
        found.setdefault(name, []).append(file)
    return {name: ",".join(files) for name, files in found.items()}
