"""Files of every kind of LoRA, tried on a UNet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from support.compatibility.markdown import attempt, grouped, outcome, table
from tstitch_export.families.base import LoraTarget, LoraUse
from tstitch_export.families.lora.fuse import check_loras, lora_deltas

__all__ = ["lora_section"]

_MODULE: Final = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
_CONV: Final = "down_blocks.0.resnets.0.conv1"
_ORIGINAL: Final = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
_TEXT: Final = "text_model.encoder.layers.0.self_attn.q_proj"
_TARGET: Final = LoraTarget(
    shapes={f"{_MODULE}.weight": (32, 768), f"{_CONV}.weight": (32, 32, 3, 3)}, aliases={_ORIGINAL: _MODULE}
)
_KOHYA: Final = f"lora_unet_{_MODULE.replace('.', '_')}"
_KOHYA_CONV: Final = f"lora_unet_{_CONV.replace('.', '_')}"
_Shapes = Mapping[str, tuple[int, ...]]
_PAIR: Final[_Shapes] = {f"{_KOHYA}.lora_down.weight": (4, 768), f"{_KOHYA}.lora_up.weight": (32, 4)}
_PEFT: Final[_Shapes] = {f"unet.{_MODULE}.lora_A.weight": (4, 768), f"unet.{_MODULE}.lora_B.weight": (32, 4)}
_BARE: Final[_Shapes] = {
    f"base_model.model.{_MODULE}.lora_A.weight": (4, 768),
    f"base_model.model.{_MODULE}.lora_B.weight": (32, 4),
}

_KINDS: Final[Mapping[str, _Shapes]] = {
    "kohya, sd-scripts": {**_PAIR, f"{_KOHYA}.alpha": ()},
    "kohya, `alpha` of shape [1]": {**_PAIR, f"{_KOHYA}.alpha": (1,)},
    "kohya without `alpha`": _PAIR,
    "kohya, names of the original UNet": {
        f"lora_unet_{_ORIGINAL.replace('.', '_')}.lora_down.weight": (4, 768),
        f"lora_unet_{_ORIGINAL.replace('.', '_')}.lora_up.weight": (32, 4),
    },
    "LoCon: convolutions": {
        f"{_KOHYA_CONV}.lora_down.weight": (4, 32, 3, 3), f"{_KOHYA_CONV}.lora_up.weight": (32, 4, 1, 1),
    },
    "LoCon with a middle (Tucker)": {
        f"{_KOHYA_CONV}.lora_down.weight": (4, 32, 1, 1), f"{_KOHYA_CONV}.lora_mid.weight": (4, 4, 3, 3),
        f"{_KOHYA_CONV}.lora_up.weight": (32, 4, 1, 1),
    },
    "diffusers, PEFT names": _PEFT,
    "PEFT's own file (`base_model.model.`)": _BARE,
    "diffusers before PEFT (attention processors)": {
        f"unet.{_MODULE.removesuffix('.to_k')}.processor.to_k_lora.down.weight": (4, 768),
        f"unet.{_MODULE.removesuffix('.to_k')}.processor.to_k_lora.up.weight": (32, 4),
    },
    "UNet and text encoder in one file": {
        **_PAIR, f"lora_te_{_TEXT.replace('.', '_')}.lora_down.weight": (4, 64),
        f"lora_te_{_TEXT.replace('.', '_')}.lora_up.weight": (64, 4),
    },
    "text encoder alone": {
        f"lora_te_{_TEXT.replace('.', '_')}.lora_down.weight": (4, 64),
        f"lora_te_{_TEXT.replace('.', '_')}.lora_up.weight": (64, 4),
    },
    "DoRA (kohya)": {**_PAIR, f"{_KOHYA}.dora_scale": (32, 1)},
    "DoRA (PEFT)": {**_PEFT, f"unet.{_MODULE}.lora_magnitude_vector": (32,)},
    "PEFT with biases": {**_PEFT, f"unet.{_MODULE}.lora_B.bias": (32,)},
    "LoHa": {f"{_KOHYA}.hada_{name}": (32, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "LoKr": {f"{_KOHYA}.lokr_{name}": (4, 4) for name in ("w1", "w2")},
    "OFT": {f"{_KOHYA}.oft_blocks": (4, 8, 8)},
    "IA3": {f"{_KOHYA}.weight": (32,), f"{_KOHYA}.on_input": ()},
    "differences of whole weights": {f"{_KOHYA}.diff": (32, 768)},
    "with textual inversions": {**_PAIR, "bundle_emb.word.string_to_param.*": (1, 768)},
    "for SDXL, given to Stable Diffusion 1": {
        f"{_KOHYA}.lora_down.weight": (4, 2048), f"{_KOHYA}.lora_up.weight": (32, 4),
    },
    "for Flux": {
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 64),
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": (64, 4),
    },
    "a damaged pair": {f"{_KOHYA}.lora_down.weight": (4, 768), f"{_KOHYA}.lora_up.weight": (32, 8)},
}  # fmt: skip
_SHORTER: Final = {
    r"^(is [^:]*, not a plain LoRA)\b.*": r"\1",
    r"^is a LoRA for another model.*; it looks like (.*)": r"does not fit the model; it looks like \1",
}
_NOTED: Final[Mapping[str, tuple[_Shapes, Mapping[str, Any]]]] = {
    "PEFT with `lora_alpha` and `alpha_pattern`": (_BARE, {"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 2}}),
    "PEFT with `use_rslora`": (_BARE, {"lora_alpha": 8, "use_rslora": True}),
    "PEFT with `use_dora`": (_BARE, {"lora_alpha": 8, "use_dora": True}),
}


def lora_section(folder: Path) -> str:
    """``folder``: an empty one, for the files."""
    rows = [(kind, _tried(folder, shapes, None)) for kind, shapes in _KINDS.items()]
    rows += [(kind, _tried(folder, shapes, noted)) for kind, (shapes, noted) in _NOTED.items()]
    return "\n\n".join(
        [
            "## LoRAs",
            "For `build --lora`, `sample --lora`, and those fused in a pipeline. Each kind was tried on a UNet.",
            table(("kinds of files", "outcome"), grouped(rows)),
        ]
    )


def _tried(folder: Path, shapes: _Shapes, noted: Mapping[str, Any] | None) -> str:
    import torch
    from safetensors.torch import save_file

    path = folder / "style.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    settings = folder / "adapter_config.json"
    settings.unlink(missing_ok=True)
    if noted is not None:
        settings.write_text(json.dumps(noted))

    def fused() -> int:
        check_loras([LoraUse(path)], _TARGET, model="a UNet")
        return len([delta() for _, delta in lora_deltas(LoraUse(path), _TARGET, model="a UNet")])

    found, why = attempt(fused, without=[path.name])
    assert found is None or found == 1
    return outcome("fused", why, _SHORTER)
