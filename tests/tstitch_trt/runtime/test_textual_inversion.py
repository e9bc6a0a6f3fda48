"""Textual inversions in a bundle's prompts: the tokens that diffusers' pipelines make of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.diffusers_pipelines import sd_pipeline
from tstitch_engines.errors import BadInput
from tstitch_export.families import open_family
from tstitch_trt.runtime.text_encoder import TextEncoder

TEXTS = [
    "a <cat> photo",
    "A photo of <cat>, <cat><cat> and mystyle",
    "a <CAT> is written in capitals, and so is <ONE>",
    "mystyles, <one>, <One>",
    "the second alone: <cat>_1",
    "a <cat> <cat>_1 <cat>_2 by hand",
    "no such thing",
    "",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TextEncoder]:
    """A pipeline with inversions of three, two and one vectors, and our encoder of the folder it was saved in."""
    folder = tmp_path_factory.mktemp("inversions")
    pipe = sd_pipeline(folder / "plain")
    width = pipe.text_encoder.config.hidden_size
    for name, vectors in (("<cat>", 3), ("mystyle", 2), ("<One>", 1)):
        pipe.load_textual_inversion({name: torch.randn(vectors, width)})
    pipe.save_pretrained(folder / "saved")
    family = open_family("clip-text")
    found = family.inspect(folder / "saved/text_encoder", {})
    assets = family.assets(found, folder)
    network = SimpleNamespace(config=found.config)
    return pipe, TextEncoder(SimpleNamespace(network=network), assets["tokenizer"])  # type: ignore[arg-type]


@pytest.mark.parametrize("text", TEXTS)
def test_several_vectors_are_several_tokens(trained: tuple[Any, TextEncoder], text: str) -> None:
    pipe, encoder = trained
    written = pipe.maybe_convert_prompt(text, pipe.tokenizer)  # the text itself, where a token has one vector
    assert encoder.tokens(text) == pipe.tokenizer(written, add_special_tokens=False).input_ids


def test_a_prompt_that_would_become_absurdly_long(trained: tuple[Any, TextEncoder], monkeypatch: Any) -> None:
    monkeypatch.setattr("tstitch_trt.runtime.text_encoder._LONGEST", 30)
    with pytest.raises(BadInput, match="'<cat>', a textual inversion of many vectors, so often that it becomes 43"):
        trained[1].tokens("<cat> <cat>")
