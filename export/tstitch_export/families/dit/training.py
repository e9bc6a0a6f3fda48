"""What a DiT's file says of its training beside its shapes: the command line, and which of its outputs were trained."""

from __future__ import annotations

import re

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import Checkpoint
from tstitch_export.checkpoint.conventions import Conventions, say
from tstitch_export.checkpoint.statements import settings, shown
from tstitch_export.families.dit.config import DiTConfig
from tstitch_export.families.dit.layout import published_name

__all__ = ["check_training", "check_variance", "has_null_class"]

_FACTORS = (1, 4, 8, 16, 32)  # pixels per latent element of the autoencoders that DiTs are trained with


def check_training(checkpoint: Checkpoint, config: DiTConfig, said: Conventions) -> tuple[str, ...]:
    """Notes of what the training state says. Raises ``BadCheckpoint`` where it is that of another model.

    SiT (arXiv 2401.08740) has DiT's tensors, names and shapes, but predicts a velocity. Its learned variance is cut off
    before the loss, so that those rows of the last layer, zero at first, stay zero.
    """
    name = checkpoint.path.name
    notes = []
    for place, key, value in settings(checkpoint.beside):
        if (problem := _contradicts(key, value, config)) is not None:
            raise BadCheckpoint(
                f"{name} is no training state of this DiT: {place} is {value!r}, and {problem}",
                hint="give a DiT's own state; of a file that was put together save the state dict alone",
            )
        if key == "vae" and isinstance(value, str):
            notes.append(f"was trained on latents of the autoencoder {shown(value)}, as {shown(place)} says")
    if config.learn_sigma and said.prediction is None:
        check_variance(checkpoint, "final_layer.linear", config.channels)
    return tuple(notes)


def has_null_class(checkpoint: Checkpoint, config: DiTConfig) -> bool | None:
    """Whether the last row of the label table is the null class, as its training says it; ``None``: it does not.

    DiT's own code adds that row where labels were dropped in training (``class_dropout_prob``). A table of one row has
    a class and no more.
    """
    if config.classes == 0:
        return False
    for _, key, value in settings(checkpoint.beside):
        if key == "class_dropout_prob" and isinstance(value, int | float):
            return value > 0
        if key == "num_classes" and value in (config.classes, config.classes + 1):
            return value == config.classes
    return None


def check_variance(checkpoint: Checkpoint, layer: str, channels: int) -> None:
    """Raises ``BadCheckpoint`` where the last ``layer`` has outputs for a learned variance that were never trained."""
    weight, bias = (checkpoint.values(f"{layer}.{part}") for part in ("weight", "bias"))
    rows, shifts = weight.reshape(-1, 2, channels, weight.shape[1]), bias.reshape(-1, 2, channels)
    if rows[:, 0].any() and not rows[:, 1].any() and not shifts[:, 1].any():
        raise BadCheckpoint(
            f"{checkpoint.path.name} has outputs for a learned variance that were never trained (rows of zeros in "
            f"{layer}). SiT and other models that predict a velocity are so (arXiv 2401.08740), and flow matching is "
            "not supported yet",
            hint=f"give a DiT. If it predicts noise after all, {say('prediction', 'eps')}",
        )


def _contradicts(key: str, value: object, config: DiTConfig) -> str | None:
    if key in ("model", "model_name", "model_type") and isinstance(value, str):
        size = re.fullmatch(r"(?:.*[./])?(\w+?)-(\w+)/(\d+)", value[-100:])
        if size is None:
            return None
        if size[1] != "DiT":
            return "it has the tensors of a DiT"
        published = published_name(config.depth, config.width, config.patch)
        return None if published in ("DiT", value) else f"its tensors are those of a {published}"
    if key == "learn_sigma" and isinstance(value, bool) and value != config.learn_sigma:
        return f"its last layer has {'an' if config.learn_sigma else 'no'} output for the variance"
    if key == "num_classes" and isinstance(value, int) and value not in (config.classes, config.classes + 1):
        return f"its label table has {config.classes + 1} rows, with the null class"
    if key == "image_size" and isinstance(value, int) and value not in [config.size * n for n in _FACTORS]:
        sides = " or ".join(str(config.size * n) for n in _FACTORS)
        return f"its latent is {config.size} wide, for pictures of {sides}"
    return None
