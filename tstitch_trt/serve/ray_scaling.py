"""When Ray Serve starts and ends replicas. It is sent to Ray's controller by value: it imports nothing of ours."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["WaitingLanes"]


class WaitingLanes:
    """As many replicas as the lanes that run and wait fill to the share ``target``.

    Each replica reports ``busy``: its lanes that run and the images that wait, over the lanes that it has. Ray averages
    that over ``look_back_period_s``, and waits for ``upscale_delay_s`` and ``downscale_delay_s``.
    """

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        busy = (context.aggregated_metrics or {}).get("busy", {})
        if not busy:
            return context.target_num_replicas, {}
        return math.ceil(sum(busy.values()) / self._target - 1e-6), {}
