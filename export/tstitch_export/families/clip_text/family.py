"""Family ``clip-text``: the text encoders of Stable Diffusion and SDXL (CLIP-L, OpenCLIP ViT-H and bigG).

Read from a ``text_encoder`` folder of transformers, a pipeline folder, or the single file of a whole pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from tstitch_engines.bundle.manifest import Precision
from tstitch_engines.errors import BadCheckpoint, BadInput, unknown_name
from tstitch_engines.needs import require
from tstitch_engines.spec import TensorSpec
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.config_limits import check_numbers
from tstitch_export.checkpoint.folder import describe_folder, files_of, read_json, weights_file
from tstitch_export.checkpoint.model_config import check_model_config
from tstitch_export.checkpoint.signatures import looks_like
from tstitch_export.families.base import TORCH_NAMES, Family, Inspection, LoraTarget, Role, Scalar
from tstitch_export.families.clip_text.inversion import (
    INVERSION_OPTION,
    check_inversions,
    describe_inversions,
    parse_inversions,
    with_inversions,
)
from tstitch_export.families.clip_text.layout import PREFIXES, Piece, Shapes, find_tower, name_pieces, take
from tstitch_export.families.clip_text.tokenizer import ClipTokenizer, read_tokenizer
from tstitch_export.families.lora.fuse import LORA_OPTION, check_loras, describe_loras, fuse, parse_loras
from tstitch_export.families.options import typed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ClipTextFamily"]

_CLASSES: Final = ("CLIPTextModel", "CLIPTextModelWithProjection")
_ACTIVATIONS: Final = ("quick_gelu", "gelu")
_TOKENIZERS: Final = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_TOKENS: Final = "embeddings.token_embedding.weight"
_HIGHEST: Final = -1  # pooled_at: the highest token ends the text, not a certain one
# our name -> transformers' key, and its default for what a config.json leaves out
_DEFAULTS: Final[dict[str, tuple[str, Any]]] = {
    "vocabulary": ("vocab_size", 49408),
    "width": ("hidden_size", 512),
    "inner": ("intermediate_size", 2048),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "tokens": ("max_position_embeddings", 77),
    "epsilon": ("layer_norm_eps", 1e-5),
    "activation": ("hidden_act", "quick_gelu"),
    "pooled_at": ("eos_token_id", 49407),
}


class ClipTextFamily(Family):
    """input_ids int64 ``[B,77]`` -> hidden ``[B,77,D]`` and, where the encoder has a projection, pooled ``[B,E]``."""

    name = "clip-text"
    role: ClassVar[Role] = "text_encoder"
    options: ClassVar[Mapping[str, tuple[type, str]]] = {
        "hidden_state": (int, "which hidden state conditions: -1 the last, -2 the one before (SDXL), -3..."),
        "final_norm": (bool, "whether the final norm is applied to it; by default to the last only"),
        "tokenizer": (str, "the tokenizer's folder, if not beside the text encoder; may be on Hugging Face"),
        "part": (str, "which encoder of a pipeline or single file: text_encoder or text_encoder_2"),
        "lora": LORA_OPTION,
        "textual_inversion": INVERSION_OPTION,
    }

    def _inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        options = typed(options, self.options, what=f"family {self.name!r}")
        part = str(options.get("part", "text_encoder"))
        if part not in PREFIXES:
            raise unknown_name("part with a text encoder", part, PREFIXES)
        found = _inspect_file(path, part, options) if path.is_file() else _inspect_folder(path, part, options)
        config, layers = dict(found.config), int(found.config["layers"])
        tokenizer = _find_tokenizer(found.path, str(config["part"]), options)
        if tokenizer.size > int(config["vocabulary"]):
            raise BadCheckpoint(
                f"{tokenizer.folder} has {tokenizer.size} tokens, the text encoder {found.path.name} "
                f"{config['vocabulary']}",
                hint="give the tokenizer that the text encoder was trained with",
            )
        if tokenizer.longest not in (None, int(config["tokens"])):
            raise BadCheckpoint(
                f"{tokenizer.folder} pads texts to {tokenizer.longest} tokens (model_max_length), and the text encoder "
                f"{found.path.name} reads {config['tokens']}",
                hint="give the tokenizer that the text encoder was trained with",
            )
        if "hidden_state" in options:
            config |= {"hidden_state": options["hidden_state"], "final_norm": options["hidden_state"] == -1}
        if "final_norm" in options:
            config["final_norm"] = options["final_norm"]
        config = {"pooled_at": tokenizer.eos, **config}
        config |= {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
        if not -layers <= int(config["hidden_state"]) <= -1:
            raise BadInput(
                f"hidden_state is {config['hidden_state']}; allowed is -{layers} to -1, for its {layers} layers",
                hint="-1 is the last one (Stable Diffusion), -2 the one before (SDXL)",
            )
        if int(config["tokens"]) < 3:
            raise BadCheckpoint(f"{path} has {config['tokens']} token positions", hint="give a CLIP text encoder")
        found = replace(found, files=(*tokenizer.files, *found.files), config=config)
        found = _with_inversions(found, tokenizer, str(options.get("textual_inversion") or ""))
        loras = parse_loras(str(options.get("lora") or ""))
        if not loras:
            return found
        check_loras(loras, self.lora_target(found), model=path.name)
        return replace(
            found,
            files=(*found.files[:1], *(use.path for use in loras), *found.files[1:]),  # the weights stay the last
            config={**found.config, "lora": describe_loras(loras)},
            loras=loras,
        )

    def holds(self, shapes: Shapes, part: str) -> bool:
        return part in PREFIXES and find_tower(shapes, part) is not None

    def load(self, inspection: Inspection) -> nn.Module:
        torch = require("torch", "exporting a text encoder")
        from tstitch_export.families.assemble import fill
        from tstitch_export.families.clip_text.model import ClipText, ClipTextConfig

        weights, config = inspection.files[-1], inspection.config
        sizes: dict[str, Any] = {
            field.name: config[field.name] for field in fields(ClipTextConfig) if field.name in config
        }
        sizes["eos"] = None if config["pooled_at"] == _HIGHEST else config["pooled_at"]
        sizes["masked"] = (config["eos"], config["pad"]) if config.get("masked") else None
        make = partial(ClipText, ClipTextConfig(**sizes))
        with torch.device("meta"):
            wanted = make().state_dict()
        pieces, shapes = _pieces(inspection)
        sizes_wanted = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        if inspection.inversions and _TOKENS in pieces:
            sizes_wanted[_TOKENS] = pieces[_TOKENS].shape(shapes)
        take(
            pieces,
            shapes,
            sizes_wanted,
            unused=frozenset({"encoder.layers.", "final_layer_norm.", "text_projection."}),
            what=weights.name,
        )
        stored = read_checkpoint(weights).tensors()
        # A LoRA may have layers that nothing reads: those above the hidden state that is taken.
        names = pieces if inspection.loras else wanted
        state = {name: pieces[name].tensor(stored).float().contiguous() for name in names}
        if inspection.loras:
            fuse(state, inspection.loras, self.lora_target(inspection), model=weights.name)
        if inspection.inversions:
            state[_TOKENS] = with_inversions(state[_TOKENS], inspection.inversions, int(config["inverted_from"]))
        return fill(make, {name: state[name] for name in wanted}, name=weights.name)

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name="input_ids", dtype="int64", shape=("B", int(inspection.config["tokens"]))),)

    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        config, dtype = inspection.config, TORCH_NAMES[precision]
        hidden = TensorSpec(name="hidden", dtype=dtype, shape=("B", int(config["tokens"]), int(config["width"])))
        if not config["projection"]:
            return (hidden,)
        return hidden, TensorSpec(name="pooled", dtype=dtype, shape=("B", int(config["projection"])))

    def example(
        self, inspection: Inspection, *, batch: int, seed: int, sizes: Mapping[str, int] | None = None
    ) -> tuple[Tensor, ...]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        config = inspection.config
        tokens, bos, eos, pad = (int(config[name]) for name in ("tokens", "bos", "eos", "pad"))
        lengths = torch.randint(0, tokens - 1, (batch, 1), generator=generator)
        words = torch.randint(0, min(bos, eos) or int(config["vocabulary"]), (batch, tokens), generator=generator)
        place = torch.arange(tokens)[None] - 1
        ids = torch.where(place < lengths, words, torch.where(place == lengths, eos, pad))
        ids[:, 0] = bos
        return (ids,)

    def lora_target(self, inspection: Inspection) -> LoraTarget:
        pieces, stored = _pieces(inspection)
        shapes = {name: piece.shape(stored) for name, piece in pieces.items()}
        if inspection.inversions:
            shapes[_TOKENS] = (int(inspection.config["vocabulary"]), *shapes[_TOKENS][1:])
        # As LoRAs spell the modules, after transformers' classes before version 5
        modules = (name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
        aliases = {f"text_model.{module}": module for module in modules}
        return LoraTarget(part=str(inspection.config["part"]), shapes=shapes, aliases=aliases)

    def assets(self, inspection: Inspection, folder: Path) -> Mapping[str, Path]:
        path = folder / "tokenizer.json"
        tokenizer = read_tokenizer(inspection.files[0].parent)
        tokenizer.with_tokens(check_inversions(inspection.inversions, tokenizer)).write(path)
        return {"tokenizer": path}


def _with_inversions(found: Inspection, tokenizer: ClipTokenizer, text: str) -> Inspection:
    config = found.config
    inversions = parse_inversions(text, str(config["part"]), int(config["width"]))
    if not inversions:
        return found
    size = tokenizer.size + len(check_inversions(inversions, tokenizer))
    return replace(
        found,
        files=(*found.files[:1], *(use.path for use in inversions), *found.files[1:]),
        config={
            **config,
            "vocabulary": max(int(config["vocabulary"]), size),
            "inverted_from": tokenizer.size,
            "textual_inversion": describe_inversions(inversions),
        },
        inversions=inversions,
    )


def _inspect_folder(path: Path, part: str, options: Mapping[str, Scalar]) -> Inspection:
    folder = path
    # The refiner of SDXL has a text_encoder_2 alone.
    there = [name for name in (part, *PREFIXES) if (path / name / "config.json").is_file()]
    if there or (path / "model_index.json").is_file():
        if "part" in options and part not in there:
            raise BadCheckpoint(
                f"{path} has no {part}: it looks like {describe_folder(path)}", hint="name another part"
            )
        part = there[0] if there else part
        folder = path / part
    elif path.name in PREFIXES and "part" not in options:
        part = path.name
    config = read_json(folder / "config.json")
    kinds = (config or {}).get("architectures") or ()
    kinds = kinds if isinstance(kinds, list) else ()
    if config is None or not any(kind in _CLASSES for kind in kinds):
        raise BadCheckpoint(
            f"{path} is no CLIP text encoder: it looks like {describe_folder(path)}",
            hint="give the text_encoder folder of a Stable Diffusion pipeline (config.json and model.safetensors)",
        )
    check_model_config(config, folder / "config.json")
    _check_config(config, folder / "config.json")
    value = {name: config.get(key, default) for name, (key, default) in _DEFAULTS.items()}
    if type(value["pooled_at"]) is not int:
        raise BadCheckpoint(
            f"{path}: eos_token_id is {value['pooled_at']!r}; wanted is one token", hint="give a CLIP text encoder"
        )
    if value["pooled_at"] == 2:
        value["pooled_at"] = _HIGHEST  # what text models of before transformers 4.31 mean by 2
    if value["activation"] not in _ACTIVATIONS:
        raise BadCheckpoint(
            f"{path}: hidden_act is {value['activation']!r}; known are {', '.join(_ACTIVATIONS)}",
            hint="give a CLIP text encoder",
        )
    weights = weights_file(folder, ("model", "pytorch_model"))
    shapes = read_checkpoint(weights).shapes
    check_numbers(config, shapes, str(folder / "config.json"))
    projection = shapes.get("text_projection.weight") if "CLIPTextModel" not in kinds else None
    stated = config.get("projection_dim")
    if projection is not None and stated is not None and stated != projection[0]:
        raise BadCheckpoint(
            f"{folder / 'config.json'}: projection_dim is {stated!r}, and the weights have text_projection of "
            f"{list(projection)}",
            hint="copy config.json and the weights from the same model",
        )
    index = read_json(folder.parent / "model_index.json") or {}
    xl = "XL" in str(index.get("_class_name"))
    return Inspection(
        family=ClipTextFamily.name,
        layout="transformers",
        path=folder,
        files=(folder / "config.json", *files_of(weights)),
        config={
            **value,
            "projection": projection[0] if projection else 0,
            "part": part,
            "hidden_state": -2 if xl else -1,
            "final_norm": not xl,
            # which SDXL's pipelines do not read
            **({"masked": True} if config.get("use_attention_mask") and not xl else {}),
        },
        packages=("tokenizers",),
    )


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raises ``BadCheckpoint`` for what transformers would make another model of."""
    for key in (key for key in ("quantization_config", "text_config") if config.get(key)):
        raise BadCheckpoint(
            f"{file} has {key}, which can't be honoured here", hint="save the text encoder alone, in fp16 or fp32"
        )
    for key, _ in _DEFAULTS.values():
        if key in config and config[key] is None:
            raise BadCheckpoint(f"{file}: {key} is null", hint="download or copy it again")
    width, heads = (int(config.get(*_DEFAULTS[name])) for name in ("width", "heads"))
    if width % heads:
        raise BadCheckpoint(
            f"{file}: num_attention_heads is {heads}, which does not divide hidden_size {width}",
            hint="download or copy it again",
        )


def _inspect_file(path: Path, part: str, options: Mapping[str, Scalar]) -> Inspection:
    shapes = read_checkpoint(path).shapes
    found = find_tower(shapes, part)
    if found is None and "part" not in options:
        part = "text_encoder_2"
        found = find_tower(shapes, part)
    if found is None:
        raise BadCheckpoint(
            f"{path.name} has no {options.get('part', 'text encoder')}: no tensor starts with "
            f"{' or '.join(prefix for prefix, _ in PREFIXES[part])}; it looks like {looks_like(shapes)}",
            hint="give the text_encoder folder of a pipeline, or the single file of a whole Stable Diffusion or SDXL",
        )
    prefix, is_open = found
    if "tokenizer" not in options:
        raise BadCheckpoint(
            f"{path.name} is a single file and holds no tokenizer",
            hint=f"give a tokenizer folder (vocab.json and merges.txt): --option {part}.tokenizer=DIR",
        )
    pieces = {name: piece.shape(shapes) for name, piece in name_pieces(shapes, prefix=prefix, is_open=is_open).items()}
    try:
        vocabulary, width = pieces["embeddings.token_embedding.weight"]
        tokens = pieces["embeddings.position_embedding.weight"][0]
        inner = pieces["encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as missing:
        raise BadCheckpoint(f"{path.name} lacks {prefix} {missing}", hint="download or copy it again") from None
    xl = prefix.startswith("conditioner.")
    projection = pieces.get("text_projection.weight") if xl and is_open else None
    return Inspection(
        family=ClipTextFamily.name,
        layout="single-file",
        path=path,
        files=files_of(path),
        config={
            "layers": 1 + max(int(name.split(".")[2]) for name in pieces if name.startswith("encoder.layers.")),
            "width": width,
            "heads": max(1, width // 64),  # leaves no trace in the shapes: CLIP's heads have 64 channels
            "inner": inner,
            "vocabulary": vocabulary,
            "tokens": tokens,
            "activation": "gelu" if is_open else "quick_gelu",
            "epsilon": 1e-5,
            "projection": projection[0] if projection else 0,
            "prefix": prefix,
            "open": is_open,
            "part": part,
            # Stable Diffusion 2.x takes the state before the last too, and normalises it.
            "hidden_state": -2 if xl or is_open else -1,
            "final_norm": not xl,
        },
        packages=("tokenizers",),
    )


def _find_tokenizer(path: Path, part: str, options: Mapping[str, Scalar]) -> ClipTokenizer:
    given = options.get("tokenizer")
    folder = Path(str(given)) if given is not None else path.parent / _TOKENIZERS[part]
    if not folder.is_dir():
        raise BadCheckpoint(
            f"the text encoder {path} has no tokenizer: {folder} does not exist",
            hint=f"give its folder (vocab.json and merges.txt): --option {part}.tokenizer=DIR",
        )
    return read_tokenizer(folder)


def _pieces(inspection: Inspection) -> tuple[dict[str, Piece], Shapes]:
    """Where each parameter is stored, and the shapes of what is stored."""
    shapes = read_checkpoint(inspection.files[-1]).shapes
    prefix, is_open = str(inspection.config.get("prefix", "")), bool(inspection.config.get("open", False))
    return name_pieces(shapes, prefix=prefix, is_open=is_open), shapes
