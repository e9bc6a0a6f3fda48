"""The arena: what writing lanes sends to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import Buffer
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.step_row import ROW_FIELDS
from tstitch_trt.runtime.arena import LaneArena
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey


class CountingDevice(HostDevice):
    sent = 0

    def upload(self, target: Buffer, source: NDArray[Any]) -> None:
        self.sent += source.nbytes
        super().upload(target, source)


def test_a_request_sends_the_rows_that_it_runs_once() -> None:
    """Of three lanes of 20 rows that start at the sixth, and of another request's lane behind them."""
    device = CountingDevice()
    arena = LaneArena(device, slots=5, latent_shape=(1, 2, 2), table_rows=1000, conditioning={})
    own, others = np.random.default_rng(0).standard_normal((2, 20, len(ROW_FIELDS))).astype(np.float32)
    keys = (StepKey("plain", 0, False, False, (2, 2)),) * 20
    device.sent = 0
    arena.write(1, [LaneProgram(own, seed, 5, keys) for seed in range(3)])
    counters = 4 + 4 + 8
    assert device.sent == own[5:].nbytes + 3 * counters
    arena.write(4, [LaneProgram(others, 3, 0, keys)])
    assert device.sent == own[5:].nbytes + others.nbytes + 4 * counters
    rows: NDArray[np.float32] = arena.buffers.rows.array  # type: ignore[attr-defined]
    for slot in (1, 2, 3):
        np.testing.assert_array_equal(rows[slot, 5:20], own[5:])
    np.testing.assert_array_equal(rows[4, :20], others)
    assert not rows[0].any()
