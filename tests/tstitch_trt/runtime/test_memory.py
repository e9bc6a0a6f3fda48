"""What a bundle would make a runtime allocate is compared with what there is, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tstitch_trt
from support.command import Command
from support.hand_made import made_member, text_bundle
from tstitch_engines.bundle.bundle import MANIFEST, Bundle
from tstitch_engines.bundle.manifest import Manifest, TextInputs
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadInput, OutOfMemory
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_trt.runtime.memory import planned_memory


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    text = TextInputs(hidden=(), width=8)
    members = {
        name: made_member(name, inputs={"encoder_hidden_states": ("T", 8)}, text=text) for name in ("small", "large")
    }
    return text_bundle(tmp_path_factory.mktemp("memory") / "a.bundle", members)


def widened(bundle: Bundle, ranges: Mapping[str, Range]) -> Bundle:
    """The bundle as a stranger's manifest may describe it: engines for any sizes."""

    def network(one: Any) -> Any:
        engines = tuple(
            msgspec.structs.replace(
                record,
                identity=msgspec.structs.replace(
                    record.identity, profile=ShapeProfile({**record.identity.profile.dims, **ranges})
                ),
            )
            for record in one.engines
        )
        return msgspec.structs.replace(one, engines=engines)

    manifest: Manifest = bundle.manifest
    members = {name: network(one) for name, one in manifest.members.items()}
    return Bundle(bundle.root, msgspec.structs.replace(manifest, members=members))


@pytest.mark.parametrize(
    "ranges",
    [
        {"B": Range(1, 2, 1 << 24)},
        {"H": Range(4, 8, 1 << 24), "W": Range(4, 8, 1 << 24)},
        {"B": Range(1, 2, 1 << 9), "T": Range(1, 5, 1 << 24)},
    ],
)
def test_a_profile_larger_than_the_machine_is_refused_at_once(bundle: Bundle, ranges: dict[str, Range]) -> None:
    with pytest.raises(OutOfMemory, match=r"needs .*iB on cpu \(weights .*, arena .*iB.* are free") as caught:
        tstitch_trt.load(widened(bundle, ranges), threads=1)
    assert "--batch" in caught.value.hint
    assert "--max-memory" in caught.value.hint


def test_a_limit_is_for_all_that_it_may_come_to(bundle: Bundle) -> None:
    needed = sum(planned_memory(bundle.manifest)["onnxruntime"].values())
    with pytest.raises(OutOfMemory, match=r"engine io .*max_memory is"):
        tstitch_trt.load(bundle, threads=1, max_memory=needed - 1)
    with tstitch_trt.load(bundle, threads=1, max_memory=needed) as runtime:
        assert runtime.sample(prompt_embeds=[[[0.0] * 8]], steps=2, guidance=1.0).latents.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("size", ["much", -1, 0, True, 1.5, "9" * 5000])
def test_what_is_no_size_is_refused(bundle: Bundle, size: Any) -> None:
    with pytest.raises(BadInput, match="max_memory"):
        tstitch_trt.load(bundle, threads=1, max_memory=size)


def test_the_command_has_the_limit_and_inspect_says_what_is_needed(
    run: Command, bundle: Bundle, tmp_path: Path
) -> None:
    said = run("inspect", bundle.root)
    assert "memory" in said.out
    assert "weights" in said.out
    refused = run("sample", bundle.root, "--max-memory", "1kB", "-o", tmp_path / "a.png")
    assert refused.code == 1
    assert "max_memory is 1000 bytes" in refused.err
    assert (bundle.root / MANIFEST).is_file()


def test_a_buffer_larger_than_the_machine_is_no_memory_error() -> None:
    for shape in ((1 << 50,), (1 << 62, 1 << 62)):
        with pytest.raises(OutOfMemory, match=r"the host has no room for float32"):
            open_device("cpu").empty(shape, "float32")


def test_a_build_says_that_its_bundle_is_too_large_for_this_machine(
    run: Command, bundle: Bundle, tmp_path: Path
) -> None:
    built = run("build", bundle.root, "--batch", "1:2:16000000", "-o", tmp_path / "large.bundle")
    assert built.code == 0
    assert "loading it takes" in built.err
    assert "a smaller --batch needs less" in built.err
    assert run("sample", tmp_path / "large.bundle", "-o", tmp_path / "a.png").code == 1
