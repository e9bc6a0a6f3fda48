"""The training configuration that single files have beside them: ``model.yaml`` for ``model.safetensors``. No torch.

Programs for Stable Diffusion look for it there, and some models that predict v say it nowhere else. It is YAML in the
layout of github.com/CompVis/latent-diffusion or github.com/Stability-AI/generative-models, of which single lines are
looked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.bundle.read import CONFIG_BYTES, read_text
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.checkpoint.conventions import Statement, spelled

__all__ = ["config_beside", "statements_of_config"]

_TARGET: Final = re.compile(r"^[ \t]*target:[ \t]*[\"']?(?:ldm|sgm)\.models\.", re.MULTILINE)
_SCALING: Final = re.compile(
    r"^[ \t]*target:[ \t]*\S*?\.(\w+)Scaling[\"']?[ \t]*$", re.MULTILINE
)  # of generative-models


def config_beside(path: Path) -> Path | None:
    """The configuration of the single file ``path``, where there is one."""
    found = path.with_suffix(".yaml")
    return found if found.is_file() else None


def statements_of_config(path: Path) -> Iterator[Statement]:
    """What it says of the training: prediction type (eps where it is silent, as in its code) and betas.

    Raises ``BadCheckpoint`` for one that can't be read, and for betas that can't be.
    """
    try:
        text = read_text(path, CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{path} is damaged: {error}", hint="download it again, or move it away from its model"
        ) from None
    if not _TARGET.search(text):  # of something else that has the same name
        return
    source = f"{path.name} beside it"
    scaling = _SCALING.search(text)
    stated = _value(text, "parameterization") or (scaling[1] if scaling else "eps")
    yield Statement(source=source, prediction=spelled(stated))
    start, end, steps = (_value(text, key) for key in ("linear_start", "linear_end", "timesteps"))
    if start is None or end is None or (_value(text, "beta_schedule") or "linear") != "linear":
        return
    try:  # what it calls linear is so in the square root of beta
        noise = NoiseScheduleSpec(
            kind="scaled-linear", steps=int(steps or 1000), beta_start=float(start), beta_end=float(end)
        )
    except (ValueError, BadInput) as error:
        raise BadCheckpoint(
            f"{path}: linear_start {start}, linear_end {end}, timesteps {steps} are no schedule of betas: {error}",
            hint="correct it, or move it away from its model",
        ) from None
    yield Statement(source=source, noise=noise)


def _value(text: str, key: str) -> str | None:
    found = re.search(rf"^[ \t]*{key}:[ \t]*[\"']?([\w.+-]{{1,40}})[\"']?[ \t]*(?:#.*)?$", text, re.MULTILINE)
    return found[1] if found else None
