"""What a member is given and what its output means, where it was trained by other conventions than the bundle's.

A member's latent is ``x0_m = r x0`` (``Member.latent_ratio``), its noise schedule may be its own (``Member.noise``).
A solver's latent ``x = a x0 + s eps`` has the noise level ``sigma = s / a``. As ``r x / a = x0_m + (r sigma) eps``, the
member meets it at ``sigma_m = r sigma``: it wants its own timestep of that level and a unit-variance sample,

    C_IN = r a_m / a     with a_m = 1 / sqrt(1 + sigma_m^2), s_m = a_m sigma_m
    D    = (p_m C_IN x + q_m m) / r     with (p_m, q_m) the member's prediction type at (a_m, s_m)
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadSchedule
from tstitch_trt.solvers import StepTable
from tstitch_trt.solvers.noise_schedule import NoiseSchedule
from tstitch_trt.solvers.prediction import coefficients, of_estimate

__all__ = ["Columns", "is_adapted", "member_columns"]

Array = NDArray[np.float64]

# How far above the noisiest level of a member's training a step may lie: there it is told its noisiest timestep. A
# ratio of two latent scalings moves the first steps there (SD in SDXL's latent: 1.4), where hardly any signal is left.
_REACH = 2.0
_EXACT = 1.001

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

    Raises ``BadSchedule`` for a step far noisier than anything the member was trained on.
    """
    member = manifest.members[name]
    a, s = table.a[mine], table.s[mine]
    if not is_adapted(manifest, name):
        return Columns(
            table.t[mine], table.c_in[mine], *coefficients(member.parametrisation, a, s, estimate=table.estimate)
        )
    ratio = member.latent_ratio
    own = NoiseSchedule.from_spec(member.noise or manifest.noise)
    sigma = ratio * s / a
    _check_reach(name, np.flatnonzero(mine), sigma, float(own.sigmas[-1]))
    signal = 1 / np.hypot(1.0, sigma)
    p, q = coefficients(member.parametrisation, signal, signal * sigma)
    c_in = ratio * signal / a
    return Columns(own.timestep_of(sigma), c_in, *of_estimate(table.estimate, p * c_in / ratio, q / ratio, a, s))


def _check_reach(name: str, steps: NDArray[np.int64], sigma: Array, most: float) -> None:
    if not sigma.size or sigma[0] <= _EXACT * most:  # the noise falls from step to step
        return
    if sigma[0] > _REACH * most:
        fitting = np.flatnonzero(sigma <= most)
        later = f"from step {steps[fitting[0]]} on" if fitting.size else "at less noisy steps"
        raise BadSchedule(
            f"member {name!r} runs at step {steps[0]}, whose noise level is {sigma[0]:.4g} in its own latent; it was "
            f"trained on levels up to {most:.4g}",
            hint=f"run it {later}, and another member before",
        )
    _log.warning(
        "member %r: step %d has the noise level %.4g in its own latent, above the %.4g of its training: "
        "it is told its noisiest timestep",
        name,
        steps[0],
        sigma[0],
        most,
    )
