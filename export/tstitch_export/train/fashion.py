"""Trains one member of the built-in pair on Fashion-MNIST.

    python -m tstitch_export.train.fashion --data DIR --member large --out runs/large --minutes 120
    python -m tstitch_export.train.fashion --data DIR --member small --out runs/small --images 1500000

On a CPU, several processes of one thread each are faster than several threads, and do not mind a busy machine:

    torchrun --nproc-per-node 2 -m tstitch_export.train.fashion --threads 1 ... (as above)

Stop it at any time (Ctrl-C, a reboot): the same command goes on from the last checkpoint. The exponential moving
average of the weights is written to ``OUT/ema.safetensors`` with the names of the published DiT checkpoints.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tstitch_export.families.dit.config import DiTConfig
from tstitch_export.families.dit.model import DiT
from tstitch_export.train.data import load_split
from tstitch_export.train.loop import Budget, Ema, parse_options, resume, run, save_state, training_parser

__all__ = ["MEMBERS", "main", "v_loss"]

MEMBERS = {
    "large": DiTConfig(depth=6, width=192, heads=3, patch=4, size=28, channels=1, classes=10),
    "small": DiTConfig(depth=2, width=64, heads=2, patch=4, size=28, channels=1, classes=10),
}
PEAK_RATE = {"large": 1e-3, "small": 2e-3}


def alphas_cumprod() -> Tensor:
    """The linear schedule of DDPM (arXiv 2006.11239, section 4): beta from 1e-4 to 0.02 over 1,000 steps."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def v_loss(model: DiT, x0: Tensor, labels: Tensor, signal: Tensor, generator: torch.Generator, part: slice) -> Tensor:
    """Mean squared error of v = alpha eps - sigma x0 (Salimans & Ho, arXiv 2202.00512) at uniform timesteps.

    The random numbers are drawn for the whole batch, then the loss is that of its ``part``.
    """
    batch = x0.shape[0]
    device = x0.device
    t = torch.randint(0, signal.shape[0], (batch,), generator=generator)[part]
    noise = torch.randn(x0.shape, generator=generator)[part].to(device)
    drop = (torch.rand(batch, generator=generator) < 0.1)[part]
    x0 = x0[part]
    labels = torch.where(drop.to(device), model.config.classes, labels[part])
    alpha = signal[t].sqrt().float().to(device)[:, None, None, None]
    sigma = (1 - signal[t]).sqrt().float().to(device)[:, None, None, None]
    v = model(alpha * x0 + sigma * noise, t.float().to(device), labels)
    loss: Tensor = (v - (alpha * noise - sigma * x0)).square().mean()
    return loss


def average_gradients(model: DiT, world: int) -> None:
    """One all-reduce for all gradients, so that processes meet once a step."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for g, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__)
    parser.add_argument("--member", choices=sorted(MEMBERS), required=True)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parse_options(parser, argv)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch % world:
        parser.error(f"--batch {args.batch} does not divide among {world} processes")
    if world > 1:
        dist.init_process_group("gloo")
    part = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
    images, labels_np = load_split(args.data, "train")
    data = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
    labels = torch.from_numpy(labels_np)

    torch.manual_seed(args.seed)
    model = DiT(MEMBERS[args.member]).initialise().to(args.device)
    ema = Ema(model, 0.999)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    budget = Budget(args.images, args.minutes)
    state = resume(args.out / "state.pt", model, optimiser, budget)
    step, history = state["step"], state.get("history", [])
    ema.values |= {name: value.to(args.device) for name, value in state.get("ema", {}).items()}

    def save(step: int) -> None:
        if rank:
            return
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "ema": ema.values}
        more = {"step": step, "history": history, "seconds": budget.seconds()}
        save_state(args.out / "state.pt", {**state, **more})
        buffers = {"pos_embed": model.get_buffer("pos_embed")}
        save_file({k: v.cpu().contiguous() for k, v in {**ema.values, **buffers}.items()}, args.out / "ema.safetensors")
        log = {"member": args.member, "images": step * args.batch, "seconds": budget.seconds(), "history": history}
        (args.out / "log.json").write_text(json.dumps(log))

    signal = alphas_cumprod()
    generator = torch.Generator()
    losses: list[Tensor] = []

    def share(step: int) -> float:
        shared = torch.tensor(budget.progress(step * args.batch))
        if world > 1:
            dist.broadcast(shared, 0)  # the clock of one process decides for all
        return float(shared)

    def advance(step: int, progress: float) -> None:
        generator.manual_seed(args.seed * 1_000_003 + step)  # a resumed run draws what an unbroken one would
        index = torch.randint(0, len(data), (args.batch,), generator=generator)
        x0, y = data[index].to(args.device), labels[index].to(args.device)
        loss = v_loss(model, x0, y, signal, generator, part)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if world > 1:
            average_gradients(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        ema.update(model, step + 1)
        losses.append(loss.detach())
        if (step + 1) % 100 == 0:
            mean, seen = float(torch.stack(losses).mean()), (step + 1) * args.batch
            losses.clear()
            history.append([seen, round(budget.seconds(), 1), mean])
            if rank == 0:
                print(f"{100 * progress:5.1f} %  images {seen:>9,}  loss {mean:.4f}", file=sys.stderr)

    steps = run(optimiser, PEAK_RATE[args.member], step=step, share=share, advance=advance, save=save)
    if steps is None:
        return 130
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return 0
    print(f"{args.out / 'ema.safetensors'}: {steps * args.batch:,} images in {budget.seconds() / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
