"""Plans: what the kernels will read, decided before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.manifests import manifest, member
from tstitch_engines.bundle.manifest import Conditioning, Defaults
from tstitch_engines.device.step_row import FLAG_LEARNED, ROW
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.plan.step_rows import reads_before
from tstitch_trt.solvers import SolverOptions


def column(plan, name: str) -> np.ndarray:  # type: ignore[no-untyped-def]
    return plan.rows[:, ROW[name]]


def test_defaults_come_from_the_bundle() -> None:
    plan = make_plan(manifest(defaults=Defaults(steps=20, guidance=2.0, schedule="small:0.25,large")))
    assert plan.steps == 20
    assert plan.schedule.names.count("small") == 5
    assert plan.guided == (True,) * 20
    assert plan.solver.name == "ddim"
    assert plan.solver.spacing == "dit"
    assert not plan.rows.flags.writeable


def test_each_member_keeps_its_own_prediction_type() -> None:
    """An eps member and a v member meet in one trajectory: D = p x + q m must be x0 for both."""
    plan = make_plan(manifest(), steps=10, fraction=0.5)
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=2)
    for i, name in enumerate(plan.schedule.names):
        a, s = plan.table.a[i], plan.table.s[i]
        x = a * x0 + s * noise
        m = noise if name == "small" else a * noise - s * x0
        np.testing.assert_allclose(column(plan, "P")[i] * x + column(plan, "Q")[i] * m, x0, rtol=1e-6)


def test_guidance_per_member_segment_and_interval() -> None:
    plan = make_plan(manifest(), steps=10, fraction=0.4, guidance={"large": 4.0})
    assert column(plan, "G").tolist() == [1.0] * 4 + [4.0] * 6
    assert plan.guided == (False,) * 4 + (True,) * 6
    plan = make_plan(manifest(), steps=10, schedule="small:0.4:g=1.5,large", guidance=4.0)
    assert column(plan, "G").tolist() == [1.5] * 4 + [4.0] * 6
    plan = make_plan(manifest(), steps=10, fraction=0.4, guidance=3.0, guidance_interval=(2, 5))
    assert plan.guided == tuple(2 <= i < 5 for i in range(10))
    assert column(plan, "GUIDED_CHANNELS").tolist() == [4.0] * 10
    assert column(make_plan(manifest(), guidance=2.0, guided_channels=3), "GUIDED_CHANNELS")[0] == 3


def test_history_is_kept_across_a_switch_or_reset() -> None:
    kept = make_plan(manifest(), steps=10, solver="dpmpp-2m", fraction=0.4)
    reset = make_plan(manifest(), steps=10, solver="dpmpp-2m", fraction=0.4, history="reset")
    assert column(kept, "C")[4] != 0
    assert column(reset, "C")[4] == 0
    assert column(reset, "C")[5] != 0
    same = [i for i in range(10) if i != 4]
    np.testing.assert_array_equal(kept.rows[same][:, [ROW["A"], ROW["C"]]], reset.rows[same][:, [ROW["A"], ROW["C"]]])


def test_a_restart_forgets_a_kept_latent_too() -> None:
    """Of equal steps in log sigma the middle row of ``dpmpp-2s`` reads the latent before it, and no estimate."""
    options = {"sigmas": "exponential", "sigma_max": 8.0, "sigma_min": 0.125, "final": "sigma-min"}
    settings: dict[str, Any] = {"steps": 3, "solver": "dpmpp-2s", "solver_options": options}
    assert column(make_plan(manifest(), **settings), "Y")[1] != 0
    assert not reads_before(make_plan(manifest(), **settings, start=1).rows, 1)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m"])
def test_a_start_outside_the_trajectory_is_refused(solver: str) -> None:
    with pytest.raises(BadInput, match=r"start 10 \(start_step of a request\) is outside 0\.\.9"):
        make_plan(manifest(), steps=10, solver=solver, start=10)


def test_learned_variance_is_read_where_it_exists() -> None:
    both = manifest({"small": member(learned=True), "large": member(learned=True)})
    plan = make_plan(both, steps=10, solver="ddpm", variance="learned")
    assert (column(plan, "FLAGS")[:-1].astype(int) & FLAG_LEARNED).all()
    with pytest.raises(BadInput, match="has none"):
        make_plan(manifest(), steps=10, solver="ddpm", variance="learned")


def test_solver_options_in_every_form_agree() -> None:
    a = make_plan(manifest(), steps=10, solver="ddim", eta=0.5, spacing="trailing")
    b = make_plan(manifest(), steps=10, solver=SolverOptions(name="ddim", eta=0.5, spacing="trailing"))
    c = make_plan(manifest(), steps=10, solver="ddim", solver_options={"eta": 0.5, "spacing": "trailing"})
    np.testing.assert_array_equal(a.rows, b.rows)
    np.testing.assert_array_equal(a.rows, c.rows)
    d = make_plan(manifest(), timesteps=[900, 500, 100])
    assert d.table.t.tolist() == [900, 500, 100]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "dimm"}, "unknown solver 'dimm'"),
        ({"fraction": 1.5}, "fraction 1.5 is outside 0..1"),
        ({"fraction": 0.4, "schedule": "small:0.4,large"}, "both fraction"),
        ({"guidance": float("nan")}, "guidance is nan; allowed is a number"),
        ({"guidance": -1.0}, "guidance -1"),
        ({"guidance": {"lrage": 2.0}}, "unknown member 'lrage'"),
        ({"guidance": 2.0, "guidance_rescale": 1.5}, "rescale"),
        ({"guidance": 2.0, "guidance_interval": (3, 80)}, "3:80 is outside the 50 steps"),
        ({"guided_channels": 5, "guidance": 2.0}, "guided_channels 5 is outside 1..4"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"eta": 0.5, "solver": "dpmpp-2m"}, "does not use eta"),
        ({"history": "forget"}, "unknown history"),
        ({"spacing": "trialing"}, "unknown spacing"),
    ],
)
def test_bad_settings_name_value_and_way_out(settings: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        make_plan(manifest(), **settings)  # type: ignore[arg-type]
    assert words in caught.value.message
    assert caught.value.hint


def test_guidance_without_a_null_class_is_refused() -> None:
    with pytest.raises(BadInput, match="without a null class"):
        make_plan(manifest(conditioning=Conditioning(classes=10, null=None)), guidance=2.0)


def test_unknown_solver_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'dpmpp-2m'"):
        make_plan(manifest(), solver="dpmpp-2mm")


def test_history_of_a_solver_that_keeps_none_is_refused() -> None:
    with pytest.raises(BadInput, match="history='reset' would be ignored: solver 'euler' keeps no estimates"):
        make_plan(manifest(), solver="euler", steps=10, fraction=0.4, history="reset")
    assert make_plan(manifest(), solver="euler", steps=10, fraction=0.4, history="keep").steps == 10


def test_defaults_of_a_bundle_that_what_was_said_makes_idle_are_left_out() -> None:
    usual = Defaults(solver="dpmpp-3m-sde", solver_options={"second_order": "heun", "euler_at_final": True})
    bundle = manifest(defaults=usual)
    assert make_plan(bundle, steps=10, solver_options={"final": "sigma-min"}).solver.euler_at_final is True
    solver = make_plan(bundle, steps=10, solver_options={"variant": "k-diffusion"}).solver
    assert (solver.second_order, solver.euler_at_final) == (None, None)
