from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tstitch_engines.device.open import parse_device
from tstitch_engines.errors import BadInput
from tstitch_engines.spec import Range
from tstitch_trt.cli._options import parse_budgets
from tstitch_trt.cli._parsing import (
    parse_age,
    parse_fractions,
    parse_interval,
    parse_numbers,
    parse_pairs,
    parse_pixels,
    parse_size,
)
from tstitch_trt.request.labels import parse_labels

PARTS = st.sampled_from(
    ["0", "3", "0-9", "9-7", "-1", "0-99999", "0-99999999", "9" * 25, "²", "٣", "Bag", "", " ", "1x1", "0.5", "1e400",
     "1e999999999", "1e-99999999", "1/0", "a=b", "=", "\0", "20GB", "30d", "9" * 5000, "8x9999999999", "5:3", "1:2"]
)  # fmt: skip
LISTS = st.lists(PARTS, max_size=6).map(",".join) | st.lists(PARTS, max_size=4).map(":".join)
TEXTS = LISTS | st.text(st.characters(exclude_categories=()), max_size=30)
PARSERS: dict[str, Callable[[str], object]] = {
    "labels": lambda text: parse_labels(text, classes=10, names=NAMES),
    "numbers": lambda text: parse_numbers(text, what="seed", example="--seeds 1,2"),
    "fractions": parse_fractions,
    "interval": parse_interval,
    "pixels": parse_pixels,
    "pairs": lambda text: parse_pairs(text.split(","), option="--member", value="FILE"),
    "size": lambda text: parse_size(text, option="--max-size"),
    "age": lambda text: parse_age(text, option="--older-than"),
    "budgets": parse_budgets,
    "range": Range.parse,
    "device": parse_device,
}


@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
@settings(max_examples=60, deadline=2000, derandomize=True)
@given(text=TEXTS)
def test_any_text_is_parsed_or_is_bad_input(parse: Callable[[str], object], text: str) -> None:
    told = ""
    try:
        parse(text)
    except BadInput as error:
        told = str(error)
    assert len(told) < 1000


def test_the_values_of_one_list_are_counted_together() -> None:
    bomb = ",".join(["0-9"] * 20_000)
    for parse in (PARSERS["labels"], PARSERS["numbers"]):
        with pytest.raises(BadInput, match="more than 100,000 values"):
            parse(bomb)


NAMES = ("T-shirt/top", "Trouser", "Ankle boot")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("3,5,0-9", [3, 5, *range(10)]),
        ("9-7", [9, 8, 7]),
        ("2-2", [2]),
        (" 1 , 0 ", [1, 0]),
    ],
)
def test_labels_are_numbers_and_ranges(text: str, labels: list[int]) -> None:
    assert parse_labels(text, classes=10) == labels


def test_labels_may_be_names_even_with_a_dash_in_them() -> None:
    assert parse_labels("t-shirt/top,ankle boot,1-2", classes=3, names=NAMES) == [0, 2, 1, 2]


@pytest.mark.parametrize(
    ("text", "value", "allowed", "hint"),
    [
        ("10", "10", "0 to 9", "--labels 0-9"),
        ("-1", "-1", "0 to 9", "--labels 0-9"),
        ("8-12", "10", "0 to 9", "--labels 0-9"),
        ("cat", "'cat'", "0 to 9", "--labels"),
        ("1,,2", "'1,,2'", "empty", "--labels"),
        ("", "''", "empty", "--labels"),
        ("0-99999999999", "0-99999999999", "100,000", "--labels"),
    ],
)
def test_a_wrong_label_is_named_with_what_is_allowed(text: str, value: str, allowed: str, hint: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_labels(text, classes=10)
    assert value in caught.value.message
    assert allowed in caught.value.message
    assert hint in caught.value.hint


def test_a_mistyped_class_name_names_the_nearest() -> None:
    with pytest.raises(BadInput) as caught:
        parse_labels("trousers", classes=3, names=NAMES)
    assert "'Trouser'" in caught.value.hint


def test_fractions_as_a_range_are_exact_and_reach_the_stop() -> None:
    assert parse_fractions("0:1:0.1") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert parse_fractions("0,0.4,1") == (0.0, 0.4, 1.0)
    assert parse_fractions("0:1:0.3") == (0.0, 0.3, 0.6, 0.9)


@pytest.mark.parametrize("text", ["0:1", "0:1:0", "1:0:0.1", "0,1.5", "x", "0,0", "-0.1", "0:1:1e-9", "nan", "1/0"])
def test_wrong_fractions_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="hint: "):
        parse_fractions(text)


def test_seeds_and_intervals_and_pairs() -> None:
    assert parse_numbers("1,5-7", what="seed", example="--seeds 1") == [1, 5, 6, 7]
    assert parse_interval("10:40") == (10, 40)
    assert parse_pairs(["small=S.pt", "large=a=b.pt"], option="--member", value="CHECKPOINT") == {
        "small": "S.pt",
        "large": "a=b.pt",
    }


@pytest.mark.parametrize("text", ["40:10", "10", "a:b", "5:5", "-1:3"])
def test_wrong_intervals_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="FIRST < STOP"):
        parse_interval(text)


@pytest.mark.parametrize("texts", [["small"], ["=x"], ["small="], ["small=a", "small=b"]])
def test_wrong_pairs_are_refused(texts: list[str]) -> None:
    with pytest.raises(BadInput, match=r"small|=x"):
        parse_pairs(texts, option="--member", value="CHECKPOINT")
