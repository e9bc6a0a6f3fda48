"""Recipes: the shipped ones decode and say what they must; a mistake in one is named with the nearest known key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tstitch_engines.errors import BadInput, UnknownName
from tstitch_export.planning.recipe import load_recipe, recipe_names
from tstitch_export.train.data import CLASSES


def text(name: str = "dit-256") -> str:
    return (load_recipe(name)[1] / f"{name}.toml").read_text()


def test_shipped_recipes_decode() -> None:
    assert {"fashion", "dit-256", "dit-512"} <= set(recipe_names())
    for name in recipe_names():
        recipe, folder = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
        for member in recipe.members.values():
            for path in (member.checkpoint, *member.shipped.values()):
                assert path is None or (folder / path).is_file()


def test_fashion() -> None:
    recipe, _ = load_recipe("fashion")
    assert recipe.conditioning.names == CLASSES
    assert (recipe.conditioning.classes, recipe.conditioning.null) == (10, 10)
    assert recipe.decoder.kind == "pixel"
    assert {m.parametrisation for m in recipe.members.values()} == {"v"}
    assert recipe.quality is not None


@pytest.mark.parametrize(("name", "side"), [("dit-256", 32), ("dit-512", 64)])
def test_dit_recipes_are_the_published_setting(name: str, side: int) -> None:
    recipe, _ = load_recipe(name)
    assert (recipe.latent.channels, recipe.latent.height, recipe.latent.width) == (4, side, side)
    assert recipe.latent.scaling == 0.18215
    assert (recipe.conditioning.classes, recipe.conditioning.null) == (1000, 1000)
    assert (recipe.defaults.guidance, recipe.defaults.guided_channels) == (4.0, 3)
    assert recipe.defaults.schedule == "small:0.4,large"
    assert (recipe.noise.kind, recipe.noise.beta_start, recipe.noise.beta_end, recipe.noise.steps) == (
        "linear", 1e-4, 0.02, 1000,
    )  # fmt: skip


def swap(old: str, new: str) -> Callable[[str], str]:
    def change(recipe: str) -> str:
        assert old in recipe
        return recipe.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (swap("guided_channels", "guided_chanels"), UnknownName, "did you mean 'guided_channels'"),
        (swap("parametrisation", "parameterization"), UnknownName, "did you mean 'parametrisation'"),
        (swap("[members.small]", "[member.small]"), UnknownName, "did you mean 'members'"),
        (swap('kind = "linear"', 'kind = "cosine"'), BadInput, "'noise.kind'.*invalid enum value 'cosine'"),
        (swap("steps = 50", 'steps = "fifty"'), BadInput, "'defaults.steps'"),
        (swap("height = 32", ""), BadInput, "missing required field `height`"),
        (swap('family = "dit"', 'family = "dti"'), UnknownName, "did you mean 'dit'"),
        (swap("[members.small]", "[members.Small]"), BadInput, "member name 'Small' is not allowed"),
        (swap("[members.small]", '[members."../x"]'), BadInput, "is not allowed"),
        (swap("guided_channels = 3", "guided_channels = 5"), BadInput, "guided_channels is 5; allowed is 1 to 4"),
        (swap("classes = 1000", 'classes = 1000\nnames = ["cat"]'), BadInput, "names 1 classes of 1000"),
        (swap("beta_end = 0.02", "beta_end = 2.0"), BadInput, "'noise.beta_end' is 2.0; allowed is above 0 below 1"),
        (swap("[latent]", "[latent"), BadInput, "no valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: Callable[[str], str], kind: type[BadInput], words: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(change(text()))
    with pytest.raises(kind, match=words):
        load_recipe(path)


def test_a_path_works_in_place_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text())
    assert load_recipe(str(path))[0] == load_recipe("dit-256")[0]
    assert load_recipe(path)[1] == tmp_path


def test_unknown_recipes() -> None:
    with pytest.raises(UnknownName, match="did you mean 'fashion'"):
        load_recipe("fashon")
    with pytest.raises(BadInput, match=r"my\.toml does not exist"):
        load_recipe("nowhere/my.toml")
