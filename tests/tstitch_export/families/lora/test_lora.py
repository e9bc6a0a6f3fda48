"""LoRAs fused into a UNet equal what diffusers and PEFT make of the same files; others are refused by name."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny_families import clip_text_folder, lora_file, unet_folder
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.families import Inspection, open_family
from tstitch_export.families.base import LoraTarget, LoraUse
from tstitch_export.families.lora.fuse import check_loras, fuse, parse_loras
from tstitch_export.families.lora.keys import lora_layers, lora_looks_like


def output(module: Any, inspection: Inspection, family: str) -> torch.Tensor:
    """A member, or diffusers' module, on the same random input."""
    opened = open_family(family)
    inputs = opened.example(inspection, batch=2, seed=1, sizes={"H": 8, "W": 6, "T": 5})
    with torch.no_grad():
        if not hasattr(module, "config"):
            return module(*inputs)
        given = dict(zip((spec.name for spec in opened.inputs(inspection, "fp32")), inputs, strict=True))
        added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
        return module(
            given["sample"], given["timestep"], given["encoder_hidden_states"], added_cond_kwargs=added
        ).sample


def by_diffusers(module: Any, files: list[tuple[Path, float]], sdxl: bool) -> Any:
    """The module with the LoRAs fused by diffusers."""
    pytest.importorskip("peft", reason="diffusers needs PEFT to load a LoRA")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    mixin: Any = StableDiffusionXLLoraLoaderMixin if sdxl else StableDiffusionLoraLoaderMixin
    for index, (path, _) in enumerate(files):
        state, alphas, noted = mixin.lora_state_dict(str(path), unet_config=module.config, return_lora_metadata=True)
        mixin.load_lora_into_unet(state, alphas, unet=module, adapter_name=f"lora{index}", metadata=noted)
    names = [f"lora{index}" for index in range(len(files))]
    module.set_adapters(names, [weight for _, weight in files])
    module.fuse_lora(adapter_names=names)
    return module


@pytest.mark.filterwarnings("ignore")  # diffusers' own, about its formats
@pytest.mark.parametrize(
    ("family", "kind", "style"),
    [
        ("unet-sd", "sd", "kohya"),
        ("unet-sd", "sd", "peft"),
        ("unet-sd", "sd", "processors"),
        ("unet-sdxl", "sdxl", "original"),
    ],
)
def test_as_diffusers_fuses_it(family: str, kind: str, style: str, tmp_path: Path) -> None:
    module = unet_folder(tmp_path, kind)
    path = lora_file(tmp_path / "style.safetensors", module, style=style)
    plain = open_family(family).inspect(tmp_path, {})
    found = open_family(family).inspect(tmp_path, {"lora": f"{path}:0.7"})
    before = output(module, plain, family)
    want = output(by_diffusers(module, [(path, 0.7)], kind == "sdxl"), plain, family)
    assert (want - before).abs().max() > 0.05 * before.abs().max(), "it has an effect"
    assert torch.allclose(output(open_family(family).load(found), found, family), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_several_with_weights(tmp_path: Path) -> None:
    module = unet_folder(tmp_path, "sd")
    first = lora_file(tmp_path / "first.safetensors", module, rank=2, seed=1)
    second = lora_file(tmp_path / "second.safetensors", module, style="peft", seed=2)
    found = open_family("unet-sd").inspect(tmp_path, {"lora": f"{first}:-0.5, {second}"})
    want = output(by_diffusers(module, [(first, -0.5), (second, 1.0)], sdxl=False), found, "unet-sd")
    assert torch.allclose(output(open_family("unet-sd").load(found), found, "unet-sd"), want, rtol=1e-4, atol=1e-5)
    # They are part of what the member is made from, so another LoRA or weight is another identity.
    assert found.config["lora"] == "first.safetensors:-0.5,second.safetensors:1"
    assert [file.name for file in found.files] == [
        "config.json", "first.safetensors", "second.safetensors", "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip


def test_the_product_through_a_middle_convolution() -> None:
    """LoCon's Tucker form against the sum it stands for."""
    down, middle, up = torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(7, 3, 1, 1)
    want = torch.zeros(7, 5, 3, 3)
    for o, i, r, s in ((o, i, r, s) for o in range(7) for i in range(5) for r in range(3) for s in range(3)):
        want[o, i] += up[o, r, 0, 0] * middle[r, s] * down[s, i, 0, 0]
    state = {"conv.weight": torch.zeros(7, 5, 3, 3)}
    fuse_tensors(
        state,
        {"lora_unet_conv.lora_down.weight": down, "lora_unet_conv.lora_mid.weight": middle}
        | {"lora_unet_conv.lora_up.weight": up, "lora_unet_conv.alpha": torch.tensor(6.0)},
    )
    assert torch.allclose(state["conv.weight"], 2 * want, atol=1e-5)


def fuse_tensors(state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], **more: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file(tensors, path, **more)
        fuse(state, [LoraUse(path)], target_of(state), model="model")


def target_of(state: dict[str, torch.Tensor], part: str = "unet") -> LoraTarget:
    return LoraTarget(part=part, shapes={key: tuple(tensor.shape) for key, tensor in state.items()})


def test_what_peft_notes_beside_the_tensors_counts() -> None:
    """``lora_alpha`` of all layers, another for one by pattern, and 1 / sqrt(rank) in place of 1 / rank."""
    down, up = torch.randn(4, 6), torch.randn(8, 4)
    tensors = {f"unet.{name}.lora_A.weight": down.clone() for name in ("a.to_q", "b.to_q")}
    tensors |= {f"unet.{name}.lora_B.weight": up.clone() for name in ("a.to_q", "b.to_q")}
    settings = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"b.to_q": 2}, "unet.use_rslora": True, "unet.r": 4}
    state = {f"{name}.weight": torch.zeros(8, 6) for name in ("a.to_q", "b.to_q")}
    fuse_tensors(state, tensors, metadata={"lora_adapter_metadata": json.dumps(settings)})
    assert torch.allclose(state["a.to_q.weight"], 8 / 2 * up @ down, atol=1e-5)
    assert torch.allclose(state["b.to_q.weight"], 2 / 2 * up @ down, atol=1e-5)


@pytest.mark.parametrize(
    ("noted", "words"),
    [
        (
            '{"unet.alpha_pattern": {"(a+)+b": 1}}',
            "says of the LoRA what can't be",
        ),  # would match until the end of time
        ('{"unet.alpha_pattern": [1]}', "says of the LoRA what can't be"),
        ('{"unet.lora_alpha": 1e300}', "says of the LoRA what can't be"),
        ('{"unet.lora_alpha": NaN}', "lora_adapter_metadata is damaged"),
        ('{"unet.use_rslora": "yes"}', "says of the LoRA what can't be"),
        ("[1]", "lora_adapter_metadata is damaged"),
        ("[" * 100_000, "lora_adapter_metadata is damaged"),
    ],
    ids=lambda text: text[:20],
)
def test_settings_that_can_not_be(noted: str, words: str) -> None:
    tensors = {"unet.a.lora_A.weight": torch.ones(4, 6), "unet.a.lora_B.weight": torch.ones(8, 4)}
    with pytest.raises(BadCheckpoint, match=words):
        fuse_tensors({"a.weight": torch.zeros(8, 6)}, tensors, metadata={"lora_adapter_metadata": noted})


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.ones(2)])
def test_an_alpha_is_one_finite_number(alpha: torch.Tensor) -> None:
    tensors = {"lora_unet_a.lora_down.weight": torch.ones(4, 6), "lora_unet_a.lora_up.weight": torch.ones(8, 4)}
    with pytest.raises(BadCheckpoint, match="alpha of a is no finite number"):
        fuse_tensors({"a.weight": torch.zeros(8, 6)}, tensors | {"lora_unet_a.alpha": alpha})


@pytest.mark.parametrize("ending", ["safetensors", "sft", "bin"])
def test_an_adapter_folder_of_peft(ending: str, tmp_path: Path) -> None:
    down, up = torch.randn(4, 6), torch.randn(8, 4)
    (torch.save if ending == "bin" else save_file)(
        {"base_model.model.a.to_q.lora_A.weight": down, "base_model.model.a.to_q.lora_B.weight": up},
        tmp_path / f"adapter_model.{ending}",
    )
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12, "r": 4}')
    state = {"a.to_q.weight": torch.zeros(8, 6)}
    fuse(state, [LoraUse(tmp_path / f"adapter_model.{ending}", 0.5)], target_of(state), model="model")
    assert torch.allclose(state["a.to_q.weight"], 0.5 * 3 * up @ down, atol=1e-5)


def test_the_text_encoders_part_goes_the_same_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = unet_folder(tmp_path, "sd")
    text = clip_text_folder(tmp_path)
    path = lora_file(tmp_path / "both.safetensors", module, text=text, alpha=4)
    with caplog.at_level(logging.WARNING):
        open_family("unet-sd").inspect(tmp_path, {"lora": str(path)})
    assert f"fused only where that part is given them: --lora text_encoder={path}:1" in caplog.text
    state = {key: tensor.clone() for key, tensor in text.state_dict().items()}
    before = {key: tensor.clone() for key, tensor in state.items()}
    fuse(state, parse_loras(f"{path}:0.5"), target_of(state, "text_encoder"), model="text encoder")
    tensors = load_file(path)
    changed = {key for key in state if not torch.equal(state[key], before[key])}
    assert len(changed) == 3 * 3, "q, v and fc1 of three layers"
    for key in changed:
        base = "lora_te_" + key.removesuffix(".weight").replace(".", "_")
        delta = 0.5 * tensors[f"{base}.lora_up.weight"] @ tensors[f"{base}.lora_down.weight"]
        assert torch.allclose(state[key], before[key] + delta, atol=1e-6)
    # The family does the same, with the hidden state before the last too: nothing reads the last layer's part there.
    plain = open_family("clip-text").inspect(tmp_path / "text_encoder", {})
    for options in ({}, {"hidden_state": -2}):
        found = open_family("clip-text").inspect(tmp_path / "text_encoder", {"lora": f"{path}:0.5", **options})
        assert found.config["lora"] == "both.safetensors:0.5"
        assert path in found.files[:-1]
        fused, untouched = (open_family("clip-text").load(x).state_dict() for x in (found, plain))
        for key in fused:
            stored = next(name for name in (key, f"text_model.{key}") if name in state)
            assert torch.allclose(fused[key], state[stored], atol=1e-6)
            assert torch.equal(fused[key], untouched[key]) == (stored not in changed)
    only = lora_file(tmp_path / "unet.safetensors", module)
    check_loras(
        parse_loras(str(only)), target_of({}, "text_encoder"), model="text encoder"
    )  # it may have nothing for it


# --- refused


def test_a_lora_for_another_model(tmp_path: Path) -> None:
    small, other = unet_folder(tmp_path / "small", "sd"), unet_folder(tmp_path / "other", "sdxl")
    path = lora_file(tmp_path / "other.safetensors", other)
    with pytest.raises(BadCheckpoint, match=r"LoRA for another model than small: \d+ of its \d+ unet layers match"):
        open_family("unet-sd").inspect(tmp_path / "small", {"lora": str(path)})
    wide = lora_file(tmp_path / "wide.safetensors", unet_folder(tmp_path / "wide", "sd", cross_attention_dim=768))
    with pytest.raises(BadCheckpoint, match=r"is 32x32, the LoRA is for 32x768.*a LoRA for Stable Diffusion 1\.x"):
        open_family("unet-sd").inspect(tmp_path / "small", {"lora": f"{wide}:0.3"})
    # The full model's LoRA on its pruned relative: what matches would be fused without what it was trained with.
    unet_folder(tmp_path / "pruned", "bksdm")
    full = lora_file(tmp_path / "full.safetensors", small)
    with pytest.raises(BadCheckpoint, match=r"the model has no mid_block_attentions_0"):
        open_family("unet-sd").inspect(tmp_path / "pruned", {"lora": str(full)})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["lora_unet_a.hada_w1_a", "lora_unet_a.hada_w1_b", "lora_unet_a.alpha"], r"is LoHa \(LyCORIS\)"),
        (["lora_unet_a.lokr_w1"], r"is LoKr \(LyCORIS\)"),
        (["unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.lora_magnitude_vector"], "is DoRA"),
        (["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.dora_scale"], "is DoRA"),
        (["lora_unet_a.lora_down.weight"], "is no LoRA"),
        (["first_stage_model.decoder.conv_in.weight", "quant_conv.weight"], "is no LoRA: 2 of its 2 tensors"),
    ],
)
def test_files_that_are_no_plain_lora(keys: list[str], words: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match=words) as caught:
        check_loras([LoraUse(tmp_path / "x.safetensors")], target_of({"a.weight": torch.zeros(2, 2)}), model="model")
    assert "merge it" in caught.value.hint


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["transformer.single_transformer_blocks.0.attn.to_q"], "a LoRA for Flux"),
        (["transformer.joint_blocks.0.attn.to_q"], "a LoRA for SD3"),
        (["unet.down_blocks.0.motion_modules.0.attn.to_q"], "a LoRA for a video model"),
        (["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"], "a LoRA for text encoders only"),
        (["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"], "a LoRA for SDXL"),
        (["unet.layers.0.to_q"], "a LoRA for something unknown"),
    ],
)
def test_what_a_lora_looks_like(keys: list[str], words: str) -> None:
    shapes = {f"{key}.lora_{end}.weight": (4, 2048) for key in keys for end in ("A", "B")}
    assert lora_looks_like(lora_layers(Path("x"), shapes), shapes).startswith(words)


def test_the_option() -> None:
    assert parse_loras("") == parse_loras(None) == ()
    assert parse_loras("a.safetensors:0.8, b/c:d.safetensors,e.pt:-1") == (
        LoraUse(Path("a.safetensors"), 0.8),
        LoraUse(Path("b/c:d.safetensors")),
        LoraUse(Path("e.pt"), -1.0),
    )
    for text in ("a.safetensors:strong", ":0.5", "a.safetensors,,b.safetensors", "a.safetensors:nan"):
        with pytest.raises(BadInput, match="allowed is FILE"):
            parse_loras(text)


# --- kinds of files: honoured, or refused by name


DOWN, UP = torch.randn(4, 6), torch.randn(8, 4)
MODULE = "down_blocks.0.attentions.0.proj_in"
FLAT = MODULE.replace(".", "_")


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"lora_unet_{FLAT}.lora_down.weight", f"lora_unet_{FLAT}.lora_up.weight"),
        (f"lycoris_{FLAT}.lora_down.weight", f"lycoris_{FLAT}.lora_up.weight"),
        (f"unet.{MODULE}.lora_A.weight", f"unet.{MODULE}.lora_B.weight"),
        (f"unet.{MODULE}.lora_A.style-1.weight", f"unet.{MODULE}.lora_B.style-1.weight"),
        (f"base_model.model.{MODULE}.lora_A.default.weight", f"base_model.model.{MODULE}.lora_B.default.weight"),
        (f"{MODULE}.lora.down.weight", f"{MODULE}.lora.up.weight"),
        (f"unet.{MODULE}.lora_linear_layer.down.weight", f"unet.{MODULE}.lora_linear_layer.up.weight"),
        (f"diffusion_model.{MODULE}.lora_A.weight", f"diffusion_model.{MODULE}.lora_B.weight"),
        (f"model.diffusion_model.{MODULE}.lora_down.weight", f"model.diffusion_model.{MODULE}.lora_up.weight"),
        (f"module.unet.{MODULE}.lora_down.weight", f"module.unet.{MODULE}.lora_up.weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_spellings_and_types(down: str, up: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {f"{MODULE}.weight": torch.zeros(8, 6)}
    save_file({down: DOWN.to(dtype), up: UP.to(dtype)}, tmp_path / "x.safetensors")
    fuse(state, [LoraUse(tmp_path / "x.safetensors")], target_of(state), model="model")
    assert torch.allclose(state[f"{MODULE}.weight"], UP.to(dtype).float() @ DOWN.to(dtype).float(), atol=1e-5)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor(2), torch.tensor([2]), 2, 2.0,
        torch.tensor(2.0).half(), torch.tensor([2.0]).bfloat16(), torch.tensor(2.0).to(torch.float8_e4m3fn),
        torch.tensor([2.0]).double(),
    ],
)  # fmt: skip
def test_an_alpha_of_any_type_and_rank(alpha: Any, ending: str, tmp_path: Path) -> None:
    tensors = {"lora_unet_a.lora_down.weight": DOWN, "lora_unet_a.lora_up.weight": UP, "lora_unet_a.alpha": alpha}
    path = tmp_path / f"x{ending}"
    if ending == ".safetensors":
        tensors["lora_unet_a.alpha"] = torch.as_tensor(alpha)
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    state = {"a.weight": torch.zeros(8, 6)}
    check_loras([LoraUse(path)], target_of(state), model="model")
    fuse(state, [LoraUse(path)], target_of(state), model="model")
    assert torch.allclose(state["a.weight"], 2 / 4 * UP @ DOWN, atol=1e-5)


def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path) -> None:
    tensors = {"lora_unet_a.lora_down.weight": DOWN, "lora_unet_a.lora_up.weight": UP, "lora_unet_a.alpha": "2"}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match=r"'lora_unet_a\.alpha' is a str, and the alpha of a LoRA is a number"):
        check_loras([LoraUse(tmp_path / "x.pt")], target_of({"a.weight": torch.zeros(8, 6)}), model="model")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], "is LoHa"),
        (["lokr_w1", "lokr_w2_a", "lokr_w2_b"], "is LoKr"),
        (["lora_down.weight", "lora_up.weight", "dora_scale"], "is DoRA"),
        (["oft_blocks"], "is OFT"),
        (["oft_R.weight"], "is OFT"),
        (["boft_R", "boft_s"], "is BOFT"),
        (["diff", "diff_b"], "is a difference of whole weights"),
        (["w_norm", "b_norm"], "is a difference of norms"),
        (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], "is GLoRA"),
        (["weight", "on_input"], "is IA3"),
        (["ia3_l"], "is IA3"),
        (["lora_down.weight", "lora_up.weight", "lora_up.bias"], "is a LoRA with biases"),
        (["lora_A.weight", "lora_B.weight", "lora_B.bias"], "is a LoRA with biases"),
        (["lora_A.weight", "lora_B.weight", "modules_to_save.weight"], "with whole modules beside it"),
        (["lora_embedding_A", "lora_embedding_B"], "is a LoRA of embeddings"),
        (["lora_A.a.weight", "lora_B.a.weight", "lora_A.b.weight", "lora_B.b.weight"], "holds several LoRAs"),
        (["base_layer.weight", "lora_A.weight", "lora_B.weight"], "a whole model with a LoRA beside its weights"),
        (
            ["lora_down.weight", "lora_up.weight", "something_new"],
            r"is no plain LoRA: 1 of its 3 tensors.*something_new",
        ),
    ],
)
@pytest.mark.parametrize("start", ["lora_unet_a", "unet.a"])
def test_other_methods_are_refused_by_name(start: str, keys: list[str], words: str, tmp_path: Path) -> None:
    save_file({f"{start}.{key}": torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match=words):
        check_loras([LoraUse(tmp_path / "x.safetensors")], target_of({"a.weight": torch.zeros(2, 2)}), model="model")


@pytest.mark.parametrize(
    ("noted", "words"),
    [
        ({"unet.use_dora": True}, "is DoRA"),
        ({"unet.init_lora_weights": "pissa_niter_4"}, "changes the weights below it"),
        ({"unet.layer_replication": [[0, 4]]}, "of repeated layers"),
    ],
)
def test_settings_that_make_it_another_method(noted: dict[str, Any], words: str) -> None:
    tensors = {"unet.a.lora_A.weight": torch.ones(4, 6), "unet.a.lora_B.weight": torch.ones(8, 4)}
    with pytest.raises(BadCheckpoint, match=words):
        fuse_tensors({"a.weight": torch.zeros(8, 6)}, tensors, metadata={"lora_adapter_metadata": json.dumps(noted)})
