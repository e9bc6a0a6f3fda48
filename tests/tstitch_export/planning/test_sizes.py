"""The batch that engines are built and tuned for: rows, two of them for an image where both halves of guidance run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from support.tiny_checkpoints import pieces, planned, text_recipe
from support.tiny_families import controlnet_folder
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.compile.bundle import recompile
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_export.planning.bundle import BundlePlan


def batches(plan: BundlePlan, batch: Range | None = None) -> dict[str, str]:
    sizes = plan.sizes(batch=batch, height=None, width=None, tokens=None)
    return {network.name: str(network.profile(sizes).dims["B"]) for network in plan.networks}


def class_pair(folder: Path, text: str) -> BundlePlan:
    """The built-in pair under a recipe that was changed by ``text``."""
    from importlib.resources import files

    source = Path(str(files("tstitch_export") / "recipes" / "fashion.toml"))
    words = source.read_text().replace('"../', f'"{source.parent.parent}/')
    before, after = text.split(" -> ")
    assert before in words
    path = folder / "other.toml"
    path.write_text(words.replace(before, after))
    return planned(path)


def test_a_guided_pair_is_tuned_for_both_halves_of_eight_images() -> None:
    assert batches(planned("fashion")) == {"small": "1:16:16", "large": "1:16:16"}


def test_a_pair_without_guidance_is_tuned_for_eight_images(tmp_path: Path) -> None:
    assert batches(class_pair(tmp_path, "guidance = 1.5 -> guidance = 1.0")) == {"small": "1:8:16", "large": "1:8:16"}


def test_what_is_asked_for_is_rows() -> None:
    assert batches(planned("fashion"), Range(2, 6, 12)) == {"small": "2:6:12", "large": "2:6:12"}


@pytest.mark.parametrize(
    ("distilled", "want"),
    [
        ((), {"small": "1:16:16", "large": "1:16:16", "controlnet": "1:16:16"}),
        (("small",), {"small": "1:8:16", "large": "1:16:16", "controlnet": "1:16:16"}),
        (("small", "large"), {"small": "1:8:16", "large": "1:8:16", "controlnet": "1:8:16"}),
    ],
)
def test_a_distilled_member_runs_one_half(tmp_path: Path, distilled: tuple[str, ...], want: dict[str, str]) -> None:
    """It takes the scale as an input; a ControlNet runs with every member."""
    recipe = text_recipe(tmp_path / "pair.toml", decoder='kind = "none"', halves=())
    recipe.write_text(recipe.read_text().replace("steps = 4", "steps = 4\nguidance = 5.0"))
    folders = {False: pieces(tmp_path / "plain"), True: pieces(tmp_path / "lcm", time_cond_proj_dim=16)}
    controlnet_folder(tmp_path / "control")
    members = {name: folders[name in distilled] for name in ("small", "large")}
    assert batches(planned(recipe, members=members, parts={"controlnet": tmp_path / "control"})) == want


def test_a_bundle_without_engines_gets_the_same(tmp_path: Path) -> None:
    build("fashion", output=tmp_path / "a.bundle")
    manifest = open_bundle(tmp_path / "a.bundle").manifest
    members = {name: msgspec.structs.replace(member, engines=()) for name, member in manifest.members.items()}
    bare = Bundle(tmp_path / "a.bundle", msgspec.structs.replace(manifest, members=members))
    made = recompile(bare, backend="onnxruntime", output=tmp_path / "b.bundle")
    for found in (manifest, made.manifest):
        assert [str(one.engines[0].identity.profile.dims["B"]) for one in found.members.values()] == ["1:16:16"] * 2
