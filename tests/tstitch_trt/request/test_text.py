"""Text bundles without encoders: embeddings of each member's own kind reach it, whatever the chunk, half and size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.hand_made import CHANNELS, Made, made_member, text_bundle
from support.reference import walk
from support.tiny import TinyPair
from tstitch_engines.bundle.manifest import TextInputs
from tstitch_engines.device.host_kernels import normal
from tstitch_engines.device.step_row import INITIAL_NOISE_STEP
from tstitch_engines.errors import BadInput, NotFinite, OutOfProfile, Unavailable, UnknownName
from tstitch_trt import Runtime
from tstitch_trt.bench.bench import measure
from tstitch_trt.serve import Engine
from tstitch_trt.study.budget import Conditions
from tstitch_trt.study.calibrate.calibrate import calibrate
from tstitch_trt.study.store import save_study

STEPS = 6


def members() -> dict[str, Made]:
    """A base and a refiner as SDXL has them, of other widths and micro-conditioning, in two precisions."""
    base = made_member(
        "base",
        inputs={"encoder_hidden_states": ("T", 10), "text_embeds": (6,), "time_ids": (6,)},
        text=TextInputs(
            hidden=("text_encoder", "text_encoder_2"), width=10, pooled="text_encoder_2", pooled_width=6,
            time_ids="sizes", zero_null=True,
        ),
    )  # fmt: skip
    refiner = made_member(
        "refiner",
        inputs={"encoder_hidden_states": ("T", 7), "text_embeds": (6,), "time_ids": (5,)},
        parametrisation="v",
        precision="fp16",
        text=TextInputs(
            hidden=("text_encoder_2",), width=7, pooled="text_encoder_2", pooled_width=6, time_ids="aesthetic"
        ),
    )
    return {"base": base, "refiner": refiner}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    bundle = text_bundle(tmp_path_factory.mktemp("text") / "pair.bundle", members())
    return tstitch_trt.load(bundle, threads=1)


def embeds(count: int, *, tokens: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((count, *shape)).astype(np.float32)

    return {
        "prompt_embeds": {"base": draw(tokens, 10), "refiner": draw(tokens, 7)},
        "negative_prompt_embeds": {"base": draw(tokens, 10), "refiner": draw(tokens, 7)},
        "pooled_prompt_embeds": draw(6),
        "negative_pooled_prompt_embeds": draw(6),
    }


def expected(runtime: Runtime, given: Mapping[str, Any], negative: Mapping[str, Any], **settings: Any) -> np.ndarray:
    """The trajectory in float64. ``given``, ``negative``: member -> input -> one row per image."""
    size, seeds = settings.pop("size", (8, 8)), settings.pop("seeds")
    plan = runtime.plan(steps=STEPS, **settings)
    shape = (len(seeds), CHANNELS, *size)
    oracles = members()

    def noise(step: int) -> np.ndarray:
        return np.stack([normal(seed, step, int(np.prod(shape[1:]))) for seed in seeds]).reshape(shape)

    def model(x: np.ndarray, t: float, step: int) -> Any:
        name = plan.schedule.names[step]
        conditional = oracles[name](x, t, given[name])
        return (conditional, oracles[name](x, t, negative[name])) if plan.guided[step] else conditional

    start = plan.init_scale * noise(INITIAL_NOISE_STEP)
    return walk(plan.rows, start, model, np.stack([noise(step) for step in range(STEPS)]))[-1]


def rows(given: Mapping[str, Any], which: str, count: int, ids: Mapping[str, Any]) -> dict[str, Any]:
    pick = np.arange(count) % len(given["pooled_prompt_embeds"])
    return {
        name: {
            "encoder_hidden_states": given[f"{which}prompt_embeds"][name][pick],
            "text_embeds": given[f"{which}pooled_prompt_embeds"][pick],
            "time_ids": np.tile(ids[name], (count, 1)),
        }
        for name in ("base", "refiner")
    }


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() < 5e-3 * np.abs(theirs).max())  # one of the members is fp16


@pytest.mark.parametrize("guidance", [1.0, 4.0, {"base": 3.0, "refiner": 1.0}], ids=str)
@pytest.mark.parametrize("tokens", [5, 12])
def test_each_member_is_given_its_own_embeddings(runtime: Runtime, guidance: Any, tokens: int) -> None:
    """Five images of three prompts, over engines of at most four lanes: chunks, both halves and the going round."""
    given = embeds(3, tokens=tokens)
    asked = given if guidance != 1.0 else {k: v for k, v in given.items() if not k.startswith("negative")}
    seeds = [5, 4, 3, 2, 1]
    result = runtime.sample(**asked, seeds=seeds, steps=STEPS, guidance=guidance)
    ids = {"base": [64, 64, 0, 0, 64, 64], "refiner": [64, 64, 0, 0, 6.0]}
    other = {"base": ids["base"], "refiner": [64, 64, 0, 0, 2.5]}
    want = expected(
        runtime, rows(given, "", 5, ids), rows(given, "negative_", 5, other), guidance=guidance, seeds=seeds
    )
    assert close(result.latents, want)
    assert result.seeds == tuple(seeds)
    assert result.images is None


def test_sizes_crops_and_scores_are_what_was_asked_for(runtime: Runtime) -> None:
    given = embeds(1)
    result = runtime.sample(
        **given, steps=STEPS, guidance=2.0, seed=3, height=80, width=48,
        original_size=(700, 500), crop=(8, 16), target_size=(640, 480),
        aesthetic_score=7.0, negative_aesthetic_score=1.0,
    )  # fmt: skip
    ids = {"base": [700, 500, 8, 16, 640, 480], "refiner": [700, 500, 8, 16, 7.0]}
    other = {"base": ids["base"], "refiner": [700, 500, 8, 16, 1.0]}
    want = expected(
        runtime, rows(given, "", 1, ids), rows(given, "negative_", 1, other), guidance=2.0, seeds=[3], size=(10, 6)
    )
    assert result.latents.shape == (1, CHANNELS, 10, 6)
    assert close(result.latents, want)


def test_without_a_negative_the_other_half_is_zeros_where_the_member_says_so(runtime: Runtime) -> None:
    given = embeds(2)
    asked = {k: v for k, v in given.items() if not k.startswith("negative")}
    result = runtime.sample(**asked, steps=STEPS, guidance=5.0, schedule="base")
    ids = {"base": [64, 64, 0, 0, 64, 64], "refiner": [64, 64, 0, 0, 6.0]}
    zeros = rows(given, "", 2, ids)
    for name in ("encoder_hidden_states", "text_embeds"):
        zeros["base"][name] = np.zeros_like(zeros["base"][name])
    want = expected(runtime, rows(given, "", 2, ids), zeros, guidance=5.0, schedule="base", seeds=[0, 1])
    assert close(result.latents, want)
    with pytest.raises(BadInput, match=r"unconditional half for member 'refiner'"):
        runtime.sample(**asked, steps=STEPS, guidance=5.0)


def test_any_size_in_any_order_is_the_same_alone(runtime: Runtime) -> None:
    """The arena, the slices and the kernels of one size leave nothing behind for the next."""
    given = embeds(1)
    sizes = [(64, 64), (128, 128), (32, 96), (128, 48), (64, 64), (32, 96)]
    seen: dict[tuple[int, int], np.ndarray] = {}
    for height, width in sizes:
        result = runtime.sample(**given, steps=4, guidance=2.0, height=height, width=width)
        assert result.latents.shape[2:] == (height // 8, width // 8)
        if (height, width) in seen:
            np.testing.assert_array_equal(result.latents, seen[height, width])
        seen[height, width] = result.latents
    noise = np.random.default_rng(0).standard_normal((1, CHANNELS, 4, 12)).astype(np.float32)
    assert runtime.sample(**given, steps=2, guidance=2.0, latents=noise).latents.shape == noise.shape


BAD: list[tuple[dict[str, Any], type[BadInput], str]] = [
    ({"height": 65}, OutOfProfile, "height 65 is no multiple of 16 pixels"),
    ({"height": 256}, OutOfProfile, "'base' 32..128 x 32..128, 'refiner' 32..128 x 32..128"),
    ({"width": 16}, OutOfProfile, "width 16 is outside"),
    ({"width": 64.0}, BadInput, "width is 64.0"),
    ({"labels": [1]}, BadInput, "draws from text: it has no classes"),
    ({"prompt": "a fox"}, BadInput, "both prompt and prompt_embeds"),
    ({"prompt_embeds": None}, BadInput, "nothing says what to draw"),
    ({"prompt_embeds": np.zeros((1, 5, 10), np.float32)}, BadInput, "member 'refiner' needs float[N, T, 7]"),
    ({"prompt_embeds": {"base": np.zeros((1, 5, 10), np.float32)}}, BadInput, "nothing for member 'refiner'"),
    ({"prompt_embeds": {"bass": np.zeros((1, 5, 10), np.float32)}}, UnknownName, "unknown member 'bass'"),
    ({"pooled_prompt_embeds": None}, BadInput, "takes a pooled embedding as well"),
    ({"negative_pooled_prompt_embeds": None}, BadInput, "negative_pooled_prompt_embeds was not"),
    ({"guidance": 1.0}, BadInput, "has no effect: no step of this plan is guided"),
    ({"original_size": (64,)}, BadInput, "original_size is (64,)"),
    ({"mask": np.zeros((64, 64))}, BadInput, "mask was given without a picture"),
    ({"control_scale": 1.0}, BadInput, "without a control picture"),
    ({"control": np.zeros((64, 64, 3), np.uint8)}, Unavailable, "has no ControlNet"),
    ({"image": np.zeros((64, 64, 3), np.uint8)}, Unavailable, "no picture encoder"),
    ({"image": np.zeros((64, 80, 3), np.uint8), "width": 64}, BadInput, "image is 80x64 pixels"),
    ({"image": np.zeros((64, 64), np.uint8)}, BadInput, "image is uint8[64, 64]; needed"),
    ({"promt": "a fox"}, UnknownName, "did you mean 'prompt'?"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD, ids=[str(next(iter(c))) for c, _, _ in BAD])
def test_bad_requests_name_value_and_way_out(
    runtime: Runtime, change: dict[str, Any], kind: type[BadInput], words: str
) -> None:
    asked = {**embeds(1), "guidance": 2.0, "steps": 4, **change}
    with pytest.raises(kind) as caught:
        runtime.sample(**asked)
    assert words in str(caught.value)
    assert caught.value.hint


def test_embeddings_that_do_not_fit(runtime: Runtime) -> None:
    given = embeds(1)
    longer = {"base": np.zeros((1, 6, 10), np.float32), "refiner": np.zeros((1, 6, 7), np.float32)}
    with pytest.raises(BadInput, match=r"5 tokens and negative_prompt_embeds 6"):
        runtime.sample(**{**given, "negative_prompt_embeds": longer}, steps=4, guidance=2.0)
    with pytest.raises(OutOfProfile, match=r"T = 13 is outside the profile; allowed is 1 to 12"):
        runtime.sample(**embeds(1, tokens=13), steps=4, guidance=2.0)
    given["pooled_prompt_embeds"][0, 0] = np.nan
    with pytest.raises(NotFinite, match="pooled_prompt_embeds for member 'base'"):
        runtime.sample(**given, steps=4, guidance=2.0)


def test_bench_measures_text_bundles_without_a_text_encoder(runtime: Runtime) -> None:
    for guidance in (1.0, 2.0):
        bench = measure(runtime, fractions=(0.0, 0.5), repeats=1, warmup=0, steps=2, guidance=guidance)
        assert [t.fraction for t in bench.trajectories] == [0.0, 0.5]
        assert all(member.step_ms > 0 for member in bench.members)


def test_a_prompt_without_text_encoders_says_what_to_give(runtime: Runtime) -> None:
    with pytest.raises(Unavailable) as caught:
        runtime.sample(prompt="a red fox", steps=4)
    assert "has no text_encoder and no text_encoder_2" in caught.value.message
    assert "prompt_embeds= [N,T,10] and pooled_prompt_embeds= [N,6] (member 'base')" in caught.value.hint


def test_a_prompt_for_a_class_bundle(tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as classes:
        with pytest.raises(BadInput, match="it understands no text"):
            classes.sample(prompt="a red fox", steps=2)
        with pytest.raises(OutOfProfile, match=r"height 16 is outside what was built: 'small' 8 x 8, 'large' 8 x 8"):
            classes.sample(labels=[1], steps=2, height=16)


def test_a_distilled_member_is_given_its_guidance_scale(tmp_path: Path) -> None:
    """As diffusers embeds it; such a member runs one half, the other both."""
    from diffusers import LatentConsistencyModelPipeline

    text = TextInputs(hidden=(), width=10)
    hidden = {"encoder_hidden_states": ("T", 10)}
    pair = {
        "lcm": made_member("lcm", inputs={**hidden, "timestep_cond": (32,)}, text=text, guidance_embedding=32),
        "full": made_member("full", inputs=hidden, text=text),
    }
    import torch

    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    want = embed(None, torch.tensor([6.5]), embedding_dim=32).numpy()
    given = {
        "prompt_embeds": np.ones((2, 5, 10), np.float32),
        "negative_prompt_embeds": np.zeros((1, 5, 10), np.float32),
    }
    with tstitch_trt.load(text_bundle(tmp_path / "lcm.bundle", pair), threads=1) as runtime:
        plan = runtime.plan(steps=STEPS, guidance=7.5)
        assert plan.guided == (False,) * 3 + (True,) * 3
        result = runtime.sample(**given, steps=STEPS, guidance=7.5)

        def model(x: np.ndarray, t: float, step: int) -> Any:
            rows_ = {"encoder_hidden_states": given["prompt_embeds"], "timestep_cond": np.repeat(want, 2, axis=0)}
            name = plan.schedule.names[step]
            conditional = pair[name](x, t, rows_)
            if not plan.guided[step]:
                return conditional
            zeros = {"encoder_hidden_states": np.zeros((2, 5, 10))}
            return conditional, pair[name](x, t, zeros)

        start = np.stack([normal(seed, INITIAL_NOISE_STEP, 256) for seed in (0, 1)]).reshape(2, CHANNELS, 8, 8)
        latents = walk(plan.rows, plan.init_scale * start, model, np.zeros((STEPS, 2, CHANNELS, 8, 8)))[-1]
        assert np.abs(result.latents - latents).max() < 1e-4 * np.abs(latents).max()


def test_distilled_and_plain_members_share_batches(tmp_path: Path) -> None:
    """Requests with other scales and shares, served at once, are each as they are alone."""
    text = TextInputs(hidden=(), width=10)
    hidden = {"encoder_hidden_states": ("T", 10)}
    pair = {
        "plain": made_member("plain", inputs=hidden, text=text),
        "lcm": made_member("lcm", inputs={**hidden, "timestep_cond": (32,)}, text=text, guidance_embedding=32),
    }
    rows = np.random.default_rng(0).normal(size=(2, 1, 5, 10)).astype(np.float32)
    asked = [(0.5, 7.5), (0.5, 1.0), (0.0, 3.0), (1.0, 3.0), (0.5, {"plain": 2.0, "lcm": -1.0})]
    requests: list[dict[str, Any]] = [
        {"prompt_embeds": rows[0], "steps": STEPS, "seed": seed, "fraction": fraction, "guidance": guidance}
        | ({"negative_prompt_embeds": rows[1]} if fraction and guidance != 1.0 else {})
        for seed, (fraction, guidance) in enumerate(asked)
    ]
    with tstitch_trt.load(text_bundle(tmp_path / "lcm.bundle", pair), threads=1) as runtime:
        alone = [runtime.sample(**request).latents for request in requests]
        assert runtime.sample(**requests[4]).plan.embedded == {"lcm": -1.0}
        with Engine(runtime) as engine:
            engine.warm_up()
            handles = [engine.submit(**request) for request in requests]
            for handle, want in zip(handles, alone, strict=True):
                assert np.abs(handle.result(timeout=60).latents - want).max() < 1e-5 * np.abs(want).max()
        with pytest.raises(BadInput, match="has no effect: the members that run take their scale as an input"):
            runtime.sample(**{**requests[0], "fraction": 0.0})
        with pytest.raises(BadInput, match=r"guidance_rescale 0\.7 has no effect"):
            runtime.sample(**requests[2], guidance_rescale=0.7)
        # A budget's schedule is not the request's own: what no step of it reads is left
        found = calibrate(runtime, batches=[1, 2], repeats=1, checks=1)
        save_study(runtime.bundle, found, key=Conditions.of(found).key)
        asked_for = {**requests[0], "guidance_rescale": 0.7}
        del asked_for["fraction"]
        chosen = runtime.sample(**asked_for, latency_budget_ms=1e9)
        assert chosen.schedule.counts == {"lcm": STEPS}
        np.testing.assert_array_equal(chosen.latents, runtime.sample(**{
            "prompt_embeds": rows[0], "steps": STEPS, "seed": 0, "fraction": 0.0, "guidance": 7.5,
        }).latents)  # fmt: skip
