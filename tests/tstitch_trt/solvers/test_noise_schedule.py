"""Noise schedules against diffusers' alphas, and the invariants of sigma <-> timestep."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.bundle.noise import NOISE_KINDS
from tstitch_engines.errors import BadInput
from tstitch_trt.solvers.noise_schedule import NoiseSchedule

specs = st.builds(
    lambda kind, steps, ends: NoiseScheduleSpec(kind=kind, steps=steps, beta_start=min(ends), beta_end=max(ends)),
    st.sampled_from(sorted({*NOISE_KINDS} - {"betas"})),
    st.integers(1, 300),
    st.tuples(st.floats(1e-5, 0.05), st.floats(1e-5, 0.05)),
)


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [("linear", "linear"), ("scaled-linear", "scaled_linear"), ("squared-cosine", "squaredcos_cap_v2")],
)
@pytest.mark.parametrize("steps", [1000, 250])
def test_alphas_are_those_of_diffusers(kind: str, theirs: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    fields = {"kind": kind, "steps": steps, "beta_start": 0.00085, "beta_end": 0.012}
    spec = msgspec.convert(fields, NoiseScheduleSpec)
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=theirs, num_train_timesteps=steps, beta_start=spec.beta_start, beta_end=spec.beta_end
    )
    ours = NoiseSchedule.from_spec(spec)
    # float32 betas: 6e-8 for each factor of the product, and 3e-5 in the clipped 1 - 0.999 of the last cosine step
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy()[:-1], ours.alphas_cumprod[:-1], rtol=3e-5)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy()[-1], ours.alphas_cumprod[-1], rtol=1e-4)


def test_noise_of_older_manifests_has_its_signal() -> None:
    spec = msgspec.json.decode(
        b'{"kind":"linear","steps":1000,"beta_start":0.0001,"beta_end":0.02}', type=NoiseScheduleSpec
    )
    assert spec == NoiseScheduleSpec(kind="linear")


def test_linear_is_ddpms() -> None:
    """arXiv 2006.11239, section 4: beta from 1e-4 to 0.02 over 1000 steps leaves sqrt(abar_T) = 0.00635."""
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec(kind="linear"))
    assert schedule.steps == 1000
    assert schedule.alphas_cumprod[0] == pytest.approx(1 - 1e-4, rel=1e-15)
    assert np.sqrt(schedule.alphas_cumprod[-1]) == pytest.approx(0.00635, rel=1e-3)


@given(specs)
def test_noise_rises_and_timesteps_come_back(spec: NoiseScheduleSpec) -> None:
    schedule = NoiseSchedule.from_spec(spec)
    assert schedule.alphas_cumprod.shape == schedule.sigmas.shape == (spec.steps,)
    assert (np.diff(schedule.sigmas) > 0).all()
    np.testing.assert_allclose(schedule.sigma_at(np.arange(spec.steps)), schedule.sigmas, rtol=1e-12)
    t = np.linspace(0, spec.steps - 1, 37)
    np.testing.assert_allclose(schedule.timestep_of(schedule.sigma_at(t)), t, atol=1e-6 * spec.steps)


def test_timestep_of_agrees_with_diffusers_between_timesteps() -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec(kind="linear"))
    sigma = np.exp(np.linspace(np.log(0.02), np.log(150), 23))
    theirs = diffusers.EulerDiscreteScheduler()._sigma_to_t(sigma, np.log(schedule.sigmas))
    np.testing.assert_allclose(schedule.timestep_of(sigma), theirs, rtol=1e-10)


def test_out_of_range_sigmas_are_clipped() -> None:
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec(kind="linear"))
    np.testing.assert_array_equal(schedule.timestep_of([1e-6, 1e6]), [0, 999])


@pytest.mark.parametrize(
    "spec",
    [
        {"steps": 0},
        {"kind": "betas"},
        {"betas": (0.1,)},
        {"beta_start": 0.03},
        {"beta_start": -0.1},
        {"beta_end": 1.0},
        {"beta_end": float("nan")},
    ],
)
def test_impossible_specs_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"are usual|set noise\.kind"):
        NoiseSchedule.from_spec(NoiseScheduleSpec(**{"kind": "linear", **spec}))


@pytest.mark.parametrize(
    "values",
    [[], [[0.9]], [0.9, 0.9], [0.5, 0.6], [1.0, 0.5], [0.5, 0.0, 0.0], [0.5, -0.1], [0.0], [0.5, float("nan")]],
)
def test_arrays_that_are_no_noise_schedule_are_refused(values: list[float]) -> None:
    with pytest.raises(BadInput, match="allowed"):
        NoiseSchedule(np.array(values))


@pytest.mark.parametrize("beta", [1e-300, 0.999])
@pytest.mark.parametrize("zero", [False, True])
def test_specs_that_are_no_noise_schedule_are_refused(beta: float, zero: bool) -> None:
    spec = NoiseScheduleSpec(kind="linear", beta_start=beta, beta_end=beta, zero_terminal_snr=zero)
    with pytest.raises(BadInput, match="is not a noise schedule"):
        NoiseSchedule.from_spec(spec)


def test_it_cannot_be_changed() -> None:
    schedule = NoiseSchedule.from_spec(NoiseScheduleSpec(kind="linear"))
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5
