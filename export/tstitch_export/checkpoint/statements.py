"""What a single file says of its training: marker tensors, metadata, and what training scripts keep beside the weights.

Markers as ComfyUI writes and reads them (comfy/supported_models.py, comfy_extras/nodes_model_merging.py), metadata of
Stability AI's ModelSpec 1.0.0, of ComfyUI (``modelspec.predict_key``) and of kohya's sd-scripts (``ss_*``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, get_args

import msgspec

from tstitch_engines.bundle.manifest import NoiseScheduleSpec, PredictionType
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.checkpoint.checkpoint import Checkpoint
from tstitch_export.checkpoint.conventions import FLOW, NO_FLOW, Conventions, Statement, say, spelled
from tstitch_export.checkpoint.noise_buffers import noise_from_buffers

__all__ = ["MARKERS", "check_markers", "foreign_metadata", "resolution_of", "settings", "shown", "statements_of"]

V_MARKER, ZERO_MARKER = "v_pred", "ztsnr"
# Tensors beside the weights of a model's own file, which are none
MARKERS: Final = frozenset({V_MARKER, ZERO_MARKER, "global_step", "betas", "alphas_cumprod", "denoiser.sigmas"})
_EDM: Final = {
    "edm_mean": "Playground v2.5",
    "edm_std": "Playground v2.5",
    "edm_vpred.sigma_max": "CosXL",
    "edm_vpred.sigma_min": "CosXL",
}


def check_markers(names: Iterable[str], name: str) -> None:
    """Raises ``BadCheckpoint`` for the file called ``name`` where its tensors are those of a model without betas."""
    if found := next((key for key in _EDM if key in names), None):
        raise BadCheckpoint(
            f"{name} looks like {_EDM[found]}: its tensor {found} says that it was trained with EDM's noise (arXiv "
            "2206.00364), not with betas",
            hint="use Stable Diffusion or SDXL checkpoints that predict noise or v",
        )


def statements_of(
    checkpoint: Checkpoint, said: Conventions, *, text_width: int | None = None
) -> tuple[list[Statement], tuple[str, ...]]:
    """What a single file says of itself, and notes of what it says besides. ``text_width``: of the text it reads.

    Raises ``BadCheckpoint`` for a model without betas, and for betas of no known formula unless noise is ``said``.
    """
    name = checkpoint.path.name
    names = {*checkpoint.shapes, *checkpoint.markers, *(marker.rpartition(".")[2] for marker in checkpoint.markers)}
    check_markers(names, name)
    for place, key, value in settings(checkpoint.beside):
        if key in _INTERPOLANTS:
            raise BadCheckpoint(
                f"{name} is a training state of SiT or a relative of it (arXiv 2401.08740), as {place} = {value} says, "
                f"and {NO_FLOW}",
                hint="give a DiT, or another model that was trained with a schedule of betas",
            )
    found = []
    if V_MARKER in names:
        found.append(Statement(source=f"its marker tensor {V_MARKER}", prediction="v"))
    if ZERO_MARKER in names:
        found.append(Statement(source=f"its marker tensor {ZERO_MARKER}", zero_snr=True))
    found += _of_metadata(_noted(checkpoint), text_width)
    found += _of_training(checkpoint.beside)
    found += [] if said.noise else _noise_of_training(checkpoint.beside, name)
    if said.noise is None and (noise := noise_from_buffers(checkpoint)) is not None:
        zero = noise.zero_terminal_snr
        plain = msgspec.structs.replace(noise, zero_terminal_snr=False)
        found.append(Statement(source="its buffer of betas", noise=plain, zero_snr=zero or None))
    notes = [
        f"{said_of}, as its metadata says ({key} = {shown(value)})"
        for key, said_of in _NOTED.items()
        if (value := checkpoint.metadata.get(key, "")).strip() and _tells(key, value)
    ]
    return found, tuple(notes)


_PREDICTION_KEYS: Final = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
_V_KEYS: Final = ("ss_v_parameterization", "v_parameterization")
_ZERO_KEYS: Final = ("ss_zero_terminal_snr", "zero_terminal_snr")
# Architectures that say more than shapes do, ModelSpec's own identifiers and kohya's version names, with the width of
# their text: merged models keep the metadata of others.
_ARCHITECTURES: Final = {
    "stable-diffusion-v2-768-v": ("v", 1024),
    "stable-diffusion-v2-512": ("eps", 1024),
    "sd_v2_v": ("v", 1024),
    "sd_v2": ("eps", 1024),
    "sd_v1_v": ("v", 768),
}
_ARCHITECTURE_KEYS: Final = ("modelspec.architecture", "ss_base_model_version")
_NOTED: Final = {
    "modelspec.timestep_range": "was trained on a part of the timesteps",
    "modelspec.encoder_layer": "is meant for a text encoder that stops early (clip_skip)",
}


def _noted(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file, or what a training state has in its place."""
    beside = settings(checkpoint.beside)
    copied = {key: str(value) for _, key, value in beside if key.startswith(("ss_", "modelspec."))}
    return {**copied, **checkpoint.metadata}


def _of_metadata(metadata: Mapping[str, str], text_width: int | None) -> Iterator[Statement]:
    for key in _PREDICTION_KEYS:
        if (text := metadata.get(key, "").strip()) and text != "None":
            yield Statement(source=f"its metadata {key}", prediction=spelled(text))
    for source, predicts, width in _architectures(metadata):
        if width == text_width:
            yield Statement(source=source, prediction=predicts)
    for key in _V_KEYS:
        if (switch := _switch(metadata.get(key))) is not None:
            yield Statement(source=f"its metadata {key}", prediction="v" if switch else "eps")
    for key in _ZERO_KEYS:  # false is sd-scripts' default, also of models that were rescaled before
        if _switch(metadata.get(key)):
            yield Statement(source=f"its metadata {key}", zero_snr=True)


def foreign_metadata(metadata: Mapping[str, str], text_width: int | None) -> str | None:
    """Which metadata is that of a model with text of another width, and says what that one predicts."""
    for source, predicts, width in _architectures(metadata):
        if width != text_width:
            return (
                f"{source} is that of a model which predicts {predicts} and takes text {width} wide, not {text_width}"
            )
    return None


def _architectures(metadata: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    for key in _ARCHITECTURE_KEYS:
        stated = metadata.get(key, "").strip().lower().partition("/")[0]
        if stated in _ARCHITECTURES:
            yield f"its metadata {key} = {stated}", *_ARCHITECTURES[stated]


def _tells(key: str, value: str) -> bool:
    """Whether the value is another than the usual one."""
    numbers = [int(number) for number in re.findall(r"\d{1,6}", value)[:2]]
    if key.endswith("range"):
        return len(numbers) == 2 and (numbers[0] > 0 or numbers[1] < 999)
    return bool(numbers) and numbers[0] > 1


def resolution_of(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Height and width in pixels, where the metadata says for which the model is."""
    found = re.fullmatch(r"\s*(\d{2,5})\s*x\s*(\d{2,5})\s*", metadata.get("modelspec.resolution", ""))
    return (int(found[2]), int(found[1])) if found else None


# --- what a training state says


_SAID_OF_OTHERS: Final = re.compile(r"(?i)^(opt|optim|optimi[sz]er|lr|scheduler|callbacks|loops|data|dataset|ema)")
_STATE_WORDS: Final = frozenset(
    {"prediction", "prediction_type", "pred_type", "pred", "parameterization", "parametrization", "objective",
     "predict", "model_mean_type"}
)  # fmt: skip
_STATE_SWITCHES: Final = {
    "predict_xstart": "x0",  # of guided-diffusion, which DiT trains with
    "predict_v": "v",
    "v_pred": "v",
    "v_prediction": "v",
    "v_parameterization": "v",
    "flow_matching": FLOW,
    "use_flow": FLOW,
    "rectified_flow": FLOW,
}
_STATE_ZERO: Final = frozenset({"zero_snr", "ztsnr", "zero_terminal_snr", "rescale_betas_zero_snr"})
_INTERPOLANTS: Final = frozenset({"path_type", "interpolant", "interpolant_type"})
_FLOW_WORDS: Final = re.compile(r"(?i)[^/]*(flow[-_ ]?match|rectified[-_ ]?flow)[^/]*")  # but no path of a folder
_STATE_STEPS: Final = ("diffusion_steps", "num_train_timesteps", "num_diffusion_timesteps")
_STATE_ENDS: Final = (("beta_start", "beta_end"), ("linear_start", "linear_end"))
_COSINE: Final = ("cosine", "squaredcos_cap_v2", "squared-cosine")


def settings(beside: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    """Every setting of a training state: where it is (``args.model``), its name and its value."""
    for key, value in beside.items():
        if isinstance(value, Mapping):
            if not _SAID_OF_OTHERS.match(key):
                yield from ((f"{key}.{place}", name, inner) for place, name, inner in settings(value))
        else:
            yield key, key, value


def shown(text: str) -> str:
    """Text of a file for notes, which hold no signs that control a terminal."""
    return repr(text[:80])[1:-1]


def _of_training(beside: Mapping[str, object]) -> Iterator[Statement]:
    for place, name, value in settings(beside):
        source = f"its training state ({shown(place)} = {shown(str(value))})"
        if name in _STATE_WORDS and isinstance(value, str):
            word = spelled(value)
            if word in {*get_args(PredictionType), FLOW} or name in ("prediction", "prediction_type"):
                yield Statement(source=source, prediction=word)
        elif name in _STATE_SWITCHES and value is True:
            yield Statement(source=source, prediction=_STATE_SWITCHES[name])
        elif name in _STATE_ZERO and value is True:
            yield Statement(source=source, zero_snr=True)
        elif isinstance(value, str) and _FLOW_WORDS.fullmatch(value[:200]):
            yield Statement(source=source, prediction=FLOW)


def _noise_of_training(beside: Mapping[str, object], name: str) -> Iterator[Statement]:
    """What groups of settings say of the betas. Raises ``BadCheckpoint`` for betas that a training has and we don't."""
    groups: dict[str, dict[str, object]] = {}
    for place, key, value in settings(beside):
        groups.setdefault(place.rpartition(".")[0], {})[key] = value
    for place, held in groups.items():
        key = next((key for key in ("noise_schedule", "beta_schedule") if isinstance(held.get(key), str)), "")
        # In latent diffusion's settings they are called timesteps; elsewhere that may be those of sampling.
        counts = ("timesteps",) if "linear_start" in held else _STATE_STEPS
        counted = next((key for key in counts if type(held.get(key)) is int), "")
        kind, steps = str(held[key]) if key else "", int(str(held[counted])) if counted else 1000
        if not key and (counted != "diffusion_steps" or steps == 1000):
            continue
        stated = ", ".join(f"{one} = {shown(str(held[one]))}" for one in (key, counted) if one)
        source = f"its training state ({shown(place)}: {stated})" if place else f"its training state ({stated})"
        try:
            noise = _formula(key, kind or "linear", steps, held)
        except (ValueError, BadInput) as error:
            reason = error.message if isinstance(error, BadInput) else str(error)
            raise BadCheckpoint(
                f"{name} was trained with noise that can't be expressed, as {source} says: {reason}",
                hint=say("noise", "linear"),
            ) from None
        if noise is not None:
            yield Statement(source=source, noise=noise)


def _formula(key: str, kind: str, steps: int, held: Mapping[str, object]) -> NoiseScheduleSpec | None:
    """``None`` where the ends of the betas are not stated."""
    if kind in _COSINE:
        return NoiseScheduleSpec(kind="squared-cosine", steps=steps)
    if kind not in ("linear", "scaled_linear"):
        raise ValueError("known are linear, scaled_linear and cosine")
    if steps < 1:
        raise ValueError(f"it has {steps} steps")
    for names in _STATE_ENDS:
        start, end = (held.get(each) for each in names)
        if isinstance(start, int | float) and isinstance(end, int | float):  # latent diffusion's is so in the root
            root = kind == "scaled_linear" or "linear_start" in names
            return NoiseScheduleSpec(
                kind="scaled-linear" if root else "linear", steps=steps, beta_start=start, beta_end=end
            )
    if kind == "scaled_linear" or key == "beta_schedule":
        return None
    scale = 1000 / steps  # guided-diffusion's own, which DiT trains with
    return NoiseScheduleSpec(kind="linear", steps=steps, beta_start=scale * 1e-4, beta_end=scale * 0.02)


def _switch(text: str | None) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get((text or "").strip().lower())
