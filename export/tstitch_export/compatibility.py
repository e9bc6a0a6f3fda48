"""Whether members may share one trajectory: latent, classes, noise and parametrisation have to agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tstitch_engines.errors import BadCheckpoint, PairMismatch
from tstitch_engines.manifest import NoiseScheduleSpec
from tstitch_export.families.base import Inspection
from tstitch_export.recipe import MemberRecipe, Recipe, load_recipe, recipe_names

__all__ = ["check_members"]


def check_members(recipe: Recipe, members: Mapping[str, tuple[MemberRecipe, Inspection]]) -> None:
    """Raises ``PairMismatch`` with the values that differ, between members first and then against the recipe.

    Raises ``BadCheckpoint`` when a checkpoint is not the size that the recipe names.
    """
    for name, (wanted, found) in members.items():
        for key, value in wanted.expect.items():
            if found.config.get(key) != value:
                raise BadCheckpoint(
                    f"member {name!r}: {found.path.name} has {key} {found.config.get(key)}; the recipe expects {value}",
                    hint=f"give a checkpoint with {key} {value}, or use a recipe that does not fix it",
                )
    inspections = {name: found for name, (_, found) in members.items()}
    _agree(inspections, "latent", lambda found: _size(found.latent), "train both on the same latent space")
    _agree(inspections, "number of labels", lambda found: str(found.labels), "train both on the same classes")
    _agree(
        inspections,
        "noise schedule",
        lambda found: _noise(found.noise) if found.noise else None,
        "members of one bundle are trained with the same noise schedule",
    )
    _fits(recipe, members)


def _agree(
    members: Mapping[str, Inspection], what: str, value: Callable[[Inspection], str | None], reason: str
) -> None:
    stated = {name: text for name, found in members.items() if (text := value(found)) is not None}
    if len(set(stated.values())) > 1:
        each = ", ".join(f"{name} ({members[name].path.name}) has {text}" for name, text in stated.items())
        raise PairMismatch(
            f"members differ in their {what}, so they can't be stitched: {each}",
            hint=f"{reason}; choose other checkpoints with --member NAME=CHECKPOINT",
        )


def _fits(recipe: Recipe, members: Mapping[str, tuple[MemberRecipe, Inspection]]) -> None:
    latent = (recipe.latent.channels, recipe.latent.height, recipe.latent.width)
    classes, null = recipe.conditioning.classes, recipe.conditioning.null
    labels = classes + (null is not None)
    for name, (wanted, found) in members.items():
        who = f"member {name!r} ({found.path.name})"
        if found.latent != latent:
            others = [other for other in recipe_names() if _latent_of(other) == found.latent]
            raise PairMismatch(
                f"{who} has the latent {_size(found.latent)}; recipe {recipe.name!r} is for {_size(latent)}",
                hint=f"use the recipe {others[0]}: tstitch-trt build {others[0]} --member {name}={found.path.name}"
                if others
                else "write a recipe with this latent and give its path: tstitch-trt build my.toml",
            )
        if found.labels != labels:
            raise PairMismatch(
                f"{who} has {found.labels} labels; recipe {recipe.name!r} has {labels}: {classes} classes"
                + (f" and the null class {null} for guidance" if null is not None else ""),
                hint="write a recipe with this model's classes (and no null if it has none) and give its path",
            )
        if null is not None and null != classes:
            raise PairMismatch(
                f"recipe {recipe.name!r} has the null class {null}; a DiT's is the last label, {classes}",
                hint=f"write null = {classes}",
            )
        if found.noise is not None and found.noise != recipe.noise:
            raise PairMismatch(
                f"{who} was trained with the noise schedule {_noise(found.noise)}; recipe {recipe.name!r} has "
                f"{_noise(recipe.noise)}",
                hint="write a recipe with this noise schedule and give its path",
            )
        if found.parametrisation not in (None, wanted.parametrisation):
            raise PairMismatch(
                f"{who} predicts {found.parametrisation}; recipe {recipe.name!r} says {wanted.parametrisation}",
                hint=f'write a recipe with parametrisation = "{found.parametrisation}" for it and give its path',
            )


def _latent_of(recipe: str) -> tuple[int, int, int]:
    latent = load_recipe(recipe)[0].latent
    return latent.channels, latent.height, latent.width


def _size(latent: tuple[int, int, int]) -> str:
    return "x".join(map(str, latent))


def _noise(noise: NoiseScheduleSpec) -> str:
    return f"{noise.kind} {noise.beta_start:g}..{noise.beta_end:g} over {noise.steps} steps"
