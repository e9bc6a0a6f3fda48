"""Checkpoints of Hugging Face: downloaded from a hub on this machine, found in its local cache, refused."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.hub_server import Hub, running_hub
from support.tiny_checkpoints import PNDM, pieces, planned, text_recipe
from support.tiny_families import lora_file
from tstitch_engines.bundle.manifest import Origin
from tstitch_engines.errors import BadCheckpoint, BadInput, FailedWork, TStitchError, Unavailable
from tstitch_export.hub.checkpoints import Checkpoints
from tstitch_export.planning.bundle import BundlePlan

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder_2": [None, None],
}
FILES = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"weights"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that takes the network away."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline, and what is in the repositories of published ones besides."""
    folder = pieces(
        tmp_path_factory.mktemp("hub") / "sd", "one", text=32, vae={"scaling_factor": 0.18215}, scheduler=PNDM
    )
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    (folder / "safety_checker").mkdir()
    for name in ("sd.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"):
        (folder / name).write_bytes(b"not wanted")
    for name in ("unet/model.onnx", "safety_checker/model.safetensors"):
        (folder / name).write_bytes(b"not wanted")
    return folder


def pair(folder: Path, **members: str) -> BundlePlan:
    return planned(text_recipe(folder / "pair.toml"), members=members)


def origins(plan: BundlePlan) -> dict[str, list[Origin]]:
    found = {network.name: [source.origin for source in network.sources] for network in plan.networks}
    return {name: [one for one in each if isinstance(one, Origin)] for name, each in found.items()}


def test_what_a_pair_needs_is_downloaded_once(hub: Hub, offline: Any, pipeline: Path, tmp_path: Path) -> None:
    small, large = hub.publish("org/small", pipeline), hub.publish("org/large", pipeline, "v1")
    plan = pair(tmp_path, small="org/small", large="org/large@v1")
    assert list(plan.parts) == ["text_encoder", "vae_decoder", "vae_encoder"]
    found = origins(plan)
    for network in plan.networks:
        assert len(found[network.name]) == len(network.sources)
    weights = found["small"][-1]
    assert weights == Origin(
        repository="org/small", revision="main", commit=small, path="unet/diffusion_pytorch_model.safetensors"
    )
    assert (found["vae_decoder"][-1].repository, found["vae_decoder"][-1].commit) == ("org/large", large)
    assert plan.members[1].sources[0].name == "large/config.json", "called as the repository, not as its commit"
    assert not [name for name in hub.asked if name.endswith((".bin", ".ckpt", ".onnx", "fp16.safetensors"))]
    assert not [name for name in hub.asked if "safety_checker" in name or name.startswith("org/small/vae/diff")]
    assert len(hub.files_asked()) == len(set(hub.asked)) - 2

    hub.asked.clear()
    again = pair(tmp_path, small=f"org/small@{small}", large=f"org/large@{large}")
    assert not hub.asked, "a commit that is there is not asked for"
    assert [network.sources[-1].sha256 for network in again.networks] == [
        network.sources[-1].sha256 for network in plan.networks
    ]
    offline()
    assert origins(pair(tmp_path, small="org/small", large="org/large@v1")) == found, "as branches were when asked for"


def test_a_cache_that_others_filled(hub: Hub, offline: Any, pipeline: Path, tmp_path: Path, caplog: Any) -> None:
    from huggingface_hub import hf_hub_download

    commit = hub.publish("org/sd", pipeline)
    for name in hub.commits["org/sd"][commit]:
        hf_hub_download("org/sd", name)
    hub.asked.clear()
    pair(tmp_path, small=f"org/sd/unet@{commit}", large=f"org/sd@{commit}")
    checkpoints = Checkpoints()
    checkpoints.add(checkpoints.locate(f"org/sd@{commit}", "member"), "text_encoder_2")
    assert not hub.asked
    offline()
    assert origins(pair(tmp_path, small="org/sd/unet", large="org/sd"))["small"][-1].given == "unet"
    assert "HF_HUB_OFFLINE is set" in caplog.text
    assert commit in caplog.text


def test_a_partial_copy_is_completed(hub: Hub, offline: Any, pipeline: Path, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    commit = hub.publish("org/sd", pipeline)
    for name in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"):
        hf_hub_download("org/sd", name, revision=commit)
    plan = pair(tmp_path, small=f"org/sd@{commit}", large=f"org/sd@{commit}")
    assert origins(plan)["small"][-1].path == "unet/diffusion_pytorch_model.safetensors", "as in a copy of all"
    assert plan.members[0].inspection.scheduler is not None
    offline()
    (Path(str(plan.members[0].given)) / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Unavailable, match="no whole copy of the repository"):
        pair(tmp_path, small=f"org/sd@{commit}", large=f"org/sd@{commit}")


def test_threads_at_once(hub: Hub) -> None:
    hub.publish("org/name", FILES)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: Checkpoints().locate("org/name", "vae_decoder"), range(8)))
    (path,) = found
    assert (path / "config.json").read_bytes() == b"{}"
    assert [file.name for file in path.parent.iterdir() if file.name not in ("name", "files.json")] == []


def test_a_branch_that_moves(hub: Hub) -> None:
    first = hub.publish("org/name", FILES)
    second = hub.publish("org/name", {**FILES, "diffusion_pytorch_model.safetensors": b"other weights"})
    for revision, commit, weights in (("main", second, b"other weights"), (first, first, b"weights")):
        checkpoints = Checkpoints()
        path = checkpoints.locate(f"org/name@{revision}", "controlnet")
        assert path.name == "name"
        assert (path / "diffusion_pytorch_model.safetensors").read_bytes() == weights
        assert (path / "config.json").resolve().is_file()
        assert commit in str(path)


def test_loras_inversions_and_tokenizers(hub: Hub, pipeline: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from torch import zeros

    lora_file(tmp_path / "style.safetensors", UNet2DConditionModel.from_pretrained(pipeline / "unet"))
    save_file({"emb_params": zeros(1, 32)}, tmp_path / "cat.safetensors")
    commit = hub.publish("org/styles", {"a/style.safetensors": (tmp_path / "style.safetensors").read_bytes()}, "v2")
    hub.publish("org/cat", {"learned_embeds.safetensors": (tmp_path / "cat.safetensors").read_bytes()})
    hub.publish("org/sd", pipeline)
    options = {
        "large.lora": "org/styles/a/style.safetensors@v2:0.5",
        "text_encoder.textual_inversion": "<cat>=org/cat",
        "text_encoder.tokenizer": "org/sd/tokenizer",
    }
    recipe = text_recipe(tmp_path / "pair.toml")
    plan = planned(recipe, members={"small": pipeline, "large": pipeline}, options=options)
    (lora,) = origins(plan)["large"]
    assert (lora.repository, lora.revision, lora.commit) == ("org/styles", "v2", commit)
    assert plan.members[1].inspection.config["lora"] == "style.safetensors:0.5"
    text = plan.parts["text_encoder"]
    assert text.inspection.config["textual_inversion"] == "learned_embeds.safetensors:<cat>"
    assert {one.path for one in origins(plan)["text_encoder"]} >= {"tokenizer/vocab.json", "learned_embeds.safetensors"}


def test_a_recipe_may_name_one(hub: Hub, pipeline: Path, tmp_path: Path) -> None:
    hub.publish("org/sd", pipeline)
    recipe = text_recipe(tmp_path / "pair.toml")
    recipe.write_text(recipe.read_text().replace("[members.small]\n", '[members.small]\ncheckpoint = "org/sd/unet"\n'))
    plan = planned(recipe, members={"large": pipeline})
    assert origins(plan)["small"][-1].given == "unet"
    assert not origins(plan)["large"]
    (tmp_path / "org/sd").mkdir(parents=True)
    with pytest.raises(BadCheckpoint, match="org/sd/unet"):  # beside the recipe a path goes first
        planned(recipe, members={"large": pipeline})


def test_shards(hub: Hub) -> None:
    index = "diffusion_pytorch_model.safetensors.index.json"
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weights = {"a": shards[0], "b": shards[1]}
    files = {"config.json": b"{}", index: json.dumps({"weight_map": weights}).encode()}
    hub.publish("org/name", {**files, **dict.fromkeys(shards, b"x"), "diffusion_pytorch_model.bin": b"x"})
    path = Checkpoints().locate("org/name", "vae_decoder")
    assert sorted(file.name for file in path.iterdir()) == sorted(["config.json", index, *shards])
    for listed in ("../../../x.safetensors", "..", "", "/etc/hostname.safetensors", "absent.safetensors"):
        hub.publish("org/bad", {**files, index: json.dumps({"weight_map": {"a": listed}}).encode()})
        with pytest.raises(BadCheckpoint, match=f"has no '.*{re.escape(listed)}', which its index lists"):
            Checkpoints().locate("org/bad", "vae_decoder")
    assert not [name for name in hub.files_asked() if name.endswith(("x.safetensors", "absent.safetensors"))]


def test_paths_are_not_asked_for(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("org/name", FILES)
    monkeypatch.chdir(tmp_path)
    for given in ("./org/name", "org/missing.safetensors", "name", Path("org/name")):
        assert Checkpoints().locate(given, "controlnet") == Path(given)
    (tmp_path / "org/name").mkdir(parents=True)
    for given in ("org/name", "org/name/unet", "org/name/ema.safetensors", "org/other", "org/other/unet"):
        assert Checkpoints().locate(given, "controlnet") == Path(given)
    assert not hub.asked
    assert Checkpoints().locate("org/name@main", "controlnet").is_absolute(), "with a revision it is no path"


def test_names_that_leave_the_repository_are_left_out(hub: Hub, tmp_path: Path) -> None:
    hub.publish("org/name", {**FILES, "../../../config.json": b"{}", "/etc/x": b"", "a\\..\\b": b"", "x/./y": b""})
    Checkpoints().locate("org/name", "controlnet")
    assert sorted(hub.files_asked()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    with pytest.raises(BadCheckpoint, match="has no"):
        Checkpoints().locate("org/name/x/y", "controlnet")


def test_a_file_that_was_altered(hub: Hub, pipeline: Path, tmp_path: Path) -> None:
    hub.publish("org/sd", pipeline)
    plan = pair(tmp_path, small="org/sd/unet", large="org/sd")
    file = (plan.members[0].given / "diffusion_pytorch_model.safetensors").resolve()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadCheckpoint, match="is damaged: its sha256"):
        pair(tmp_path, small="org/sd/unet", large="org/sd")


@pytest.mark.parametrize(
    ("closed", "given", "words"),
    [
        ((404, "RepoNotFound"), "org/name", ("no file or folder of this name", "has no model org/name", "spelling")),
        ((401, "RepoNotFound"), "org/name", ("a private one (401)", "hf auth login", "HF_TOKEN")),
        ((401, "GatedRepo"), "org/name", ("its owner gave access (401)", "hf auth login", "HF_TOKEN")),
        ((403, "GatedRepo"), "org/name/config.json", ("its owner gave access (403)", "ask for it at")),
        ((400, "Odd"), "org/name", ("answers 400", "HF_ENDPOINT")),
        ((403, ""), "org/name", ("its owner gave access (403)",)),
        ((401, "Invalid credentials in Authorization header"), "org/name", ("does not accept the access token",)),
        ((200, ""), "org/name@main", ("can't be read (JSONDecodeError",)),
        (None, "org/name@v9", ("no branch, tag or commit 'v9'", "/commits/main")),
        (None, f"org/name@{'0' * 40}", ("no branch, tag or commit",)),
    ],
)
def test_what_may_not_be_read(hub: Hub, closed: Any, given: str, words: tuple[str, ...]) -> None:
    hub.publish("org/name", FILES)
    hub.closed |= {} if closed is None else {"org/name": closed}
    with pytest.raises(BadInput) as caught:
        Checkpoints().locate(given, "controlnet")
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_hub_that_is_busy(hub: Hub, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = hub.publish("org/name", FILES)
    path = Checkpoints().locate("org/name", "controlnet")
    hub.closed["org/name"] = (429, "")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url.replace("//", "//me:secret@"))
    assert Checkpoints().locate("org/name", "controlnet") == path
    assert f"answers 429; taken is what it was when it was last asked for, {commit}" in caplog.text
    with pytest.raises(Unavailable, match=f"{hub.url} answers 429"):
        Checkpoints().locate("org/name@v1", "controlnet")
    assert "secret" not in caplog.text


def test_a_download_that_fails(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("org/name", FILES)
    hub.closed["org/name/config.json"] = (403, "")
    with pytest.raises(BadInput, match=r"its owner gave access \(403\)"):
        Checkpoints().locate("org/name", "controlnet")
    hub.closed.clear()
    hub.sends = lambda content: (content[:1],)
    with pytest.raises(Unavailable, match=r"can't be read .*should be of size 2 but has size 1"):
        Checkpoints().locate("org/name", "controlnet")
    (tmp_path / "disk/models--org--name/blobs").rmdir()
    (tmp_path / "disk/models--org--name/blobs").write_text("")
    with pytest.raises(FailedWork, match="can't be used") as caught:
        Checkpoints().locate("org/name", "controlnet")
    assert "HF_HOME=DIR" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    with pytest.raises(BadInput, match="token of Hugging Face is not ASCII") as refused:
        Checkpoints().locate("org/name", "controlnet")
    assert "cret" not in str(refused.value)


def test_a_download_that_is_stopped_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.publish("org/name", FILES)
    hub.sends = lambda content: (time.sleep(0.02) or content for _ in range(500))
    blobs = tmp_path / "hf/models--org--name/blobs"
    blobs.mkdir(parents=True)
    (blobs / "old.incomplete").write_bytes(bytes(5_000_000))
    os.utime(blobs / "old.incomplete", (0, 0))
    phases = []

    def stop(phase: str, share: float) -> None:
        phases.append(phase)
        if len(list(blobs.iterdir())) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Checkpoints(stop).locate("org/name", "controlnet")
    assert [file.name for file in blobs.iterdir()] == ["old.incomplete"]
    assert {phase.rpartition(": ")[2] for phase in phases} == {"0 of 0 MB"}, "what others left does not count"


def test_without_a_network_it_says_so_at_once(hub: Hub, offline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def refused(given: str, *words: str, seconds: float = 3) -> None:
        start = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            Checkpoints().locate(given, "member")
        assert time.monotonic() - start < seconds
        assert all(word in str(caught.value) for word in words), caught.value

    commit = "0" * 40
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        refused("org/name", "can't be reached", "hf download org/name;")
    refused(f"org/name/x.safetensors@{commit}", "can't be reached", f"org/name x.safetensors --revision {commit}")
    offline()
    refused("org/name@v1", "no file or folder", "HF_HUB_OFFLINE is set", "no copy", "--revision v1", "HF_HOME")


def test_an_answer_that_is_none(hub: Hub) -> None:
    hub.publish("org/name", FILES)
    hub.commits["org/name"]["../../x"] = FILES
    hub.branches["org/name"]["main"] = "../../x"
    with pytest.raises(BadInput, match="a commit is 40 hex digits"):
        Checkpoints().locate("org/name", "controlnet")


def test_without_the_library(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(TStitchError, match="needs huggingface_hub") as caught:
        Checkpoints().locate("org/name", "member")
    assert "local copy" in caught.value.hint
