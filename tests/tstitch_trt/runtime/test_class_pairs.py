"""Whole trajectories of LDM and U-ViT pairs on our engines, against PyTorch's modules in a plain float64 loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tstitch_trt
from support.class_pairs import PAIRS, ClassPair
from support.compare import relative_error
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.device.host_kernels import normal
from tstitch_engines.device.step_row import INITIAL_NOISE_STEP
from tstitch_trt.solvers.noise_schedule import NoiseSchedule

LABELS, SEEDS, STEPS, GUIDANCE = [3, 7], [11, 5], 5, 2.5


SLOW = {name: [pytest.mark.slow] if name in ("ldm-diffusers", "dit-uvit") else [] for name in PAIRS}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=marks) for name, marks in SLOW.items()])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ClassPair:
    return PAIRS[request.param](tmp_path_factory.mktemp(request.param))


def reference(pair: ClassPair, names: list[str], x: np.ndarray) -> np.ndarray:
    """DDIM (arXiv 2010.02502, eq. 12 at eta 0) from the large member's noise levels, guided (arXiv 2207.12598, eq. 6).

    A member that was trained with other noise is asked at the time at which its own process is as noisy.
    """
    schedule = NoiseSchedule.from_spec(pair.large.noise)
    times = (np.arange(STEPS) * (1000 // STEPS))[::-1]
    for index, (name, t) in enumerate(zip(names, times, strict=True)):
        now = schedule.alphas_cumprod[t]
        after = schedule.alphas_cumprod[times[index + 1]] if index + 1 < STEPS else 1.0
        own = NoiseSchedule.from_spec(pair.part(name).noise).alphas_cumprod
        own_sigma, sigma = np.sqrt(1 / own - 1), np.sqrt(1 / now - 1)
        told = float(np.interp(np.log(sigma), np.log(own_sigma), np.arange(1000)))
        cond, null = (pair.run(name, x, told, labels) for labels in (LABELS, [10] * len(LABELS)))
        eps = null + GUIDANCE * (cond - null)
        clean = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * eps
    return x


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_trajectory_equals_a_float64_loop_over_the_modules(pair: ClassPair, fraction: float) -> None:
    with tstitch_trt.load(pair.bundle, threads=1) as runtime:
        result = runtime.sample(
            labels=LABELS, seeds=SEEDS, steps=STEPS, solver="ddim", spacing="leading", guidance=GUIDANCE,
            fraction=fraction,
        )  # fmt: skip
    small = round(fraction * STEPS)
    names = ["small"] * small + ["large"] * (STEPS - small)
    assert list(result.schedule.names) == names
    noise = [normal(seed, INITIAL_NOISE_STEP, int(np.prod(pair.latent))).reshape(pair.latent) for seed in SEEDS]
    want = reference(pair, names, np.stack(noise).astype(np.float64))
    assert np.abs(result.latents - want).max() < 1e-3 * np.abs(want).max()


def test_the_manifest_says_what_each_member_was_trained_with(pair: ClassPair) -> None:
    manifest = open_bundle(pair.bundle).manifest
    assert manifest.noise == pair.large.noise
    for name, member in manifest.members.items():
        trained = pair.part(name).noise
        assert member.noise == (None if trained == manifest.noise else trained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ldm", "uvit"])
def test_half_precision_stays_close(kind: str, tmp_path: Path) -> None:
    pair = PAIRS[kind](tmp_path)
    pair.build(tmp_path / "half.bundle", precision="fp16")
    with tstitch_trt.load(tmp_path / "half.bundle", threads=1) as runtime:
        result = runtime.sample(labels=LABELS, seeds=SEEDS, steps=STEPS, solver="ddim", spacing="leading", fraction=0.4)
    with tstitch_trt.load(pair.bundle, threads=1) as runtime:
        want = runtime.sample(labels=LABELS, seeds=SEEDS, steps=STEPS, solver="ddim", spacing="leading", fraction=0.4)
    assert relative_error(result.latents, want.latents) < 0.05


@pytest.mark.parametrize("kind", [pytest.param("ldm-diffusers", marks=pytest.mark.slow), "uvit"])
def test_tensorrt_rtx_compiles_the_pair_at_two_precisions(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    manifest = PAIRS[kind](tmp_path).build(
        tmp_path / "rtx.bundle", backend="tensorrt-rtx", precision={"small": "fp32", "large": "fp16"}
    )
    open_bundle(tmp_path / "rtx.bundle")
    for name, precision in (("small", "fp32"), ("large", "fp16")):
        (record,) = manifest.members[name].engines
        assert (record.identity.backend, record.identity.precision) == ("tensorrt-rtx", precision)
        assert record.files[0].bytes > 10_000
