"""Which members may share a bundle. The checkpoints are real safetensors files of the published shapes, all zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.dits import diffusers_folder, sparse_safetensors
from support.ldms import ldm_checkpoint
from tstitch_engines.bundle.consistency import check_conventions
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.errors import BadCheckpoint, BadInput, OutOfProfile, PairMismatch, UnknownName
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_export.families.base import Scalar
from tstitch_export.families.dit.config import DiTConfig
from tstitch_export.families.dit.layout import PUBLISHED_SIZES, expected_shapes
from tstitch_export.families.uvit.layout import UViTConfig
from tstitch_export.families.uvit.layout import expected_shapes as uvit_shapes
from tstitch_export.hub.checkpoints import Checkpoints
from tstitch_export.planning.bundle import plan_bundle
from tstitch_export.planning.compatibility import PairConventions, reconcile
from tstitch_export.planning.network import plan_member
from tstitch_export.planning.recipe import load_recipe


def published(folder: Path, letter: str, *, size: int = 32, classes: int = 1000, channels: int = 4) -> Path:
    depth, width = PUBLISHED_SIZES[letter]
    config = DiTConfig(
        depth=depth, width=width, heads=1, patch=2, size=size, channels=channels, classes=classes, learn_sigma=True
    )
    return sparse_safetensors(folder / f"{letter}-{size}-{classes}-{channels}.safetensors", expected_shapes(config))


def refuse(recipe: str | Path, kind: type[Exception], words: str, output: Path, **options: Any) -> str:
    with pytest.raises(kind, match=words) as caught:
        build(recipe, output=output, **options)
    assert not output.exists()
    return str(caught.value)


def test_members_of_different_latents(tmp_path: Path) -> None:
    members = {"small": published(tmp_path, "S"), "large": published(tmp_path, "B", size=64)}
    said = refuse("dit-256", PairMismatch, "differ in their latent", tmp_path / "out", members=members)
    assert "small (S-32-1000-4.safetensors) has 4x32x32" in said
    assert "large (B-64-1000-4.safetensors) has 4x64x64" in said


def test_512_checkpoints_given_to_256(tmp_path: Path) -> None:
    members = {"small": published(tmp_path, "S", size=64), "large": published(tmp_path, "B", size=64)}
    said = refuse("dit-256", PairMismatch, "has the latent 4x64x64", tmp_path / "out", members=members)
    assert "tstitch-trt build dit-512" in said


@pytest.mark.parametrize(
    ("changes", "null", "guided"),
    [
        ({"size": 16}, True, 3),
        ({"size": 48, "classes": 7}, True, 3),
        ({"channels": 16, "classes": 7}, True, 3),
        ({"channels": 3, "size": 64}, True, None),
        ({"channels": 1, "classes": 10}, False, None),
    ],
)
@pytest.mark.parametrize("family", ["dit", "uvit"])
def test_a_recipe_for_any_latent_and_classes(
    family: str, changes: dict[str, int], null: bool, guided: int | None, tmp_path: Path
) -> None:
    """All of it is read from the checkpoints, but for a null class, which leaves no trace in the shapes."""
    shape = {"size": 32, "channels": 4, "classes": 1000, **changes}
    if family == "dit":
        members = dict.fromkeys(("small", "large"), published(tmp_path, "S", **changes))
    else:
        config = UViTConfig(
            depth=13, width=512, heads=8, patch=2, size=shape["size"], channels=shape["channels"],
            labels=shape["classes"] + 1,
        )  # fmt: skip
        members = dict.fromkeys(("small", "large"), sparse_safetensors(tmp_path / "u.safetensors", uvit_shapes(config)))
    options = {} if null else {f"{name}.null_class": "false" for name in members}
    plan = plan_bundle(family, members=members, parts={}, precision="fp32", options=options)
    latent, conditioning, defaults = plan.conventions.latent, plan.recipe.conditioning, plan.recipe.defaults
    assert (latent.channels, latent.height, latent.width) == (shape["channels"], shape["size"], shape["size"])
    classes = shape["classes"] + (not null)
    assert (conditioning.classes, conditioning.null) == (classes, classes if null else None)
    published_scale = {"dit": 4.0, "uvit": 1.4}[family]
    assert defaults.guidance == (published_scale if null else 1.0)
    assert defaults.guided_channels == (guided if family == "dit" else None)
    check_conventions(latent, conditioning, defaults)
    noted = [note for note in plan.conventions.notes if "is taken for the null class" in note]
    assert len(noted) == (2 if null and shape["classes"] != 1000 else 0)


@pytest.mark.parametrize(
    ("option", "classes", "null", "notes"),
    [({}, 10, 10, 2), ({"null_class": False}, 11, None, 0), ({"null_embedding": "mean"}, 11, 11, 0)],
)
def test_a_latent_diffusion_model_s_own_classes(
    option: dict[str, Scalar], classes: int, null: int | None, notes: int, tmp_path: Path
) -> None:
    """A table of eleven rows: what a note names, and what adds a row to it, are options of the family."""
    recipe = tmp_path / "any.toml"
    dit = (load_recipe("dit")[1] / "dit.toml").read_text()
    recipe.write_text(dit.replace('family = "dit"', 'family = "ldm"'))
    ldm_checkpoint(path := tmp_path / "x.safetensors")
    given = {"num_heads": 2, "size": 8, **option}
    plan = plan_bundle(
        recipe, members=dict.fromkeys(("small", "large"), path), parts={}, precision="fp32",
        options={f"{name}.{key}": value for name in ("small", "large") for key, value in given.items()},
    )  # fmt: skip
    assert (plan.recipe.conditioning.classes, plan.recipe.conditioning.null) == (classes, null)
    noted = [note for note in plan.conventions.notes if ".null_class=false" in note]
    assert len(noted) == notes


def test_members_that_differ_have_no_recipe(tmp_path: Path) -> None:
    small, output = published(tmp_path, "S", size=16, classes=7), tmp_path / "out"
    for changes, words in (({"size": 48}, "latent"), ({"size": 16, "classes": 8}, "number of labels")):
        large = published(tmp_path, "B", **changes)
        refuse("dit", PairMismatch, f"differ in their {words},", output, members={"small": small, "large": large})
    members = {"small": small, "large": published(tmp_path, "B", size=16, classes=7)}
    said = refuse("dit", PairMismatch, "null class", output, members=members, options={"large.null_class": False})
    assert "small (S-16-7-4.safetensors) has a null class, large (B-16-7-4.safetensors) has none" in said
    said = refuse("dit-256", PairMismatch, "the latent 4x16x16", output, members=members)
    assert "use the recipe dit: tstitch-trt build dit --member small=" in said
    members = {name: published(tmp_path, letter) for name, letter in (("small", "S"), ("large", "B"))}
    said = refuse(
        "dit-256", PairMismatch, "no null class", output, members=members,
        options={f"{name}.null_class": False for name in members},
    )  # fmt: skip
    assert "use the recipe dit:" in said


def test_members_of_different_classes(tmp_path: Path) -> None:
    members = {"small": published(tmp_path, "S"), "large": published(tmp_path, "B", classes=10)}
    refuse("dit-256", PairMismatch, "small .* has 1001, large .* has 11", tmp_path / "out", members=members)
    members["small"] = published(tmp_path, "S", classes=10)
    refuse("dit-256", PairMismatch, "has 11 labels; recipe 'dit-256' has 1001", tmp_path / "out", members=members)


def test_members_of_different_channels(tmp_path: Path) -> None:
    members = {"small": published(tmp_path, "S", channels=16), "large": published(tmp_path, "B")}
    refuse("dit-256", PairMismatch, "latent channels.* has 16, .* has 4", tmp_path / "out", members=members)


def pipeline(folder: Path, **scheduler: Any) -> Path:
    diffusers_folder(folder / "transformer", layers=1)
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"beta_end": 0.02, **scheduler}))
    return folder


def test_noise_and_parametrisation_of_pipelines(tmp_path: Path) -> None:
    recipe = tmp_path / "my.toml"
    recipe.write_text(
        'name = "my"\ndescription = "d"\n[latent]\nchannels = 4\nheight = 8\nwidth = 8\n[noise]\nkind = "linear"\n'
        '[conditioning]\nclasses = 5\nnull = 5\n[defaults]\n[decoder]\nkind = "none"\n'
        + "".join(f'[members.{m}]\nfamily = "dit"\nparametrisation = "eps"\n' for m in ("small", "large"))
    )
    plain = pipeline(tmp_path / "a")
    cosine = pipeline(tmp_path / "b", beta_schedule="squaredcos_cap_v2")
    v = pipeline(tmp_path / "c", prediction_type="v_prediction")
    odd = pipeline(tmp_path / "d", beta_schedule="sigmoid")

    def check(large: Path, kind: type[Exception], words: str) -> None:
        refuse(recipe, kind, words, tmp_path / "out", members={"small": plain, "large": large})

    def planned(large: Path) -> PairConventions:
        spec, base = load_recipe(recipe)
        return reconcile(
            spec,
            [
                plan_member(n, spec, base, path, {}, "fp32", Checkpoints())
                for n, path in (("small", plain), ("large", large))
            ],
            {},
        )

    found = planned(cosine)  # the large member's schedule is the bundle's, the small one is adapted to it
    assert found.noise.kind == "squared-cosine"
    assert found.members["large"].noise is None
    assert found.members["small"].noise == NoiseScheduleSpec(kind="linear")
    assert any("'small' (transformer) was trained with the noise schedule linear" in note for note in found.notes)
    found = planned(v)
    assert (found.members["small"].parametrisation, found.members["large"].parametrisation) == ("eps", "v")
    assert any("predicts v, as its scheduler_config.json says" in note for note in found.notes)
    assert planned(plain).notes == ()
    zero = {"_class_name": "DDIMScheduler", "clip_sample": False, "rescale_betas_zero_snr": True}
    found = planned(pipeline(tmp_path / "e", **zero, timestep_spacing="trailing"))
    assert found.noise == NoiseScheduleSpec(kind="linear", zero_terminal_snr=True)
    assert found.members["small"].noise == NoiseScheduleSpec(kind="linear")
    notes = "\n".join(found.notes)
    assert "begins with pure noise (zero terminal SNR), which member 'small'" in notes
    assert "member 'large' (transformer) predicts the noise, which says nothing" in notes
    found = planned(pipeline(tmp_path / "f", **zero, prediction_type="v_prediction"))
    assert not any("predicts the noise" in note for note in found.notes)
    assert "trailing would begin there" not in "".join(found.notes)
    recipe.write_text(recipe.read_text().replace("[defaults]", '[defaults]\nspacing = "leading"'))
    found = planned(pipeline(tmp_path / "g", **zero, prediction_type="v_prediction"))
    assert any("the default spacing, leading, begins below that" in note for note in found.notes)
    check(odd, BadCheckpoint, "beta_schedule is 'sigmoid'")


def test_expected_sizes(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "export/tstitch_export/recipes/dit-256.toml"
    recipe = tmp_path / "my.toml"
    recipe.write_text(
        source.read_text().replace("[members.large]", "[members.large]\nexpect = { depth = 28, width = 1152 }")
    )
    members = {"small": published(tmp_path, "S"), "large": published(tmp_path, "B")}
    refuse(recipe, BadCheckpoint, "has depth 12; the recipe expects 28", tmp_path / "out", members=members)


def test_arguments(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse("dit-256", BadInput, "no checkpoint of its own for member 'small'", out)
    refuse("fashion", UnknownName, "unknown member of recipe 'fashion' 'larg'", out, members={"larg": Path("x")})
    refuse("fashion", UnknownName, "did you mean 'onnxruntime'", out, backend="onnxruntim")
    refuse("fashion", UnknownName, "unknown precision 'fp8'", out, precision="fp8")
    refuse("fashion", UnknownName, "did you mean 'small'", out, precision={"smal": "fp16"})
    refuse("fashion", UnknownName, "graph-optimisation", out, options={"graph-optimization": "all"})
    refuse("fashion", UnknownName, "did you mean 'large.num_heads'", out, options={"larg.num_heads": 3})
    refuse("fashion", BadInput, "num_heads of member 'large' is 'x'", out, options={"large.num_heads": "x"})
    refuse("fashion", BadCheckpoint, "does not exist", out, members={"large": tmp_path / "none.pt"})
    refuse("dit-256", BadInput, "member name 'Base' is not allowed", out, members={"Base": Path("x")})
    with pytest.raises((BadInput, OutOfProfile)):
        build("fashion", output=out, profile=Range(4, 2, 1))
    assert not list(tmp_path.iterdir())
