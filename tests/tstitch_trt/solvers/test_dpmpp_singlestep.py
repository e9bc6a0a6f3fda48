"""DPM-Solver++ in single steps beside diffusers' scheduler, and beside the algorithm as U-ViT's code runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.denoiser import draw, member, rows_for
from support.diffusers_trajectory import compare
from support.reference import walk
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.bundle.scheduler_config import read_scheduler
from tstitch_engines.errors import BadInput
from tstitch_trt.solvers import SolverOptions, make_table
from tstitch_trt.solvers.noise_schedule import NoiseSchedule

diffusers = pytest.importorskip("diffusers")

# diffusers calls np.array on tensors, which NumPy 2 wants spelled otherwise
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def both(config: dict[str, Any], steps: int, kind: str = "eps") -> tuple[Any, Any]:
    """diffusers' scheduler of this configuration, and the table of what ours reads in it."""
    config = {**LATENT, "prediction_type": KINDS[kind], **config}
    found = read_scheduler({"_class_name": "DPMSolverSinglestepScheduler", **config})
    scheduler = diffusers.DPMSolverSinglestepScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    options = SolverOptions.parse(found.solver, {**found.options})
    spacing = {} if "sigmas" in found.options else {"spacing": found.spacing}
    return scheduler, make_table(options, NoiseSchedule.from_spec(found.noise), steps, **spacing)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 18, 19, 20])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("formula", ["midpoint", "heun"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_equals_diffusers(order: int, formula: str, final: str, steps: int) -> None:
    for lower in (False, True):
        config = {"solver_order": order, "solver_type": formula, "final_sigmas_type": final, "lower_order_final": lower}
        scheduler, table = both(config, steps)
        compare(table, scheduler, "eps", relative=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"timestep_spacing": "trailing"}], ids=str
)
def test_sigmas_equal_diffusers(config: dict[str, Any], kind: str) -> None:
    """The class has no ``timestep_spacing``: one that another class left in the configuration changes nothing."""
    scheduler, table = both({**config, "solver_order": 3}, 20, kind)
    theirs = scheduler.timesteps.numpy()  # of exponential sigmas the first is 998: float32 falls below 999
    assert np.abs(theirs - table.t).max() <= ("use_exponential_sigmas" in config)
    compare(table, scheduler, kind, t=theirs, seen=table.t, relative=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"algorithm_type": "dpmsolver"}, "algorithm_type"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_refusals(config: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read_scheduler({"_class_name": "DPMSolverSinglestepScheduler", **config})


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 25, 48, 50])
def test_the_papers_algorithm(steps: int) -> None:
    """DPM-Solver++ "fast" as U-ViT samples: blocks of order 3, one of order 2 or 1 or both at the end, at uniform
    times from 1 to 1/N, each block by the published formulas (arXiv 2206.00927, appendix; 2211.01095, eq. 8 ff.)."""
    noise = NoiseSchedule.from_spec(NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012))
    table = make_table("dpmpp-3s", noise, steps, spacing="uniform", final="sigma-min", middle="paper")
    np.testing.assert_allclose(table.t, np.linspace(999, 0, steps + 1)[:-1])
    a, s = np.append(table.a, table.a_end), np.append(table.s, table.s_end)
    lam = np.log(a / s)
    x, _ = draw(steps)
    ours = walk(rows_for("x0", table), x, member("x0", table), np.zeros((steps, *x.shape)))

    def model(z: Any, i: int) -> Any:
        return member("x0", table)(z, table.t[i], i)

    blocks = {0: [3] * (steps // 3 - 1) + [2, 1], 1: [3] * (steps // 3) + [1], 2: [3] * (steps // 3) + [2]}[steps % 3]
    i = 0
    for order in blocks:
        h = lam[i + order] - lam[i]
        m0 = model(x, i)

        def reach(to: int, start: Any = x, i: int = i, m0: Any = m0) -> Any:  # order 1
            return s[to] / s[i] * start - a[to] * np.expm1(lam[i] - lam[to]) * m0

        if order > 1:
            r1 = (lam[i + 1] - lam[i]) / h
            m1 = model(reach(i + 1), i + 1)
        if order == 1:
            x = reach(i + 1)
        elif order == 2:
            x = reach(i + 2) - a[i + 2] * np.expm1(-h) / (2 * r1) * (m1 - m0)
        else:
            r2 = (lam[i + 2] - lam[i]) / h
            middle = reach(i + 2) + r2 / r1 * a[i + 2] * (np.expm1(-r2 * h) / (r2 * h) + 1) * (m1 - m0)
            m2 = model(middle, i + 2)
            x = reach(i + 3) + a[i + 3] / r2 * (np.expm1(-h) / h + 1) * (m2 - m0)
        i += order
        np.testing.assert_allclose(ours[i], x, rtol=1e-8, atol=1e-9)
    assert i == steps
