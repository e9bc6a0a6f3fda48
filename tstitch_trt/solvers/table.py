"""The step table: a solver's update at each evaluation of a model, as checked coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import PredictionType
from tstitch_engines.errors import BadInput
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.prediction import coefficients

__all__ = ["COLUMNS", "Y_COLUMNS", "Coefficients", "StepTable"]

Array = NDArray[np.float64]

Y_COLUMNS = ("YX", "YY", "YB", "YC", "YE", "YF")
COLUMNS = ("t", "c_in", "A", "B", "C", "E", "F", "S", "Y", *Y_COLUMNS, "log_std_min", "log_std_max", "a", "s")
_NONE = np.zeros(0)
_CLOSE = 1e-9  # relative; the columns are float64


def _left_out() -> Array:
    return _NONE


@dataclass(frozen=True, eq=False, kw_only=True)
class Coefficients:
    """What a solver computes of a ``StepTable``, float64 ``[N]`` each; an empty column is all zeros."""

    A: Array
    B: Array
    C: Array = field(default_factory=_left_out)
    E: Array = field(default_factory=_left_out)
    F: Array = field(default_factory=_left_out)
    S: Array = field(default_factory=_left_out)
    Y: Array = field(default_factory=_left_out)
    YX: Array = field(default_factory=_left_out)
    YY: Array = field(default_factory=_left_out)
    YB: Array = field(default_factory=_left_out)
    YC: Array = field(default_factory=_left_out)
    YE: Array = field(default_factory=_left_out)
    YF: Array = field(default_factory=_left_out)
    log_std_min: Array = field(default_factory=_left_out)  # range of the learned log standard deviation; 0 where unused
    log_std_max: Array = field(default_factory=_left_out)
    uses_variance: bool = False  # some row scales its noise by the model's second half of channels
    keeps_mean: bool = True
    keeps_variance: bool = True
    estimate: PredictionType = "x0"


@dataclass(frozen=True, eq=False, kw_only=True)
class StepTable(Coefficients):
    """One row for each evaluation of a model, columns float64 ``[N]`` and read-only.

        x' = A x + B D + C D1 + E D2 + F D3 + Y y + S z
        y' = YX x + YY y + YB D + YC D1 + YE D2 + YF D3      where one of these is not 0; else y stays

    ``D`` is the model's ``estimate``: of the clean latent (``x0``), of the noise (``eps``) or of the velocity (``v``,
    arXiv 2202.00512). Before row ``i`` the latent is ``x = a[i] x0 + s[i] eps``, after the last ``a_end x0 + s_end
    eps``. ``ends`` ``(a, s)``: the levels where rows end, if that is not where the next row begins.

    Raises ``BadInput`` unless

    - every column has the same length, is finite, and the noise ``s / a`` falls from row to row; two rows may begin at
      one level if one of them repeats a step from ``y``, or the first changes nothing;
    - no row reads an estimate from before the first row, or a ``y`` that no row has written;
    - ``keeps_mean``: with exact estimates, each row lands on the next signal level: for ``x0`` estimates
      ``A a + Y a_y + B + C + E + F = a'``, where ``y = a_y x0 + s_y eps`` is followed from row to row;
    - ``keeps_variance``: each row lands on the next noise level: ``(A s + Y s_y)^2 + S^2 = s'^2``. With estimates of
      the noise the terms of ``B, C, E, F`` count here instead of there.
    """

    solver: SolverOptions  # with every default filled in
    t: Array  # timestep the member is given, may be fractional
    c_in: Array  # factor on the latent before the member sees it
    a: Array
    s: Array
    a_end: float
    s_end: float
    init_scale: float  # factor on the unit Gaussian noise at the start
    ends: tuple[Array, Array] | None = None

    def __post_init__(self) -> None:
        for name in COLUMNS:
            given = getattr(self, name)
            column = np.zeros(np.shape(self.t)) if given is _NONE else np.array(given, dtype=np.float64)
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        shapes = {name: getattr(self, name).shape for name in COLUMNS}
        if self.ends is not None:
            shapes |= {f"ends of {name}": end.shape for name, end in zip("as", self.ends, strict=True)}
        if self.t.ndim != 1 or self.t.size == 0 or len(set(shapes.values())) != 1:
            self._refuse(f"its columns have the shapes {shapes}; allowed is one length of 1 or more")
        for name in COLUMNS:
            self._require(np.isfinite(getattr(self, name)), f"column {name} is not finite")
        ends = np.array([self.a_end, self.s_end, self.init_scale])
        if not np.isfinite(ends).all() or self.a_end <= 0 or self.s_end < 0 or self.init_scale <= 0:
            self._refuse(f"a_end, s_end, init_scale are {ends}")
        self._require((self.a >= 0) & (self.s > 0) & (self.c_in > 0) & (self.S >= 0), "a, s, c_in or S is out of range")
        self._require(self.log_std_min <= self.log_std_max, "log_std_min is above log_std_max")
        self._check_levels()
        self._check_memory()
        self._check_landing()

    def _check_levels(self) -> None:
        levels = np.append(self.sigma, self.s_end / self.a_end)
        falls = levels[1:] < levels[:-1]
        falls[-1] |= levels[-1] == levels[-2]  # a trajectory may end at the level of its last step: a step that rests
        others = sum(np.abs(column) for column in (self.B, self.C, self.E, self.F, self.S))
        again, rests = (self.A == 0) & (self.Y != 0), (self.A == 1) & (others == 0) & (self.Y == 0)
        falls[:-1] |= (levels[1:-1] == levels[:-2]) & ((again | rests)[:-1] | again[1:])
        self._require(falls, "the noise does not fall")
        if self.ends is not None:
            a, s = self.ends
            self._require(
                np.isfinite(a) & np.isfinite(s) & (a > 0) & (s >= 0) & (s * self.a <= self.s * a),
                "a row does not end at less noise than it begins with",
            )

    def _check_memory(self) -> None:
        for back, names in enumerate((("C", "YC"), ("E", "YE"), ("F", "YF")), 1):
            if any((getattr(self, name)[:back] != 0).any() for name in names):
                self._refuse("its first rows read estimates that don't exist yet")
        written = np.logical_or.accumulate(np.append(False, self.writes_y[:-1]))
        self._require(((self.Y == 0) & (self.YY == 0)) | written, "y is read before a row has written it,")

    def _check_landing(self) -> None:
        if not (self.keeps_mean or self.keeps_variance):
            return
        a_next, s_next = self._ends()
        estimates = (self.B, self.C, self.E, self.F)
        of_y = (self.YB, self.YC, self.YE, self.YF)
        clean = float(self.estimate == "x0")  # what an exact estimate is: clean x0 + (1 - clean) eps
        a_y, s_y = self._follow_y(self.a, clean, of_y), self._follow_y(self.s, 1 - clean, of_y)
        if self.keeps_mean:
            terms = (self.A * self.a, self.Y * a_y, *(clean * column for column in estimates))
            size = sum(np.abs(term) for term in terms)
            self._require(
                np.abs(sum(terms) - a_next) <= _CLOSE * np.maximum(size, a_next),
                "where it lands is not the next signal level",
            )
        if self.keeps_variance:
            terms = (self.A * self.s, self.Y * s_y, *((1 - clean) * column for column in estimates))
            size = sum(np.abs(term) for term in terms) ** 2
            self._require(
                np.abs(sum(terms) ** 2 + self.S**2 - s_next**2) <= _CLOSE * np.maximum(size, s_next**2),
                "where it lands is not the next noise level",
            )

    def _ends(self) -> tuple[Array, Array]:
        if self.ends is not None:
            return self.ends
        return np.append(self.a[1:], self.a_end), np.append(self.s[1:], self.s_end)

    def _follow_y(self, level: Array, exact: float, of_y: tuple[Array, ...]) -> Array:
        """One part of ``y`` before each row (signal or noise), from that part of ``x`` and of an exact estimate."""
        found, now = np.zeros(self.steps), 0.0
        added = exact * sum(of_y) + self.YX * level
        for row in range(self.steps):
            found[row] = now
            if self.writes_y[row]:
                now = float(added[row] + self.YY[row] * now)
        return found

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
        """Noise over signal ``s / a`` before each step, float64 ``[N]``; infinite where there is no signal."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.s / self.a)

    @property
    def history(self) -> int:
        """How many estimates of earlier rows some row reads: 0 to 3."""
        read = [(self.C != 0) | (self.YC != 0), (self.E != 0) | (self.YE != 0), (self.F != 0) | (self.YF != 0)]
        return max((back for back, rows in enumerate(read, 1) if rows.any()), default=0)

    @property
    def writes_y(self) -> NDArray[np.bool_]:
        """Which rows write ``y``, bool ``[N]``."""
        return np.asarray(np.any([getattr(self, name) != 0 for name in Y_COLUMNS], axis=0))

    def clean_estimate(self, row: int) -> tuple[float, float]:
        """``(p, q)`` for a preview after ``row``: the clean latent is about ``p x' + q D``.

        Exact for DDIM steps, and close where a solver extrapolates ``D``.
        """
        a, s = (end[row : row + 1] for end in self._ends())
        p, q = coefficients(self.estimate, a, s)
        return float(p[0]), float(q[0])
