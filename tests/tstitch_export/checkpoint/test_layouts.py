"""Layouts that training code and other programs write: every one gives the same model, or a refusal that says why."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.conventions import NOTHING_KNOWN
from tstitch_export.checkpoint.stand_ins import STAND_INS
from tstitch_export.checkpoint.statements import statements_of

# What tells each kind of model, and one tensor more
KINDS: dict[str, tuple[str, ...]] = {
    "unet": ("conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight", "down_blocks.0.x.bias"),
    "dit": ("x_embedder.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"),
    "diffusers-dit": ("pos_embed.proj.weight", "proj_out_2.weight", "transformer_blocks.0.norm1.emb.weight"),
    "uvit": ("patch_embed.proj.weight", "decoder_pred.weight", "mid_block.attn.qkv.weight"),
    "original": ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight"),
    "controlnet": (
        "conv_in.weight", "time_embedding.linear_1.weight", "controlnet_cond_embedding.conv_in.weight",
        "controlnet_down_blocks.0.weight",
    ),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"),
    "tiny vae": ("encoder.layers.0.weight", "decoder.layers.0.weight", "decoder.layers.2.conv.0.weight"),
    "text": (
        "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
        "text_projection.weight",
    ),
    "bare text": ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "final_layer_norm.bias"),
    "openclip": ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.ln_1.weight"),
    "whole": (
        "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.time_embed.0.weight",
        "first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight", "betas",
        "model_ema.diffusion_modelinput_blocks00weight",
    ),
}  # fmt: skip
PREFIXES = (
    "", "_orig_mod.", "module.", "model.", "diffusion_model.", "model.diffusion_model.", "ema_model.", "net.", "unet.",
    "module._orig_mod.model.", "_forward_module.module.", "_orig_mod.module.ema_model.module.", "student.unet.",
)  # fmt: skip


def state_of(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 3, generator=generator) for name in KINDS[kind]}


def written(path: Path, state: dict[str, torch.Tensor], how: str) -> Path:
    """The state as a file of this ending, or as two shards with an index."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    if how == "shards":
        names, table = list(state), {}
        for index, part in enumerate((names[:1], names[1:])):
            file = f"model-0000{index + 1}-of-00002.safetensors"
            save_file({name: state[name] for name in part}, path / file)
            table |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        return path / "model.safetensors.index.json"
    target = path / f"model{how}"
    (save_file if how == ".safetensors" else torch.save)(state, target)
    return target


def same(path: Path, want: dict[str, torch.Tensor]) -> None:
    """Names, shapes, tensors and arrays are those of ``want``."""
    found = read_checkpoint(path)
    tensors, arrays = found.tensors(), found.arrays()
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in want.items()}
    assert tensors.keys() == arrays.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(tensors[name], tensor)
        assert np.array_equal(arrays[name](), tensor.float().numpy())


@pytest.mark.parametrize("how", [".safetensors", ".pt", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes(kind: str, how: str, tmp_path: Path) -> None:
    state = state_of(kind)
    for prefix in PREFIXES if how == ".safetensors" else PREFIXES[1::4]:
        inside = "diffusion_model." in prefix
        if kind == "whole" and inside:
            continue  # no program puts a whole pipeline there
        want = state
        if kind == "original" and inside:  # where whole pipelines have it, and where it is looked for
            want = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
        same(written(tmp_path, {prefix + name: tensor for name, tensor in state.items()}, how), want)


def test_wrappers_between_the_modules(tmp_path: Path) -> None:
    """Blocks that were compiled, sharded or checkpointed one by one."""
    state = state_of("dit")
    inner = {
        name.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module."): t for name, t in state.items()
    }
    same(written(tmp_path, {f"_fsdp_wrapped_module.{name}": t for name, t in inner.items()}, ".pt"), state)


@pytest.mark.parametrize(
    ("taken", "other", "words"),
    [
        ("ema_model.", "online_model.", "'ema_model.' is taken, not 'online_model.', since the moving average"),
        ("ema_model.module.", "", "'ema_model.module.' is taken, not ''"),
        ("", "teacher.", "without a prefix is taken, not 'teacher.'"),
        ("model.", "teacher.model.", "'model.' is taken, not 'teacher.model.'"),
    ],
)
def test_of_two_models_the_stated_one_is_taken(taken: str, other: str, words: str, tmp_path: Path) -> None:
    state, left = state_of("dit"), state_of("dit", seed=1)
    both = {taken + name: t for name, t in state.items()} | {other + name: t for name, t in left.items()}
    path = written(
        tmp_path, {**both, "step": torch.zeros(1), "initted": torch.ones(1)} if taken else both, ".safetensors"
    )
    same(path, state)
    assert words in " ".join(read_checkpoint(path).notes)


def test_an_average_of_the_unet_alone_has_the_other_parts_of_its_pipeline(tmp_path: Path) -> None:
    state, unet = state_of("whole"), "model.diffusion_model."
    average = {f"ema.{name}": tensor + 1 for name, tensor in state.items() if name.startswith(unet)}
    want = {name: average.get(f"ema.{name}", tensor) for name, tensor in state.items()}
    del want["model_ema.diffusion_modelinput_blocks00weight"], want["betas"]
    path = written(tmp_path, {**state, **average}, ".safetensors")
    same(path, want)
    assert "betas" in read_checkpoint(path).outside


def test_where_nothing_decides_it_is_refused(tmp_path: Path) -> None:
    both = {f"{who}.{name}": t for who in ("student", "teacher") for name, t in state_of("unet").items()}
    with pytest.raises(BadCheckpoint, match=r"2 models of one kind, under 'student\.' and 'teacher\.'") as caught:
        read_checkpoint(written(tmp_path, both, ".pt"))
    assert "a file of its own" in caught.value.hint


def test_a_denoiser_goes_before_the_other_parts_of_its_trainer(tmp_path: Path) -> None:
    state = state_of("unet")
    others = {f"vae.{name}": t for name, t in state_of("vae").items()}
    others |= {f"text_encoder.{name}": t for name, t in state_of("text").items()}
    path = written(tmp_path, {f"unet.{name}": t for name, t in state.items()} | others, ".ckpt")
    same(path, state)
    assert "6 tensors are not its own" in " ".join(read_checkpoint(path).notes)


@pytest.mark.parametrize(
    ("prefix", "around"), [("unet.", ""), ("module.model.", "module."), ("module.ema_model.module.", "module.")]
)
@pytest.mark.parametrize("how", [".safetensors", ".pt", "shards"])
def test_what_lies_around_the_model_can_still_be_asked(prefix: str, around: str, how: str, tmp_path: Path) -> None:
    """A trainer keeps its noise schedule and marks outside the model, which say how the model was trained."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    state = {prefix + name: tensor for name, tensor in state_of("unet").items()}
    path = written(tmp_path, {**state, f"{around}betas": betas, f"{around}v_pred": torch.ones(1)}, how)
    found = read_checkpoint(path)
    assert found.shapes.keys() == set(KINDS["unet"])
    assert found.outside == {"betas": (1000,), "v_pred": (1,)}
    assert {"betas", "v_pred"} <= found.markers
    assert np.array_equal(found.values("betas"), betas.numpy())
    stated, _ = statements_of(found, NOTHING_KNOWN)
    assert [(s.prediction, s.noise and s.noise.kind) for s in stated] == [("v", None), (None, "linear")]


# --- training states

STATE = state_of("dit")
OTHER = state_of("dit", seed=1)
SHADOW = {"decay": 0.9999, "optimization_step": 10, "shadow_params": list(STATE.values())}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"module": STATE, "optimizer": {"state": {}}, "ds_config": {"a": 1}, "global_steps": 3}, ""),  # DeepSpeed
        ({"state_dict": {f"model.{k}": v for k, v in STATE.items()}, "callbacks": {}, "epoch": 1}, ""),  # Lightning
        ({"model_ema": STATE, "model": OTHER}, "'model_ema' is taken, not model, since the moving average"),
        ({"ema": {"module": STATE}, "model": OTHER}, "'ema' is taken, not model"),
        ({"model_state_dict": STATE, "optimizer_state_dict": {}}, ""),
        ({"state": 1, "model": {"ema": {"state_dict": STATE}, "net": OTHER}}, "'ema' is taken, not net"),
        ({"ema": SHADOW, "model": STATE}, "the moving average 'ema' has no names (shadow_params)"),
        ({"generator": STATE, "opt": {"state": {0: {"a": OTHER["pos_embed"]}}}, "rng": {"cpu": torch.ones(5)}}, ""),
        ({"ema": None, "params_ema": STATE, "params": OTHER}, "'params_ema' is taken, not params"),
    ],
)
def test_training_states(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "state.pt")
    same(tmp_path / "state.pt", STATE)
    assert words in " ".join(read_checkpoint(tmp_path / "state.pt").notes)


def test_the_empty_tensors_of_zero_stage_3_are_refused_with_the_reason(tmp_path: Path) -> None:
    torch.save({"module": {name: torch.empty(0) for name in STATE}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(BadCheckpoint, match="all of them empty, as ZeRO stage 3") as caught:
        read_checkpoint(tmp_path / "mp_rank_00_model_states.pt")
    assert "zero_to_fp32.py" in caught.value.hint


def test_other_endings(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.sft")
    same(tmp_path / "model.sft", STATE)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadCheckpoint, match=r"the ending '\.gguf'") as caught:
        read_checkpoint(tmp_path / "model.gguf")
    assert "its weights are quantised" in caught.value.hint


@pytest.mark.parametrize("content", [SHADOW, {"ema": SHADOW}, list(STATE.values())])
def test_lists_without_names_are_refused_with_the_reason(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "ema.pt")
    with pytest.raises(BadCheckpoint, match="list without names") as caught:
        read_checkpoint(tmp_path / "ema.pt")
    assert "save model.state_dict()" in caught.value.hint


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a class of a library that is not here, under its name, for pickling; it is not importable afterwards."""

    def make(name: str, *bases: type, **members: Any) -> Any:
        module, _, last = name.rpartition(".")
        words = module.split(".")
        for cut in range(1, len(words) + 1):
            whole = ".".join(words[:cut])
            if whole not in sys.modules:
                monkeypatch.setitem(sys.modules, whole, ModuleType(whole))
        made = type(last, bases, {"__module__": module, **members})
        monkeypatch.setattr(sys.modules[module], last, made, raising=False)
        return made

    return make


def test_lightning_with_callbacks_and_settings(foreign: Callable[..., Any], tmp_path: Path) -> None:
    """Known objects are read as nothing: their class's code does not run, though it is there to be run."""
    ran: list[str] = []

    def run(self: Any, state: Any) -> None:
        ran.append(type(self).__name__)

    callback = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", __setstate__=run)
    attributes = foreign("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    config = foreign("omegaconf.dictconfig.DictConfig", __setstate__=run)
    instance, held = callback(), config()
    instance.best, held._content = Path("best.ckpt"), {"lr": 1e-4}
    content = {
        "state_dict": OrderedDict((f"model.diffusion_model.{k}", v) for k, v in state_of("original").items()),
        "callbacks": {callback: {"best": np.float32(0.5), "path": Path("a/b.ckpt")}, "again": instance},
        "hyper_parameters": attributes(parameterization="v", config=held),
        "loops": defaultdict(dict, {"fit": {"done": np.int64(7)}}),
        "global_step": np.int64(1000),
        "random": np.random.get_state(),
        "losses": deque([np.float64(0.5)], maxlen=9),
        "settings": SimpleNamespace(lr=1e-4),
    }
    torch.save(content, tmp_path / "last.ckpt")
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert found.shapes.keys() == {f"model.diffusion_model.{name}" for name in KINDS["original"]}
    assert found.beside["global_step"] == 1000
    assert found.beside["hyper_parameters"] == {"parameterization": "v", "config": {"lr": 1e-4}}
    assert (found.beside["losses"], found.beside["settings"]) == ([0.5], {"lr": 1e-4})
    assert not ran
    torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert set(ran) == {"ModelCheckpoint", "DictConfig"}, "the file would run them where it could"


def test_every_stand_in_says_its_own_name() -> None:
    """By which torch finds it, whatever its version takes beside a class."""
    names = [f"{each.__module__}.{each.__qualname__}" for each in STAND_INS]
    assert len(set(names)) == len(names)
    assert {"argparse.Namespace", "omegaconf.dictconfig.DictConfig", "numpy.core.multiarray.scalar"} <= set(names)
    assert all(isinstance(each, type) for each in STAND_INS)


def test_another_protocol_is_named(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(BadCheckpoint, match=r"another protocol than torch\.save's own") as caught:
        read_checkpoint(tmp_path / "x.pt")
    assert "safetensors" in caught.value.hint


def test_other_objects_are_refused_by_name(foreign: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "x": foreign("someones.code.Thing")()}, tmp_path / "last.ckpt")
    with pytest.raises(BadCheckpoint, match=r"could run code: it names someones\.code\.Thing"):
        read_checkpoint(tmp_path / "last.ckpt")


# --- types of numbers

UNET = state_of("unet")
LAYER = "down_blocks.0.attentions.0.proj_in"


@pytest.mark.parametrize("how", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("scales", "factor"),
    [
        ({}, 1.0),
        ({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, 1.0),
        ({f"{LAYER}.scale_weight": torch.tensor(0.3), f"{LAYER}.scale_input": torch.tensor(9.0)}, torch.tensor(0.3)),
        (
            {f"{LAYER}.weight_scale": torch.tensor([0.3]), f"{LAYER}.input_scale": torch.tensor([9.0])},
            torch.tensor(0.3),
        ),
        ({f"{LAYER}.weight_scale": torch.arange(1.0, 5).reshape(4, 1)}, torch.arange(1.0, 5).reshape(4, 1)),
    ],
)
def test_eight_bit_floats(how: str, dtype: torch.dtype, scales: Any, factor: Any, tmp_path: Path) -> None:
    stored = torch.randn(4, 6).to(dtype)
    path = written(tmp_path, {**UNET, f"{LAYER}.weight": stored, **scales}, how)
    found = read_checkpoint(path)
    assert found.shapes.keys() == {*UNET, f"{LAYER}.weight"}
    want = stored.float() * factor
    assert torch.equal(found.tensors()[f"{LAYER}.weight"].float(), want)
    assert np.array_equal(found.arrays()[f"{LAYER}.weight"](), want.numpy())


def test_every_eight_bit_float_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    stored = {name: codes.clone().view(getattr(torch, name)) for name in ("float8_e4m3fn", "float8_e5m2")}
    save_file(stored, tmp_path / "all.safetensors")
    for name, read in read_checkpoint(tmp_path / "all.safetensors").arrays().items():
        assert np.array_equal(read(), stored[name].float().numpy(), equal_nan=True)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"weight": torch.zeros(4, 6, dtype=torch.int8)}, f"'{LAYER}.weight' is stored as int8, so it is quantised"),
        (
            {"weight": torch.zeros(12, 1, dtype=torch.uint8), "weight.absmax": torch.ones(1)},
            "uint8, so it is quantised",
        ),
        ({"weight": torch.zeros(4, 6, dtype=torch.complex64)}, "is stored as complex64; allowed are float16"),
        ({"weight": torch.zeros(4, 6, dtype=torch.bool)}, "is stored as bool; allowed are float16"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, f"'{LAYER}.bias' is stored as int64"),
        (
            {"weight": torch.zeros(4, 6).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(2, 3)},
            r"weight_scale_inv' of shape \[2, 3\]; allowed is one scale",
        ),
        (
            {"weight": torch.zeros(4, 6).to(torch.float8_e4m3fn), "scale_weight": torch.ones(6)},
            r"scale_weight' of shape \[6\]",
        ),
        (
            {"weight": torch.zeros(4, 6).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}
            | {"comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn", "convrot": true}'), dtype=torch.uint8)},
            "says that its layer is quantised",
        ),
    ],
)
def test_other_numbers_are_refused_with_the_tensors_name(more: Any, words: str, tmp_path: Path) -> None:
    tensors = {**UNET, **{f"{LAYER}.{name}": tensor for name, tensor in more.items()}}
    for how in (".safetensors", ".pt"):
        with pytest.raises(BadCheckpoint, match=words) as caught:
            read_checkpoint(written(tmp_path, tensors, how))
        assert "float16, bfloat16 or float32" in caught.value.hint


def test_what_is_no_weight_may_be_of_any_type(tmp_path: Path) -> None:
    more = {"position_ids": torch.arange(77)[None], "step": torch.tensor(3), "mask": torch.ones(2, 2, dtype=torch.bool)}
    noted = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    quantised = {f"{LAYER}.weight": torch.ones(4, 6).to(torch.float8_e4m3fn), f"{LAYER}.comfy_quant": noted}
    found = read_checkpoint(written(tmp_path, {**UNET, **more, **quantised}, ".safetensors"))
    assert found.shapes.keys() == {*UNET, *more, f"{LAYER}.weight"}
    assert found.values("step") == 3


@pytest.mark.parametrize("note", [torch.full((3,), float("nan")), torch.zeros(5000, dtype=torch.uint8)])
def test_a_note_that_is_no_short_text_is_refused(note: torch.Tensor, tmp_path: Path) -> None:
    tensors = {**UNET, f"{LAYER}.weight": torch.ones(4, 6).to(torch.float8_e4m3fn), f"{LAYER}.comfy_quant": note}
    with pytest.raises(BadCheckpoint, match=r"says that its layer is quantised: (float32|uint8) \[\d+\]"):
        read_checkpoint(written(tmp_path, tensors, ".safetensors"))


def test_notes_of_many_layers_open_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    tensors: dict[str, torch.Tensor] = {}
    for layer in (f"blocks.{index}.to_q" for index in range(20)):
        tensors |= {f"{layer}.weight": torch.ones(4, 6).to(torch.float8_e4m3fn), f"{layer}.comfy_quant": noted}
    path, memmap = written(tmp_path, tensors, ".safetensors"), np.memmap
    mapped: list[Any] = []

    def counted(*args: Any) -> Any:
        mapped.append(args)
        return memmap(*args)

    monkeypatch.setattr(np, "memmap", counted)
    assert len(read_checkpoint(path).shapes) == 20
    assert len(mapped) == 1
