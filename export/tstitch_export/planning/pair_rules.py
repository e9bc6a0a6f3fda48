"""What can't be adapted between the networks of a bundle. Every rule names the values that differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tstitch_engines.errors import BadCheckpoint, PairMismatch
from tstitch_export.families.controlnet.family import residuals_fit
from tstitch_export.planning.network import NetworkPlan
from tstitch_export.planning.recipe import MemberRecipe, Recipe, load_recipe, recipe_names

__all__ = ["check_control", "check_members"]

_LATENT: Final = "train both on the same latent space"
_CONDITIONS: Final = {"text": "text", "class": "class labels"}


def check_members(recipe: Recipe, members: Sequence[NetworkPlan]) -> None:
    """The members with each other first, then each with the recipe.

    Raises ``PairMismatch``, and ``BadCheckpoint`` when a checkpoint is not the size that the recipe names.
    """
    for plan in members:
        _expected(plan)
    _same(members, "conditioning", _condition, "members of one recipe are all conditioned alike")
    _same(members, "number of latent channels", lambda plan: str(plan.inspection.latent[0]), _LATENT)
    fixed = [plan for plan in members if not plan.dynamic]
    _same(fixed, "latent", lambda plan: _size(plan.inspection.latent), _LATENT)
    _same(members, "number of labels", lambda plan: str(plan.inspection.labels), "train both on the same classes")
    _same(members, "null class", _null_class, "say of each whether it has one: --option MEMBER.null_class=false")
    _same(members, "latent shift", lambda plan: _number(plan.inspection.shift), "only a scale can be adapted")
    for plan in members:
        _fits(recipe, plan)


def check_control(members: Sequence[NetworkPlan], parts: Mapping[str, NetworkPlan], notes: list[str]) -> None:
    """Every residual a member takes has to be one that the ControlNet gives, in the same type."""
    control = parts.get("controlnet")
    steered = [plan for plan in members if plan.inspection.controlled]
    if control is None:
        if steered:
            raise PairMismatch(
                f"{steered[0].who} takes the residuals of a ControlNet, and there is none",
                hint="give it: --part controlnet=FOLDER, or leave the option controlled away",
            )
        return
    if not steered:
        raise PairMismatch(
            f"{control.who} controls no member: none takes its residuals",
            hint=f"let one: --option {members[-1].name}.controlled=true, or leave --part controlnet away",
        )
    for plan in steered:
        fit = residuals_fit(plan.inspection, control.inspection)
        if isinstance(fit, str):
            raise PairMismatch(
                f"{control.who} can't control {plan.who}: {fit}",
                hint="give a ControlNet for this architecture, and members that share one, such as SSD-1B and SDXL; or "
                f"let its steps run without: --option {plan.name}.controlled=false",
            )
        if plan.precision != control.precision:
            raise PairMismatch(
                f"{control.who} is built in {control.precision} and {plan.who} in {plan.precision}; residuals reach "
                "a member as they are",
                hint="build all members that it controls, and it, in one precision: --precision controlnet="
                f"{plan.precision}",
            )
    free = (plan for plan in members if plan not in steered)
    notes.extend(f"{plan.who} is not controlled: its steps run without the control picture" for plan in free)


def _expected(plan: NetworkPlan) -> None:
    assert isinstance(plan.recipe, MemberRecipe)
    for key, value in plan.recipe.expect.items():
        got = plan.inspection.config.get(key)
        if got != value:
            raise BadCheckpoint(
                f"member {plan.name!r}: {plan.inspection.path.name} has {key} {got}; the recipe expects {value}",
                hint=f"give a checkpoint with {key} {value}, or use a recipe that does not fix it",
            )


def _same(members: Sequence[NetworkPlan], what: str, value: Callable[[NetworkPlan], str | None], reason: str) -> None:
    stated = {plan: text for plan in members if (text := value(plan)) is not None}
    if len(set(stated.values())) > 1:
        each = ", ".join(f"{plan.name} ({plan.inspection.path.name}) has {text}" for plan, text in stated.items())
        raise PairMismatch(
            f"members differ in their {what}, so they can't be stitched: {each}",
            hint=f"{reason}; choose other checkpoints with --member NAME=CHECKPOINT",
        )


def _fits(recipe: Recipe, plan: NetworkPlan) -> None:
    found = plan.inspection
    wanted = (recipe.latent.channels, recipe.latent.height, recipe.latent.width)
    classes, null = recipe.conditioning.classes, recipe.conditioning.null
    labels = classes + (null is not None)
    if found.latent[0] != wanted[0] or (not plan.dynamic and found.latent != wanted):
        raise PairMismatch(
            f"{plan.who} has the latent {_size(found.latent)}; recipe {recipe.name!r} is for {_size(wanted)}",
            hint=_other_recipe(plan, same_latent=True)
            or "write a recipe with this latent and give its path: tstitch-trt build my.toml",
        )
    kind = _condition(plan)
    if kind != _CONDITIONS[recipe.conditioning.kind]:
        raise PairMismatch(
            f"{plan.who} is conditioned by {kind}; recipe {recipe.name!r} is for "
            f"{_CONDITIONS[recipe.conditioning.kind]}",
            hint="choose a recipe of its kind: tstitch-trt build --list",
        )
    if recipe.conditioning.kind == "text":
        return
    if found.labels != labels:
        raise PairMismatch(
            f"{plan.who} has {found.labels} labels; recipe {recipe.name!r} has {labels}: {classes} classes"
            + (f" and the null class {null} for guidance" if null is not None else ""),
            hint=_other_recipe(plan, same_latent=False)
            or "write a recipe with this model's classes (and no null if it has none) and give its path",
        )
    if null is not None and not found.null_class:
        raise PairMismatch(
            f"{plan.who} has no null class, as the option null_class or its training says; recipe "
            f"{recipe.name!r} has one",
            hint=_other_recipe(plan, same_latent=False) or "write a recipe without null and give its path",
        )
    if null is not None and null != classes:
        raise PairMismatch(
            f"recipe {recipe.name!r} has the null class {null}; a model's is the last label, {classes}",
            hint=f"write null = {classes}",
        )


def _condition(plan: NetworkPlan) -> str:
    return _CONDITIONS["class" if plan.inspection.text is None else "text"]


def _null_class(plan: NetworkPlan) -> str | None:
    return None if not plan.inspection.labels else "a null class" if plan.inspection.null_class else "none"


def _other_recipe(plan: NetworkPlan, *, same_latent: bool) -> str | None:
    """A hint at the shipped recipe for members of this family: for this very latent if there is one, or for any."""
    shipped = [load_recipe(name)[0] for name in recipe_names()]
    suited = [
        other.name
        for other in sorted(shipped, key=lambda other: other.from_checkpoints)
        if {part.family for part in other.members.values()} == {plan.family.name}
        and (other.from_checkpoints or (same_latent and _latent_of(other) == plan.inspection.latent))
    ]
    if not suited:
        return None
    return f"use the recipe {suited[0]}: tstitch-trt build {suited[0]} --member {plan.name}={plan.inspection.path.name}"


def _latent_of(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.latent.channels, recipe.latent.height, recipe.latent.width


def _size(latent: tuple[int, int, int]) -> str:
    return "x".join(map(str, latent))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"
