"""The recipes of LDM and U-ViT pairs: the published settings, and published checkpoints fit them (files of zeros)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.dits import sparse_safetensors
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.errors import PairMismatch
from tstitch_export.families.dit import layout as dit_layout
from tstitch_export.families.dit.config import DiTConfig
from tstitch_export.families.ldm import layout as ldm_layout
from tstitch_export.families.unet.layout import PREFIX
from tstitch_export.families.uvit import layout as uvit_layout
from tstitch_export.hub.checkpoints import Checkpoints
from tstitch_export.planning.compatibility import PairConventions, reconcile
from tstitch_export.planning.network import plan_member
from tstitch_export.planning.recipe import load_recipe

SD = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
LDM = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.0015, beta_end=0.0195)
LINEAR = NoiseScheduleSpec(kind="linear")


@pytest.mark.parametrize(
    ("name", "latent", "factor", "scaling", "noise", "guidance"),
    [
        ("ldm-imagenet", (4, 32, 32), 8, 1.0, LDM, 3.0),
        ("ldm-imagenet-f4", (3, 64, 64), 4, 1.0, LDM, 3.0),
        ("uvit-256", (4, 32, 32), 8, 0.18215, SD, 1.4),
        ("uvit-512", (4, 64, 64), 8, 0.18215, SD, 1.7),
        ("dit-uvit-256", (4, 32, 32), 8, 0.18215, LINEAR, 1.4),
    ],
)
def test_recipes_are_the_published_settings(
    name: str, latent: tuple[int, ...], factor: int, scaling: float, noise: NoiseScheduleSpec, guidance: float
) -> None:
    recipe, _ = load_recipe(name)
    assert recipe.name == name
    assert (recipe.latent.channels, recipe.latent.height, recipe.latent.width) == latent
    assert (recipe.latent.scaling, recipe.latent.shift) == (scaling, 0.0)
    assert (recipe.decoder.kind, recipe.decoder.factor) == ("vae", factor)
    assert recipe.noise == noise
    assert (recipe.conditioning.kind, recipe.conditioning.classes, recipe.conditioning.null) == ("class", 1000, 1000)
    assert recipe.defaults.guidance == guidance
    assert recipe.defaults.schedule == "small:0.4,large"
    assert {part.parametrisation for part in recipe.members.values()} == {"eps"}
    for part in recipe.parts.values():
        assert part.options.get("scaling", 0.18215) == scaling  # a VQ's own default is another


def ldm_s(path: Path, labels: int = 1000) -> Path:
    config = ldm_layout.LDMConfig(
        base=64, channels=4, widths=(64, 128, 256), blocks=2, attention=(0, 1, 2), depth=1, context=256, labels=labels,
        heads=ldm_layout.Heads(channels=32),
    )  # fmt: skip
    shapes = {PREFIX + key: shape for key, shape in ldm_layout.expected_shapes(config).items()}
    return sparse_safetensors(path, {**shapes, ldm_layout.TABLE: (labels, 256)})


def uvit_s(path: Path, size: int = 32) -> Path:
    config = uvit_layout.UViTConfig(
        depth=13, width=512, heads=8, patch=2 if size == 32 else 4, size=size, channels=4, labels=1001
    )
    return sparse_safetensors(path, uvit_layout.expected_shapes(config))


def dit_s(path: Path) -> Path:
    config = DiTConfig(
        depth=12, width=384, heads=6, patch=2, size=32, channels=4, classes=1000, learn_sigma=True
    )  # fmt: skip
    return sparse_safetensors(path, dit_layout.expected_shapes(config))


def planned(name: str, members: dict[str, Path], options: dict[str, dict[str, Any]] | None = None) -> PairConventions:
    spec, base = load_recipe(name)
    plans = [
        plan_member(n, spec, base, path, (options or {}).get(n, {}), "fp32", Checkpoints())
        for n, path in members.items()
    ]
    return reconcile(spec, plans, {})


def test_checkpoints_without_a_null_class_get_the_recipe_s(tmp_path: Path) -> None:
    """The recipe chooses the null class for any checkpoint; a model that has its own says so."""
    members = {"small": ldm_s(tmp_path / "s.safetensors"), "large": ldm_s(tmp_path / "l.safetensors", 1001)}
    with pytest.raises(PairMismatch, match=r"small \(s.safetensors\) has 1001, large \(l.safetensors\) has 1002"):
        planned("ldm-imagenet", members)
    found = planned("ldm-imagenet", members, {"large": {"null_embedding": "none"}})
    assert found.noise == LDM
    assert [part.noise for part in found.members.values()] == [None, None]


def test_both_kinds_of_u_vit_share_a_trajectory(tmp_path: Path) -> None:
    path = uvit_s(tmp_path / "s.safetensors")
    found = planned("uvit-256", {"small": path, "large": path}, {"large": {"time": "discrete"}})
    assert found.noise == SD
    assert (found.members["small"].noise, found.members["large"].noise) == (LINEAR, None)
    assert any("its timesteps are those of equal noise" in note for note in found.notes)


def test_a_dit_beside_a_u_vit_keeps_the_recipe_s_noise(tmp_path: Path) -> None:
    """A DiT's file does not say with which noise it was trained: the recipe does, and the U-ViT's is not its."""
    members = {"small": dit_s(tmp_path / "d.safetensors"), "large": uvit_s(tmp_path / "u.safetensors")}
    found = planned("dit-uvit-256", members, {"large": {"time": "discrete"}})
    assert found.noise == SD
    assert (found.members["small"].noise, found.members["large"].noise) == (LINEAR, None)


def test_another_latent_names_the_recipe_of_the_same_family(tmp_path: Path) -> None:
    path = uvit_s(tmp_path / "s.safetensors", size=64)
    with pytest.raises(PairMismatch, match="4x64x64") as caught:
        planned("uvit-256", {"small": path, "large": path})
    assert "use the recipe uvit-512" in caught.value.hint


@pytest.mark.parametrize("name", ["uvit", "uvit-256", "uvit-512", "dit-uvit-256"])
def test_u_vits_are_sampled_as_published(name: str) -> None:
    """tests/tstitch_trt/solvers/test_dpmpp_singlestep.py has the published algorithm beside this very solver."""
    defaults = load_recipe(name)[0].defaults
    assert (defaults.solver, defaults.steps, defaults.spacing) == ("dpmpp-3s", 50, "uniform")
    assert defaults.solver_options == {"final": "sigma-min", "middle": "paper"}


@pytest.mark.parametrize(("name", "eta"), [("ldm-imagenet", 1.0), ("ldm-imagenet-f4", 0.0)])
def test_latent_diffusion_is_sampled_at_the_timesteps_of_its_own_sampler(name: str, eta: float) -> None:
    """Counted from 1, and ending at the noise of timestep 0."""
    defaults = load_recipe(name)[0].defaults
    assert defaults.solver_options == {"eta": eta, "steps_offset": 1, "final": "sigma-min"}
    assert (defaults.solver, defaults.spacing) == ("ddim", "leading")
