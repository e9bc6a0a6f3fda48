"""Parsing a request: whatever is given, it is one typed value or a ``BadInput``, and no engine runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.manifests import manifest, member
from tstitch_engines.bundle.manifest import Conditioning, Decoder, Defaults, Manifest, TextInputs
from tstitch_engines.errors import BadInput, NotFinite, UnknownName
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.request.limits import Limits
from tstitch_trt.request.options import SampleKeywords, SampleOptions
from tstitch_trt.request.parse import ParsedRequest, parse_request

NAMES = ("T-shirt", "Sneaker", "Bag", *(f"class {i}" for i in range(3, 10)))
CLASSES = manifest(conditioning=Conditioning(classes=10, null=10, names=NAMES))
EMBEDDING = np.zeros((2, 5, 10), np.float32)


def parse(asked: Mapping[str, Any], made: Manifest = CLASSES) -> ParsedRequest:
    profiles = {name: ShapeProfile({"B": Range(1, 8, 8)}) for name in made.members}
    options = SampleOptions.from_keywords(asked)
    parsed = parse_request(made, Limits.of(made, profiles), options)
    parsed.check(made, make_plan(made, options.plan))
    return parsed


def text_bundle(**changes: Any) -> Manifest:
    text = TextInputs(hidden=(), width=10, pooled="text_encoder", pooled_width=6, time_ids="aesthetic")
    base = msgspec.structs.replace(member(), text=text, **changes)
    # An element is a pixel, so that pictures and latents of one size are tried.
    decoder = Decoder(kind="vae", factor=1)
    defaults = Defaults(schedule="base")
    return manifest({"base": base}, conditioning=Conditioning(kind="text"), decoder=decoder, defaults=defaults)


TEXT = text_bundle()
PAINTER = text_bundle(inpaints=True, controlled=True)


def test_the_record_has_the_keywords_of_sample() -> None:
    known = [field.name for field in fields(SampleOptions) if field.name != "plan"]
    assert set(SampleKeywords.__annotations__) - {field.name for field in fields(SampleOptions().plan)} == set(known)


def test_class_names_are_labels() -> None:
    assert parse({"labels": "sneaker"}).labels == (1,)
    assert parse({"labels": ["Sneaker", 3, np.int64(0)]}).labels == (1, 3, 0)
    assert parse({"labels": "bag, 4-6"}).labels == (2, 4, 5, 6)
    assert parse({"labels": np.array([1, 2]), "n": 3}).labels == (1, 2, 1)
    assert parse({}).labels == (0,)
    with pytest.raises(BadInput, match="did you mean 'Sneaker'"):
        parse({"labels": "sneakers"})


def test_images_are_counted_and_seeded() -> None:
    assert parse({"labels": [1, 2], "seed": 7}).seeds == (7, 8)
    assert parse({"seeds": np.array([3, 1], np.uint64)}).seeds == (3, 1)
    assert parse({"latents": np.zeros((3, 4, 8, 8))}).n == 3
    assert parse({"image": np.zeros((2, 8, 8, 4), np.uint8)}).n == 2
    assert parse({"prompt_embeds": EMBEDDING, "pooled_prompt_embeds": np.zeros((2, 6))}, TEXT).n == 2
    assert parse({"prompt": "a", "negative_prompt": ["b", "c"], "guidance": 2.0}, TEXT).n == 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"seed": "a"}, "seed 'a' is out of range"),
    ({"seed": -1}, "seed -1 is out of range"),
    ({"seed": True}, "seed True is out of range"),
    ({"seed": 2**64 - 1, "n": 2}, "seed 18446744073709551616 is out of range"),
    ({"seeds": 3}, "seeds is 3; allowed is a list"),
    ({"seeds": "12"}, "seeds is '12'"),
    ({"seed": 3, "seeds": [1, 2]}, "both seed 3 and seeds [1, 2] were given"),
    ({"n": "3"}, "n is '3'; allowed is a whole number from 0 to 100000"),
    ({"n": 10**9}, "n is 1000000000"),
    ({"n": 10**6000}, "n is something of type int"),
    ({"labels": [1.5]}, "label 1.5 is out of range; allowed is 0 to 9, or a class name"),
    ({"labels": "unknown class"}, "label 'unknown class' is no number, range or class name"),
    ({"labels": [1, 2, 3], "n": 2}, "labels has 3 entries and n asks for 2"),
    ({"labels": "0-4", "seeds": [1, 2]}, "labels has 5 entries and seeds asks for 2"),
    ({"image": np.zeros((2, 8, 8, 4), np.uint8), "n": 1}, "image has 2 entries and n asks for 1"),
    ({"labels": {1: 2}}, "labels is {1: 2}; allowed is a class number or name"),
    ({"labels": "\ud800"}, "half of a surrogate pair"),
    ({"prompt": "a fox"}, "it understands no text"),
    ({"height": "x"}, "height is 'x'; allowed is a whole number from 1 to 1000000"),
    ({"height": [8]}, "height is [8]"),
    ({"width": 10**400}, "0000; allowed is a whole number"),
    ({"latents": np.zeros((1, 4, 8, 8), np.int32)}, "latents are int32[1, 4, 8, 8]; needed is float32[N, 4, 8, 8]"),
    ({"latents": [[1.0], [2.0, 3.0]]}, "a list can't be read as latents"),
    ({"latents": np.full((1, 4, 8, 8), np.nan)}, "NaN or infinity in the latents given for image 0"),
    ({"latents": np.full((1, 4, 8, 8), 1e300)}, "NaN or infinity in the latents given for image 0"),
    ({"mask": np.zeros((8, 8))}, "mask was given without a picture"),
    ({"image": np.zeros((8, 8, 4), np.uint8), "mask": np.full((8, 8), np.nan)}, "NaN or infinity in the mask"),
    ({"image": np.full((1, 4, 8, 8), np.nan)}, "NaN or infinity in the latents given as image"),
    ({"image": "file.png"}, "needed is uint8 [H,W,4]"),
    (
        {"image": np.zeros((8, 8, 4), np.uint8), "strength": float("nan")},
        "strength is nan; allowed is a number from 0 to 1",
    ),
    ({"image": np.zeros((8, 8, 4), np.uint8), "strength": "1"}, "strength is '1'; allowed is a number"),
    ({"start_step": 1.5}, "start_step is 1.5"),
    ({"control": np.full((1, 3, 8, 8), np.nan)}, "control is floats that are not all from 0 to 1"),
]
BAD_TEXTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 3}, "prompt is 3; allowed is a text or a list of texts"),
    ({"prompt": ["a", None]}, "a text of prompt is None; allowed is a text"),
    ({"prompt": "a \udcff fox"}, "character 2 is half of a surrogate pair"),
    ({"prompt": "x" * 10_000_000}, "prompt has 10000000 characters; allowed are 20000"),
    ({"prompt": []}, "prompt is []"),
    ({"prompt": ["a", "b"], "n": 1}, "prompt has 2 entries and n asks for 1"),
    ({"prompt": "a", "negative_prompt": ["b", "c"], "n": 1}, "negative_prompt has 2 entries"),
    ({"prompt_embeds": EMBEDDING, "n": 1}, "prompt_embeds has 2 entries"),
    ({"prompt": "a", "control": np.zeros((2, 8, 8, 3), np.uint8), "n": 1}, "control has 2 entries"),
    ({"prompt": "a", "crop": "12"}, "crop is '12'; allowed are two whole numbers of pixels"),
    ({"prompt": "a", "original_size": (64, 0)}, "original_size is 0"),
    ({"prompt": "a", "aesthetic_score": "6"}, "aesthetic_score is '6'; allowed is a number"),
    ({"prompt_embeds": {3: EMBEDDING}}, "allowed is a dict by name"),
    ({"prompt_embeds": EMBEDDING.astype(int)}, "prompt_embeds is int64[2, 5, 10]; needed is float[N, T, D]"),
    ({"prompt": "a", "labels": 1}, "draws from text: it has no classes"),
]


@pytest.mark.parametrize(
    ("made", "asked", "words"),
    [(CLASSES, *case) for case in BAD] + [(TEXT, *case) for case in BAD_TEXTS],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_can_be_refused_is_refused_with_value_and_way_out(
    made: Manifest, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput) as caught:
        parse(asked, made)
    assert words in caught.value.message
    assert caught.value.hint
    assert len(str(caught.value)) < 700


def test_arrays_that_are_not_finite_are_bad_input_and_not_finite() -> None:
    with pytest.raises(NotFinite) as caught:
        parse({"latents": np.full((1, 4, 8, 8), np.inf)})
    assert (isinstance(caught.value, BadInput), caught.value.exit_code) == (True, 2)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("num_inference_steps", "did you mean steps=?"), ("guidance_scale", "did you mean guidance=?"),
     ("num_images_per_prompt", "did you mean n=?"), ("generator", "did you mean seed=?"),
     ("output_type", "did you mean decode=?"), ("promt", "did you mean 'prompt'?")],
)  # fmt: skip
def test_an_unknown_keyword_names_ours(name: str, hint: str) -> None:
    with pytest.raises(UnknownName) as caught:
        parse({name: 1})
    assert caught.value.hint == hint


# --- anything at all

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, 2**64])
    | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8) | st.binary(max_size=4)
    | st.sampled_from([np.int64(3), np.float32("nan"), np.bool_(True), object(), complex(1, 2), np.datetime64("NaT")])
)  # fmt: skip
SHAPES = [(), (0,), (2,), (8, 8), (8, 8, 3), (8, 8, 4), (2, 8, 8), (1, 4, 8, 8), (1, 3, 8, 8), (2, 5, 10), (2, 6)]
FILLED = [np.float16(1), np.float32("nan"), 0.5, 1e300, np.int8(-1), np.uint8(200), True, 1j, "a", None]
ARRAYS = st.builds(np.full, st.sampled_from(SHAPES), st.sampled_from(FILLED))
JUNK = (
    SCALARS
    | ARRAYS
    | st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from(["base", "small", 3, "eta"]), inner, max_size=2)
        ),
        max_leaves=4,
    )
)
ENOUGH: dict[str, Any] = {"image": np.zeros((8, 8, 4), np.uint8), "mask": np.ones((8, 8), bool)}
COMPANIONS: list[tuple[Manifest, dict[str, Any]]] = [
    (CLASSES, {}),
    (CLASSES, ENOUGH),
    (TEXT, {"prompt_embeds": EMBEDDING}),
    (PAINTER, {"prompt": "a fox", "image": np.zeros((8, 8, 3), np.uint8), "mask": np.ones((8, 8))}),
]


@pytest.mark.parametrize("name", SampleKeywords.__annotations__)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(value=JUNK, which=st.sampled_from(COMPANIONS))
def test_any_value_parses_or_is_bad_input(name: str, value: Any, which: tuple[Manifest, dict[str, Any]]) -> None:
    made, others = which
    with warnings.catch_warnings(), suppress(BadInput):
        warnings.simplefilter("error")
        parse({**others, "steps": 4, name: value}, made)
