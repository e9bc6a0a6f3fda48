"""Bundles with an altered manifest beside sound engines: loaded and drawn from, or refused, at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tstitch_trt
from support.hand_made import made_member, text_bundle
from support.hostile import altered, dumps, only_our_errors
from tstitch_engines.bundle.bundle import MANIFEST
from tstitch_engines.bundle.manifest import TextInputs

TOKENS = np.ones((1, 5, 16), np.float32)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text, inputs = TextInputs(hidden=(), width=16), {"encoder_hidden_states": ("T", 16)}
    members = {name: made_member(name, inputs=inputs, text=text) for name in ("small", "large")}
    return text_bundle(tmp_path_factory.mktemp("hostile") / "a.bundle", members).root


def use(bundle: Path) -> None:
    with tstitch_trt.load(bundle, threads=1, trust=True) as runtime:
        drawn = runtime.sample(
            prompt_embeds=TOKENS, negative_prompt_embeds=TOKENS, guidance=2.0, steps=3, decode=False, seeds=[1]
        )
        assert np.isfinite(drawn.latents).all()


def test_the_bundle_itself(good: Path) -> None:
    use(good)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_altered_manifests(data: st.DataObject, good: Path) -> None:
    bundle = good.parent / "hostile.bundle"
    if not bundle.exists():
        shutil.copytree(good, bundle)
    (bundle / MANIFEST).write_bytes(dumps(data.draw(altered(json.loads((good / MANIFEST).read_bytes()), most=1))))
    only_our_errors(lambda: use(bundle))
