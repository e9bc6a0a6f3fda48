"""Errors of ``tstitch_trt.accelerate`` and of calls name arguments that the caller has, and no files of the build."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tstitch_engines
import tstitch_export
import tstitch_trt
from support.accelerating import SD, fast, pipeline
from support.tiny_families import controlnet_folder, unet_folder
from tstitch_engines.errors import TStitchError
from tstitch_trt.pipeline.callers_words import reworded

# What a build of an accelerated pipeline, and a call, may pass through
BELOW = [Path(package.__file__).parent for package in (tstitch_export, tstitch_engines)]
BELOW += [Path(tstitch_trt.__file__).parent / name for name in
          ("runtime", "plan", "request", "solvers", "pipeline", "study/budget", "files.py")]  # fmt: skip
ELSEWHERE = ("/train/", "/quantise/", "make_fatbin", "pack_pair", "callers_words", "/signature.py")
FLAG = re.compile(r"(?<![\w-])--[a-z]")
COMMAND = re.compile(r"(?:tstitch-trt (?!build)[a-z]+|pip install)[^;,()]*")


def said(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "name" for part in node.values)  # type: ignore[misc]
    return None


def texts() -> Iterator[tuple[str, str]]:
    for place in BELOW:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if any(part in str(path) for part in ELSEWHERE):
                continue
            tree = ast.parse(path.read_text())
            docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
            for node in ast.walk(tree):
                text = said(node) if id(node) not in docs | pieces else None
                if text and FLAG.search(text):
                    yield path.name, text


def test_nothing_below_says_an_option_of_the_command_line() -> None:
    found = list(texts())
    assert len(found) > 100
    left = [(name, text) for name, text in found if FLAG.search(COMMAND.sub("", reworded(text)))]
    assert not left


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("let its steps run without: --option small.controlled=false",
         'let its steps run without: options={"small.controlled": False}'),
        ("the vae has 4 pixels per latent element; the recipe says 8",
         "the vae has 4 pixels per latent element; the pipeline's class says 8"),
        ("build with --precision bf16 or fp32", 'build with precision="bf16" or fp32'),
        ("one precision: --precision controlnet=fp16", 'one precision: precision={"controlnet": "fp16"}'),
        ("build again with a wider --tokens MIN:OPT:MAX", 'build again with a wider tokens="MIN:OPT:MAX"'),
        ("pass guidance=1 (--guidance 1), or build again with --batch 1:16:16",
         'pass guidance_scale=1, or build again with batch="1:16:16"'),
        ("raise --memory-limit (memory_limit=)", "raise memory_limit="),
        ("compile it: tstitch-trt build sd --member large=/tmp/x/large --option a=1 --backend onnxruntime -o b.bundle",
         'compile it: tstitch_trt.accelerate(..., options={"a": 1}, backend="onnxruntime")'),
        ("use --device cuda, or --backend onnxruntime on the CPU", 'use device="cuda", or backend="onnxruntime" on '
         "the CPU"),
        ("e.g. --steps 4, or set original_steps", "e.g. num_inference_steps=4, or set original_steps"),
        ("or: tstitch-trt quantise BUNDLE --mode int8", "or: tstitch-trt quantise BUNDLE --mode int8"),
    ],
)  # fmt: skip
def test_options_become_arguments(text: str, want: str) -> None:
    assert reworded(text) == want


# --- as they are raised


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders with small UNets that do not fit."""
    folder = tmp_path_factory.mktemp("unets")

    def made(kind: str = "least", **changes: Any) -> Path:
        place = folder / "_".join([kind, *(f"{key}{value}" for key, value in changes.items())])
        if not place.exists():
            unet_folder(place, kind, part=None, **changes)
        return place

    return made


@pytest.fixture(scope="module")
def pipe(sd: Path) -> Any:
    return pipeline(sd)


def check_words(error: TStitchError, *unknown: str) -> None:
    text = f"{error.message}\n{error.hint}"
    assert not FLAG.search(COMMAND.sub("", text)), text
    for word in ("saving-", "tstitch-trt build", "recipe", *unknown):
        assert word not in text, text


REFUSED: dict[str, dict[str, Any]] = {
    "batch": {"batch": "2:1"},
    "a batch of words": {"batch": "many"},
    "height": {"height": 60},
    "tokens": {"tokens": "3:2:1"},
    "an option": {"options": {"small.contrlled": False}},
    "an option of the backend": {"options": {"provider": "tensor"}},
    "a provider that is not there": {"options": {"provider": "tensorrt"}},
    "the value of an option": {"options": {"small.controlled": "perhaps"}},
    "a precision": {"precision": "fp12"},
    "the precision of nothing": {"precision": {"middle": "fp16"}},
    "a type without kernels": {"precision": "bf16"},
    "a device": {"device": "cuda:99"},
    "a device of no kind": {"device": "abacus"},
    "a time limit": {"time_limit": "soon"},
    "a memory limit": {"memory_limit": "much"},
    "memory to load it in": {"max_memory": "much"},
    "an embedding of time": {"small": {"time_cond_proj_dim": 8}, "options": {"small.controlled": True}},
    "channels": {"small": {"in_channels": 8, "out_channels": 8}},
    "text": {"small": {"cross_attention_dim": 48}},
    "a pixel model": {"small": {"in_channels": 3, "out_channels": 3}},
    "another kind": {"small": {"kind": "xl-least"}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_build_refuses(pipe: Any, sd: Path, tmp_path: Path, unets: Callable[..., Path], what: str) -> None:
    asked = dict(REFUSED[what])
    if "small" in asked:
        asked["small"] = unets(**asked["small"])
    with pytest.raises(TStitchError) as caught:
        fast(pipe, sd, tmp_path, **asked)
    check_words(caught.value)


def test_notes_of_a_build_are_true_for_the_caller(sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts are read by the pipeline's text encoders, which the bundle does not have."""
    with caplog.at_level("INFO", logger="tstitch_export.build"):
        fast(pipeline(sd, "ddim"), sd, tmp_path, progress=lambda phase, share: None).close()
    assert "the default solver is ddim" in caplog.text
    assert "text_encoder" not in caplog.text
    assert not FLAG.search(caplog.text)


def test_a_controlnet_that_does_not_fit(sd: Path, tmp_path: Path, unets: Callable[..., Path]) -> None:
    net = controlnet_folder(tmp_path / "c", "one")
    pipe = pipeline(sd, "ddim", "StableDiffusionControlNetPipeline", controlnet=net)
    for asked in ({"small": unets("one", layers_per_block=2)}, {"precision": {"controlnet": "fp16"}}):
        with pytest.raises(TStitchError) as caught:
            fast(pipe, sd, tmp_path, **asked)
        check_words(caught.value)
        assert "options={" in caught.value.hint or "precision={" in caught.value.hint


def test_what_a_call_refuses(sd: Path, cache: Path) -> None:
    import torch

    long = torch.zeros(1, 77 * 5, 32)
    with fast(pipeline(sd), sd, cache) as made:
        for asked in (
            {"height": 128, "width": 128},
            {"prompt": None, "negative_prompt": None, "prompt_embeds": long, "negative_prompt_embeds": long},
            {"num_inference_steps": 5000},
            {"fraction": 1.5},
            {"schedule": "small:9,large:9"},
            {"latency_budget_ms": 1e-9},
            {"num_images_per_prompt": 100, "callback_on_step_end": lambda *_: {}},
        ):
            with pytest.raises(TStitchError) as caught:
                made(**{**SD, **asked})
            check_words(caught.value)
