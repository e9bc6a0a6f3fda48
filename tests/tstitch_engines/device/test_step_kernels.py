"""The host step kernels against published vectors, statistics and the float64 reference in ``step_reference``."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support import step_reference
from tstitch_engines import _kernels
from tstitch_engines.device import step_row as rows
from tstitch_engines.device.base import ArenaBuffers
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.host_kernels import ISAS, HostStepKernels, fill_initial_noise, normal
from tstitch_engines.device.host_memory import HostBuffer
from tstitch_engines.device.step_row import (
    FLAG_GIVEN_NOISE,
    FLAG_INPAINT,
    FLAG_LEARNED,
    FLAG_STORE,
    FLAG_STORE_Y,
    HISTORY,
    INITIAL_NOISE_STEP,
    ROW,
)
from tstitch_engines.errors import BadInput

DTYPES = ("float32", "float16", "bfloat16")


def buffer(values: NDArray[Any], dtype: str | None = None) -> HostBuffer:
    out = HostBuffer(values.shape, dtype or str(values.dtype))
    out.array[...] = values
    return out


def encode(values: NDArray[np.float32], dtype: str) -> HostBuffer:
    """Rounds by numpy or torch, not by the code under test."""
    if dtype == "bfloat16":
        import torch

        return buffer(torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy(), dtype)
    return buffer(values.astype(dtype), dtype)


def decode(values: HostBuffer) -> NDArray[np.float32]:
    if values.dtype == "bfloat16":
        return (values.array.astype(np.uint32) << 16).view(np.float32)
    return values.array.astype(np.float32)


@dataclass
class Arena:
    """An arena of host buffers; history and y start as NaN, as memory that nothing has written may be."""

    x: HostBuffer
    history: HostBuffer
    rows: HostBuffer
    step: HostBuffer
    seed: HostBuffer
    fault: HostBuffer
    y: HostBuffer
    kernels: HostStepKernels


def make_arena(latents: NDArray[np.float32], table: NDArray[np.float32], seeds: list[int], **options: Any) -> Arena:
    lanes = len(latents)
    x = buffer(latents)
    history = buffer(np.full((HISTORY, *latents.shape), np.nan, np.float32))
    parts = {
        "y": buffer(np.full(latents.shape, np.nan, np.float32)),
        "rows": buffer(table),
        "step": buffer(np.zeros(lanes, np.int32)),
        "seed": buffer(np.array(seeds, np.uint64).view(np.int64)),
        "fault": buffer(np.full(lanes, -1, np.int32)),
    }
    given = {name: buffer(options.pop(name)) for name in ("image", "mask", "noise") if name in options}
    return Arena(x, history, **parts, kernels=HostStepKernels(ArenaBuffers(x, history, **parts, **given), **options))


def random_table(rng: np.random.Generator, lanes: int, steps: int, *, channels: int, **fixed: float) -> Any:
    """Rows with moderate random coefficients; D1, D2, D3 and y are used as soon as there are any."""
    table = rng.uniform(0.2, 0.9, (lanes, steps, len(rows.ROW_FIELDS))).astype(np.float32)
    table[..., ROW["GUIDED_CHANNELS"]] = channels
    table[..., ROW["LOG_STD_MIN"]] = -1.5
    table[..., ROW["LOG_STD_MAX"]] = 0.3
    table[..., ROW["FLAGS"]] = 0
    for name in ("C", "E", "F", "S", "RESCALE", "Y", "YY", "YC", "YE", "YF"):
        table[..., ROW[name]] = 0
    table[..., ROW["G"]] = 1.7
    for name, value in fixed.items():
        table[..., ROW[name]] = value
    for back, names in enumerate((("C", "YC", "Y", "YY"), ("E", "YE"), ("F", "YF")), 1):
        table[:, :back, [ROW[name] for name in names]] = 0
    return table


def close(got: NDArray[Any], want: NDArray[Any]) -> None:
    """float32 arithmetic on values near 1 over a few steps: some ulp of the largest value."""
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * max(1.0, float(np.abs(want).max())))


# ------------------------------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], want: tuple[int, int, int, int]
) -> None:
    """The vectors that Random123 publishes for philox4x32, 10 rounds (kat_vectors)."""
    assert _kernels.philox(*counter, *key) == want


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 3, 4, 1023, 20_011])
def test_normals_are_box_muller_of_philox(isa: str, n: int) -> None:
    for seed, step in ((0, 0), (2**63 + 12345, 7), (-1 & (2**64 - 1), INITIAL_NOISE_STEP)):
        np.testing.assert_allclose(
            normal(seed, step, n, isa=isa), step_reference.normals(seed, step, n), rtol=2e-6, atol=2e-6
        )


def test_normals_look_normal() -> None:
    n = 400_000
    z = normal(11, 3, n).astype(np.float64)
    deviation = 1 / np.sqrt(n)
    assert abs(z.mean()) < 4 * deviation
    assert abs(z.var() - 1) < 4 * np.sqrt(2) * deviation
    assert abs((z**3).mean()) < 4 * np.sqrt(15) * deviation
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96) * deviation
    from scipy import stats

    assert stats.kstest(z, "norm").pvalue > 1e-4


def test_normals_are_independent() -> None:
    """Across neighbouring elements (the four of a Philox call among them), steps and seeds."""
    n = 200_000
    z = normal(5, 0, n)
    limit = 4.5 / np.sqrt(n)
    for other in (normal(5, 1, n), normal(6, 0, n), normal(5 + 2**32, 0, n), *(np.roll(z, k) for k in (1, 2, 3, 4))):
        assert abs(np.corrcoef(z, other)[0, 1]) < limit
        assert abs(np.corrcoef(z**2, other**2)[0, 1]) < limit


def test_initial_noise() -> None:
    latent = np.empty((3, 5, 7), np.float32)
    fill_initial_noise(latent, 42, 14.6)
    np.testing.assert_array_equal(latent.ravel(), np.float32(14.6) * normal(42, INITIAL_NOISE_STEP, latent.size))
    again = HostBuffer((2, 3, 5, 7), "float32")
    HostDevice().initial_noise(again, 1, 42, 14.6)
    np.testing.assert_array_equal(again.array[1], latent)


# ----------------------------------------------------------------------------------------------------------- half types


@pytest.mark.parametrize("isa", ISAS)
def test_float16_equals_numpy(isa: str) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    out = np.empty(every.size, np.float32)
    _kernels.to_float32(every, out, isa)
    np.testing.assert_array_equal(out, every.astype(np.float32))  # NaN equals NaN here, infinities included
    values = _rounding_cases(np.float16)
    half = np.empty(values.size, np.float16)
    _kernels.from_float32(values, half, isa)
    with np.errstate(over="ignore"):
        want = values.astype(np.float16)
    np.testing.assert_array_equal(np.isnan(half), np.isnan(want))
    ok = ~np.isnan(want)
    np.testing.assert_array_equal(half.view(np.uint16)[ok], want.view(np.uint16)[ok])


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_equals_torch(isa: str) -> None:
    import torch

    every = np.arange(65536, dtype=np.uint16)
    out = np.empty(every.size, np.float32)
    _kernels.to_float32(every, out, isa)
    np.testing.assert_array_equal(out, torch.from_numpy(every).view(torch.bfloat16).float().numpy())
    values = _rounding_cases(None)
    half = np.empty(values.size, np.uint16)
    _kernels.from_float32(values, half, isa)
    want = torch.from_numpy(values).to(torch.bfloat16)
    nan = torch.isnan(want).numpy()
    np.testing.assert_array_equal(np.isnan((half.astype(np.uint32) << 16).view(np.float32)), nan)
    np.testing.assert_array_equal(half[~nan], want.view(torch.uint16).numpy()[~nan])


def _rounding_cases(half: Any) -> NDArray[np.float32]:
    """Random bit patterns, every half value, and the midpoints between neighbours with their own neighbours."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    every = np.arange(65536, dtype=np.uint32)
    with np.errstate(invalid="ignore", over="ignore"):
        exact = (
            every.astype(np.uint16).view(np.float16).astype(np.float32)
            if half is np.float16
            else (every << 16).view(np.float32)
        )
        middle = np.float32(0.5) * exact[:-1] + np.float32(0.5) * exact[1:]
        cases = [bits.view(np.float32), exact, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)]
    return np.concatenate(cases).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- prepare


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", [False, True])
def test_prepare(isa: str, dtype: str, guided: bool) -> None:
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((4, 3, 5, 7)).astype(np.float32)
    table = random_table(rng, 4, 3, channels=3)
    table[..., ROW["T"]] = rng.uniform(0, 999, (4, 3))
    arena = make_arena(latents, table, [0] * 4, isa=isa)
    arena.step.array[:] = [0, 2, 1, 2]
    active = [3, 0, 2]
    copies = 2 if guided else 1
    sample = HostBuffer((3 * copies, 3, 5, 7), dtype)
    now = table[active, arena.step.array[active]]
    want = encode(now[:, ROW["C_IN"], None, None, None] * latents[active], dtype).array
    for timestep_dtype in ("float32", "int64"):
        timestep = HostBuffer((3 * copies,), timestep_dtype)
        arena.kernels.prepare(buffer(np.array(active, np.int32)), sample, timestep, guided=guided)
        np.testing.assert_array_equal(sample.array, np.concatenate([want] * copies))
        t = now[:, ROW["T"]] if timestep_dtype == "float32" else np.rint(now[:, ROW["T"]]).astype(np.int64)
        np.testing.assert_array_equal(timestep.array, np.tile(t, copies))
    np.testing.assert_array_equal(arena.x.array, latents)
    np.testing.assert_array_equal(arena.step.array, [0, 2, 1, 2])


# -------------------------------------------------------------------------------------------------------------- advance

KINDS: dict[str, dict[str, float]] = {
    "plain": {},
    "noise": {"S": 0.4},
    "history-1": {"C": 0.3, "FLAGS": FLAG_STORE},
    "history-2": {"C": 0.3, "E": -0.2, "FLAGS": FLAG_STORE},
    "history-2-noise": {"C": 0.3, "E": -0.2, "S": 0.5, "FLAGS": FLAG_STORE},
    "learned": {"S": 1.0, "FLAGS": FLAG_LEARNED},
    "history-3": {"C": 0.3, "E": -0.2, "F": 0.25, "FLAGS": FLAG_STORE},
    "y": {"Y": 0.4, "YY": 0.5, "FLAGS": FLAG_STORE_Y},
    "y-of-history": {"Y": -0.4, "YC": 0.3, "YE": 0.2, "YF": -0.3, "FLAGS": FLAG_STORE + FLAG_STORE_Y},
    "inpaint": {"FLAGS": FLAG_INPAINT},
    "inpaint-given": {"FLAGS": FLAG_INPAINT + FLAG_GIVEN_NOISE},
    "inpaint-clean": {"IMAGE_S": 0, "FLAGS": FLAG_INPAINT},
    "everything": {
        "C": 0.3, "E": -0.2, "F": 0.2, "S": 0.7, "RESCALE": 0.7, "Y": 0.3, "YY": 0.4, "YC": 0.3, "YE": 0.2, "YF": -0.3,
        "FLAGS": FLAG_LEARNED + FLAG_STORE + FLAG_STORE_Y + FLAG_INPAINT,
    },
}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided_channels", [None, 0, 2, 4], ids=lambda k: f"guided{k}")
@pytest.mark.parametrize("kind", KINDS)
def test_advance_equals_float64(isa: str, dtype: str, guided_channels: int | None, kind: str) -> None:
    """Five steps of every kind of row; a latent of odd size, of one tile and a bit."""
    run_and_compare(np.random.default_rng(2), (3, 19, 21), dtype, guided_channels, KINDS[kind], isa)


@pytest.mark.parametrize("kind", ["history-2-noise", "inpaint", "everything"])
def test_advance_of_several_chunks_equals_float64(kind: str) -> None:
    run_and_compare(np.random.default_rng(2), (3, 59, 61), "float32", 2, KINDS[kind], ISAS[0])


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("guided_channels", [2, 4])
def test_rescale_equals_float64(strength: float, guided_channels: int) -> None:
    run_and_compare(
        np.random.default_rng(3), (4, 64, 40), "float32", guided_channels, {"RESCALE": strength, "G": 6.0}, ISAS[0]
    )


def run_and_compare(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str,
    guided_channels: int | None,
    fixed: dict[str, float],
    isa: str,
) -> None:
    lanes, steps, guided = 2, 5, guided_channels is not None
    learned = int(fixed.get("FLAGS", 0)) & FLAG_LEARNED
    table = random_table(rng, lanes, steps, channels=guided_channels or 0, **fixed)
    latents = rng.standard_normal((lanes, *shape)).astype(np.float32)
    seeds = [7, 2**64 - 3]
    inpainting = {}
    if int(fixed.get("FLAGS", 0)) & FLAG_INPAINT:
        mask = rng.uniform(0, 1, (lanes, 1, *shape[1:])).astype(np.float32).round(1)  # whole 0 and 1 among them
        image, noise = rng.standard_normal((2, *latents.shape)).astype(np.float32)
        inpainting = {"image": image, "mask": mask, "noise": noise}
    arena = make_arena(latents, table, seeds, isa=isa, **inpainting)
    reference = [
        step_reference.Lane(latents[i], table[i], seeds[i], **{name: part[i] for name, part in inpainting.items()})
        for i in range(lanes)
    ]
    active = buffer(np.arange(lanes, dtype=np.int32))
    for _ in range(steps):
        out_shape = (lanes * (1 + guided), shape[0] * (2 if learned else 1), *shape[1:])
        output = encode(rng.uniform(-1, 1, out_shape).astype(np.float32), dtype)
        values = decode(output)
        arena.kernels.advance(active, output, guided=guided, rescale="RESCALE" in fixed)
        for index, lane in enumerate(reference):
            lane.advance(values[index], values[lanes + index] if guided else None, rescale="RESCALE" in fixed)
    for index, lane in enumerate(reference):
        close(arena.x.array[index], lane.x)
        if lane.y is not None:
            close(arena.y.array[index], lane.y)
    np.testing.assert_array_equal(arena.step.array, steps)
    np.testing.assert_array_equal(arena.fault.array, -1)


def test_rescale_equals_torch() -> None:
    """arXiv 2305.08891, eq. 15-16, as diffusers' ``rescale_noise_cfg`` has it: with torch's unbiased deviation."""
    import torch

    rng = np.random.default_rng(4)
    shape = (4, 16, 16)
    cond, uncond = rng.standard_normal((2, 3, *shape)).astype(np.float32)
    table = random_table(rng, 3, 1, channels=4, P=0, Q=1, A=0, B=1, G=5.0, RESCALE=0.6)
    arena = make_arena(np.zeros((3, *shape), np.float32), table, [0] * 3)
    output = buffer(np.concatenate([cond, uncond]))
    arena.kernels.advance(buffer(np.arange(3, dtype=np.int32)), output, guided=True, rescale=True)
    text, guided = torch.from_numpy(cond), torch.from_numpy(uncond + 5.0 * (cond - uncond))
    dims = (1, 2, 3)
    rescaled = guided * (text.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    close(arena.x.array, (0.6 * rescaled + 0.4 * guided).numpy())


def test_rescale_leaves_a_constant_output_finite() -> None:
    table = random_table(np.random.default_rng(0), 1, 1, channels=1, RESCALE=0.5)
    arena = make_arena(np.zeros((1, 1, 4, 4), np.float32), table, [0])
    arena.kernels.advance(
        buffer(np.zeros(1, np.int32)), buffer(np.zeros((2, 1, 4, 4), np.float32)), guided=True, rescale=True
    )
    np.testing.assert_array_equal(arena.x.array, 0)


def test_lanes_are_independent_of_their_batch() -> None:
    """Lanes at different steps, in any subset and order, give bit for bit what each gives alone."""
    rng = np.random.default_rng(5)
    lanes, steps, shape = 5, 6, (3, 9, 11)
    table = random_table(rng, lanes, steps, channels=2, **KINDS["history-2-noise"])
    latents = rng.standard_normal((lanes, *shape)).astype(np.float32)
    outputs = rng.standard_normal((lanes, steps, 2, *shape)).astype(np.float32)  # per lane and step: cond, uncond
    seeds = list(range(100, 100 + lanes))

    def go(arena: Arena, active: list[int]) -> None:
        steps_now = arena.step.array[active]
        output = np.concatenate([outputs[active, steps_now, half] for half in (0, 1)])
        arena.kernels.advance(buffer(np.array(active, np.int32)), buffer(output), guided=True, rescale=False)

    alone = make_arena(latents, table, seeds)
    for lane in range(lanes):
        for _ in range(steps):
            go(alone, [lane])
    mixed = make_arena(latents, table, seeds)
    while (mixed.step.array < steps).any():
        left = np.flatnonzero(mixed.step.array < steps)
        go(mixed, list(rng.permutation(left)[: rng.integers(1, len(left) + 1)]))
    np.testing.assert_array_equal(mixed.x.array, alone.x.array)


def test_history_is_neither_written_nor_read_without_need() -> None:
    """Slot i % 3 holds D of step i, only under FLAG_STORE; NaN in what no row reads never gets out."""
    table = random_table(np.random.default_rng(6), 1, 3, channels=1, P=0, Q=1)
    table[0, 1, ROW["FLAGS"]] = FLAG_STORE
    arena = make_arena(np.zeros((1, 1, 2, 2), np.float32), table, [0])
    for step in range(3):
        output = buffer(np.full((1, 1, 2, 2), step + 1, np.float32))
        arena.kernels.advance(buffer(np.zeros(1, np.int32)), output, guided=False, rescale=False)
    assert np.isnan(arena.history.array[[0, 2]]).all()
    np.testing.assert_array_equal(arena.history.array[1], 2)
    assert np.isnan(arena.y.array).all()
    assert np.isfinite(arena.x.array).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fault_names_the_first_bad_step(bad: float) -> None:
    table = random_table(np.random.default_rng(7), 3, 4, channels=1)
    arena = make_arena(np.zeros((3, 1, 6, 6), np.float32), table, [0] * 3)
    for step in range(4):
        output = np.zeros((3, 1, 6, 6), np.float32)
        if step == 2:
            output[1, 0, 5, 5] = bad
        arena.kernels.advance(buffer(np.arange(3, dtype=np.int32)), buffer(output), guided=False, rescale=False)
    np.testing.assert_array_equal(arena.fault.array, [-1, 2, -1])
    np.testing.assert_array_equal(arena.step.array, 4)


def test_a_nan_in_the_learned_variance_is_a_fault() -> None:
    table = random_table(np.random.default_rng(7), 1, 1, channels=1, S=1.0, FLAGS=FLAG_LEARNED)
    arena = make_arena(np.zeros((1, 1, 4, 4), np.float32), table, [0])
    output = np.zeros((1, 2, 4, 4), np.float32)
    output[0, 1, 0, 0] = np.nan
    arena.kernels.advance(buffer(np.zeros(1, np.int32)), buffer(output), guided=False, rescale=False)
    assert arena.fault.array[0] == 0


# -------------------------------------------------------------------------------------------------------------- threads


def big_run(threads: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(8)
    shape = (4, 64, 65)
    table = random_table(rng, 3, 2, channels=3, S=0.5, RESCALE=0.5)
    arena = make_arena(rng.standard_normal((3, *shape)).astype(np.float32), table, [1, 2, 3], threads=threads)
    assert arena.x.array.size * 12 > _kernels.PARALLEL_WORK  # else this tests nothing
    active = buffer(np.arange(3, dtype=np.int32))
    for _ in range(2):
        arena.kernels.advance(
            active, buffer(rng.standard_normal((6, *shape)).astype(np.float32)), guided=True, rescale=True
        )
    return arena.x.array.copy()


def test_threads_do_not_change_a_bit() -> None:
    alone = big_run(1)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(big_run(threads), alone)


def test_callers_on_several_threads() -> None:
    """Arenas of their own may be used at once: they take turns on the pool or work alone."""
    want = big_run(1)
    results: list[NDArray[np.float32]] = []
    callers = [threading.Thread(target=lambda: results.extend(big_run(3) for _ in range(3))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 9
    for got in results:
        np.testing.assert_array_equal(got, want)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    want = big_run(3)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(big_run(3), want) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# --------------------------------------------------------------------------------------------------- layout and refusal


def test_rows_equal_the_header() -> None:
    assert _kernels.ROW_FIELDS == rows.ROW_FIELDS
    for name in rows.__all__:
        if name not in ("ROW", "ROW_FIELDS"):
            assert getattr(_kernels, name) == getattr(rows, name), name


def small_arena(**options: Any) -> Arena:
    return make_arena(
        np.zeros((2, 3, 4, 4), np.float32), random_table(np.random.default_rng(0), 2, 2, channels=3), [0, 0], **options
    )


@pytest.mark.parametrize(
    ("active", "output", "says"),
    [
        ([2], (1, 3, 4, 4), "active[0] = 2 is no lane; allowed is 0 to 1"),
        ([-1], (1, 3, 4, 4), "active[0] = -1"),
        ([0, -2], (2, 3, 4, 4), "active[1] = -2 is no lane; allowed is 0 to 1, or -1 for a spare position"),
        ([0, 1], (1, 3, 4, 4), "must hold 2 lanes"),
        ([0], (1, 4, 4, 4), "[1, 4, 4, 4]"),
    ],
)
def test_advance_refuses(active: list[int], output: tuple[int, ...], says: str) -> None:
    arena = small_arena()
    with pytest.raises(BadInput) as caught:
        arena.kernels.advance(
            buffer(np.array(active, np.int32)), buffer(np.zeros(output, np.float32)), guided=False, rescale=False
        )
    assert says in caught.value.message
    np.testing.assert_array_equal(arena.step.array, 0)


def test_a_finished_lane_is_refused() -> None:
    arena = small_arena()
    arena.step.array[1] = 2
    with pytest.raises(BadInput, match="lane 1 is at step 2; its table has the steps 0 to 1"):
        arena.kernels.prepare(
            buffer(np.array([0, 1], np.int32)), HostBuffer((2, 3, 4, 4), "float16"), HostBuffer((2,), "float32"),
            guided=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("T", np.nan, "allowed is a finite number"),
        ("S", -np.inf, "allowed is a finite number"),
        ("T", 1e19, "a timestep that fits into 64 bits"),
        ("FLAGS", 32, "a sum of the flags, 0 to 31"),
        ("GUIDED_CHANNELS", -1, "allowed is 0 or more"),
    ],
)
def test_a_row_that_can_not_be_right_is_refused(field: str, value: float, says: str) -> None:
    arena = small_arena()
    arena.rows.array[0, 0, ROW[field]] = value
    active, sample = buffer(np.zeros(1, np.int32)), buffer(np.zeros((1, 3, 4, 4), np.float32))
    with pytest.raises(BadInput, match=f"row 0 of lane 0 has {field} = .*{says}"):
        arena.kernels.prepare(active, sample, HostBuffer((1,), "int64"), guided=False)
    with pytest.raises(BadInput, match=f"row 0 of lane 0 has {field} = .*{says}"):
        arena.kernels.advance(active, sample, guided=False, rescale=False)


def test_an_array_between_two_elements_is_refused() -> None:
    bytes_ = np.zeros(4 * 48 + 1, np.uint8)
    sample = HostBuffer((1, 3, 4, 4), "float32", bytes_[1:].view(np.float32).reshape(1, 3, 4, 4))
    with pytest.raises(BadInput, match="is at an address that is no multiple of 4"):
        small_arena().kernels.advance(buffer(np.zeros(1, np.int32)), sample, guided=False, rescale=False)


def test_learned_rows_need_a_second_half() -> None:
    arena = small_arena()
    arena.rows.array[..., ROW["S"]] = 1
    arena.rows.array[..., ROW["FLAGS"]] = FLAG_LEARNED
    with pytest.raises(BadInput, match="has 3 channels, allowed is 6"):
        arena.kernels.advance(
            buffer(np.zeros(1, np.int32)), buffer(np.zeros((1, 3, 4, 4), np.float32)), guided=False, rescale=False
        )


@pytest.mark.parametrize(
    ("row", "given", "says"),
    [
        ({"FLAGS": FLAG_STORE_Y}, (), "lane 0 remembers a second state, and the arena has no y"),
        ({"Y": 1}, (), "lane 0 remembers a second state, and the arena has no y"),
        ({"FLAGS": FLAG_INPAINT}, ("mask", "noise"), "lane 0 inpaints, and the arena has no image"),
        ({"FLAGS": FLAG_INPAINT}, ("image", "noise"), "and the arena has no mask"),
        (
            {"FLAGS": FLAG_INPAINT + FLAG_GIVEN_NOISE},
            ("image", "mask"),
            "noise that is given, and the arena has no noise",
        ),
    ],
)
def test_rows_need_the_memory_they_use(row: dict[str, float], given: tuple[str, ...], says: str) -> None:
    shape = (1, 2, 3, 3)
    table = random_table(np.random.default_rng(0), 1, 1, channels=2)
    for name, value in row.items():
        table[..., ROW[name]] = value
    more = {name: buffer(np.zeros((1, 1, 3, 3) if name == "mask" else shape, np.float32)) for name in given}
    arena = make_arena(np.zeros(shape, np.float32), table, [0])
    parts = {name: getattr(arena, name) for name in ("history", "rows", "step", "seed", "fault")}
    kernels = HostStepKernels(ArenaBuffers(latents=arena.x, **parts, **more))
    with pytest.raises(BadInput) as caught:
        kernels.advance(buffer(np.zeros(1, np.int32)), buffer(np.zeros(shape, np.float32)), guided=False, rescale=False)
    assert says in caught.value.message
    assert arena.step.array[0] == 0


def test_lanes_of_several_sizes_lie_side_by_side() -> None:
    """Each walks as in an arena of its own, bit for bit, and writes nothing outside its own latent."""
    rng = np.random.default_rng(9)
    shapes, steps, largest = [(2, 12, 10), (2, 5, 7), (2, 9, 10), (2, 1, 2)], 5, (2, 12, 10)
    lanes = len(shapes)
    table = random_table(rng, lanes, steps, channels=2, **KINDS["y-of-history"] | {"S": 0.3, "GUIDED_CHANNELS": 1})
    shared = make_arena(np.full((lanes, *largest), np.nan, np.float32), table, list(range(lanes)))
    buffers = ArenaBuffers(shared.x, shared.history, shared.rows, shared.step, shared.seed, shared.fault, shared.y)
    alone = []
    for slot, shape in enumerate(shapes):
        latents = rng.standard_normal((1, *shape)).astype(np.float32)
        shared.x.array[slot].reshape(-1)[: latents.size] = latents.reshape(-1)
        alone.append((HostStepKernels(buffers, shape), make_arena(latents, table[slot : slot + 1], [slot])))
    for _ in range(steps):
        for slot, (kernels, own) in enumerate(alone):
            output = buffer(rng.standard_normal((4, *shapes[slot])).astype(np.float32))
            kernels.advance(buffer(np.array([slot, -1], np.int32)), output, guided=True, rescale=True)
            half = buffer(output.array[[0, 2]])
            own.kernels.advance(buffer(np.zeros(1, np.int32)), half, guided=True, rescale=True)
    for slot, (kernels, own) in enumerate(alone):
        for ours, theirs in ((shared.x, own.x), (shared.y, own.y)):
            flat, size = ours.array[slot].reshape(-1), theirs.array.size
            np.testing.assert_array_equal(flat[:size], theirs.array.reshape(-1))
            assert np.isnan(flat[size:]).all()
        ours = shared.history.array[:, slot].reshape(HISTORY, -1)
        size = own.x.array.size
        np.testing.assert_array_equal(ours[:, :size], own.history.array.reshape(HISTORY, -1))
        assert np.isnan(ours[:, size:]).all()
        sample, times = HostBuffer((2, *shapes[slot]), "float32"), HostBuffer((2,), "int64")
        shared.step.array[slot] = 0
        kernels.prepare(buffer(np.array([slot, -1], np.int32)), sample, times, guided=False)
        np.testing.assert_array_equal(sample.array[0], sample.array[1])  # a spare position is given the first
    np.testing.assert_array_equal(shared.fault.array, -1)


@pytest.mark.parametrize(
    ("sample", "timestep", "says"),
    [
        (((2, 3, 4, 4), "int32"), ((2,), "float32"), "float32, float16 and bfloat16"),
        (((2, 3, 4, 4), "float32"), ((2,), "int32"), "float32 and int64"),
        (((2, 3, 4, 4), "float32"), ((1,), "int64"), "timestep [1] must be [2]"),
        (((1, 3, 4, 4), "float32"), ((2,), "int64"), "sample [1, 3, 4, 4] must hold 2 lanes of 48"),
    ],
)
def test_prepare_refuses(sample: Any, timestep: Any, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        small_arena().kernels.prepare(
            buffer(np.zeros(1, np.int32)), HostBuffer(*sample), HostBuffer(*timestep), guided=True
        )
    assert says in caught.value.message


def test_an_arena_that_does_not_fit_together_is_refused() -> None:
    arena = small_arena()
    good = ArenaBuffers(arena.x, arena.history, arena.rows, arena.step, arena.seed, arena.fault, arena.y)
    wrong = {
        "history": arena.history.array[:2],
        "y": arena.y.array[:1],
        "image": arena.x.array[:, :1].copy(),
        "mask": arena.x.array,
        "noise": arena.x.array.astype(np.float64),
        "rows": arena.rows.array[..., :8].copy(),
        "step": arena.step.array.astype(np.int64),
        "fault": arena.fault.array[:1],
        "latents": arena.x.array.transpose(0, 1, 3, 2)[:, :, ::2],
    }
    for name, value in wrong.items():
        with pytest.raises(BadInput, match="no arena of lanes"):
            HostStepKernels(replace(good, **{name: HostBuffer(value.shape, str(value.dtype), value)}))
    for shape in ((2, 4, 4), (3, 4, 5), (3, 0, 4)):
        with pytest.raises(BadInput, match="no arena of lanes"):
            HostStepKernels(good, shape)
    with pytest.raises(BadInput, match="no instruction set 'mmx'; allowed are"):
        HostStepKernels(good, isa="mmx")
    for threads in (-1, 100_000, 2**40):
        with pytest.raises(BadInput, match="no arena of lanes"):
            HostStepKernels(good, threads=threads)


def test_buffers_of_another_device_are_refused() -> None:
    class Foreign:
        ptr, shape, dtype, nbytes = 0, (1,), "int32", 4

    with pytest.raises(BadInput, match="Foreign is not in host memory"):
        small_arena().kernels.prepare(
            Foreign(), HostBuffer((1, 3, 4, 4), "float32"), HostBuffer((1,), "float32"), guided=False
        )
