"""What a diffusers pipeline folder says of a denoiser besides its weights: scheduler, scaling of the latent, index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tstitch_engines.bundle.manifest import NoiseScheduleSpec, PredictionType
from tstitch_engines.bundle.scheduler_config import read_training
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.checkpoint.folder import read_json
from tstitch_export.checkpoint.model_config import check_model_config

__all__ = ["PipelineFacts", "read_pipeline"]

# Class of the VAE -> its default scaling factor. That of an AutoencoderTiny says nothing of the denoiser's latent,
# which it was trained to take as it is.
_SCALING: Final = {"AutoencoderKL": 0.18215, "VQModel": 0.18215}


@dataclass(frozen=True, kw_only=True)
class PipelineFacts:
    """``index`` is ``model_index.json``, ``scheduler`` the raw ``scheduler_config.json``; ``None``: not stated."""

    index: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    noise: NoiseScheduleSpec | None = None
    parametrisation: PredictionType | None = None
    scaling: float | None = None
    shift: float | None = None


def read_pipeline(path: Path) -> PipelineFacts:
    """The facts of the pipeline folder ``path``; none for a bare model folder.

    Raises ``BadCheckpoint`` for a damaged file and for a training schedule that a noise schedule can't express.
    """
    scheduler = read_json(file := path / "scheduler" / "scheduler_config.json")
    noise = parametrisation = scaling = shift = None
    if scheduler is not None:
        try:
            noise, parametrisation = read_training(scheduler, where=str(file))
        except BadInput as error:
            raise BadCheckpoint(
                f"the model was trained with noise that can't be expressed: {error.message}",
                hint="give the model's own folder, not the pipeline, and state noise and prediction type in the recipe",
            ) from None
    vae = read_json(file := path / "vae" / "config.json")
    if vae is not None and str(vae.get("_class_name")) in _SCALING:
        check_model_config(vae, file)
        stated = vae.get("scaling_factor")
        scaling = _SCALING[vae["_class_name"]] if stated is None else float(stated)
        shift = float(vae.get("shift_factor") or 0.0)
    return PipelineFacts(
        index=read_json(path / "model_index.json"),
        scheduler=scheduler,
        noise=noise,
        parametrisation=parametrisation,
        scaling=scaling,
        shift=shift,
    )
