"""The plan of each network: its family, what its checkpoint says, precision and sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import Precision, Source
from tstitch_engines.errors import BadCheckpoint, BadInput, first_line, unknown_name
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.families import Family, Inspection, open_family
from tstitch_export.families.base import TORCH_NAMES, Scalar
from tstitch_export.families.clip_text.inversion import locate_inversions
from tstitch_export.families.lora.fuse import locate_loras
from tstitch_export.families.options import typed
from tstitch_export.hub.checkpoints import Checkpoints
from tstitch_export.planning.opset import OPSET
from tstitch_export.planning.recipe import PARTS, TEXT_ENCODERS, MemberRecipe, PartRecipe, Recipe
from tstitch_export.planning.shipped import ShippedMember, read_shipped
from tstitch_export.planning.sizes import SizeRanges

__all__ = ["NetworkPlan", "part_names", "part_of", "plan_member", "plan_part", "plan_parts", "precision_of"]

_MOST_TOKENS: Final = 3 * 77  # of prompts longer than the encoders' 77, which go through them in chunks
# The VAE in half precision loses pictures (SDXL's overflows), and it is one call of a whole trajectory.
_FP32_PARTS: Final = ("vae_decoder", "vae_encoder")
_PART_BATCH: Final = {"vae_decoder": Range(1, 1, 1), "vae_encoder": Range(1, 1, 1)}


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkPlan:
    """One network, everything about it decided and checked before any long work starts."""

    name: str
    recipe: MemberRecipe | PartRecipe
    family: Family
    inspection: Inspection
    precision: Precision
    sources: tuple[Source, ...]
    given: Path  # the checkpoint as it was given: for a pipeline its folder
    opset: int
    shipped: ShippedMember | None = None
    folder: Path | None = None  # where a shipped member's files are

    @property
    def what(self) -> str:
        """``member small``"""
        return f"{'member' if self.family.role == 'member' else 'part'} {self.name}"

    @property
    def who(self) -> str:
        """``member 'small' (unet)``: with what it was given as."""
        return f"{self.what.partition(' ')[0]} {self.name!r} ({self.inspection.path.name})"

    @property
    def dynamic(self) -> bool:
        """Whether the latent's height and width may vary."""
        return "H" in self.family.dims(self.inspection)

    def exported_at(self, opset: int) -> NetworkPlan:
        """It with this opset. What is shipped has the usual one."""
        return self if opset == self.opset else replace(self, opset=opset, shipped=None, folder=None)

    def profile(self, sizes: SizeRanges) -> ShapeProfile:
        """The ranges its engine is built for. Raises ``BadInput`` for a size that the model can't take."""
        rows = sizes.rows(distilled=bool(self.inspection.guidance_embedding))
        batch = _PART_BATCH.get(self.name, rows)
        if isinstance(self.recipe, PartRecipe) and self.recipe.batch is not None:
            batch = Range.parse(self.recipe.batch)
        elif self.family.role == "text_encoder":
            batch = Range(1, min(2, rows.max), rows.max)
        dims = {"B": batch}
        asked: dict[str, Range | None] = {"H": sizes.height, "W": sizes.width, "T": sizes.tokens}
        for name, dim in self.family.dims(self.inspection).items():
            found = asked[name]
            if found is None:
                found = Range(dim.native, dim.native, max(dim.native, _MOST_TOKENS if name == "T" else 0))
            for size in (found.min, found.opt, found.max):
                if size % dim.multiple or size > dim.most:
                    raise BadInput(
                        f"{self.what} takes {_SIDES[name]} in steps of {dim.multiple} up to {dim.most}, not {size}",
                        hint=f"e.g. {dim.native}; pixels are {_PER_LATENT}" if name in "HW" else f"e.g. {dim.native}",
                    )
            dims[name] = found
        return ShapeProfile(dims)


_SIDES: Final = {"H": "latent heights", "W": "latent widths", "T": "prompt lengths in tokens"}
_PER_LATENT: Final = "latent elements times the decoder's factor, 8 for Stable Diffusion"


def precision_of(
    name: str, names: Iterable[str], precision: Precision | Mapping[str, Precision], default: Precision | None
) -> Precision:
    """What ``precision`` (one for all, or by name) says for ``name``. Raises ``UnknownName``.

    ``default`` is the recipe's; without it fp32 stands where nothing is said.
    """
    if isinstance(precision, str):
        chosen = precision
        if part_of(name) in PARTS and default is not None:
            chosen = default
        elif name in _FP32_PARTS:
            chosen = "fp32"
    else:
        names = list(names)
        for other in precision:
            if other not in names:
                raise unknown_name("member in precision", other, names)
        chosen = precision.get(name, default or "fp32")
    if chosen not in TORCH_NAMES:
        raise unknown_name("precision", chosen, TORCH_NAMES)
    return chosen


def plan_member(
    name: str,
    spec: Recipe,
    base: Path,
    given: str | Path | None,
    options: Mapping[str, Scalar],
    precision: Precision,
    checkpoints: Checkpoints,
) -> NetworkPlan:
    """Reads what the checkpoint says. Raises ``BadInput`` and ``BadCheckpoint``."""
    part = spec.members.get(name) or spec.other_members
    if part is None:
        raise unknown_name(f"member of recipe {spec.name!r}", name, spec.members)
    family = open_family(part.family)
    if given is None and part.checkpoint is None:
        raise BadInput(
            f"recipe {spec.name!r} has no checkpoint of its own for member {name!r}",
            hint=f"give it: --member {name}=CHECKPOINT (.safetensors, .pt, .pth, a diffusers folder or a Hugging Face "
            "repository ORG/NAME)",
        )
    if given is None:
        path = checkpoints.locate(str(part.checkpoint), "member", base=base)
    else:
        path = checkpoints.locate(given, "member")
    # The recipe's options describe its own checkpoint; another file speaks for itself unless it can't.
    chosen = {key: value for key, value in part.options.items() if given is None or key in family.choices}
    try:
        plan = _plan(name, part, path, {**chosen, **options}, precision, path.name, checkpoints, shipped=given is None)
    except BadCheckpoint:
        if given is None or not part.options or options:
            raise
        plan = _plan(name, part, path, part.options, precision, path.name, checkpoints)
    if given is not None or precision not in part.shipped or options:
        return plan
    record = base / part.shipped[precision]
    return replace(plan, shipped=read_shipped(record), folder=record.parent)


def plan_part(
    name: str,
    recipe: PartRecipe,
    path: Path,
    options: Mapping[str, Scalar],
    precision: Precision,
    shown: str,
    checkpoints: Checkpoints,
) -> NetworkPlan:
    """Like ``plan_member`` for a part, also a member's own (``small_text_encoder``). Raises ``BadCheckpoint``.

    ``shown`` is what the manifest calls its source.
    """
    family = open_family(recipe.family)
    chosen = {**recipe.options, **options}
    part = part_of(name)
    whole = path.is_file() or (path / "model_index.json").is_file() or (path / part).is_dir()
    if "part" in family.options and whole:
        chosen.setdefault("part", part)
    return _plan(name, recipe, path, chosen, precision, shown, checkpoints)


def _plan(
    name: str,
    recipe: MemberRecipe | PartRecipe,
    path: Path,
    options: Mapping[str, Scalar],
    precision: Precision,
    shown: str,
    checkpoints: Checkpoints,
    *,
    shipped: bool = False,
) -> NetworkPlan:
    if not os.path.lexists(path):
        raise BadCheckpoint(
            f"checkpoint {path} does not exist",
            hint="check the path; a Hugging Face repository is ORG/NAME, ORG/NAME/PATH or ORG/NAME@REVISION, "
            "which it must be where a folder ORG is here",
        )
    options = _located(options, checkpoints)
    family, kind = open_family(recipe.family), "member" if isinstance(recipe, MemberRecipe) else "part"
    try:
        inspection = family.inspect(path, typed(options, family.options, what=f"{kind} {name!r}"))
        files = inspection.files
        shown_as = {file: shown if len(files) == 1 else f"{shown}/{file.name}" for file in files}
        sources = [
            checkpoints.source(file, Source(name=shown_as[file], sha256=sha256, bytes=size, shipped=shipped))
            for file, (sha256, size) in ((file, hash_file(file)) for file in files)
        ]
    except BadCheckpoint as error:  # families call it MEMBER
        raise BadCheckpoint(error.message, hint=error.hint.replace("MEMBER.", f"{name}.")) from error.__cause__
    except OSError as error:
        raise BadCheckpoint(f"checkpoint {path} can't be read: {error}", hint="check the path and its rights") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # Configurations that contradict themselves, each key of which is in its range
        raise BadCheckpoint(
            f"checkpoint {path} says of itself what can't be: {type(error).__name__}: {first_line(error)}",
            hint="copy config.json and the weights from the same model",
        ) from error
    return NetworkPlan(
        name=name,
        recipe=recipe,
        family=family,
        inspection=inspection,
        precision=precision,
        sources=tuple(sources),
        given=path,
        opset=OPSET[precision],
    )


def _located(options: Mapping[str, Scalar], checkpoints: Checkpoints) -> dict[str, Scalar]:
    """``options`` with paths in place of Hugging Face repositories."""
    found = dict(options)
    for key, locate in (("lora", locate_loras), ("textual_inversion", locate_inversions)):
        if isinstance(text := options.get(key), str):
            found[key] = locate(text, checkpoints)
    if isinstance(text := options.get("tokenizer"), str):
        found["tokenizer"] = str(checkpoints.locate(text, "tokenizer"))
    return found


def part_of(name: str) -> str:
    """``small_text_encoder`` -> ``text_encoder``; the recipe's parts are themselves."""
    return next((part for part in TEXT_ENCODERS if name.endswith(f"_{part}")), name)


def part_names(spec: Recipe, members: Iterable[str]) -> list[str]:
    """The parts that a bundle of ``members`` may have: the recipe's, and a text encoder of each member's own."""
    own = [f"{member}_{part}" for member in members for part in TEXT_ENCODERS if part in spec.parts]
    return [*spec.parts, *own]


def plan_parts(
    spec: Recipe,
    members: Sequence[NetworkPlan],
    given: Mapping[str, str | Path],
    options: Mapping[str, Mapping[str, Scalar]],
    precision: Precision | Mapping[str, Precision],
    checkpoints: Checkpoints,
) -> tuple[dict[str, NetworkPlan], tuple[str, ...]]:
    """The parts given by path, or found in the members' pipelines (folder or single file), the last member's first.

    A member with another text encoder keeps it as the part ``MEMBER_text_encoder``. The second result are notes of
    what was left out.
    """
    names = part_names(spec, [plan.name for plan in members])
    known = [*(plan.name for plan in members), *names]
    for name in given:
        if name not in names:
            raise unknown_name(f"part of recipe {spec.name!r}", name, names)
    paths = {name: checkpoints.locate(path, part_of(name)) for name, path in given.items()}
    found: dict[str, NetworkPlan] = {}
    notes: list[str] = []
    for part, recipe in spec.parts.items():
        chosen = _part_precision(part, known, precision, recipe.precision, members)

        def plan(
            path: Path, key: str, shown: str, part: str = part, recipe: PartRecipe = recipe, made: Precision = chosen
        ) -> NetworkPlan:
            named = made if isinstance(precision, str) else precision.get(key, made)
            own = {**(_inherited(options.get(part, {}), path) if key != part else {}), **options.get(key, {})}
            return plan_part(key, recipe, path, own, named, shown, checkpoints)

        if part in paths:
            found[part] = plan(paths[part], part, paths[part].name)
        for member in reversed(members):
            key = f"{member.name}_{part}"
            if key in paths:
                found[key] = plan(paths[key], key, paths[key].name)
                continue
            if part in paths or (part in found and part not in TEXT_ENCODERS):
                continue
            path = _inside(member, recipe, part, checkpoints)
            if path is None:
                continue
            shown = "/".join((member.given.name, *path.relative_to(member.given).parts))
            try:
                own = plan(path, part, shown)
            except BadCheckpoint as error:
                if path.is_dir():
                    raise
                notes.append(f"the {part} in {path.name} is left out: {error.message} ({error.hint})")
                continue
            if part not in found:
                found[part] = own
            elif part in TEXT_ENCODERS and _digests(own) != _digests(found[part]):
                found[key] = plan(path, key, shown)
    return found, tuple(notes)


def _inside(member: NetworkPlan, recipe: PartRecipe, part: str, checkpoints: Checkpoints) -> Path | None:
    """Where the pipeline that the member was given as has this part; ``None`` where it has none."""
    if member.given.is_file():
        family = open_family(recipe.family)
        return member.given if family.holds(read_checkpoint(member.given).shapes, part) else None
    if recipe.subfolder is None:
        return None
    checkpoints.add(member.given, recipe.subfolder)
    if not (member.given / recipe.subfolder / "config.json").is_file():
        return None
    return member.given / recipe.subfolder


def _inherited(options: Mapping[str, Scalar], path: Path) -> dict[str, Scalar]:
    """The options of a text encoder that hold for a member's own too. A folder has its own tokenizer."""
    others = ("lora", "textual_inversion", *(("tokenizer",) if path.is_dir() else ()))
    return {key: value for key, value in options.items() if key not in others}


def _part_precision(
    part: str,
    known: Sequence[str],
    precision: Precision | Mapping[str, Precision],
    default: Precision | None,
    members: Sequence[NetworkPlan],
) -> Precision:
    """A ControlNet has its members' precision by default: residuals reach them without a cast."""
    steered = {plan.precision for plan in members if plan.inspection.controlled}
    if part == "controlnet" and default is None and len(steered) == 1:
        (default,) = steered
    return precision_of(part, known, precision, default)


def _digests(plan: NetworkPlan) -> list[str]:
    return [source.sha256 for source in plan.sources]
