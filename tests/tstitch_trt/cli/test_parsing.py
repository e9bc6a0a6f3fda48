from __future__ import annotations

import pytest

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._parsing import parse_fractions, parse_interval, parse_numbers, parse_pairs
from tstitch_trt.request.labels import parse_labels

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
