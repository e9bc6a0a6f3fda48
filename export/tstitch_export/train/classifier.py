"""Trains the feature network of the built-in pair: a small classifier of Fashion-MNIST.

    python -m tstitch_export.train.classifier --data DIR --out runs/classifier --images 600000

Stop it at any time (Ctrl-C, a reboot): the same command goes on from the last checkpoint. At the end ``OUT`` holds
``classifier.onnx`` (images float32 [B,1,28,28] in [-1,1] -> features [B,64], logits [B,10]) and ``reference.npz`` (mean
and covariance of the features of the 10,000 held-out test pictures, their count, the accuracy on them, and the features
themselves in float16).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tstitch_engines.backends.onnx_session import open_session
from tstitch_engines.quiet import silence_output
from tstitch_engines.spec import TensorSpec
from tstitch_export.onnx_export.graph import tidy
from tstitch_export.onnx_export.pack import store_half
from tstitch_export.train.data import load_split
from tstitch_export.train.loop import Budget, parse_options, resume, run, save_state, training_parser

__all__ = ["Classifier", "export", "main"]

FEATURES = 64
PEAK_RATE = 3e-3


class Classifier(nn.Module):
    """Images ``[B,1,28,28]`` in [-1, 1] -> (features ``[B,64]``, logits ``[B,10]``); 0.27M parameters."""

    def __init__(self) -> None:
        super().__init__()

        def stage(channels: int, out: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        self.body = nn.Sequential(
            *stage(1, 16),
            nn.MaxPool2d(2),
            *stage(16, 32),
            nn.MaxPool2d(2),
            *stage(32, 64),
            *stage(64, 64),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 7 * 7, FEATURES),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.3), nn.Linear(FEATURES, 10))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return features, self.head(features)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors half of the pictures and shifts each by up to 2 pixels, filling with black."""
    batch = images.shape[0]
    mirror = torch.rand(batch, generator=generator) < 0.5
    images = torch.where(mirror[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (2, 2, 2, 2), value=-1.0)
    dy, dx = torch.randint(0, 5, (2, batch, 1), generator=generator)
    rows, columns = dy + torch.arange(28), dx + torch.arange(28)
    return padded[torch.arange(batch)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def normalised(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]


def export(model: Classifier, path: Path) -> None:
    """Writes the ONNX graph with a dynamic batch and float16-stored weights."""
    import onnx

    batch = torch.export.Dim("B", min=1, max=65535)
    with silence_output(), torch.no_grad():
        program = torch.export.export(model.eval(), (torch.zeros(2, 1, 28, 28),), dynamic_shapes={"images": {0: batch}})
        exported = torch.onnx.export(
            program,
            (),
            input_names=["images"],
            output_names=["features", "logits"],
            dynamo=True,
            opset_version=20,
            verbose=False,
        )
        assert exported is not None
        exported.save(path, external_data=False)
    tidy(
        path,
        inputs=[TensorSpec(name="images", dtype="float32", shape=("B", 1, 28, 28))],
        outputs=[
            TensorSpec(name=name, dtype="float32", shape=("B", size))
            for name, size in (("features", FEATURES), ("logits", 10))
        ],
    )
    graph = onnx.load(path)
    store_half(graph)
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def write_reference(network: Path, data: Path, path: Path) -> float:
    """Runs the exported graph over the test split, writes features and statistics and returns the accuracy."""
    import onnxruntime

    images, labels = load_split(data, "t10k")
    session = open_session(network, settings=onnxruntime.SessionOptions())
    inputs = normalised(images).numpy()
    parts = [session.run(["features", "logits"], {"images": inputs[i : i + 500]}) for i in range(0, len(inputs), 500)]
    features = np.concatenate([part[0] for part in parts]).astype(np.float64)
    accuracy = float((np.concatenate([part[1] for part in parts]).argmax(1) == labels).mean())
    np.savez(
        path,
        mean=features.mean(0),
        covariance=np.cov(features, rowvar=False),
        count=np.int64(len(features)),
        accuracy=np.float64(accuracy),
        features=features.astype(np.float16),
    )
    return accuracy


def main(argv: list[str] | None = None) -> int:
    args = parse_options(training_parser(__doc__), argv)
    images, labels_np = load_split(args.data, "train")
    data, labels = normalised(images), torch.from_numpy(labels_np)

    torch.manual_seed(args.seed)
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.02)
    budget = Budget(args.images, args.minutes)
    step = resume(args.out / "state.pt", model, optimiser, budget)["step"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
        save_state(args.out / "state.pt", {**state, "step": step, "seconds": budget.seconds()})

    generator = torch.Generator()
    losses: list[float] = []

    def advance(step: int, progress: float) -> None:
        seed = args.seed * 1_000_003 + step
        generator.manual_seed(seed)
        torch.manual_seed(seed)  # dropout: a resumed run draws what an unbroken one would
        index = torch.randint(0, len(data), (args.batch,), generator=generator)
        _, logits = model(augment(data[index], generator))
        loss = functional.cross_entropy(logits, labels[index], label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
        if len(losses) == 200:
            print(f"{100 * progress:5.1f} %  loss {sum(losses) / len(losses):.4f}", file=sys.stderr, flush=True)
            losses.clear()

    model.train()
    share = lambda step: budget.progress(step * args.batch)  # noqa: E731
    steps = run(optimiser, PEAK_RATE, step=step, share=share, advance=advance, save=save)
    if steps is None:
        return 130
    export(model, args.out / "classifier.onnx")
    accuracy = write_reference(args.out / "classifier.onnx", args.data, args.out / "reference.npz")
    print(f"{args.out / 'classifier.onnx'}: test accuracy {100 * accuracy:.2f} % after {steps * args.batch:,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
