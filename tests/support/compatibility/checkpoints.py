"""Files and folders of weights as training code and other programs write them, each written here and read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from support.compatibility.markdown import attempt, code, grouped, outcome, table
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.conventions import NOTHING_KNOWN, conventions_of
from tstitch_export.checkpoint.folder import weights_file
from tstitch_export.checkpoint.original_config import statements_of_config
from tstitch_export.checkpoint.statements import statements_of

__all__ = ["checkpoint_section", "training_section"]

_NAMES: Final = ("x_embedder.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
_STEM: Final = "diffusion_pytorch_model"
_DTYPES: Final = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu",
    "int8", "uint8", "int64", "bool", "complex64",
)  # fmt: skip


def _state(seed: int = 0) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 3, generator=generator) for name in _NAMES}


def _prefixed(prefix: str) -> Callable[[], Any]:
    return lambda: {prefix + name: tensor for name, tensor in _state().items()}


_CONTENTS: Final[Mapping[str, Callable[[], Any]]] = {
    "a state dict": _state,
    **{f"names under {code(prefix)}": _prefixed(prefix) for prefix in (
        "module.", "model.", "_orig_mod.", "diffusion_model.", "model.diffusion_model.", "ema_model.", "net.",
        "_forward_module.module.",
    )},
    "compiled or sharded blocks (`_fsdp_wrapped_module.`) inside": lambda: {
        name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): tensor for name, tensor in _state().items()
    },
    "DeepSpeed: `module` beside an optimizer": lambda: {"module": _state(), "optimizer": {"state": {}}, "step": 3},
    "Lightning: `state_dict` beside callbacks": lambda: {
        "state_dict": _prefixed("model.")(), "callbacks": {"a": {"best": 0.5}}, "epoch": 1,
    },
    "`model` and `ema`": lambda: {"ema": _state(), "model": _state(1), "opt": {}, "args": {"lr": 1e-4}},
    "`model_ema` and `model`": lambda: {"model_ema": _state(), "model": _state(1)},
    "`ema` that holds `module`": lambda: {"ema": {"module": _state()}, "model": _state(1)},
    "two models, an average under `ema_model.`": lambda: {
        **_prefixed("ema_model.")(), **{f"online_model.{name}": tensor for name, tensor in _state(1).items()},
    },
    "two models, `student.` and `teacher.`": lambda: {**_prefixed("student.")(), **_prefixed("teacher.")()},
    "an average without names (`shadow_params`) alone": lambda: {"decay": 0.99, "shadow_params": [*_state().values()]},
    "a pickled object of an unknown class": lambda: {"state_dict": _state(), "x": _Foreign()},
    "a model under a key of the writer's own": lambda: {"weights": _state(), "step": 3},
    "the empty tensors of ZeRO stage 3": lambda: {"module": {name: tensor[:0] for name, tensor in _state().items()}},
    "no tensors": lambda: {"epoch": 3},
}  # fmt: skip


class _Foreign:
    pass


_SHORTER: Final = {
    r"^'[^']*' is stored as \w+, so it is quantised.*": "quantised weights",
    r"^'[^']*' is stored as \w+.*": "no floats",
    r"^has the ending '[^']*'; ": "",
    r"^(holds no state dict): .*": r"\1",
    r" \(nor .*\)": "",
}
_ENDINGS: Final = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_FOLDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "the plain file": (f"{_STEM}.safetensors",),
    "the plain file in pickle": (f"{_STEM}.bin",),
    "several variants": (f"{_STEM}.safetensors", f"{_STEM}.fp16.safetensors", f"{_STEM}.bin"),
    **{
        f"only `.{variant}`": (f"{_STEM}.{variant}.safetensors",)
        for variant in ("fp16", "bf16", "fp32", "ema", "non_ema")
    },
    "only `.fp16` and `.ema`": (f"{_STEM}.fp16.safetensors", f"{_STEM}.ema.safetensors"),
    "only an unknown variant": (f"{_STEM}.mine.safetensors",),
    "two unknown variants": (f"{_STEM}.mine.safetensors", f"{_STEM}.yours.safetensors"),
    "an index of shards": (f"{_STEM}.safetensors.index.json",),
    "an index of shards with a variant": (f"{_STEM}.safetensors.index.fp16.json",),
    "shards without an index": (f"{_STEM}-00001-of-00002.safetensors",),
    "no weights": (),
}  # fmt: skip


def checkpoint_section(folder: Path) -> str:
    """``folder``: an empty one, for the files."""
    contents = [(kind, _read(folder, make())) for kind, make in _CONTENTS.items()]
    endings = [(code(ending), _read(folder, _state(), ending)) for ending in _ENDINGS]
    types = [(code(dtype), _typed(folder, dtype)) for dtype in _DTYPES]
    folders = [(kind, _folder(folder, files)) for kind, files in _FOLDERS.items()]
    return "\n\n".join(
        [
            "## Checkpoints",
            "Each row is a file that was written and read. Pickles are read without running code.",
            table(("what is in the file", "outcome"), grouped(contents)),
            table(("ending", "outcome"), grouped(endings)),
            table(("type of the weights", "outcome"), grouped(types)),
            f"Which file of a folder is taken, for names that begin with `{_STEM}`:",
            table(("what is there", "taken"), folders),
        ]
    )


def _write(path: Path, content: Any) -> None:
    import torch
    from safetensors.torch import save_file

    if path.suffix in (".safetensors", ".sft"):
        save_file(content, path)
    else:
        torch.save(content, path)


def _read(folder: Path, content: Any, ending: str = ".pt") -> str:
    path = folder / f"weights{ending}"
    _write(path, content)
    found, why = attempt(lambda: read_checkpoint(path), without=[path.name])
    if found is None:
        return outcome("", why, _SHORTER)
    assert set(found.shapes) == set(_NAMES), found.shapes  # type: ignore[attr-defined]
    want = _state()
    got = found.tensors()  # type: ignore[attr-defined]
    assert all((got[name] == want[name]).all() for name in _NAMES)
    notes = "; ".join(found.notes)  # type: ignore[attr-defined]
    return f"read: {notes}" if notes else "read"


def _typed(folder: Path, dtype: str) -> str:
    import torch

    path = folder / "weights.pt"
    _write(path, {name: tensor.to(getattr(torch, dtype)) for name, tensor in _state().items()})
    found, why = attempt(lambda: read_checkpoint(path).tensors(), without=[path.name])
    if found is None:
        return outcome("", why, _SHORTER)
    (kind,) = {str(tensor.dtype).removeprefix("torch.") for tensor in found.values()}  # type: ignore[attr-defined]
    return "read" if kind == dtype else f"read, as {kind}"


def _folder(folder: Path, files: tuple[str, ...]) -> str:
    place = folder / "unet"
    place.mkdir()
    for name in files:
        (place / name).write_text(json.dumps({"weight_map": {}}))
    found, why = attempt(lambda: weights_file(place, (_STEM,)), without=[str(place)])
    for name in files:
        (place / name).unlink()
    place.rmdir()
    return outcome("", why, _SHORTER) if found is None else code(found.name)  # type: ignore[attr-defined]


# --- what a file says of its training

_YAML: Final = "NAME.yaml` beside a UNet's `NAME.safetensors"
_TRAINING: Final = (
    "The folder of a pipeline has a scheduler. From a single file the following is read. `--option MEMBER.prediction`, "
    "`.noise` and `.zero_snr` take precedence over all of it. Two sources that contradict each other are refused.\n\n"
    "Stable Diffusion 2.x has two kinds of equal shapes, 512-base (eps) and 768-v. They are told apart by the standard "
    "deviation of `output_blocks.11.1.transformer_blocks.0.norm1.bias`, above 0.09 in 768-v, and by the `global_step` "
    "of the published files. If neither tells, the file is refused.\n\n"
    "A DiT whose outputs for a learned variance were never trained is refused, because SiT's look like that."
)
_SAID: Final[Mapping[str, Mapping[str, Any]]] = {
    "empty tensor `v_pred`": {"markers": ["v_pred"]},
    "empty tensors `v_pred` and `ztsnr`": {"markers": ["v_pred", "ztsnr"]},
    "empty tensor `ztsnr` alone": {"markers": ["ztsnr"]},
    "tensors `edm_mean`, `edm_std`": {"markers": ["edm_mean", "edm_std"]},
    "tensor `edm_vpred.sigma_max`": {"markers": ["edm_vpred.sigma_max"]},
    **{f"metadata `{key}` = `{value}`": {"metadata": {key: value}} for key, value in (
        ("modelspec.prediction_type", "v"), ("modelspec.prediction_type", "epsilon"),
        ("modelspec.prediction_type", "flow"), ("modelspec.predict_key", "v"),
        ("ss_v_parameterization", "True"), ("ss_zero_terminal_snr", "True"),
    )},
    **{f"metadata `{key}` = `{value}`, of a UNet with text 1024 wide": {"metadata": {key: value}, "text_width": 1024}
       for key, value in (
        ("modelspec.architecture", "stable-diffusion-v2-768-v"), ("modelspec.architecture", "stable-diffusion-v2-512"),
        ("ss_base_model_version", "sd_v2_v"),
    )},
    f"`{_YAML}` that says `parameterization: v`": {"config": "parameterization: v"},
    f"`{_YAML}` that names no `parameterization`": {"config": ""},
    "metadata of `v` and of `epsilon`": {
        "metadata": {"modelspec.prediction_type": "v", "ss_v_parameterization": "False"},
    },
    **{f"training state, `args.{key}` = `{value}`": {"beside": {"args": {key: value}}} for key, value in (
        ("prediction_type", "v_prediction"), ("objective", "pred_x0"), ("parameterization", "v"),
        ("predict_xstart", True), ("flow_matching", True), ("noise_schedule", "cosine"),
        ("rescale_betas_zero_snr", True), ("path_type", "Linear"),
    )},
    "a file name with `vpred` and nothing in it": {"name": "my-vpred-model"},
    "nothing": {},
}  # fmt: skip


def training_section(folder: Path) -> str:
    """``folder``: an empty one, for the files."""
    rows = [(kind, _conventions(folder, **said)) for kind, said in _SAID.items()]
    return "\n\n".join(
        [
            "## What a single file says of its training",
            _TRAINING,
            table(("what the file says", "taken as"), grouped(rows)),
        ]
    )


def _conventions(
    folder: Path,
    *,
    markers: list[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    beside: Mapping[str, Any] | None = None,
    config: str | None = None,
    text_width: int | None = None,
    name: str = "weights",
) -> str:
    import torch
    from safetensors.torch import save_file

    state = {**_state(), **{marker: torch.tensor([]) for marker in markers or ()}}
    if beside is None:
        path = folder / f"{name}.safetensors"
        save_file(state, path, metadata=dict(metadata or {}))
    else:
        path = folder / f"{name}.pt"
        torch.save({"model": state, **beside}, path)

    def read() -> Any:
        stated, notes = statements_of(read_checkpoint(path), NOTHING_KNOWN, text_width=text_width)
        if config is not None:
            yaml = folder / f"{name}.yaml"
            yaml.write_text(f"target: ldm.models.diffusion.ddpm.LatentDiffusion\n{config}\n")
            stated += statements_of_config(yaml)
        return conventions_of(path.name, stated, said=NOTHING_KNOWN, notes=notes)

    found, why = attempt(read, without=[path.name])
    if found is None:
        return outcome("", why, {})
    told = [f"predicts {found.prediction}"] if found.prediction is not None else []
    told += ["zero terminal SNR"] if found.zero_snr else []
    told += [f"noise {found.noise.kind}"] if found.noise is not None else []
    return ", ".join(told) or "says nothing: the family's usual conventions"
