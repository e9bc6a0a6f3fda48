"""A pair of tiny DiTs with random weights, and bundles of it built as a user would build them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.spec import Range
from tstitch_export.build import build

__all__ = ["SHAPES", "TinyPair"]

SIZE, CHANNELS = 8, 4
PARAMETRISATION = {"small": "eps", "large": "v"}
SHAPES = {"small": {"depth": 1, "width": 32, "heads": 2}, "large": {"depth": 2, "width": 48, "heads": 3}}


class TinyPair:
    """``small`` (eps) and ``large`` (v): 4x8x8 latents, learned variance, 10 classes and a null class."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recipe(self, *names: str, classes: int = 10) -> Path:
        path = self.folder / f"{'-'.join(names)}-{classes}.toml"
        members = "".join(
            f'[members.{name}]\nfamily = "dit"\nparametrisation = "{PARAMETRISATION[name]}"\n'
            f"options = {{ num_heads = {SHAPES[name]['heads']} }}\n"
            for name in names
        )
        path.write_text(
            'name = "tiny"\ndescription = "for tests"\n'
            f"[latent]\nchannels = {CHANNELS}\nheight = {SIZE}\nwidth = {SIZE}\n"
            '[noise]\nkind = "linear"\n'
            f"[conditioning]\nclasses = {classes}\nnull = {classes}\n"
            '[defaults]\nsteps = 10\n[decoder]\nkind = "pixel"\n' + members
        )
        return path

    def model(self, name: str, *, classes: int = 10):  # type: ignore[no-untyped-def]
        """The PyTorch module, float32, with every parameter random (adaLN's zeros would hide mistakes)."""
        import torch

        from tstitch_export.families.dit.config import DiTConfig
        from tstitch_export.families.dit.model import DiT

        config = DiTConfig(
            **SHAPES[name], patch=2, size=SIZE, channels=CHANNELS, classes=classes, learn_sigma=True, null_class=True
        )
        torch.manual_seed(len(name))
        model = DiT(config).initialise()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()

    def checkpoint(self, name: str) -> Path:
        from safetensors.torch import save_file

        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            save_file(self.model(name).state_dict(), path)
        return path

    def _build(self, tag: str, *names: str, profile: Range | None = None) -> Path:
        output = self.folder / f"{tag}.bundle"
        if not output.exists():
            members = {name: self.checkpoint(name) for name in names}
            build(self.recipe(*names), members=members, output=output, profile=profile or Range(1, 4, 8))
        return output

    @cached_property
    def bundle(self) -> Path:
        return self._build("pair", "small", "large")

    def alone(self, name: str) -> Path:
        return self._build(f"{name}-alone", name)

    def batch_one(self) -> Path:
        return self._build("batch-one", "small", "large", profile=Range(1, 1, 1))

    def broken_large(self) -> Path:
        """A large member that overflows for class 1 only, so that its export check (other classes) passes."""
        from safetensors.torch import save_file

        output = self.folder / "broken.bundle"
        if output.exists():
            return output
        members = {}
        for name in ("small", "large"):
            state = self.model(name, classes=1000).state_dict()
            if name == "large":
                state["y_embedder.embedding_table.weight"][1] = 3e38  # overflows in the first layer
            members[name] = self.folder / f"{name}-1000.safetensors"
            save_file(state, members[name])
        build(self.recipe("small", "large", classes=1000), members=members, output=output, profile=Range(1, 4, 8))
        return output

    @cached_property
    def _float64(self) -> dict[str, object]:
        return {name: self.model(name).double() for name in SHAPES}

    def run(self, name: str, x: NDArray[np.float64], t: float, labels: list[int]) -> NDArray[np.float64]:
        """The PyTorch module in float64 on ``x [B,4,8,8]``."""
        import torch

        with torch.inference_mode():
            out = self._float64[name](  # type: ignore[operator]
                torch.from_numpy(np.ascontiguousarray(x)), torch.full((len(x),), t), torch.tensor(labels)
            )
        result: NDArray[np.float64] = out.numpy()
        return result
