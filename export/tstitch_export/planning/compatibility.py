"""Whether networks may share one trajectory, and how each is adapted. Decided before anything is exported.

Adapted, with a note: prediction type, noise schedule, number of timesteps, scale of the latent, own text encoders.
Refused, with the reason: other channels, another fixed size or shift of the latent, other classes, text of another
width than the encoders give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from tstitch_engines.bundle.manifest import Decoder, Latent, NoiseScheduleSpec, PredictionType, TextInputs
from tstitch_engines.bundle.scheduler_config import Scheduler, read_scheduler
from tstitch_engines.errors import BadInput, PairMismatch
from tstitch_export.checkpoint.conventions import Conventions
from tstitch_export.planning.network import NetworkPlan
from tstitch_export.planning.pair_rules import check_control, check_members
from tstitch_export.planning.recipe import MemberRecipe, Recipe

__all__ = ["Adapted", "PairConventions", "reconcile"]

_VAES: Final = ("vae_decoder", "vae_encoder")


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """How one member takes part: the fields of ``manifest.Member`` that differ from the bundle's conventions."""

    parametrisation: PredictionType
    noise: NoiseScheduleSpec | None = None
    latent_ratio: float = 1.0
    text: TextInputs | None = None


@dataclass(frozen=True, kw_only=True)
class PairConventions:
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


def reconcile(recipe: Recipe, members: Sequence[NetworkPlan], parts: Mapping[str, NetworkPlan]) -> PairConventions:
    """Raises ``PairMismatch`` with the values that differ, between members first and then against the recipe.

    Raises ``BadCheckpoint`` when a checkpoint is not the size that the recipe names.
    """
    check_members(recipe, members)
    notes: list[str] = []
    check_control(members, parts, notes)
    latent, noise = _latent(recipe, members, parts, notes), _noise_of(recipe, members)
    decoder = _decoder(recipe, latent, parts, notes)
    adapted = {plan.name: _adapt(plan, recipe, latent, noise, parts, notes) for plan in members}
    scheduler = _scheduler(recipe, members, notes)
    spacing = (scheduler or recipe.defaults).spacing
    if noise.zero_terminal_snr and spacing == "leading":
        notes.append(
            "the noise schedule ends without any signal (zero terminal SNR); the default spacing, leading, begins "
            "below that, and trailing would begin there"
        )
    return PairConventions(
        latent=latent,
        noise=noise,
        decoder=decoder,
        scheduler=scheduler,
        members=adapted,
        notes=tuple(dict.fromkeys(notes)),
    )


# --- the bundle's conventions


def _latent(
    recipe: Recipe, members: Sequence[NetworkPlan], parts: Mapping[str, NetworkPlan], notes: list[str]
) -> Latent:
    """The recipe's, with the size, scale and shift of the last member that states one.

    Where no member states a scale or shift, an autoencoder's go before the recipe's.
    """
    latent = recipe.latent
    if all(plan.dynamic for plan in members):
        _, height, width = members[-1].inspection.latent
        latent = msgspec.structs.replace(latent, height=height, width=width)
    vaes = [parts[name] for name in reversed(_VAES) if name in parts and _states_latent(parts[name])]
    for word, field in (("scaled", "scaling"), ("shifted", "shift")):
        stated = [plan for plan in (*vaes, *members) if getattr(plan.inspection, field) is not None]
        if not stated:
            continue
        value, of_recipe = getattr(stated[-1].inspection, field), getattr(latent, field)
        if value != of_recipe:
            notes.append(
                f"the latent is {word} by {value:g}, as {stated[-1].who} states; the recipe says {of_recipe:g}"
            )
        latent = msgspec.structs.replace(latent, **{field: value})
    return latent


def _states_latent(vae: NetworkPlan) -> bool:
    """Whether its scale is the denoisers'. A tiny autoencoder was trained to take their latent as it is."""
    return vae.inspection.config["kind"] != "tiny"


def _noise_of(recipe: Recipe, members: Sequence[NetworkPlan]) -> NoiseScheduleSpec:
    stated = [plan for plan in members if _states_noise(plan.inspection.trained)]
    return _trained(stated[-1], recipe) if stated else recipe.noise


def _trained(plan: NetworkPlan, recipe: Recipe) -> NoiseScheduleSpec:
    """The noise a member was trained with; a checkpoint that states none is what the recipe is for."""
    trained = plan.inspection.trained
    noise = trained.noise or recipe.noise
    return noise if trained.zero_snr is None else msgspec.structs.replace(noise, zero_terminal_snr=trained.zero_snr)


def _states_noise(trained: Conventions) -> bool:
    return trained.noise is not None or trained.zero_snr is not None


def _scheduler(recipe: Recipe, members: Sequence[NetworkPlan], notes: list[str]) -> Scheduler | None:
    """That of the last pipeline; one that can't be honoured is noted, and the recipe's defaults stand."""
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
        notes.append(f"the default solver is {found.solver}, as the scheduler of {stated[-1].who} states")
    return found


def _decoder(recipe: Recipe, latent: Latent, parts: Mapping[str, NetworkPlan], notes: list[str]) -> Decoder:
    """The recipe's, with as many pixels per latent element as the networks that make or take pixels have."""
    vaes = [parts[name] for name in _VAES if name in parts]
    for plan in vaes:
        channels = plan.inspection.latent[0]
        if channels != latent.channels:
            raise _other_autoencoder(plan, f"has latents of {channels} channels; the members' have {latent.channels}")
        if not _states_latent(plan):
            continue
        for word, field in (("scales", "scaling"), ("shifts", "shift")):
            own, shared = getattr(plan.inspection, field), getattr(latent, field)
            if own is not None and not math.isclose(own, shared):
                raise _other_autoencoder(
                    plan,
                    f"{word} its latents by {own:g}; the members' are by {shared:g}",
                    f"; if it is the same one: --option {plan.name}.{field}={shared:g}",
                )
    decoder = recipe.decoder
    sized = [*vaes, *([parts["controlnet"]] if "controlnet" in parts else [])]
    factors = {plan: int(plan.inspection.config["factor"]) for plan in sized}
    if len(set(factors.values())) > 1:
        each = ", ".join(f"{plan.who} {factor}" for plan, factor in factors.items())
        raise PairMismatch(
            f"parts differ in the pixels along each side that a latent element stands for: {each}",
            hint="give autoencoder halves and a ControlNet of the same kind of model",
        )
    if factors and factors[sized[0]] != decoder.factor:
        factor = factors[sized[0]]
        notes.append(f"{sized[0].who} has {factor} pixels per latent element; the recipe says {decoder.factor}")
        decoder = msgspec.structs.replace(decoder, factor=factor)
    if decoder.kind == "vae" and "vae_decoder" not in parts:
        notes.append("there is no vae_decoder: the bundle gives latents, not pictures (--part vae_decoder=FOLDER)")
        return msgspec.structs.replace(decoder, kind="none")
    return decoder


def _other_autoencoder(plan: NetworkPlan, problem: str, more: str = "") -> PairMismatch:
    hint = f"give the autoencoder the members were trained with: --part {plan.name}=FOLDER{more}"
    return PairMismatch(f"{plan.who} {problem}", hint=hint)


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
        notes.append(f"{plan.who} predicts {parametrisation}, as {found.trained.because} says")
    elif found.trained.doubt and found.parametrisation is None and plan.recipe.checkpoint is None:
        notes.append(
            f"{plan.who} {found.trained.doubt}, and does not say what it predicts: it is taken to predict "
            f"{parametrisation}, as the recipe says (--option {plan.name}.prediction=...)"
        )
    notes.extend(f"{plan.who} {note}" for note in found.trained.notes)
    trained = _trained(plan, recipe)
    own = trained if trained != noise else None
    if parametrisation == "eps" and trained.zero_terminal_snr:
        notes.append(
            f"{plan.who} predicts the noise, which says nothing of the picture at its last timestep, where there is no "
            "signal (zero terminal SNR): ddim, ddpm and lcm are refused there"
        )
    if own is not None:
        notes.append(
            f"{plan.who} was trained with the noise schedule {own}; the bundle's is {noise}: "
            "its timesteps are those of equal noise"
        )
        if noise.zero_terminal_snr and not own.zero_terminal_snr:
            notes.append(
                f"the bundle's schedule begins with pure noise (zero terminal SNR), which {plan.who} was not trained "
                "on: at steps noisier than its training it is told its noisiest timestep"
            )
    ratio = 1.0 if found.scaling is None else found.scaling / latent.scaling
    if ratio != 1:
        notes.append(
            f"{plan.who} was trained on latents scaled by {found.scaling:g}, the bundle's by {latent.scaling:g}: "
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

    missing = [name for name in text.encoders if part_of(name) is None]
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
        each = " + ".join(f"{parts[name].who} {width}" for name, width in widths.items())
        raise PairMismatch(
            f"{plan.who} takes text of width {text.width}; its encoders give {each}",
            hint=f"give its own encoder: --part {plan.name}_{text.hidden[0]}=FOLDER, or --member {plan.name}=PIPELINE; "
            "or build from bare UNet folders and pass prompt_embeds",
        )
    pooled = None if text.pooled is None else part_of(text.pooled)
    if pooled is not None and (width := parts[pooled].inspection.config.get("projection")) != text.pooled_width:
        raise PairMismatch(
            f"{plan.who} takes a pooled text of width {text.pooled_width}; {parts[pooled].who} gives {width}",
            hint="give the text encoder with projection that the member was trained with",
        )
    return msgspec.structs.replace(text, hidden=hidden, pooled=pooled)
