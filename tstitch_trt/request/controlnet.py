"""The ControlNet's part of a request (arXiv 2302.05543): the picture that steers the members that let it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import ComponentName, Manifest
from tstitch_trt.request.conditioning import Values

__all__ = ["CONTROLNET", "control_values"]

CONTROLNET: Final = ComponentName.CONTROLNET

_log = logging.getLogger(__name__)


def control_values(
    manifest: Manifest,
    names: Sequence[str],
    control: NDArray[np.float32],
    scale: float,
    networks: Mapping[str, Mapping[str, Values]],
) -> dict[str, Values]:
    """What the ControlNet is given: the pictures, and the text inputs of the first member of ``names`` that it steers.

    ``control``: float32 ``[N,3,H,W]`` in [0, 1].
    """
    steered = [name for name in names if manifest.members[name].controlled]
    if free := [name for name in names if name not in steered]:
        _log.warning("member %s takes no control: its steps run without the control picture", ", ".join(free))
    inputs = {spec.name for spec in manifest.parts[CONTROLNET].inputs}
    return {
        **{key: values for key, values in networks[steered[0]].items() if key in inputs},
        "control": Values(control),
        "control_scale": Values(np.array([scale], np.float32)),
    }
