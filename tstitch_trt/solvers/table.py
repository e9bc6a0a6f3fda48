"""The step table: what a solver does at each step, as checked numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput
from tstitch_trt.solvers.options import SolverOptions

__all__ = ["COLUMNS", "StepTable"]

Array = NDArray[np.float64]

COLUMNS = ("t", "c_in", "A", "B", "C", "E", "S", "log_std_min", "log_std_max", "a", "s")
_CLOSE = 1e-9  # relative; the columns are float64


@dataclass(frozen=True, eq=False, kw_only=True)
class StepTable:
    """``x' = A x + B D + C D1 + E D2 + S z``: one row for each step, columns float64 ``[N]`` and read-only.

    Before step ``i`` the latent is ``x = a[i] x0 + s[i] eps``, after the last ``a_end x0 + s_end eps``. The table
    proves what can be proved of it, or raises ``BadInput``:

    - every column has the same length, is finite, and the noise ``s / a`` falls from row to row;
    - no row reads an estimate from before the first step;
    - ``keeps_mean``: fed exact estimates, each row lands on the next signal level, ``A a + B + C + E = a'``;
    - ``keeps_variance``: each row lands on the next noise level, ``(A s)^2 + S^2 = s'^2``.
    """

    solver: SolverOptions  # with every default filled in
    t: Array  # timestep the member is given, may be fractional
    c_in: Array  # factor on the latent before the member sees it
    A: Array
    B: Array
    C: Array
    E: Array
    S: Array
    log_std_min: Array  # range of the learned log standard deviation; 0 where unused
    log_std_max: Array
    a: Array
    s: Array
    a_end: float
    s_end: float
    init_scale: float  # what unit Gaussian noise is multiplied by to start
    uses_variance: bool = False  # some row scales its noise by the model's second half of channels
    keeps_mean: bool = True
    keeps_variance: bool = True

    def __post_init__(self) -> None:
        for name in COLUMNS:
            column = np.array(getattr(self, name), dtype=np.float64)
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        shapes = {name: getattr(self, name).shape for name in COLUMNS}
        if self.t.ndim != 1 or self.t.size == 0 or len(set(shapes.values())) != 1:
            self._refuse(f"its columns have the shapes {shapes}; allowed is one length of 1 or more")
        for name in COLUMNS:
            self._require(np.isfinite(getattr(self, name)), f"column {name} is not finite")
        ends = np.array([self.a_end, self.s_end, self.init_scale])
        if not np.isfinite(ends).all() or self.a_end <= 0 or self.s_end < 0 or self.init_scale <= 0:
            self._refuse(f"a_end, s_end, init_scale are {ends}")
        self._require((self.a > 0) & (self.s > 0) & (self.c_in > 0) & (self.S >= 0), "a, s, c_in or S is out of range")
        self._require(self.log_std_min <= self.log_std_max, "log_std_min is above log_std_max")
        levels = np.append(self.sigma, self.s_end / self.a_end)
        falls = np.diff(levels) < 0
        falls[-1] |= levels[-1] == levels[-2]  # a trajectory may end at the level of its last step: a step that rests
        self._require(falls, "the noise does not fall")
        if self.C[0] != 0 or (self.E[:2] != 0).any():
            self._refuse("its first rows read estimates that don't exist yet")
        a_next, s_next = np.append(self.a[1:], self.a_end), np.append(self.s[1:], self.s_end)
        if self.keeps_mean:
            terms = (self.A * self.a, self.B, self.C, self.E)
            size = sum(np.abs(term) for term in terms)
            self._require(np.abs(sum(terms) - a_next) <= _CLOSE * size, "A a + B + C + E is not the next signal level")
        if self.keeps_variance:
            noise = (self.A * self.s) ** 2 + self.S**2
            self._require(np.abs(noise - s_next**2) <= _CLOSE * s_next**2, "(A s)^2 + S^2 is not the next noise level")

    def _require(self, holds: NDArray[np.bool_], what: str) -> None:
        wrong = np.flatnonzero(~holds)
        if wrong.size:
            self._refuse(f"{what} at step {wrong[0]} of {self.t.size}")

    def _refuse(self, what: str) -> None:
        raise BadInput(
            f"the step table of solver {self.solver.name!r} is not consistent: {what}",
            hint="make tables with tstitch_trt.solvers.make_table, or mend the solver that made this one",
        )

    @property
    def steps(self) -> int:
        return int(self.t.size)

    @property
    def sigma(self) -> Array:
        """Noise over signal ``s / a`` before each step, float64 ``[N]``."""
        return np.asarray(self.s / self.a)

    @property
    def history(self) -> int:
        """How many estimates of earlier steps some row reads: 0, 1 or 2."""
        return 2 if self.E.any() else 1 if self.C.any() else 0
