"""Members trained by other conventions in one trajectory. The oracle: where the data are Gaussian the ideal denoiser is
known in closed form, so members of any schedule, scaling and prediction type must say the very same thing.
"""

from __future__ import annotations

import logging

import msgspec
import numpy as np
import pytest

from support.manifests import manifest, member
from support.reference import walk
from tstitch_engines.bundle.manifest import Manifest, NoiseScheduleSpec
from tstitch_engines.device.step_row import ROW
from tstitch_engines.errors import BadInput, BadSchedule
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.solvers import SOLVERS
from tstitch_trt.solvers.noise_schedule import NoiseSchedule, signal_and_noise
from tstitch_trt.solvers.prediction import coefficients

SCALED = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
WITHOUT_SIGNAL = msgspec.structs.replace(SCALED, zero_terminal_snr=True)
_rng = np.random.default_rng(5)
# away from both ends of the schedules, beyond which a member is told its own noisiest or cleanest timestep
TIMESTEPS = np.linspace(850, 60, 12).round().tolist()
MEAN, VARIANCE = _rng.normal(size=(1, 4, 3, 3)), _rng.uniform(0.1, 2.0, size=(1, 4, 3, 3))  # of the bundle's latent


def stitched(ratio: float, kind: str, own: NoiseScheduleSpec | None) -> Manifest:
    other = msgspec.structs.replace(member(parametrisation=kind), noise=own, latent_ratio=ratio)
    return manifest({"base": member(), "other": other}, noise=SCALED)


def ideal(
    pair: Manifest, name: str, sample: np.ndarray, t: float, *, known: bool = False, trace: bool = False
) -> np.ndarray:
    """What member ``name`` answers: the mean of its Gaussian given the noisy ``sample``, in its own terms.

    ``known``: a Gaussian without variance. ``trace``: it takes the last timestep for one with a trace of signal.
    """
    own = pair.members[name]
    ratio, noise = own.latent_ratio, NoiseSchedule.from_spec(own.noise or pair.noise)
    a, s = signal_and_noise((noise.with_signal() if trace else noise).sigma_at(t))
    mean, variance = ratio * MEAN, ratio**2 * VARIANCE * (not known)
    estimate = (mean * s**2 + variance * a * sample) / (a**2 * variance + s**2)
    p, q = coefficients(own.parametrisation, a, s)
    return np.asarray((estimate - p * sample) / q) if own.parametrisation != "x0" else estimate


def trajectory(pair: Manifest, schedule: str, **settings: object) -> np.ndarray:
    plan = make_plan(pair, timesteps=TIMESTEPS, schedule=schedule, guidance=1.0, **settings)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(2, 4, 3, 3)), rng.normal(size=(12, 2, 4, 3, 3))

    def model(sample: np.ndarray, t: float, step: int) -> np.ndarray:
        return ideal(pair, plan.schedule.names[step], sample, t)

    return walk(plan.rows, plan.init_scale * x, model, noise)


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp-2m", "ddpm"])
@pytest.mark.parametrize(
    ("ratio", "kind", "own"),
    [
        (1.0, "v", None),
        (1.4, "eps", None),
        (0.7, "v", None),
        (1.0, "x0", NoiseScheduleSpec(kind="linear")),
        (0.18215 / 0.13025, "v", NoiseScheduleSpec(kind="squared-cosine")),
        (1.0, "v", WITHOUT_SIGNAL),
        (1.4, "x0", WITHOUT_SIGNAL),
        (1.4, "eps", NoiseScheduleSpec(kind="linear", steps=500, beta_start=2e-4, beta_end=0.04)),
    ],
)
def test_ideal_members_of_any_convention_walk_one_trajectory(
    ratio: float, kind: str, own: NoiseScheduleSpec | None, solver: str
) -> None:
    pair = stitched(ratio, kind, own)
    alone = trajectory(pair, "base", solver=solver)
    for schedule in ("base:5,other", "base:3,other:4,base"):
        mixed = trajectory(pair, schedule, solver=solver)
        np.testing.assert_allclose(mixed, alone, atol=2e-6 * np.abs(alone).max())


def test_equal_conventions_give_the_very_same_rows() -> None:
    plain = make_plan(stitched(1.0, "v", None), steps=12, schedule="base:5,other")
    stated = make_plan(stitched(1.0, "v", SCALED), steps=12, schedule="base:5,other")
    np.testing.assert_array_equal(plain.rows, stated.rows)
    np.testing.assert_array_equal(plain.rows[:, ROW["T"]], plain.table.t)
    np.testing.assert_array_equal(plain.rows[:, ROW["C_IN"]], plain.table.c_in)


def test_steps_noisier_than_the_training_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = make_plan(stitched(1.4, "eps", None), steps=12, schedule="other:2,base", guidance=1.0)
    assert (
        "member 'other': step 0 begins with sigma of up to 20.46 in its own latent; it was trained with up to 14.61"
        in caplog.text
    )
    assert plan.rows[0, ROW["T"]] == 999
    mild = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.0001, beta_end=0.002)
    with caplog.at_level(logging.WARNING):
        plan = make_plan(stitched(1.0, "eps", mild), steps=12, schedule="other:8,base", guidance=1.0)
    assert (
        "steps 0 to 6 begin with sigma of up to 14.61 in its own latent; it was trained with up to 1.157" in caplog.text
    )
    assert plan.rows[:7, ROW["T"]].tolist() == [999] * 7


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "dpmpp-2m", "unipc"])
@pytest.mark.parametrize(
    ("ratio", "kind", "own"),
    [
        (1.0, "eps", SCALED),
        (1.0, "v", SCALED),
        (1.4, "eps", SCALED),
        (1.0, "x0", NoiseScheduleSpec(kind="linear")),
        (0.7, "v", None),
    ],
)
def test_members_of_the_usual_noise_begin_without_signal(
    solver: str, ratio: float, kind: str, own: NoiseScheduleSpec | None
) -> None:
    """A member that knows the picture for sure tells it at any timestep, so what is read is what was told."""
    other = msgspec.structs.replace(member(parametrisation=kind), noise=own, latent_ratio=ratio)
    pair = manifest({"base": member(parametrisation="v"), "other": other}, noise=WITHOUT_SIGNAL)
    found = []
    for schedule in ("other:6,base", "base"):
        plan = make_plan(pair, steps=12, spacing="trailing", schedule=schedule, solver=solver, guidance=1.0)
        assert plan.rows[0, ROW["T"]] > 998
        rng = np.random.default_rng(1)
        x, noise = rng.normal(size=(2, 4, 3, 3)), rng.normal(size=(12, 2, 4, 3, 3))

        def model(sample: np.ndarray, t: float, step: int, names: tuple[str, ...] = plan.schedule.names) -> np.ndarray:
            return ideal(pair, names[step], sample, t, known=True, trace=not SOLVERS[solver].from_zero_signal)

        found.append(walk(plan.rows, plan.init_scale * x, model, noise))
    np.testing.assert_allclose(found[0][1:], found[1][1:], atol=1e-9 * np.abs(found[1][1:]).max())


def test_a_prediction_of_the_noise_can_not_begin_without_signal() -> None:
    pair = manifest({"small": member(), "large": member(parametrisation="v")}, noise=WITHOUT_SIGNAL)
    with pytest.raises(BadSchedule, match=r"member 'small' predicts the noise.* at step 0 \(timestep 999\)") as error:
        make_plan(pair, steps=10, spacing="trailing", schedule="small:0.4,large")
    assert error.value.hint is not None
    assert "spacing 'leading'" in error.value.hint
    make_plan(pair, steps=10, spacing="trailing", schedule="large:1,small:3,large")
    make_plan(pair, steps=10, spacing="leading", schedule="small:0.4,large")
    assert make_plan(pair, steps=10, spacing="trailing", solver="euler").rows[0, ROW["Q"]] == pytest.approx(-4096)


def test_a_learned_variance_can_not_be_adapted() -> None:
    learned = msgspec.structs.replace(member(learned=True), latent_ratio=1.1)
    pair = manifest({"base": member(learned=True), "other": learned})
    with pytest.raises(BadInput, match="member 'other' learned its own"):
        make_plan(pair, solver="ddpm", variance="learned", schedule="base:5,other")
    make_plan(pair, solver="ddpm", variance="learned", schedule="base")


def test_a_trajectory_entered_from_a_picture_starts_its_history_there() -> None:
    entered = make_plan(manifest(), steps=10, solver="dpmpp-2m", start=4)
    assert entered.rows[4, ROW["C"]] == 0
    assert entered.rows[5, ROW["C"]] != 0
