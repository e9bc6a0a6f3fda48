"""Which files of a repository are downloaded."""

from __future__ import annotations

import pytest

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.hub.selection import Selection, select, select_component

UNET = "diffusion_pytorch_model"
TOKENIZER = ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"]
# As published pipelines look
PIPELINE = [
    *(
        "README.md",
        "model_index.json",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json",
    ),
    *(
        f"unet/{UNET}{end}"
        for end in (".bin", ".fp16.bin", ".safetensors", ".fp16.safetensors", ".non_ema.safetensors")
    ),
    *("unet/config.json", "unet/flax_model.msgpack", "vae/config.json", f"vae/{UNET}.bin", f"vae/{UNET}.safetensors"),
    *("text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", *TOKENIZER),
    *("safety_checker/config.json", "safety_checker/model.safetensors", "unet/model.onnx", "example.png"),
]


def needed(names: list[str], path: str, kind: str) -> set[str]:
    return set(select(names, path, kind, where="org/name").files)


def test_of_a_pipeline_the_denoiser_and_what_is_said_of_it() -> None:
    assert needed(PIPELINE, "", "member") == {
        *("model_index.json", "scheduler/scheduler_config.json", "vae/config.json"),
        *("unet/config.json", f"unet/{UNET}.safetensors"),
    }


def test_parts_of_a_pipeline() -> None:
    text = {"text_encoder/config.json", "text_encoder/model.safetensors", "model_index.json", *TOKENIZER}
    assert set(select_component(PIPELINE, "", "text_encoder", where="org/name")) == text
    assert needed(PIPELINE, "text_encoder", "text_encoder") == text
    vae = {"vae/config.json", f"vae/{UNET}.safetensors"}
    assert set(select_component(PIPELINE, "", "vae", where="org/name")) == vae
    assert needed(PIPELINE, "vae", "vae_decoder") == vae
    assert select_component(PIPELINE, "", "text_encoder_2", where="org/name") == ()


def test_a_folder_and_a_file_alone() -> None:
    assert needed(PIPELINE, "unet", "member") == {"unet/config.json", f"unet/{UNET}.safetensors"}
    assert needed(PIPELINE, "v1-5-pruned.safetensors", "member") == {"v1-5-pruned.safetensors"}
    assert needed(["a/x.safetensors", "a/x.yaml", "a/config.json"], "a/x.safetensors", "member") == {
        *("a/x.safetensors", "a/x.yaml", "a/config.json"),
    }
    assert needed([f"{UNET}.bin", "config.json", "x.png"], "", "controlnet") == {f"{UNET}.bin", "config.json"}
    assert needed([*TOKENIZER, "x.txt"], "tokenizer", "tokenizer") == set(TOKENIZER)


def test_classes_are_beside_a_denoiser() -> None:
    classes = ["class_embedder/config.json", f"class_embedder/{UNET}.safetensors"]
    unet = ["unet/config.json", f"unet/{UNET}.safetensors"]
    for path in ("", "unet"):
        assert needed([*classes, *unet], path, "member") == {*classes, *unet}


def test_shards_are_taken_by_their_index() -> None:
    names = ["config.json", f"{UNET}.safetensors.index.json", f"{UNET}-00001-of-00002.safetensors", f"{UNET}.fp16.bin"]
    assert needed(names, "", "member") == {"config.json", f"{UNET}.safetensors.index.json"}


def test_a_repository_for_a_file() -> None:
    usual = ["pytorch_lora_weights.safetensors", "other.safetensors", "adapter_config.json"]
    expected = ("pytorch_lora_weights.safetensors", "adapter_config.json")
    assert select(usual, "", "lora", where="org/name") == Selection(expected[0], expected)
    assert select(["a.safetensors", "a.png"], "", "lora", where="o/n").path == "a.safetensors"
    assert select(["learned_embeds.bin", "x.bin"], "", "textual_inversion", where="o/n").path == "learned_embeds.bin"
    with pytest.raises(BadCheckpoint, match=r"a\.safetensors, b\.safetensors") as caught:
        select(["a.safetensors", "b.safetensors"], "", "lora", where="org/name")
    assert "org/name/a.safetensors" in caught.value.hint


def test_what_a_partial_copy_can_not_tell() -> None:
    with pytest.raises(BadCheckpoint):
        select(["model_index.json", "unet/config.json", f"unet/{UNET}.bin"], "", "member", where="o/n", whole=False)
    with pytest.raises(BadCheckpoint):
        select(["a.safetensors"], "", "lora", where="o/n", whole=False)
    for path in ("", "adapter_model.safetensors"):
        with pytest.raises(BadCheckpoint, match="the scale of"):
            select(["adapter_model.safetensors"], path, "lora", where="o/n", whole=False)


@pytest.mark.parametrize(
    ("names", "path", "words"),
    [
        (["a.ckpt", "b.safetensors"], "", ("no model_index.json and no config.json", "b.safetensors")),
        (PIPELINE, "unett", ("no unett", "unet")),
        (["config.json", "README.md"], "", ("no diffusion_pytorch_model.safetensors",)),
    ],
)
def test_a_repository_without_the_model(names: list[str], path: str, words: tuple[str, ...]) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        select(names, path, "member", where="org/name")
    assert all(word in str(caught.value) for word in words)
