"""What a diffusers pipeline folder says of a denoiser besides its weights: scheduler, scaling of the latent, index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from tstitch_engines.bundle.scheduler_config import read_training
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.checkpoint.conventions import NOTHING_KNOWN, Conventions, Statement
from tstitch_export.checkpoint.folder import read_json
from tstitch_export.checkpoint.model_config import check_model_config

__all__ = ["PipelineFacts", "read_pipeline", "scheduler_keys"]

# Class of the VAE -> its default scaling factor. That of an AutoencoderTiny says nothing of the denoiser's latent,
# which it was trained to take as it is.
_SCALING: Final = {"AutoencoderKL": 0.18215, "VQModel": 0.18215}


_PREDICTIONS: Final = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_SCHEDULES: Final = {"linear": "linear", "scaled-linear": "scaled_linear", "squared-cosine": "squaredcos_cap_v2"}


@dataclass(frozen=True, kw_only=True)
class PipelineFacts:
    """``index`` is ``model_index.json``, ``scheduler`` the raw ``scheduler_config.json``; ``None``: not stated.

    ``training``: what the scheduler says of the denoiser.
    """

    index: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    training: tuple[Statement, ...] = ()
    scaling: float | None = None
    shift: float | None = None

    def scheduler_of(self, trained: Conventions) -> Mapping[str, Any] | None:
        """``scheduler`` for a model that was ``trained`` in another way than it says."""
        return None if self.scheduler is None else {**self.scheduler, **scheduler_keys(trained)}


def scheduler_keys(trained: Conventions) -> dict[str, Any]:
    """The keys of a diffusers scheduler that say how a model was ``trained``, as far as that is known."""
    keys: dict[str, Any] = {}
    if trained.prediction is not None:
        keys["prediction_type"] = _PREDICTIONS[trained.prediction]
    if (noise := trained.noise) is not None and noise.kind == "betas":
        keys |= {"trained_betas": list(noise.betas), "num_train_timesteps": noise.steps}
    elif noise is not None:
        keys |= {"beta_schedule": _SCHEDULES[noise.kind], "num_train_timesteps": noise.steps}
        keys |= {"beta_start": noise.beta_start, "beta_end": noise.beta_end, "trained_betas": None}
    if trained.zero_snr is not None:
        keys["rescale_betas_zero_snr"] = trained.zero_snr
    return keys


def read_pipeline(path: Path, said: Conventions = NOTHING_KNOWN) -> PipelineFacts:
    """The facts of the pipeline folder ``path``; none for a bare model folder.

    Raises ``BadCheckpoint`` for a damaged file and for a training schedule that a noise schedule can't express, unless
    the user ``said`` noise and prediction.
    """
    scheduler = read_json(file := path / "scheduler" / "scheduler_config.json")
    scaling = shift = None
    training: tuple[Statement, ...] = ()
    if scheduler is not None:
        try:
            noise, prediction = read_training(scheduler, where=str(file))
            plain, zero = msgspec.structs.replace(noise, zero_terminal_snr=False), noise.zero_terminal_snr
            training = (Statement(source=f"its {file.name}", prediction=prediction, noise=plain, zero_snr=zero),)
        except BadInput as error:
            if said.noise is None or said.prediction is None:
                raise BadCheckpoint(
                    f"the model was trained with noise that can't be expressed: {error.message}",
                    hint="if it was trained otherwise, say both noise and prediction: --option "
                    "MEMBER.noise=scaled-linear:0.00085:0.012 --option MEMBER.prediction=eps, in Python "
                    'options={"MEMBER.noise": "scaled-linear:0.00085:0.012", "MEMBER.prediction": "eps"}',
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
        training=training,
        scaling=scaling,
        shift=shift,
    )
