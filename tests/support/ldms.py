"""Real tiny latent diffusion UNets of diffusers with random weights, saved as diffusers and as their authors do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["TINY_SHAPE", "conditional_unet", "ldm_checkpoint", "ldm_folder", "original_names", "original_state"]

TINY_SHAPE = (3, 8, 8)
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def _random(model: Any, seed: int, scale: float = 0.05) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def conditional_unet(
    *,
    widths: tuple[int, ...] = (32, 64),
    blocks: int = 1,
    attention: tuple[int, ...] = (1,),
    context: int = 24,
    heads: int | tuple[int, ...] = 2,
    depth: int = 1,
    channels: int = 3,
    seed: int = 0,
) -> Any:
    """diffusers' ``UNet2DConditionModel`` set up as latent diffusion; ``attention`` names levels, 0 the finest."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    with_attention = [level in attention for level in range(len(widths))]
    kind: Any = UNet2DConditionModel
    model = kind(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)),
        cross_attention_dim=context,
        attention_head_dim=heads,  # the number of heads: diffusers keeps the wrong name for old configurations
        transformer_layers_per_block=depth,
    )
    return _random(model, seed)


def original_names(unet: Any) -> dict[str, str]:
    """diffusers' parameter names -> those of latent diffusion's own UNet."""
    n = unet.config.layers_per_block
    up_attention = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]

    def place(name: str) -> str:
        head, *rest = name.split(".")
        tail = ".".join(rest)
        match head:
            case "conv_in":
                return f"input_blocks.0.0.{tail}"
            case "time_embedding":
                return {"linear_1": "time_embed.0", "linear_2": "time_embed.2"}[rest[0]] + "." + rest[1]
            case "conv_norm_out":
                return f"out.0.{tail}"
            case "conv_out":
                return f"out.2.{tail}"
            case "mid_block":
                index = 1 if rest[0] == "attentions" else 2 * int(rest[1])
                return f"middle_block.{index}.{inner(rest[0], rest[2:])}"
        level, kind, index = int(rest[0]), rest[1], int(rest[2])
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (n + 1)}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            return f"output_blocks.{level * (n + 1) + n}.{2 if up_attention[level] else 1}.conv.{rest[-1]}"
        block = f"input_blocks.{1 + level * (n + 1) + index}" if head == "down_blocks" else None
        block = block or f"output_blocks.{level * (n + 1) + index}"
        return f"{block}.{0 if kind == 'resnets' else 1}.{inner(kind, rest[3:])}"

    def inner(kind: str, rest: list[str]) -> str:
        return ".".join([_RESNET[rest[0]], *rest[1:]] if kind == "resnets" else rest)

    return {name: place(name) for name in unet.state_dict()}


def original_state(unet: Any, table: Any, *, ema: Any = None, betas: bool = True) -> dict[str, Any]:
    """The state dict of the whole model as its training saves it; ``ema`` is a UNet whose weights are the average."""
    import torch

    names = original_names(unet)
    state = {f"model.diffusion_model.{names[k]}": v.clone() for k, v in unet.state_dict().items()}
    if ema is not None:
        averaged = {("diffusion_model." + names[k]).replace(".", ""): v for k, v in ema.state_dict().items()}
        state |= {f"model_ema.{k}": v.clone() for k, v in averaged.items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    state["cond_stage_model.embedding.weight"] = table.clone()
    state["first_stage_model.quantize.embedding.weight"] = torch.zeros(4, 3)
    if betas:
        state["betas"] = (torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2).float()
        state["alphas_cumprod"] = torch.cumprod(1 - state["betas"], 0)
    return state


def class_table(labels: int, context: int, seed: int) -> Any:
    import torch

    return torch.randn(labels, context, generator=torch.Generator().manual_seed(seed))


def ldm_checkpoint(
    path: Path, *, labels: int = 11, seed: int = 0, ema: bool = False, **changes: Any
) -> tuple[Any, Any]:
    """Writes a tiny model in the original layout (``.safetensors`` or ``.ckpt``); its UNet in diffusers, and its table.

    With ``ema`` the UNet returned is the average, and the weights beside it are others.
    """
    import torch
    from safetensors.torch import save_file

    unet = conditional_unet(seed=seed, **changes)
    table = class_table(labels, unet.config.cross_attention_dim, seed)
    raw = conditional_unet(seed=seed + 100, **changes) if ema else unet
    state = original_state(raw, table, ema=unet if ema else None)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 3}, path)
    return unet, table


def ldm_folder(folder: Path, *, kind: str = "attended", labels: int = 11, seed: int = 0) -> tuple[Any, Any]:
    """Writes a diffusers pipeline folder; its UNet, and its table where the class is a token (``attended``)."""
    import torch
    from diffusers import UNet2DModel
    from safetensors.torch import save_file

    table = None
    if kind == "attended":
        unet = conditional_unet(seed=seed)
        table = class_table(labels, unet.config.cross_attention_dim, seed)
        (folder / "class_embedder").mkdir(parents=True)
        save_file({"embedding.weight": table}, folder / "class_embedder" / "diffusion_pytorch_model.safetensors")
    else:
        torch.manual_seed(seed)
        maker: Any = UNet2DModel
        unet = maker(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=labels, attention_head_dim=16,
        )  # fmt: skip
        unet = _random(unet, seed)
    unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    settings = {
        "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195,
        "num_train_timesteps": 1000, "prediction_type": "epsilon",
    }  # fmt: skip
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    return unet, table
