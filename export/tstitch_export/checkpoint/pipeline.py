"""What a diffusers pipeline folder says of a denoiser besides its weights: scheduler, scaling of the latent, index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tstitch_engines.bundle.manifest import NoiseScheduleSpec, Parametrisation
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.folder import read_json

__all__ = ["PipelineFacts", "read_pipeline"]

_KINDS: Final = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "squared-cosine"}
_PREDICTIONS: Final[dict[str, Parametrisation]] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

# What diffusers takes where a config leaves a key out: (beta_schedule, beta_start, beta_end)
_BETAS: Final = ("linear", 1e-4, 0.02)
_CLASS_BETAS: Final = dict.fromkeys(("LCMScheduler", "TCDScheduler"), ("scaled_linear", 0.00085, 0.012))
# Class of the VAE -> its default scaling factor. That of an AutoencoderTiny says nothing of the denoiser's latent,
# which it was trained to take as it is.
_SCALING: Final = {"AutoencoderKL": 0.18215, "VQModel": 0.18215}


@dataclass(frozen=True, kw_only=True)
class PipelineFacts:
    """``index`` is ``model_index.json``, ``scheduler`` the raw ``scheduler_config.json``; ``None``: not stated."""

    index: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    noise: NoiseScheduleSpec | None = None
    parametrisation: Parametrisation | None = None
    scaling: float | None = None
    shift: float | None = None


def read_pipeline(path: Path) -> PipelineFacts:
    """The facts of the pipeline folder ``path``; none for a bare model folder.

    Raises ``BadCheckpoint`` for a damaged file and for a training schedule that a noise schedule can't express.
    """
    scheduler = read_json(file := path / "scheduler" / "scheduler_config.json")
    noise, parametrisation = (None, None) if scheduler is None else _noise(file, scheduler)
    scaling = shift = None
    vae = read_json(path / "vae" / "config.json")
    if vae is not None and vae.get("_class_name") in _SCALING:
        scaling = float(vae.get("scaling_factor") or _SCALING[vae["_class_name"]])
        shift = float(vae.get("shift_factor") or 0.0)
    return PipelineFacts(
        index=read_json(path / "model_index.json"),
        scheduler=scheduler,
        noise=noise,
        parametrisation=parametrisation,
        scaling=scaling,
        shift=shift,
    )


def _noise(file: Path, config: Mapping[str, Any]) -> tuple[NoiseScheduleSpec, Parametrisation]:
    name = str(config.get("_class_name"))
    schedule, start, end = _CLASS_BETAS.get(name, _BETAS)
    kind, prediction = config.get("beta_schedule", schedule), config.get("prediction_type", "epsilon")
    problem = None
    if "EDM" in name or "FlowMatch" in name:
        problem = f"_class_name is {name}, which has no betas"
    elif config.get("trained_betas") is not None:
        problem = "it lists trained_betas, which are no formula"
    elif config.get("rescale_betas_zero_snr"):
        problem = "rescale_betas_zero_snr is true: its last timestep is pure noise"
    for value, known, what in ((kind, _KINDS, "beta_schedule"), (prediction, _PREDICTIONS, "prediction_type")):
        if value not in known:
            problem = f"{what} is {value!r}; known are {', '.join(known)}"
    if problem is not None:
        raise BadCheckpoint(
            f"{file}: the model was trained with noise that can't be expressed: {problem}",
            hint="give the model's own folder, not the pipeline, and state noise and parametrisation in the recipe",
        )
    noise = NoiseScheduleSpec(
        kind=_KINDS[kind],  # type: ignore[arg-type]
        steps=int(config.get("num_train_timesteps", 1000)),
        beta_start=float(config.get("beta_start", start)),
        beta_end=float(config.get("beta_end", end)),
    )
    return noise, _PREDICTIONS[prediction]
