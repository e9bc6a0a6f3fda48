"""The ControlNet's part of a request (arXiv 2302.05543): the picture that steers the members that let it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import ComponentName, Manifest
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.request.conditioning import Values
from tstitch_trt.request.options import PictureWishes

__all__ = ["CONTROLNET", "control_values"]

CONTROLNET: Final = ComponentName.CONTROLNET

_log = logging.getLogger(__name__)


def control_values(
    manifest: Manifest,
    names: Sequence[str],
    wishes: PictureWishes,
    control: NDArray[np.float32],
    networks: Mapping[str, Mapping[str, Values]],
) -> dict[str, Values]:
    """What the ControlNet is given: the picture, and the text inputs of the first member that it steers.

    ``control``: float32 ``[N,3,H,W]`` in [0, 1].
    """
    if CONTROLNET not in manifest.parts:
        raise Unavailable(
            f"the bundle {manifest.name!r} has no ControlNet, so it can't follow a control picture",
            hint="build it with one: --part controlnet=FOLDER",
        )
    steered = [name for name in names if manifest.members[name].controlled]
    free = [name for name in names if name not in steered]
    if not steered:
        raise BadInput(
            f"a control picture was given, and none of the members that run takes control: {', '.join(names)}",
            hint="build them with the option controlled, or choose a schedule with one that is",
        )
    if free:
        _log.warning("member %s takes no control: its steps run without the control picture", ", ".join(free))
    inputs = {spec.name for spec in manifest.parts[CONTROLNET].inputs}
    scale = wishes.get("control_scale")
    return {
        **{key: values for key, values in networks[steered[0]].items() if key in inputs},
        "control": Values(control),
        "control_scale": Values(np.array([1.0 if scale is None else scale], np.float32)),
    }
