"""What a member is given and what its output means, where it was trained by other conventions than the bundle's.

A member's latent is ``x0_m = r x0`` (``Member.latent_ratio``), its noise schedule may be its own (``Member.noise``).
A solver's latent ``x = a x0 + s eps`` has the noise level ``sigma = s / a``. As ``r x / a = x0_m + (r sigma) eps``, the
member meets it at ``sigma_m = r sigma``: it wants its own timestep of that level and a unit-variance sample,

    C_IN = r a_m / a     with a_m = 1 / sqrt(1 + sigma_m^2), s_m = a_m sigma_m
    D    = (p_m C_IN x + q_m m) / r     with (p_m, q_m) the member's prediction type at (a_m, s_m)

A step may be noisier than the noisiest level of a member's training. There it is told its last timestep, and ``(p_m,
q_m)`` are those of that level, since its output rests on what it is told: its own pipelines begin like that too, with
pure noise at a timestep that has some signal. A ratio of two latent scalings moves the first steps there (SD in SDXL's
latent: 1.4), and so does zero terminal SNR.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadSchedule
from tstitch_trt.solvers import StepTable
from tstitch_trt.solvers.noise_schedule import NoiseSchedule, signal_and_noise
from tstitch_trt.solvers.prediction import coefficients, of_estimate

__all__ = ["Columns", "is_adapted", "member_columns"]

Array = NDArray[np.float64]

_EXACT = 1.001  # what is less far above a member's noisiest level is a rounding

_log = logging.getLogger(__name__)


class Columns(NamedTuple):
    """Of some steps, float64 ``[K]`` each: the timestep the member is given, ``C_IN``, ``P`` and ``Q``."""

    t: Array
    c_in: Array
    p: Array
    q: Array


def is_adapted(manifest: Manifest, name: str) -> bool:
    """Whether member ``name`` has conventions of its own."""
    member = manifest.members[name]
    return member.latent_ratio != 1 or (member.noise is not None and member.noise != manifest.noise)


def member_columns(manifest: Manifest, name: str, table: StepTable, mine: NDArray[np.bool_]) -> Columns:
    """The columns of member ``name`` for the steps ``mine`` (bool ``[N]``) of ``table``.

    Raises ``BadSchedule`` for a step without signal on a member that predicts the noise.
    """
    member = manifest.members[name]
    kind, steps = member.parametrisation, np.flatnonzero(mine)
    a, s = table.a[mine], table.s[mine]
    if not is_adapted(manifest, name):
        _check_signal(name, kind, table, steps[a == 0])
        return Columns(table.t[mine], table.c_in[mine], *coefficients(kind, a, s, estimate=table.estimate))
    own = NoiseSchedule.from_spec(member.noise or manifest.noise)
    ratio, most = member.latent_ratio, float(own.sigmas[-1])
    sigma = ratio * table.sigma[mine]
    _warn_above(name, steps, sigma, most)
    told = np.minimum(sigma, most)
    _check_signal(name, kind, table, steps[np.isinf(told)])
    p, q = coefficients(kind, *signal_and_noise(told))
    c_in = ratio / np.hypot(a, ratio * s)
    t = own.with_signal().timestep_of(sigma)
    return Columns(t, c_in, *of_estimate(table.estimate, p * c_in / ratio, q / ratio, a, s))


def _warn_above(name: str, steps: NDArray[np.int64], sigma: Array, most: float) -> None:
    above = steps[sigma > _EXACT * most]
    if above.size:
        which = f"step {above[0]} begins" if above.size == 1 else f"steps {above[0]} to {above[-1]} begin"
        level = f"sigma of up to {sigma[0]:.4g} in its own latent" if np.isfinite(sigma[0]) else "pure noise"
        _log.warning(
            "member %r: %s with %s; it was trained with up to %.4g and is told its noisiest timestep there",
            name, which, level, most,
        )  # fmt: skip


def _check_signal(name: str, kind: str, table: StepTable, without: NDArray[np.int64]) -> None:
    """``without``: the steps that begin without any signal."""
    if kind == "eps" and without.size:
        raise BadSchedule(
            f"member {name!r} predicts the noise (eps), which says nothing of the picture at step {without[0]} "
            f"(timestep {table.t[without[0]]:g}), where there is no signal: the noise schedule has zero terminal SNR",
            hint="run a member that predicts v or x0 there, or begin at less noise, as the spacing 'leading' does",
        )
