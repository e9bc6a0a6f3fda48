"""The CLIP score against transformers' own model, as a folder of it and as a pair of networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tstitch_trt
from support.hand_made_parts import World
from support.tiny_families import clip_tokenizer_folder, clip_vocabulary
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_engines.quiet import silence_output
from tstitch_trt.study.evaluate.evaluate import evaluate
from tstitch_trt.study.image_set import ImageSet
from tstitch_trt.study.quality.clip import Clip, normalised
from tstitch_trt.study.quality.scorer import Scorer
from tstitch_trt.study.settings import setting_of

PROMPTS = ("a red fox in the snow", "blue sky", "")
SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    place = tmp_path_factory.mktemp("clip") / "model"
    clip_tokenizer_folder(place)
    vocabulary, _ = clip_vocabulary()
    bos, eos = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    config = CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(vocabulary)},
        vision_config={**small, "image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    CLIPModel(config).eval().save_pretrained(place)
    return place


def pictures(height: int = 48, width: int = 40, count: int = 3) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def by_transformers(folder: Path, images: Any) -> Any:
    """``100 max(cos, 0)`` from the model's own logits."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    texts = tokenizer(list(PROMPTS), padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        found = model(pixel_values=torch.from_numpy(normalised(images, SIDE)), **texts)
    cosines = found.logits_per_image.diag() / model.logit_scale.exp()
    return 100 * np.maximum(cosines.detach().numpy(), 0)


def test_pictures_are_prepared_as_clips_are() -> None:
    """The shorter side to 32 by Pillow on bytes, the middle, then CLIP's mean and deviation of each channel."""
    images = pictures(48, 40)
    picture = Image.fromarray(images[1]).resize((SIDE, 38), Image.Resampling.BICUBIC).crop((0, 3, SIDE, 35))
    scaled = np.asarray(picture) / 255
    want = (scaled - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    got = normalised(images, SIDE)[1].transpose(1, 2, 0)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert normalised(images[..., :1], SIDE).shape == (3, 3, SIDE, SIDE)


def test_the_score_is_that_of_the_models_own_cosines(folder: Path) -> None:
    images = pictures()
    np.testing.assert_allclose(Clip(folder)(images, PROMPTS), by_transformers(folder, images), rtol=1e-4, atol=1e-4)


class ImageNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(3, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x.mean((2, 3)))


class TextNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(2000, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.words(input_ids).cumsum(1).mean(1)


def test_a_pair_of_networks_is_given_pictures_of_its_size_and_77_tokens(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    torch.manual_seed(1)
    image, text = ImageNet().eval(), TextNet().eval()
    with silence_output():
        torch.onnx.export(
            image, (torch.zeros(1, 3, SIDE, SIDE),), str(tmp_path / "image.onnx"), dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "N"}},
        )  # fmt: skip
    torch.jit.script(text).save(str(tmp_path / "text.pt"))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = tokenizer(list(PROMPTS), padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        pair = image(torch.from_numpy(normalised(pictures(), SIDE))), text(ids)
        want = 100 * torch.cosine_similarity(*pair).clamp(min=0)
    np.testing.assert_allclose(Clip(tmp_path)(pictures(), PROMPTS), want.numpy(), rtol=1e-4, atol=1e-4)


def test_a_text_bundle_is_scored_against_its_prompts(folder: Path, tmp_path: Path) -> None:
    bundle: Bundle = World().bundle(tmp_path)
    with tstitch_trt.load(bundle, threads=1) as runtime:
        setting = setting_of(runtime.manifest, schedule="plain", steps=2, guidance=1.0)
        scorer = Scorer.of(bundle, "clip", clip=folder)
        found = evaluate(
            runtime, scorer, [setting], ImageSet(3, 0, PROMPTS), work=tmp_path / "work", resamples=5, command="a test"
        )
        drawn = runtime.sample(schedule="plain", steps=2, guidance=1.0, prompt=list(PROMPTS), seeds=[0, 1, 2])
    want = by_transformers(folder, drawn.images).mean()
    assert found.points[0].measures["clip"].value == pytest.approx(want, rel=1e-3)


def test_what_is_no_clip_model(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no folder"):
        Clip(tmp_path / "none")
    with pytest.raises(BadInput, match=r"neither config.json nor image.onnx"):
        Clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(BadInput, match="type 'bert'; allowed is clip"):
        Clip(tmp_path)
    with pytest.raises(Unavailable, match="clip needs a network"):
        Scorer.of(World().bundle(tmp_path), "clip")
