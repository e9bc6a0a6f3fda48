"""Everything about a bundle that is decided and checked before anything is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.bundle.manifest import Precision, guided_by_default
from tstitch_engines.errors import BadInput
from tstitch_engines.progress import Progress, silent
from tstitch_engines.spec import Range
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.families import open_family
from tstitch_export.families.base import Scalar
from tstitch_export.families.options import split_options
from tstitch_export.hub.checkpoints import Checkpoints
from tstitch_export.planning.compatibility import PairConventions, reconcile
from tstitch_export.planning.network import NetworkPlan, part_names, plan_member, plan_parts, precision_of
from tstitch_export.planning.opset import Opsets
from tstitch_export.planning.recipe import Recipe, check_member_name, load_recipe
from tstitch_export.planning.sizes import SizeRanges, in_latents

__all__ = ["BundlePlan", "plan_bundle"]

_NULL_OPTIONS: Final = frozenset({"null_class", "null_embedding"})  # with either the user has said it


@dataclass(frozen=True, kw_only=True)
class BundlePlan:
    """``base``: where the recipe's paths start from. ``options``: those given that are no network's own."""

    recipe: Recipe
    base: Path
    members: tuple[NetworkPlan, ...]
    parts: Mapping[str, NetworkPlan]
    conventions: PairConventions
    options: Mapping[str, Scalar]

    @property
    def networks(self) -> tuple[NetworkPlan, ...]:
        """Members first, then parts."""
        return (*self.members, *self.parts.values())

    def sizes(
        self, *, batch: Range | None, height: Range | None, width: Range | None, tokens: Range | None
    ) -> SizeRanges:
        """What all networks are built for; ``height`` and ``width`` are in pixels, ``None``: the latent's own.

        ``batch``: rows of an engine, ``None``: the usual ones.

        Raises ``BadInput`` for a size that is no multiple of the decoder's factor or that a member can't have.
        """
        latent, factor = self.conventions.latent, self.conventions.decoder.factor
        fixed = next((plan for plan in self.members if not plan.dynamic), None)
        found: dict[str, Range] = {}
        for side, asked, size in (("height", height, latent.height), ("width", width, latent.width)):
            native = Range(size, size, size)
            found[side] = in_latents(asked, factor, side) or native
            if fixed is not None and found[side] != native:
                raise BadInput(
                    f"{side} {asked} was asked for, and {fixed.what} takes {size * factor} pixels alone",
                    hint=f"leave out --{side}",
                )
        guided = guided_by_default(self.recipe.conditioning, self.recipe.defaults) and any(
            not plan.inspection.guidance_embedding for plan in self.members
        )
        return SizeRanges(batch=batch, guided=guided, height=found["height"], width=found["width"], tokens=tokens)


def plan_bundle(
    recipe: str | Path,
    *,
    members: Mapping[str, str | Path],
    parts: Mapping[str, str | Path],
    precision: Precision | Mapping[str, Precision],
    options: Mapping[str, Scalar],
    check: Callable[[dict[str, Scalar]], dict[str, Scalar]] = dict,
    opset_limits: Callable[[Mapping[str, Scalar]], tuple[int, int, str]] | None = None,
    progress: Progress = silent,
) -> BundlePlan:
    """The arguments are those of ``build``. Reads shapes and configs, no weights; needs no torch. Raises ``BadInput``.

    What a Hugging Face repository has of it is downloaded.

    ``check`` types the options that are no network's own, before any checkpoint is read; ``opset`` is not among them.
    ``opset_limits``: the oldest ONNX opset in half precision and the newest that may be exported with them, and why.
    """
    spec, base = load_recipe(recipe)
    for name in members:
        check_member_name(name)
    names = [*spec.members, *(name for name in members if name not in spec.members)]
    known = [*names, *part_names(spec, names)]
    common, own = split_options(options, known)
    asked = Opsets.asked_of(common)
    settings = check(common)
    opsets = Opsets(asked=asked)
    if opset_limits is not None:
        oldest, newest, why = opset_limits(settings)
        opsets = Opsets(asked=asked, oldest=oldest, newest=newest, why=why)
    if "controlnet" in parts:
        for name in names:
            described = spec.members.get(name) or spec.other_members
            if described is not None and "controlled" in open_family(described.family).options:
                own[name] = {"controlled": True, **own[name]}
    checkpoints = Checkpoints(progress)
    plans = tuple(
        plan_member(
            name, spec, base, members.get(name), own[name], precision_of(name, known, precision, None), checkpoints
        )
        for name in names
    )
    labels: tuple[str, ...] = ()
    if spec.from_checkpoints:
        spec = _of_checkpoints(spec, plans)
        labels = _null_classes([plan for plan in plans if not _NULL_OPTIONS & own[plan.name].keys()])
    beside, left_out = plan_parts(spec, plans, parts, own, precision, checkpoints)
    lowered = [plan.who for plan in (*plans, *beside.values()) if opsets.of(plan.precision) < plan.opset]
    plans = tuple(plan.exported_at(opsets.of(plan.precision)) for plan in plans)
    beside = {name: plan.exported_at(opsets.of(plan.precision)) for name, plan in beside.items()}
    conventions = reconcile(spec, plans, beside)
    return BundlePlan(
        recipe=spec,
        base=base,
        members=plans,
        parts=beside,
        conventions=replace(
            conventions,
            notes=(
                *_of_files([*plans, *beside.values()]),
                *labels,
                *left_out,
                *conventions.notes,
                *opsets.notes(lowered),
            ),
        ),
        options=settings,
    )


def _of_checkpoints(recipe: Recipe, members: Sequence[NetworkPlan]) -> Recipe:
    """``recipe`` with the latent and the classes of the last member; whether the others have them is checked later.

    A model without a null class is not guided.
    """
    found = members[-1].inspection
    channels, height, width = found.latent
    latent = msgspec.structs.replace(recipe.latent, channels=channels, height=height, width=width)
    conditioning, defaults = recipe.conditioning, recipe.defaults
    if conditioning.kind == "class":
        classes = found.labels - found.null_class
        conditioning = msgspec.structs.replace(
            conditioning, classes=classes, null=classes if found.null_class else None
        )
    guided = defaults.guided_channels
    defaults = msgspec.structs.replace(
        defaults,
        guidance=defaults.guidance if conditioning.guidable else 1.0,
        guided_channels=guided if guided is not None and guided < channels else None,
    )
    return msgspec.structs.replace(recipe, latent=latent, conditioning=conditioning, defaults=defaults)


def _null_classes(members: Sequence[NetworkPlan]) -> tuple[str, ...]:
    """Whether a label table ends in a null class leaves no trace in it; ImageNet's 1,000 classes and one more tell."""
    return tuple(
        f"{plan.who}: the last of its {labels} labels is taken for the null class of guidance (--option "
        f"{plan.name}.null_class=false if it is a class)"
        for plan in members
        if plan.inspection.null_class and (labels := plan.inspection.labels) not in (0, 1001)
    )


def _of_files(plans: Sequence[NetworkPlan]) -> tuple[str, ...]:
    """What was taken of files that hold more than one model; once for a file that several networks are read from."""
    notes = []
    for plan in plans:
        weights = plan.inspection.files[-1]
        notes += [f"{weights.name}: {note}" for note in (*read_checkpoint(weights).notes, *plan.inspection.notes)]
    return tuple(dict.fromkeys(notes))
