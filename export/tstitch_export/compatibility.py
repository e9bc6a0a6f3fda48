"""Whether networks may share one trajectory, and what has to be adapted so that they do. Nothing is compiled before.

What the rows of a plan can express is adapted and said: parametrisation, noise schedule, number of timesteps, scale of
the latent, a prompt's own encoders. What they can't is refused with the reason: other channels or a fixed size of the
latent, a shifted one, other classes, text of another width than the encoders give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from tstitch_engines.errors import BadCheckpoint, BadInput, PairMismatch
from tstitch_engines.manifest import (
    Decoder,
    Latent,
    NoiseScheduleSpec,
    Parametrisation,
    TextInputs,
)
from tstitch_engines.scheduler_config import Scheduler, read_scheduler
from tstitch_export.families.controlnet import residuals_fit
from tstitch_export.planning import NetworkPlan
from tstitch_export.recipe import MemberRecipe, Recipe, load_recipe, recipe_names

__all__ = ["Adapted", "Agreement", "agree"]


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """How one member takes part: the fields of ``manifest.Member`` that differ from the bundle's conventions."""

    parametrisation: Parametrisation
    noise: NoiseScheduleSpec | None = None
    latent_ratio: float = 1.0
    text: TextInputs | None = None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The bundle's conventions. ``scheduler``: the governing pipeline's, ``None`` where none came with a member.

    The last member that states something governs: it takes the steps that count most. ``notes`` say in words what was
    adapted and what is missing.
    """

    latent: Latent
    noise: NoiseScheduleSpec
    decoder: Decoder
    scheduler: Scheduler | None
    members: Mapping[str, Adapted]
    notes: tuple[str, ...]


def agree(recipe: Recipe, members: Sequence[NetworkPlan], parts: Mapping[str, NetworkPlan]) -> Agreement:
    """Raises ``PairMismatch`` with the values that differ, between members first and then against the recipe.

    Raises ``BadCheckpoint`` when a checkpoint is not the size that the recipe names.
    """
    for plan in members:
        _expected(plan)
    _same(members, "number of latent channels", lambda plan: str(plan.inspection.latent[0]), _LATENT)
    fixed = [plan for plan in members if not plan.dynamic]
    _same(fixed, "latent", lambda plan: _size(plan.inspection.latent), _LATENT)
    _same(members, "number of labels", lambda plan: str(plan.inspection.labels), "train both on the same classes")
    _same(members, "latent shift", lambda plan: _number(plan.inspection.shift), "only a scale can be adapted")
    _fits(recipe, members)
    _inputs_are_known(members)
    _control_fits(members, parts)

    notes: list[str] = []
    latent, noise = _latent(recipe, members, notes), _noise_of(recipe, members)
    decoder = _decoder(recipe, latent, parts, notes)
    adapted = {plan.name: _adapt(plan, recipe, latent, noise, parts, notes) for plan in members}
    return Agreement(
        latent=latent,
        noise=noise,
        decoder=decoder,
        scheduler=_scheduler(recipe, members, notes),
        members=adapted,
        notes=tuple(dict.fromkeys(notes)),
    )


_LATENT = "train both on the same latent space"


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


def _fits(recipe: Recipe, members: Sequence[NetworkPlan]) -> None:
    wanted = (recipe.latent.channels, recipe.latent.height, recipe.latent.width)
    classes, null = recipe.conditioning.classes, recipe.conditioning.null
    labels = classes + (null is not None)
    for plan in members:
        found = plan.inspection
        who = _who(plan)
        if found.latent[0] != wanted[0] or (not plan.dynamic and found.latent != wanted):
            others = [other for other in recipe_names() if _suits(other, plan)]
            raise PairMismatch(
                f"{who} has the latent {_size(found.latent)}; recipe {recipe.name!r} is for {_size(wanted)}",
                hint=f"use the recipe {others[0]}: tstitch-trt build {others[0]} --member {plan.name}={found.path.name}"
                if others
                else "write a recipe with this latent and give its path: tstitch-trt build my.toml",
            )
        if found.shift is not None and found.shift != recipe.latent.shift:
            raise PairMismatch(
                f"{who} has a latent shifted by {found.shift:g}; recipe {recipe.name!r} says {recipe.latent.shift:g}",
                hint="write a recipe with this shift and give its path: only a scale can be adapted",
            )
        kind = "text" if found.text is not None else "class"
        if kind != recipe.conditioning.kind:
            raise PairMismatch(
                f"{who} is conditioned by {_CONDITIONS[kind]}; recipe {recipe.name!r} is for "
                f"{_CONDITIONS[recipe.conditioning.kind]}",
                hint="choose a recipe of its kind: tstitch-trt build --list",
            )
        if kind == "text":
            continue
        if found.labels != labels:
            raise PairMismatch(
                f"{who} has {found.labels} labels; recipe {recipe.name!r} has {labels}: {classes} classes"
                + (f" and the null class {null} for guidance" if null is not None else ""),
                hint="write a recipe with this model's classes (and no null if it has none) and give its path",
            )
        if null is not None and null != classes:
            raise PairMismatch(
                f"recipe {recipe.name!r} has the null class {null}; a model's is the last label, {classes}",
                hint=f"write null = {classes}",
            )


_CONDITIONS = {"text": "text", "class": "class labels"}


def _inputs_are_known(members: Sequence[NetworkPlan]) -> None:
    """A ControlNet's residuals reach either all members or none: a picture can't be controlled on some steps only."""
    _same(
        members,
        "control",
        lambda plan: "the residuals of a ControlNet" if plan.inspection.controlled else "none",
        "give --part controlnet=FOLDER, which controls all of them",
    )


def _control_fits(members: Sequence[NetworkPlan], parts: Mapping[str, NetworkPlan]) -> None:
    """Every residual a member takes has to be one that the ControlNet gives."""
    control = parts.get("controlnet")
    for plan in members:
        if not plan.inspection.controlled:
            continue
        if control is None:
            raise PairMismatch(
                f"{_who(plan)} takes the residuals of a ControlNet, and there is none",
                hint="give it: --part controlnet=FOLDER, or leave the option controlled away",
            )
        fit = residuals_fit(plan.inspection, control.inspection)
        if isinstance(fit, str):
            raise PairMismatch(
                f"{_who(control)} can't control {_who(plan)}: {fit}",
                hint="give a ControlNet for this architecture, and members that share one, such as SSD-1B and SDXL",
            )


# --- the bundle's conventions


def _latent(recipe: Recipe, members: Sequence[NetworkPlan], notes: list[str]) -> Latent:
    """The recipe's, with the size and scale of the last member that states one."""
    latent = recipe.latent
    if all(plan.dynamic for plan in members):
        _, height, width = members[-1].inspection.latent
        latent = msgspec.structs.replace(latent, height=height, width=width)
    stated = [plan for plan in members if plan.inspection.scaling is not None]
    if stated:
        scaling = stated[-1].inspection.scaling
        assert scaling is not None
        if scaling != latent.scaling:
            notes.append(
                f"the latent is scaled by {scaling:g}, as {_who(stated[-1])} states; the recipe says {latent.scaling:g}"
            )
        latent = msgspec.structs.replace(latent, scaling=scaling)
    return latent


def _noise_of(recipe: Recipe, members: Sequence[NetworkPlan]) -> NoiseScheduleSpec:
    stated = [plan.inspection.noise for plan in members if plan.inspection.noise is not None]
    return stated[-1] if stated else recipe.noise


def _scheduler(recipe: Recipe, members: Sequence[NetworkPlan], notes: list[str]) -> Scheduler | None:
    """The last pipeline's that can be honoured; for one that can't the recipe's defaults stand, and it is said."""
    stated = [plan for plan in members if plan.inspection.scheduler is not None]
    if not stated:
        return None
    config = stated[-1].inspection.scheduler
    assert config is not None
    try:
        found = read_scheduler(config, where=f"scheduler_config.json of {stated[-1].inspection.path.name}")
    except BadInput as error:
        notes.append(
            f"the default solver is {recipe.defaults.solver}, as the recipe says; the pipeline's scheduler is not "
            f"taken over: {error.message}"
        )
        return None
    if found.solver != recipe.defaults.solver:
        notes.append(f"the default solver is {found.solver}, as the scheduler of {_who(stated[-1])} states")
    return found


def _decoder(recipe: Recipe, latent: Latent, parts: Mapping[str, NetworkPlan], notes: list[str]) -> Decoder:
    decoder = recipe.decoder
    for name in ("vae_decoder", "vae_encoder"):
        plan = parts.get(name)
        if plan is None:
            continue
        channels = plan.inspection.latent[0]
        if channels != latent.channels:
            raise PairMismatch(
                f"{_who(plan)} has latents of {channels} channels; the members' have {latent.channels}",
                hint=f"give the autoencoder the members were trained with: --part {name}=FOLDER",
            )
        if plan.inspection.shift not in (None, latent.shift):
            raise PairMismatch(
                f"{_who(plan)} shifts its latents by {plan.inspection.shift:g}; the members' are by {latent.shift:g}",
                hint=f"give the autoencoder the members were trained with: --part {name}=FOLDER",
            )
        factor = plan.inspection.config.get("factor")
        if isinstance(factor, int) and factor != decoder.factor:
            notes.append(f"{_who(plan)} makes {factor} pixels of a latent element; the recipe says {decoder.factor}")
            decoder = msgspec.structs.replace(decoder, factor=factor)
    if decoder.kind == "vae" and "vae_decoder" not in parts:
        notes.append("there is no vae_decoder: the bundle gives latents, not pictures (--part vae_decoder=FOLDER)")
        return msgspec.structs.replace(decoder, kind="none")
    return decoder


# --- one member


def _adapt(
    plan: NetworkPlan,
    recipe: Recipe,
    latent: Latent,
    noise: NoiseScheduleSpec,
    parts: Mapping[str, NetworkPlan],
    notes: list[str],
) -> Adapted:
    found = plan.inspection
    assert isinstance(plan.recipe, MemberRecipe)
    parametrisation = found.parametrisation or plan.recipe.parametrisation
    if parametrisation != plan.recipe.parametrisation:
        notes.append(f"{_who(plan)} predicts {parametrisation}, as its checkpoint states")
    trained = found.noise or recipe.noise  # a checkpoint that states nothing is what the recipe is for
    own = trained if trained != noise else None
    if own is not None:
        notes.append(
            f"{_who(plan)} was trained with the noise schedule {_noise(own)}, the bundle's is {_noise(noise)}: "
            "its timesteps are those of equal noise"
        )
    ratio = 1.0 if found.scaling is None else found.scaling / latent.scaling
    if ratio != 1:
        notes.append(
            f"{_who(plan)} was trained on latents scaled by {found.scaling:g}, the bundle's by {latent.scaling:g}: "
            f"its input is scaled by {ratio:g} and its timesteps are those of equal noise"
        )
    return Adapted(parametrisation=parametrisation, noise=own, latent_ratio=ratio, text=_text(plan, parts, notes))


def _text(plan: NetworkPlan, parts: Mapping[str, NetworkPlan], notes: list[str]) -> TextInputs | None:
    """The member's encoders by the names of the parts that are there; its own before shared ones."""
    text = plan.inspection.text
    if text is None:
        return None

    def part_of(encoder: str) -> str | None:
        return next((name for name in (f"{plan.name}_{encoder}", encoder) if name in parts), None)

    wanted = (*text.hidden, *((text.pooled,) if text.pooled else ()))
    missing = [name for name in dict.fromkeys(wanted) if part_of(name) is None]
    if missing:
        more = f" and pooled_prompt_embeds [N,{text.pooled_width}]" if text.pooled_width else ""
        notes.append(
            f"member {plan.name!r} has no {' and '.join(missing)}: it takes prompt_embeds [N,T,{text.width}]{more} "
            f"in place of prompts (--part {missing[0]}=FOLDER)"
        )
        return msgspec.structs.replace(text, hidden=(), pooled=None)
    hidden = tuple(name for encoder in text.hidden if (name := part_of(encoder)) is not None)
    widths = {name: int(parts[name].inspection.config["width"]) for name in hidden}
    if sum(widths.values()) != text.width:
        each = " + ".join(f"{_who(parts[name])} {width}" for name, width in widths.items())
        raise PairMismatch(
            f"{_who(plan)} takes text of width {text.width}; its encoders give {each}",
            hint=f"give its own encoder with a whole pipeline folder: --member {plan.name}=PIPELINE; "
            "or build from bare UNet folders and pass prompt_embeds",
        )
    pooled = None if text.pooled is None else part_of(text.pooled)
    if pooled is not None and (width := parts[pooled].inspection.config.get("projection")) != text.pooled_width:
        raise PairMismatch(
            f"{_who(plan)} takes a pooled text of width {text.pooled_width}; {_who(parts[pooled])} gives {width}",
            hint="give the text encoder with projection that the member was trained with",
        )
    return msgspec.structs.replace(text, hidden=hidden, pooled=pooled)


# --- words


def _who(plan: NetworkPlan) -> str:
    kind = "member" if plan.family.role == "member" else "part"
    return f"{kind} {plan.name!r} ({plan.inspection.path.name})"


def _suits(recipe: str, plan: NetworkPlan) -> bool:
    """Whether a shipped recipe is for this member's family and latent."""
    other = load_recipe(recipe)[0]
    latent = (other.latent.channels, other.latent.height, other.latent.width)
    return latent == plan.inspection.latent and plan.family.name in {part.family for part in other.members.values()}


def _size(latent: tuple[int, int, int]) -> str:
    return "x".join(map(str, latent))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _noise(noise: NoiseScheduleSpec) -> str:
    return f"{noise.kind} {noise.beta_start:g}..{noise.beta_end:g} over {noise.steps} steps"
