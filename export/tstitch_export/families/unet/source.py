"""Finds a model's weights and names them: folders, pipelines, shards, single files. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import Checkpoint, read_checkpoint
from tstitch_export.checkpoint.config_limits import check_numbers
from tstitch_export.checkpoint.conventions import NOTHING_KNOWN, Conventions, Statement, conventions_of
from tstitch_export.checkpoint.folder import files_of, model_folder, read_json, weights_file
from tstitch_export.checkpoint.model_config import check_model_config
from tstitch_export.checkpoint.original_config import config_beside, statements_of_config
from tstitch_export.checkpoint.pipeline import PipelineFacts, read_pipeline
from tstitch_export.checkpoint.signatures import Shapes, looks_like
from tstitch_export.checkpoint.statements import MARKERS, foreign_metadata, resolution_of, statements_of
from tstitch_export.families.unet.config import CLASS, UNetConfig
from tstitch_export.families.unet.conventions import SPREAD_OF, Implied, implied_by, native_size
from tstitch_export.families.unet.layout import (
    PREFIX,
    config_from_diffusers_names,
    config_from_shapes,
    has_diffusers_names,
    module_names,
    rename,
    unet_shapes,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Source", "read_diffusers", "read_state", "read_unet"]

_STEM = "diffusion_pytorch_model"
_AVERAGE = "model_ema.diffusion_model"  # latent diffusion's, under names without dots
_AVERAGED = f"its moving average ({_AVERAGE}...) is not taken, but the weights themselves, as diffusers does"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model on disk. ``shapes`` are under diffusers' names; ``config`` is what diffusers' ``from_config`` takes.

    ``layout``: ``diffusers`` (``described`` are its JSON files) or ``original``, a single file. ``stated`` and
    ``implied``: what is known of its training.
    """

    layout: str
    path: Path
    described: tuple[Path, ...]
    weights: tuple[Path, ...]
    config: Mapping[str, Any]
    shapes: Shapes
    facts: PipelineFacts = field(default_factory=PipelineFacts)
    stated: tuple[Statement, ...] = ()
    implied: Implied = field(default_factory=Implied)
    resolution: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    training_notes: tuple[str, ...] = ()
    title: str = ""

    def conventions(self, said: Conventions, *, sure: bool = True) -> Conventions:
        """How it was trained. Raises ``BadCheckpoint`` for a contradiction, with ``sure`` also where nothing tells."""
        return conventions_of(
            self.weights[-1].name if self.path.is_file() else f"{self.path.name}/{self.weights[-1].name}",
            [*self.facts.training, *self.stated],
            said=said,
            implied=self.implied.statements,
            undecided=self.implied.undecided if sure else None,
            title=self.title,
            notes=self.training_notes,
        )

    def native(self, trained: Conventions) -> tuple[int, int]:
        """Height and width of the latent that it is for."""
        config = UNetConfig(self.config)
        if self.resolution is not None and not any(side % (8 * config.multiple) for side in self.resolution):
            return self.resolution[0] // 8, self.resolution[1] // 8
        return native_size(config, trained.prediction)

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_unet(path: Path, said: Conventions = NOTHING_KNOWN) -> Source:
    """A UNet: a model folder, a pipeline folder with one in ``unet/``, or a single file under either names.

    ``said``: the conventions that the user gave. Raises ``BadCheckpoint`` saying what it looks like when it is
    something else.
    """
    if path.is_dir() or not path.exists():
        source = read_diffusers(path, part="unet", kind=CLASS)
        if source.path != path:
            source = replace(source, facts=read_pipeline(path, said))
        return _with_training(source, read_checkpoint(source.weights[-1]), {key: key for key in source.shapes}, said)
    checkpoint = read_checkpoint(path)
    if has_diffusers_names(checkpoint.shapes):
        source = _diffusers_file(path, checkpoint.shapes)
        return _with_training(source, checkpoint, {key: key for key in source.shapes}, said)
    config = config_from_shapes(checkpoint.shapes, name=path.name)
    inside = unet_shapes(checkpoint.shapes)
    names = rename(inside, module_names(config), name=path.name)
    source = Source(
        layout="original",
        path=path,
        described=(),
        weights=files_of(path),
        config=config.raw,
        shapes={names[key]: shape for key, shape in inside.items()},
        notes=(_AVERAGED,) if any(key.startswith(_AVERAGE) for key in checkpoint.shapes) else (),
    )
    prefix = PREFIX if PREFIX + next(iter(inside)) in checkpoint.shapes else ""
    return _with_training(source, checkpoint, {ours: prefix + key for key, ours in names.items()}, said)


def _with_training(source: Source, checkpoint: Checkpoint, stored: Mapping[str, str], said: Conventions) -> Source:
    """``stored``: diffusers' name of a tensor -> its name in the checkpoint."""

    def spread() -> float | None:
        return float(checkpoint.values(stored[SPREAD_OF]).std()) if SPREAD_OF in stored else None

    config = UNetConfig(source.config)
    stated, notes = statements_of(checkpoint, said, text_width=config.width)
    described = source.described
    if source.path.is_file() and (beside := config_beside(source.path)) is not None:
        stated += statements_of_config(beside)
        described = (*described, beside)
    implied = implied_by(config, _step(checkpoint), spread)
    if not implied.statements and (foreign := foreign_metadata(checkpoint.metadata, config.width)) is not None:
        implied = Implied(undecided=foreign)
    return replace(
        source,
        described=described,
        stated=tuple(stated),
        implied=implied,
        resolution=resolution_of(checkpoint.metadata),
        training_notes=notes,
        title=checkpoint.metadata.get("modelspec.title", ""),
    )


def _step(checkpoint: Checkpoint) -> int | None:
    """The step of its training at which it was saved, where the file says it."""
    noted = checkpoint.beside.get("global_step")
    if noted is None and checkpoint.shapes.get("global_step") in ((), (1,)):
        noted = int(checkpoint.values("global_step").reshape(-1)[0])
    return noted if isinstance(noted, int) else None


def _diffusers_file(path: Path, shapes: Shapes) -> Source:
    """A UNet's own file under diffusers' names: with the ``config.json`` beside it, or with what the shapes tell."""
    file = path.parent / "config.json"
    config, described, notes = read_json(file), tuple[Path, ...](), tuple[str, ...]()
    if config is not None and config.get("_class_name") == CLASS and "conv_out.weight" in shapes:
        check_model_config(config, file)
        check_numbers(config, shapes, str(file))
        found, described = config, (file,)
    else:
        found = dict(config_from_diffusers_names(shapes, name=path.name).raw)
        notes = (f"there is no config.json beside {path.name}: attention heads are those of the published models",)
    return Source(
        layout="diffusers",
        path=path,
        described=described,
        weights=files_of(path),
        config={key: value for key, value in found.items() if not key.startswith("_")},
        shapes=shapes,
        notes=notes,
    )


def read_diffusers(path: Path, *, part: str, kind: str) -> Source:
    """A diffusers folder with a ``kind``, or a pipeline folder with one in ``part``, of which the index is read alone.

    Raises ``BadCheckpoint``.
    """
    folder, config = model_folder(
        path,
        (part,),
        (kind,),
        what=f"has no {kind}",
        hint=f"give the folder of a {kind} (config.json and {_STEM}.safetensors), or a pipeline with {part}/",
    )
    stored = weights_file(folder, (_STEM,))
    shapes = read_checkpoint(stored).shapes
    if "conv_in.weight" not in shapes:
        raise BadCheckpoint(
            f"{stored} does not fit its config.json: it looks like {looks_like(shapes)}",
            hint="copy config.json and the weights from the same model",
        )
    check_numbers(config, shapes, str(folder / "config.json"))
    averaged = folder not in (path, path / part) and (path / part / "config.json").is_file()
    return Source(
        layout="diffusers",
        path=folder,
        described=(folder / "config.json",),
        weights=files_of(stored),
        config={key: value for key, value in config.items() if not key.startswith("_")},
        shapes=shapes,
        facts=PipelineFacts(index=read_json(path / "model_index.json") if folder != path else None),
        notes=(f"the moving average {folder.name} is taken, not {part}",) if averaged else (),
    )


def read_state(layout: str, weights: tuple[Path, ...], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under diffusers' names, as stored."""
    state = {key: value for key, value in read_checkpoint(weights[-1]).tensors().items() if key not in MARKERS}
    if layout == "diffusers":
        return state
    inside = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)} or state
    names = rename(inside, module_names(UNetConfig(config)), name=weights[0].name)
    return {names[key]: tensor for key, tensor in inside.items()}
