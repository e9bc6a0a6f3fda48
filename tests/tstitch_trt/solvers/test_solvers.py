"""Step tables: what must hold of every row, multistep history, members that share a trajectory, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from support.denoiser import SHAPE, draw, estimate, member, rows_for
from support.reference import walk
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.device.step_row import FLAG_LEARNED, FLAG_STORE, FLAG_STORE_Y, ROW, ROW_FIELDS
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.plan.step_rows import fill_rows, reads_before
from tstitch_trt.solvers import SOLVERS, SolverOptions, StepTable, make_table, resolve, with_default_spacing
from tstitch_trt.solvers.base import Grid
from tstitch_trt.solvers.noise_schedule import NoiseSchedule
from tstitch_trt.solvers.prediction import PREDICTION_TYPES, coefficients
from tstitch_trt.solvers.registry import idle_options
from tstitch_trt.solvers.spacing import SIGMA_SPACINGS, SPACINGS
from tstitch_trt.solvers.table import COLUMNS

Array = NDArray[np.float64]

NOISE = {
    (kind, zero): NoiseSchedule.from_spec(msgspec.convert({"kind": kind, "zero_terminal_snr": zero}, NoiseScheduleSpec))
    for kind in ("linear", "scaled-linear", "squared-cosine")
    for zero in (False, True)
}
LINEAR = NOISE["linear", False]
MULTISTEP = ("dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "dpmpp-3m-sde", "unipc")


@st.composite
def tables(draw: Any) -> StepTable:
    solver = SOLVERS[draw(st.sampled_from(sorted(SOLVERS)))]
    steps = draw(st.integers(1, 50 if solver.timesteps is not None else 120))
    options: dict[str, Any] = {}
    if solver.timesteps is None:
        place = draw(st.sampled_from((*SPACINGS, *SIGMA_SPACINGS)))
        options["spacing" if place in SPACINGS else "sigmas"] = place
    values = {
        "eta": st.floats(0, 1),
        "final": st.sampled_from(["zero", "sigma-min"]),
        "variance": st.sampled_from(["fixed-small", "fixed-large", "learned"]),
        "variant": st.sampled_from(["diffusers", "k-diffusion"]),
        "second_order": st.sampled_from(["midpoint", "heun"]),
        "middle": st.sampled_from(["diffusers", "paper"]),
        "lower_order_final": st.booleans(),
        "euler_at_final": st.booleans(),
        "order": st.integers(1, 3),
        "formula": st.sampled_from(["bh1", "bh2"]),
        "uncorrected": st.sampled_from(["", "0", "1,3"]),
    }
    options |= {name: draw(values[name]) for name in solver.defaults if name in values}
    idle = idle_options(SolverOptions.parse(solver.name, options))
    options = {name: value for name, value in options.items() if name not in idle}
    restarts = draw(st.sets(st.integers(0, steps - 1), max_size=4))
    noise = NOISE[draw(st.sampled_from(sorted(NOISE)))]
    return make_table(solver.name, noise, steps, restarts=restarts, **options)


@settings(max_examples=300, deadline=None)
@given(tables())
def test_exact_estimates_stay_on_the_path(table: StepTable) -> None:
    """A denoiser that knows x0 keeps ``x = a x0 + s eps`` with the table's own a and s: signal and noise, step by step,
    as a scalar pair (mean, variance) through the filled rows."""
    rows = fill_rows(table, p=0.0, q=1.0, learned=True)
    x, y = np.array([table.a[0], table.s[0]]), np.full(2, np.nan)
    exact = np.array([1.0, 0.0] if table.estimate == "x0" else [0.0, 1.0])
    a_next, s_next = np.append(table.a[1:], table.a_end), np.append(table.s[1:], table.s_end)
    for i, row in enumerate(rows):
        after = row[ROW["A"]] * x + exact * sum(row[ROW[name]] for name in "BCEF")
        after_y = row[ROW["YX"]] * x + exact * sum(row[ROW[f"Y{name}"]] for name in "BCEF")
        if row[ROW["Y"]]:
            after = after + row[ROW["Y"]] * y
        if row[ROW["YY"]]:
            after_y = after_y + row[ROW["YY"]] * y
        if int(row[ROW["FLAGS"]]) & FLAG_STORE_Y:
            y = after_y
        x = np.array([after[0], np.hypot(after[1], row[ROW["S"]])])
        if table.solver.name != "lcm":  # its boundary scalings do not add up to 1
            assert x[0] == pytest.approx(a_next[i], rel=1e-7)
        if table.solver.name not in ("lcm", "ddpm") or table.solver.variance == "fixed-small":
            assert x[1] ** 2 == pytest.approx(s_next[i] ** 2, rel=1e-7, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(tables())
def test_every_table_ends_where_it_says(table: StepTable) -> None:
    final = table.solver.final or SOLVERS[table.solver.name].final
    assert table.s_end > 0 if final == "sigma-min" else table.s_end == 0
    if (
        table.s_end == 0 and table.estimate == "x0"
    ):  # what is left is the last estimate: nothing of the latent (but LCM's c_skip), no noise
        assert table.S[-1] == 0
        assert table.A[-1] == pytest.approx(0, abs=1e-4 if table.solver.name == "lcm" else 0) or table.t[-1] == 0
    for name in COLUMNS:
        column = getattr(table, name)
        assert column.shape == (table.steps,)
        assert column.dtype == np.float64
        assert not column.flags.writeable


@settings(max_examples=200, deadline=None)
@given(tables())
def test_estimates_are_stored_exactly_where_they_are_read(table: StepTable) -> None:
    rows = fill_rows(table, p=1.0, q=1.0, learned=True)
    flags = rows[:, ROW["FLAGS"]].astype(int)
    backs = {"C": 1, "YC": 1, "E": 2, "YE": 2, "F": 3, "YF": 3}
    read = {i - back for name, back in backs.items() for i in np.flatnonzero(rows[:, ROW[name]])}
    assert {i for i in range(table.steps) if flags[i] & FLAG_STORE} == read
    written, kept = None, set()
    for i, row in enumerate(rows):
        if row[ROW["Y"]] or row[ROW["YY"]]:
            assert written is not None
            kept.add(written)
        if flags[i] & FLAG_STORE_Y:
            written = i
    assert {i for i in range(table.steps) if flags[i] & FLAG_STORE_Y} == kept
    learned = {i for i in range(table.steps) if flags[i] & FLAG_LEARNED}
    assert learned == (set(range(table.steps - 1)) if table.solver.variance == "learned" else set())


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "ddpm"])
@pytest.mark.parametrize("steps", [10, 20])
def test_members_of_different_prediction_types_share_a_trajectory(solver: str, steps: int) -> None:
    """One denoiser as an eps, a v and an x0 member, stitched: the same latents as each of them alone."""
    table = make_table(solver, LINEAR, steps)
    steps = table.steps
    x, noise = draw(steps)
    x = x * table.init_scale
    members = {kind: member(kind, table) for kind in PREDICTION_TYPES}
    alone = {kind: walk(rows_for(kind, table), x, members[kind], noise) for kind in PREDICTION_TYPES}
    kinds = [PREDICTION_TYPES[i * len(PREDICTION_TYPES) // steps] for i in range(steps)]
    p, q = np.array(
        [coefficients(kind, table.a[i], table.s[i], estimate=table.estimate) for i, kind in enumerate(kinds)]
    ).T
    stitched = walk(fill_rows(table, p=p, q=q), x, lambda s, t, i: members[kinds[i]](s, t, i), noise)
    for latents in (stitched, alone["v"], alone["x0"]):
        np.testing.assert_allclose(latents, alone["eps"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("space", ["vp", "ve"])
def test_prediction_types_recover_the_clean_latent(kind: str, space: str) -> None:
    rng = np.random.default_rng(3)
    x0, eps = rng.normal(size=(2, 5))
    sigma = np.array([0.01, 0.3, 1.0, 7.0, 150.0])
    alpha, rest = 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma)
    a, s = (alpha, rest) if space == "vp" else (np.ones(5), sigma)
    output = {"eps": eps, "v": alpha * eps - rest * x0, "x0": x0}[kind]
    p, q = coefficients(kind, a, s)
    np.testing.assert_allclose(p * (a * x0 + s * eps) + q * output, x0, rtol=1e-9)
    for other, want in {"eps": eps, "v": alpha * eps - rest * x0, "x0": x0}.items():
        p, q = coefficients(kind, a, s, estimate=other)
        np.testing.assert_allclose(p * (a * x0 + s * eps) + q * output, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize(("steps", "restart"), [(40, 1), (40, 17), (12, 6), (40, 39)])
def test_a_restart_is_a_fresh_start(solver: str, steps: int, restart: int) -> None:
    """From step k on, a table with a restart at k is the table of the timesteps from k on."""
    table = make_table(solver, LINEAR, steps, spacing="trailing", restarts={restart})
    fresh = make_table(solver, LINEAR, timesteps=table.t[restart:])
    # (diffusers' rule lowers the last orders below 15 steps in all: both are beyond it, or below, or at order 1 anyway)
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(table, name)[restart:], getattr(fresh, name), rtol=1e-12)
    plain = make_table(solver, LINEAR, steps, spacing="trailing")
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(table, name)[:restart], getattr(plain, name)[:restart])
    x, noise = draw(steps)
    latents = walk(rows_for("eps", table), x, member("eps", table), noise)
    again = walk(
        rows_for("eps", table)[restart:], latents[restart], _later(member("eps", table), restart), noise[restart:]
    )
    np.testing.assert_array_equal(again, latents[restart:])


def _later(model: Any, by: int) -> Any:
    return lambda sample, t, step: model(sample, t, step + by)


@pytest.mark.parametrize("solver", [*MULTISTEP, "dpmpp-2s", "dpmpp-3s"])
def test_restarting_everywhere_is_the_first_order_solver(solver: str) -> None:
    table = make_table(solver, LINEAR, 20, spacing="dit", restarts=range(20))
    first = make_table("ddim", LINEAR, 20, spacing="dit", eta=1.0 if solver.endswith("sde") else 0.0)
    np.testing.assert_allclose(rows_for("eps", table), rows_for("eps", first), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("restart", [1, 2, 3, 4, 9])
def test_pndm_starts_again_at_order_1(restart: int) -> None:
    """After a restart it is Adams-Bashforth over the evaluations from there on, and no step is taken twice."""
    table = make_table("pndm", LINEAR, 12, spacing="leading", restarts={restart})
    plain = make_table("pndm", LINEAR, 12, spacing="leading")
    assert table.steps == 13
    columns = np.stack([getattr(table, name) for name in ("B", "C", "E", "F")], axis=1)
    gain = np.append(table.s[1:], table.s_end) - np.append(table.a[1:], table.a_end) / table.a * table.s
    first = 2 if restart == 1 else restart  # row 1 alone repeats a step that was not its own: it rests
    for age, weights in enumerate(
        [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    ):
        want = np.append(weights, np.zeros(4 - len(weights))) * gain[first + age]
        np.testing.assert_allclose(columns[first + age], want, rtol=1e-12)
    if restart == 1:
        assert (table.A[1], table.Y[1], columns[1].any()) == (1.0, 0.0, False)
    for name in COLUMNS:
        if name != "YC" or restart > 4:  # a first estimate that row 4 does not read is not kept
            np.testing.assert_array_equal(getattr(table, name)[:restart], getattr(plain, name)[:restart])
    rows = fill_rows(table, p=0.0, q=1.0)
    assert not reads_before(rows, restart)
    assert reads_before(fill_rows(plain, p=0.0, q=1.0), restart)


def k_diffusion_3m_sde(sigmas: Array, x: Array, denoise: Any, noise: Array, eta: float, s_noise: float) -> Array:
    """sample_dpmpp_3m_sde as published in k-diffusion's sampling.py, on latents and not on coefficients."""
    seen: list[tuple[float, Array]] = []  # (h, denoised) of earlier steps, latest first
    for i, (now, then) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, i)
        if then == 0:
            return np.asarray(denoised)
        h = np.log(now) - np.log(then)
        h_eta = h * (eta + 1)
        x = np.exp(-h_eta) * x + (1 - np.exp(-h_eta)) * denoised
        phi_2 = np.expm1(-h_eta) / h_eta + 1
        if len(seen) > 1:
            r0, r1 = seen[0][0] / h, seen[1][0] / h
            d1_0, d1_1 = (denoised - seen[0][1]) / r0, (seen[0][1] - seen[1][1]) / r1
            d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        elif seen:
            x = x + phi_2 * (denoised - seen[0][1]) / (seen[0][0] / h)
        x = x + noise[i] * then * np.sqrt(-np.expm1(-2 * h * eta)) * s_noise
        seen = [(h, denoised), *seen][:2]
    raise AssertionError("the last sigma is not zero")


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.5, 1.0), (1.0, 1.003), (0.0, 1.0)])
def test_3m_sde_as_in_k_diffusion(steps: int, eta: float, s_noise: float) -> None:
    """k-diffusion samples variance-exploding latents: ours are those divided by a."""
    options: dict[str, Any] = {"variant": "k-diffusion", "eta": eta, "s_noise": s_noise}
    table = make_table("dpmpp-3m-sde", LINEAR, steps, sigmas="karras", **options)
    x, noise = draw(steps)
    sigmas = np.append(table.sigma, 0.0)
    ours = walk(rows_for("x0", table), x * table.a[0], member("x0", table), noise)[-1]

    def denoise(x: Array, i: int) -> Array:
        return estimate(x * table.a[i], table.t[i])

    np.testing.assert_allclose(ours, k_diffusion_3m_sde(sigmas, x, denoise, noise, eta, s_noise), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.4, 1.0), (0.7, 1.01)])
def test_euler_ancestral_with_part_of_the_noise(eta: float, s_noise: float) -> None:
    """k-diffusion's get_ancestral_step(sigma_from, sigma_to, eta)."""
    table = make_table("euler-ancestral", LINEAR, 12, eta=eta, s_noise=s_noise)
    now, then = table.sigma, np.append(table.sigma[1:], 0)
    up = np.minimum(then, eta * np.sqrt(then**2 * (now**2 - then**2) / now**2))
    down = np.sqrt(then**2 - up**2)
    np.testing.assert_allclose(table.S, up * s_noise, rtol=1e-12)
    np.testing.assert_allclose(table.A, down / now, rtol=1e-12)


def test_euler_and_ddim_are_one_method_in_two_spaces() -> None:
    """arXiv 2010.02502, section 4.3: DDIM is Euler's method in sigma."""
    ddim, euler = (make_table(name, LINEAR, 20, spacing="dit") for name in ("ddim", "euler"))
    x, noise = draw(20)
    ours = walk(rows_for("eps", ddim), x, member("eps", ddim), noise)
    theirs = walk(rows_for("eps", euler), x / ddim.a[0], member("eps", euler), noise)
    np.testing.assert_allclose(ours[-1], theirs[-1], rtol=1e-9, atol=1e-9)


def test_learned_range_lies_between_posterior_and_beta_of_the_respaced_chain() -> None:
    """Improved DDPM, eq. 15, computed from betas as the published respaced samplers do."""
    table = make_table("ddpm", LINEAR, 25, spacing="dit", variance="learned")
    kept = LINEAR.alphas_cumprod[table.t[::-1].astype(int)]
    before = np.append(1.0, kept[:-1])
    betas = 1 - kept / before
    posterior = betas * (1 - before) / (1 - kept)
    np.testing.assert_allclose(np.exp(2 * table.log_std_max[:-1]), betas[:0:-1], rtol=1e-9)
    np.testing.assert_allclose(np.exp(2 * table.log_std_min[:-1]), posterior[:0:-1], rtol=1e-9)
    assert table.uses_variance
    assert table.S.tolist() == [1.0] * 24 + [0.0]


def test_own_timesteps_may_be_fractional() -> None:
    table = make_table("ddim", LINEAR, timesteps=[900, 450.5, 0])
    assert table.t.tolist() == [900, 450.5, 0]
    assert LINEAR.sigmas[450] < table.sigma[1] < LINEAR.sigmas[451]
    assert table.solver.spacing is None


def test_options_are_resolved_and_told() -> None:
    assert make_table("ddim", LINEAR, 10).solver == SolverOptions(
        name="ddim", spacing="dit", eta=0.0, final="zero", step_to="next"
    )
    assert str(make_table("lcm", LINEAR, 4).solver) == "lcm(original_steps=50, timestep_scaling=10.0)"
    assert resolve(SolverOptions(name="euler", sigmas="karras")).spacing is None
    base = SolverOptions(name="ddim", eta=0.5)
    assert make_table(base, LINEAR, 10, spacing="leading").solver.eta == 0.5
    assert with_default_spacing(base, "trailing").spacing == "trailing"
    assert with_default_spacing(SolverOptions(name="lcm"), "trailing").spacing is None
    assert with_default_spacing(SolverOptions(name="euler", sigmas="karras"), "trailing").spacing is None


@pytest.mark.parametrize(
    ("solver", "options", "kind", "message"),
    [
        ("dimm", {}, UnknownName, "did you mean 'ddim'"),
        ("ddim", {"etta": 1.0}, UnknownName, "did you mean 'eta'"),
        ("ddim", {"spacing": "leadin"}, UnknownName, "did you mean 'leading'"),
        ("ddim", {"sigmas": "karas"}, UnknownName, "did you mean 'karras'"),
        ("ddpm", {"variance": "learnt"}, UnknownName, "did you mean 'learned'"),
        ("dpmpp-2m", {"eta": 0.5}, BadInput, r"'dpmpp-2m' does not use eta=0.5"),
        ("euler", {"variance": "learned"}, BadInput, "does not use variance"),
        ("ddpm", {"final": "sigma-min"}, BadInput, "does not use final"),
        ("lcm", {"spacing": "dit"}, BadInput, "does not use spacing"),
        ("ddim", {"original_steps": 50}, BadInput, "choose a solver that has it: lcm"),
        ("ddim", {"eta": 1.5}, BadInput, "eta is 1.5; allowed is a number from 0 to 1"),
        ("ddim", {"eta": "1"}, BadInput, "eta is '1'; allowed is a number"),
        ("ddim", {"eta": True}, BadInput, "eta is True"),
        ("ddim", {"eta": float("nan")}, BadInput, "eta is nan"),
        ("ddim", {"spacing": "leading", "steps_offset": 0.5}, BadInput, "allowed is a whole number of 0 or more"),
        ("ddim", {"steps_offset": 1}, BadInput, "add spacing='leading'"),
        ("ddim", {"spacing": "trailing", "steps_offset": 1}, BadInput, "add spacing='leading'"),
        ("euler", {"sigmas": "karras", "spacing": "dit"}, BadInput, "give either spacing or sigmas"),
        ("euler", {"sigma_max": 10.0}, BadInput, "needs a sigma spacing"),
        ("euler", {"sigmas": "karras", "sigma_max": 1e6}, BadInput, "covers 0.01"),
        ("euler", {"sigmas": "karras", "sigma_min": 5.0, "sigma_max": 4.0}, BadInput, "sigma_min < sigma_max"),
        ("euler-ancestral", {"s_noise": -1.0}, BadInput, "s_noise is -1.0; allowed is a number of 0 or more"),
        ("lcm", {"original_steps": 5}, BadInput, "10 steps of solver 'lcm'; allowed is 1 to 5"),
        ("lcm", {"original_steps": 2000}, BadInput, "original_steps is 2000; allowed is 1 to 1000"),
        ("ddim", {"restarts": {10}}, BadInput, "restart at step 10; allowed is 0 to 9"),
        ("pndm", {"restart": "repeat", "restarts": {1, 2}}, BadInput, "restart at steps 1 and 2: both are at the same"),
        ("ddim", {"timesteps": [5, 4]}, BadInput, "10 steps but 2 timesteps"),
    ],
)
def test_bad_options_are_refused(solver: str, options: dict[str, Any], kind: type[BadInput], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        make_table(solver, LINEAR, 10, **options)
    assert caught.value.hint


@pytest.mark.parametrize("steps", [0, -3, 1001, 2.5, True, None])
def test_bad_step_counts_are_refused(steps: Any) -> None:
    with pytest.raises(BadInput, match="allowed is a whole number from 1 to 1000"):
        make_table("ddim", LINEAR, steps)


def test_timesteps_leave_no_room_for_a_spacing() -> None:
    with pytest.raises(BadInput, match="give either spacing or timesteps"):
        make_table("ddim", LINEAR, timesteps=[500, 1], spacing="dit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": lambda t: t.A * 1.001}, "not the next signal level at step 0 of 10"),
        ({"B": lambda t: t.B + np.eye(10)[3] * 1e-5}, "not the next signal level at step 3"),
        ({"S": lambda t: t.S + 0.01}, "not the next noise level"),
        ({"S": lambda t: t.S - 1}, "out of range"),
        ({"c_in": lambda t: t.c_in * np.nan}, "column c_in is not finite"),
        ({"t": lambda t: t.t[:-1]}, "allowed is one length"),
        ({"a": lambda t: t.a[::-1], "s": lambda t: t.s[::-1]}, "the noise does not fall"),
        ({"a": lambda t: _repeat(t.a, 4), "s": lambda t: _repeat(t.s, 4)}, "the noise does not fall at step 3 of 10"),
        ({"C": lambda t: t.C + np.eye(10)[0]}, "estimates that don't exist yet"),
        ({"E": lambda t: t.E + np.eye(10)[1]}, "estimates that don't exist yet"),
        ({"log_std_min": lambda t: t.log_std_min + 1}, "log_std_min is above log_std_max"),
        ({"s_end": lambda t: -1.0}, "a_end, s_end"),
    ],
)
def test_a_table_that_is_not_consistent_is_refused(change: dict[str, Any], message: str) -> None:
    table = make_table("ddim", LINEAR, 10, eta=0.5)
    with pytest.raises(BadInput, match=message):
        replace(table, **{name: make(table) for name, make in change.items()})


def _repeat(column: Array, at: int) -> Array:
    """``column`` with the value before ``at`` once more."""
    return np.where(np.arange(column.size) == at, column[at - 1], column)


def test_an_estimate_is_stored_for_the_step_after_the_next_alone() -> None:
    """No solver here skips an estimate and reads it later, but a row may."""
    table = make_table("ddim", LINEAR, 10)
    skipping = replace(table, B=table.B - np.eye(10)[5] * 0.1, E=np.eye(10)[5] * 0.1)
    flags = fill_rows(skipping, p=1.0, q=1.0)[:, ROW["FLAGS"]]
    assert flags.tolist() == [FLAG_STORE if step == 3 else 0 for step in range(10)]


def test_rows_hold_what_they_are_given() -> None:
    table = make_table("dpmpp-2m", LINEAR, 10)
    steps = np.arange(10.0)
    rows = fill_rows(table, p=steps, q=-steps, guidance=steps + 1, rescale=0.7, guided_channels=3)
    assert rows.shape == (10, len(ROW_FIELDS))
    assert rows.dtype == np.float64
    assert rows[4, ROW["P"]] == 4
    assert rows[4, ROW["Q"]] == -4
    assert rows[4, ROW["G"]] == 5
    assert set(rows[:, ROW["RESCALE"]]) == {0.7}
    assert set(rows[:, ROW["GUIDED_CHANNELS"]]) == {3}
    np.testing.assert_array_equal(rows[:, ROW["C"]], table.C)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p": np.zeros(9)}, "P has shape"),
        ({"guidance": np.nan}, "G has shape .* or is not finite"),
        ({"rescale": 1.5}, "allowed is 0 to 1"),
        ({"guided_channels": 2.5}, "guided channels 2.5"),
        ({"guided_channels": -1}, "guided channels -1"),
    ],
)
def test_rows_refuse_what_does_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fill_rows(make_table("ddim", LINEAR, 10), **{"p": 1.0, "q": 1.0, **values})


def test_a_learned_variance_needs_members_that_have_one() -> None:
    table = make_table("ddpm", LINEAR, 10, variance="learned")
    learned = np.arange(10) != 4
    with pytest.raises(BadInput, match="the member of step 4 has none"):
        fill_rows(table, p=1.0, q=1.0, learned=learned)
    fill_rows(table, p=1.0, q=1.0, learned=np.arange(10) != 9)  # the last step draws no noise


def test_the_walker_guides_some_channels_and_rescales() -> None:
    """One step of the reference by hand (arXiv 2305.08891, eq. 15-16), as other tests lean on it."""
    table = make_table("ddim", LINEAR, 1)
    rows = fill_rows(table, p=0.0, q=1.0, guidance=3.0, rescale=0.5, guided_channels=1)
    rng = np.random.default_rng(0)
    cond, uncond = rng.normal(size=(2, *SHAPE))
    end = walk(rows, np.zeros(SHAPE), lambda *_: (cond, uncond), np.zeros((1, *SHAPE)))[-1]
    for lane in range(SHAPE[0]):
        guided = uncond[lane, 0] + 3 * (cond[lane, 0] - uncond[lane, 0])
        rescaled = guided * np.std(cond[lane, 0]) / np.std(guided)
        np.testing.assert_allclose(end[lane, 0], 0.5 * rescaled + 0.5 * guided, rtol=1e-12)
        np.testing.assert_allclose(end[lane, 1], cond[lane, 1], rtol=1e-12)


@pytest.mark.parametrize(
    ("solver", "options", "name", "values"),
    [
        ("dpmpp-3m-sde", {"variant": "k-diffusion"}, "second_order", ("midpoint", "heun")),
        ("dpmpp-3m-sde", {"variant": "k-diffusion"}, "lower_order_final", (True, False)),
        ("dpmpp-2m", {}, "euler_at_final", (True, False)),
        ("dpmpp-2m-sde", {"eta": 0.0}, "s_noise", (1.1,)),
        ("euler-ancestral", {"eta": 0.0}, "s_noise", (1.1,)),
        ("unipc", {"order": 1}, "lower_order_final", (True, False)),
        ("ddpm", {}, "last_noise", (True, False)),
        ("dpmpp-2s", {}, "lower_order_final", (True, False)),
        ("dpmpp-3s", {"second_order": "heun"}, "middle", ("paper", "diffusers")),
    ],
)
def test_options_without_effect_are_refused(
    solver: str, options: dict[str, Any], name: str, values: tuple[Any, ...]
) -> None:
    """And have none: the coefficients are the same with every value. A switch that is off asks for nothing."""
    table = make_table(solver, LINEAR, 10, **options)
    assert resolve(table.solver) == table.solver
    grid = Grid(
        t=table.t, a=np.append(table.a, table.a_end), s=np.append(table.s, table.s_end), age=np.arange(table.steps)
    )
    for value in values:
        if value is not False:
            with pytest.raises(BadInput, match=f"{name}=.* would be ignored: "):
                make_table(solver, LINEAR, 10, **options, **{name: value})
        made = SOLVERS[solver].coefficients(grid, replace(table.solver, **{name: value}))
        for column in ("A", "B", "C", "E", "S"):
            found = getattr(made, column)
            np.testing.assert_array_equal(found if found.size else np.zeros(10), getattr(table, column))


@pytest.mark.parametrize("solver", [name for name, each in SOLVERS.items() if "s_noise" in each.defaults])
def test_drawn_noise_may_be_scaled_down_to_none(solver: str) -> None:
    plain = make_table(solver, LINEAR, 10)
    for scale in (0.0, 0.5, 1.1):
        table = make_table(solver, LINEAR, 10, s_noise=scale)
        np.testing.assert_allclose(table.S, scale * plain.S, rtol=1e-12)
        np.testing.assert_array_equal(table.A, plain.A)
    assert plain.S.any()


def test_a_trajectory_can_not_rest_where_there_is_no_signal() -> None:
    with pytest.raises(BadInput, match=r"final='last' ends at timestep 999, where there is no signal"):
        make_table("ddim", NOISE["linear", True], 1, final="last")
    assert make_table("ddim", NOISE["linear", True], 2, final="last", spacing="trailing").s_end > 0


def test_timesteps_of_sigmas_may_be_named() -> None:
    exact = make_table("dpmpp-2m", LINEAR, 3, sigmas="karras").t
    told = ",".join(str(int(t)) for t in exact)
    table = make_table("dpmpp-2m", LINEAR, 3, sigmas="karras", sigma_timesteps=told)
    assert table.t.tolist() == np.floor(exact).tolist()
    for wrong in ("998,3", "998,500,0,0", "1,2,3"):
        with pytest.raises(BadInput, match="allowed is one for each of the 3 steps, within 1 of that of its sigma"):
            make_table("dpmpp-2m", LINEAR, 3, sigmas="karras", sigma_timesteps=wrong)
    with pytest.raises(BadInput, match="sigma_timesteps is 'some'; allowed is exact, nearest, down, or a timestep"):
        SolverOptions(name="dpmpp-2m", sigma_timesteps="some")


def test_lambda_min_leaves_out_the_noisiest_timesteps() -> None:
    table = make_table("dpmpp-2m", LINEAR, 10, spacing="linspace", lambda_min=-2.0)
    assert -2.0 <= -np.log(table.sigma[0]) < -1.98
    with pytest.raises(BadInput, match=r"lambda_min is -2 .*; 10 steps of spacing 'trailing' need all of them"):
        make_table("dpmpp-2m", LINEAR, 10, spacing="trailing", lambda_min=-2.0)
    with pytest.raises(BadInput, match=r"lambda_min is 4 .*leaves \d of 1000 timesteps; 10 steps .* need 11 or more"):
        make_table("dpmpp-2m", LINEAR, 10, spacing="linspace", lambda_min=4.0)
    with pytest.raises(BadInput, match=r"lambda_min=-2\.0 would be ignored: the steps follow the karras sigmas"):
        make_table("dpmpp-2m", LINEAR, 10, sigmas="karras", lambda_min=-2.0)
    assert make_table("dpmpp-2m", LINEAR, 10, spacing="trailing", lambda_min=-99.0).t[0] == 999
