"""Recipes: TOML files that say which models make a bundle and how they are exported and sampled."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.bundle.consistency import check_conventions
from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.manifest import (
    Conditioning,
    Decoder,
    Defaults,
    Latent,
    NoiseScheduleSpec,
    Precision,
    PredictionType,
)
from tstitch_engines.bundle.read import RECIPE_BYTES, read_toml
from tstitch_engines.errors import BadInput, UnknownName, nearest, unknown_name
from tstitch_engines.spec import Range

__all__ = [
    "PARTS",
    "TEXT_ENCODERS",
    "MemberRecipe",
    "PartRecipe",
    "QualityRecipe",
    "Recipe",
    "load_recipe",
    "recipe_names",
    "template",
]

TEXT_ENCODERS: Final = ("text_encoder", "text_encoder_2")  # the second is SDXL's
PARTS: Final = (*TEXT_ENCODERS, "vae_decoder", "vae_encoder", "controlnet")
_TEMPLATE: Final = "template"
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")


class MemberRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One denoiser. Paths are relative to the recipe's own directory.

    ``options`` are the family's. ``checkpoint``, a path or a Hugging Face repository, is exported unless ``--member``
    gives another; ``shipped`` names by precision the records (by ``tstitch_export.pack_pair``) of graphs exported from
    it beforehand. ``expect``: values of the checkpoint's shape (``depth``, ``width``...) that it must have.
    """

    family: str
    parametrisation: PredictionType
    options: dict[str, int | float | bool | str] = {}
    checkpoint: str | None = None
    shipped: dict[Precision, str] = {}
    expect: dict[str, int | float | bool | str] = {}


class PartRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model beside the members: text encoder, VAE, ControlNet.

    Given with ``--part NAME=FOLDER`` or taken from the ``subfolder`` of a member's pipeline, else left out.
    ``precision`` and ``batch`` (MIN:OPT:MAX) are its defaults.
    """

    family: str
    subfolder: str | None = None
    options: dict[str, int | float | bool | str] = {}
    precision: Precision | None = None
    batch: str | None = None


class QualityRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What metrics need, as files beside the recipe: the feature ``network`` (ONNX) and the statistics of real
    pictures, ``reference`` (``.npz``)."""

    network: str
    reference: str


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe file as data; the sections are the manifest's own records.

    ``other_members`` is the pattern for members given with ``--member`` under names the recipe does not list.
    ``from_checkpoints``: size and channels of the latent and the classes are the members' own, whatever the file says.
    """

    name: str
    description: str
    latent: Latent
    noise: NoiseScheduleSpec
    conditioning: Conditioning
    defaults: Defaults
    decoder: Decoder
    members: dict[str, MemberRecipe]
    from_checkpoints: bool = False
    other_members: MemberRecipe | None = None
    parts: dict[str, PartRecipe] = {}
    quality: QualityRecipe | None = None


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return tuple(sorted(path.stem for path in _folder().glob("*.toml") if path.stem != _TEMPLATE))


def template() -> str:
    """A commented recipe to start one's own from."""
    return (_folder() / f"{_TEMPLATE}.toml").read_text()


def load_recipe(reference: str | Path) -> tuple[Recipe, Path]:
    """The recipe called ``reference``, or the TOML file at that path; and the directory its paths start from.

    Raises ``UnknownName`` for an unknown recipe or key (naming the nearest) and ``BadInput`` for a wrong value.
    """
    text = str(reference)
    if text.endswith(".toml") or "/" in text:
        path = Path(text)
        if not os.path.lexists(path):
            raise BadInput(
                f"recipe file {text} does not exist",
                hint=f"give the path of a TOML file, or one of the recipes {', '.join(recipe_names())}",
            )
    else:
        if text not in recipe_names():
            raise unknown_name("recipe", text, recipe_names(), hint="(or give the path of a .toml file)")
        path = _folder() / f"{text}.toml"
    return _decode(path), path.parent


def _folder() -> Path:
    return Path(str(resources.files("tstitch_export"))) / "recipes"


def _decode(path: Path) -> Recipe:
    try:
        data = read_toml(path, RECIPE_BYTES)
    except (OSError, DecodeError) as error:
        fix = (isinstance(error, DecodeError) and error.fix) or "give a readable TOML file"
        raise BadInput(f"recipe {path.name} can't be read: {error}", hint=fix) from None
    try:
        recipe = convert(data, Recipe, word="key")
    except DecodeError as error:
        kind = UnknownName if error.message.startswith("unknown") else BadInput
        raise kind(f"recipe {path.name}: {error.message}", hint=error.fix or f"mend it in {path}") from None
    _check(recipe, path.name)
    return recipe


def _check(recipe: Recipe, file: str) -> None:
    from tstitch_export.families import FAMILIES

    def refuse(problem: str, fix: str) -> BadInput:
        return BadInput(f"recipe {file}: {problem}", hint=fix)

    if not recipe.members:
        raise refuse("it has no members", "add at least one section [members.NAME]")
    for name in recipe.members:
        check_member_name(name)
    patterns = [recipe.other_members] if recipe.other_members else []
    for family in (part.family for part in (*recipe.members.values(), *patterns)):
        if family not in FAMILIES:
            raise unknown_name("model family", family, FAMILIES)
    for name, own in recipe.parts.items():
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
        if own.family not in FAMILIES:
            raise unknown_name("model family", own.family, FAMILIES)
        if own.batch is not None:
            Range.parse(own.batch)
    try:
        check_conventions(recipe.latent, recipe.conditioning, recipe.defaults)
    except DecodeError as error:
        raise refuse(error.message, error.fix) from None


def check_member_name(name: str) -> None:
    """Member names become directories and words of a schedule: ``small:0.4,large``."""
    if not _NAME.fullmatch(name):
        close = nearest(re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-"), ["small", "base", "large", "refiner"])
        raise BadInput(
            f"member name {name!r} is not allowed; a name is a small letter, then up to 31 of a-z, 0-9, _ and -",
            hint=f"e.g. {close or 'small'}",
        )
    if name.endswith(PARTS):
        raise BadInput(
            f"member name {name!r} is not allowed: parts are called so",
            hint="call it small, base, large or refiner; a part is given with --part NAME=FOLDER",
        )
