"""Pairs of tiny class-conditional members other than DiTs, built as a user would, and their modules in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest, NoiseScheduleSpec
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_export.families import open_family

__all__ = ["PAIRS", "ClassPair", "Part"]

Array = NDArray[np.float64]

SD = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
LINEAR = NoiseScheduleSpec(kind="linear")
LDM = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.0015, beta_end=0.0195)


@dataclass(frozen=True)
class Part:
    """A member: ``write`` makes its checkpoint at the path it is given; ``noise`` is what it was trained with."""

    family: str
    file: str
    write: Callable[[Path], object]
    noise: NoiseScheduleSpec
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class ClassPair:
    """``small`` and ``large`` in one recipe: 10 classes and a null class, eps."""

    folder: Path
    small: Part
    large: Part
    latent: tuple[int, int, int]
    recipe_noise: NoiseScheduleSpec

    def part(self, name: str) -> Part:
        return self.small if name == "small" else self.large

    @property
    def recipe(self) -> Path:
        channels, height, width = self.latent
        noise = self.recipe_noise
        text = (
            'name = "pair"\ndescription = "for tests"\n'
            f"[latent]\nchannels = {channels}\nheight = {height}\nwidth = {width}\n"
            f'[noise]\nkind = "{noise.kind}"\nbeta_start = {noise.beta_start}\nbeta_end = {noise.beta_end}\n'
            '[conditioning]\nclasses = 10\nnull = 10\n[defaults]\nsteps = 10\n[decoder]\nkind = "none"\n'
        )
        for name in ("small", "large"):
            text += f'[members.{name}]\nfamily = "{self.part(name).family}"\nparametrisation = "eps"\n'
        path = self.folder / "pair.toml"
        path.write_text(text)
        return path

    def checkpoint(self, name: str) -> Path:
        path = self.folder / name / self.part(name).file
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            self.part(name).write(path)
        return path

    def build(self, output: Path, **changes: Any) -> Manifest:
        return build(
            self.recipe,
            members={name: self.checkpoint(name) for name in ("small", "large")},
            output=output,
            options={f"{m}.{key}": value for m in ("small", "large") for key, value in self.part(m).options.items()},
            **{"profile": Range(1, 2, 4), **changes},
        )

    @cached_property
    def bundle(self) -> Path:
        output = self.folder / "pair.bundle"
        self.build(output)
        return output

    @cached_property
    def _modules(self) -> dict[str, Any]:
        modules = {}
        for name in ("small", "large"):
            family = open_family(self.part(name).family)
            modules[name] = family.load(family.inspect(self.checkpoint(name), self.part(name).options)).double()
        return modules

    def run(self, name: str, x: Array, t: float, labels: list[int]) -> Array:
        """The member in PyTorch and float64: ``x [B,C,H,W]``, at a timestep of its own noise schedule -> eps."""
        import torch

        with torch.inference_mode():
            out = self._modules[name](
                torch.from_numpy(np.ascontiguousarray(x)), torch.full((len(x),), t), torch.tensor(labels)
            )
        found: Array = out.numpy()[:, : self.latent[0]]
        return found


def _ldm(**changes: Any) -> Callable[[Path], object]:
    def write(path: Path) -> object:
        from support.ldms import ldm_checkpoint

        return ldm_checkpoint(path, **changes)

    return write


def _ldm_folder(path: Path) -> object:
    from support.ldms import ldm_folder

    return ldm_folder(path, seed=5)


def _uvit(**changes: Any) -> Callable[[Path], object]:
    def write(path: Path) -> object:
        from support.uvits import uvit_checkpoint

        return uvit_checkpoint(path, **changes)

    return write


def _dit(path: Path) -> object:
    import torch

    from support.dits import published_model

    torch.manual_seed(3)
    model = published_model(classes=10)
    torch.save(model.state_dict(), path)
    return model


_LDM_OPTIONS = {"num_heads": 2, "size": 8}
_UVIT = {"num_heads": 4}
PAIRS: Mapping[str, Callable[[Path], ClassPair]] = {
    # class embedders of different widths, the small one without a null class of its own
    "ldm": lambda folder: ClassPair(
        folder,
        Part(
            "ldm",
            "s.ckpt",
            _ldm(widths=(32,), attention=(0,), context=16, labels=10),
            LDM,
            {**_LDM_OPTIONS, "null_embedding": "uniform"},
        ),
        Part("ldm", "l.ckpt", _ldm(widths=(64, 32), context=24, seed=1, ema=True), LDM, _LDM_OPTIONS),
        (3, 8, 8),
        LINEAR,  # the checkpoints state theirs
    ),
    "ldm-diffusers": lambda folder: ClassPair(
        folder,
        Part("ldm", "s.safetensors", _ldm(seed=2), LDM, _LDM_OPTIONS),
        Part("ldm", "pipeline", _ldm_folder, LDM),
        (3, 8, 8),
        LDM,
    ),
    # as L and H were published: two kinds of noise
    "uvit": lambda folder: ClassPair(
        folder,
        Part("uvit", "s.pth", _uvit(depth=3), LINEAR, {**_UVIT, "time": "continuous"}),
        Part("uvit", "l.pth", _uvit(depth=3, mlp_time=True, conv=False, seed=1), SD, {**_UVIT, "time": "discrete"}),
        (4, 8, 8),
        SD,
    ),
    "dit-uvit": lambda folder: ClassPair(
        folder,
        Part("dit", "s.pt", _dit, LINEAR, _UVIT),
        Part("uvit", "l.pth", _uvit(seed=4), SD, {**_UVIT, "time": "discrete"}),
        (4, 8, 8),
        LINEAR,
    ),
}
