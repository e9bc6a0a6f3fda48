"""The component cache: hits are verified, entries appear whole, and two processes may share one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tstitch_engines.bundle.cache import Cache, default_root
from tstitch_engines.bundle.files import copy_component
from tstitch_engines.compile.engine import from_cache

KEY = "ab" * 32


def writes(content: bytes) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "engine").write_bytes(content)
        return {"made": len(content)}

    return make


def test_miss_put_hit(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get(KEY) is None
    made = cache.put(KEY, writes(b"engine"))
    found = Cache(tmp_path).get(KEY)
    assert found is not None
    assert found.files["engine"].read_bytes() == b"engine"
    assert found.info == made.info == {"made": 6}
    assert cache.get("cd" * 32) is None


@pytest.mark.parametrize("damage", ["alter", "truncate", "remove", "record", "no record", "other key"])
def test_damage_is_a_miss_that_is_said_and_mended(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path)
    folder = cache.put(KEY, writes(b"engine")).files["engine"].parent
    if damage == "alter":
        (folder / "engine").write_bytes(b"engina")
    elif damage == "truncate":
        (folder / "engine").write_bytes(b"eng")
    elif damage == "remove":
        (folder / "engine").unlink()
    elif damage == "record":
        (folder / "entry.json").write_text("{}")
    elif damage == "no record":
        (folder / "entry.json").unlink()
    else:
        other = "ac" * 32
        (cache.root / "ac").mkdir()
        folder.rename(cache.root / "ac" / other)
        assert cache.get(other) is None
        return
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert "damaged" in caplog.text
    cache.put(KEY, writes(b"again"))
    found = cache.get(KEY)
    assert found is not None
    assert found.files["engine"].read_bytes() == b"again"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> dict[str, Any]:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    cache = Cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, fails)
    assert cache.get(KEY) is None
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_two_builders_of_one_key_agree(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    found: list[bytes] = []

    def build(content: bytes) -> None:
        def make(folder: Path) -> dict[str, Any]:
            (folder / "engine").write_bytes(content)
            barrier.wait()
            return {}

        found.append(Cache(tmp_path).put(KEY, make).files["engine"].read_bytes())

    threads = [threading.Thread(target=build, args=(bytes([i]) * 10,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = Cache(tmp_path).get(KEY)
    assert stored is not None
    assert found == [stored.files["engine"].read_bytes()] * 2


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from tstitch_engines.bundle.cache import Cache\n"
        "def make(folder):\n"
        "    (folder / 'half').write_bytes(b'half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
        f"Cache(pathlib.Path(sys.argv[1])).put({KEY!r}, make)\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        children[0].send_signal(signal.SIGKILL)
        children[0].wait()
        cache = Cache(tmp_path)
        cache.put(KEY, writes(b"engine"))
        left = [p for p in cache.root.iterdir() if p.name.startswith("building-")]
        assert len(left) == 1, "the killed process's folder goes, the living one's stays"
    finally:
        for child in children:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


_BUILDER = """
import logging, os, sys, time
from pathlib import Path
from tstitch_engines.bundle.cache import Cache
from tstitch_engines.compile.engine import from_cache

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
root, seconds = Path(sys.argv[1]), float(sys.argv[2])

def make(folder):
    with (root / "made").open("a") as made:
        made.write("x")
    print("making", flush=True)
    time.sleep(seconds)
    (folder / "engine").write_bytes(b"engine")
    return {}

from_cache(Cache(root), "ab" * 32, make, "the engine")
print("done", flush=True)
"""


def _builder(root: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _BUILDER, str(root), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def _told(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdout is not None
    assert any(line in told for told in iter(child.stdout.readline, ""))


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    first = _builder(tmp_path, 3)
    _told(first, "making")
    second = _builder(tmp_path, 0)
    _told(second, "waiting for another process")
    assert first.communicate(timeout=60)[0].endswith("done\n")
    assert second.communicate(timeout=60)[0] == "the engine: reused from the cache\ndone\n"
    assert (tmp_path / "made").read_text() == "x"
    assert not (tmp_path / "v1" / "locks").exists()


def test_who_waits_for_a_process_that_is_killed_builds_itself(tmp_path: Path) -> None:
    first = _builder(tmp_path, 600)
    _told(first, "making")
    second = _builder(tmp_path, 0)
    _told(second, "waiting for another process")
    first.kill()
    first.communicate(timeout=60)
    assert second.communicate(timeout=60)[0].endswith("making\ndone\n")
    assert (tmp_path / "made").read_text() == "xx"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
    monkeypatch.delenv("TSTITCH_TRT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "tstitch-trt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "tstitch-trt"


# --- making room


def filled(tmp_path: Path) -> Cache:
    """Three entries of 10, 20 and 30 bytes, used one, two and three days ago."""
    cache = Cache(tmp_path)
    for days, letter in enumerate("abc", start=1):
        with cache.put(letter * 64, writes(bytes(10 * days))) as made:
            record = made.files["engine"].with_name("entry.json")
        when = time.time() - 86400 * days
        os.utime(record, (when, when))
    return cache


def test_a_listing_is_by_use_and_using_an_entry_counts(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert [(entry.key[0], entry.bytes) for entry in cache.stored()] == [("a", 10), ("b", 20), ("c", 30)]
    assert cache.get("c" * 64) is not None
    assert [entry.key[0] for entry in cache.stored()] == ["c", "a", "b"]
    assert cache.stored()[0].what == "engine", "by its files, where nothing else is known"


@pytest.mark.parametrize(
    ("limits", "gone"),
    [
        ({"older_than": 2.5 * 86400}, "c"),
        ({"older_than": 100 * 86400}, ""),
        ({"max_bytes": 30}, "c"),
        ({"max_bytes": 59}, "c"),
        ({"max_bytes": 60}, ""),
        ({"max_bytes": 9}, "abc"),
        ({"max_bytes": 40, "older_than": 1.5 * 86400}, "bc"),
        ({}, "abc"),
    ],
)
def test_prune_removes_what_was_used_longest_ago(tmp_path: Path, limits: dict[str, Any], gone: str) -> None:
    cache = filled(tmp_path)
    assert "".join(entry.key[0] for entry in cache.prune(**limits)) == gone
    assert [entry.key[0] for entry in cache.stored()] == [letter for letter in "abc" if letter not in gone]
    assert {path.name for path in cache.root.iterdir()} == {2 * letter for letter in "abc" if letter not in gone}
    for letter in "abc":
        assert (cache.get(letter * 64) is None) == (letter in gone)


def test_a_fresh_cache_finds_only_what_it_made_itself_and_replaces_what_was_there(tmp_path: Path) -> None:
    Cache(tmp_path).put(KEY, writes(b"old"))
    fresh = Cache(tmp_path, fresh=True)
    assert fresh.get(KEY) is None
    assert fresh.put(KEY, writes(b"new")).files["engine"].read_bytes() == b"new"
    for cache in (fresh, Cache(tmp_path)):
        found = cache.get(KEY)
        assert found is not None
        assert found.files["engine"].read_bytes() == b"new"
    assert len(list(fresh.root.iterdir())) == 1


def test_clearing_removes_damaged_and_half_made_entries_but_none_that_is_being_made(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    (cache.root / "aa" / ("a" * 64) / "entry.json").write_text("{")
    (cache.root / "building-dead").mkdir()
    assert len(cache.stored()) == 2

    def make(folder: Path) -> dict[str, Any]:
        assert len(Cache(tmp_path).prune()) == 2
        (folder / "engine").write_bytes(b"new")
        return {}

    cache.put("d" * 64, make)
    assert [entry.key[0] for entry in cache.stored()] == ["d"]
    assert [path.name for path in cache.root.iterdir()] == ["dd"]


def test_what_is_in_use_stays_until_it_is_no_longer(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    with cache.get("a" * 64) as entry:  # type: ignore[union-attr]  # it is there
        assert [gone.key[0] for gone in Cache(tmp_path).prune()] == ["b", "c"]
        assert [gone.key[0] for gone in Cache(tmp_path).prune(max_bytes=0)] == []
        assert entry.files["engine"].read_bytes() == bytes(10)
    kept = Cache(tmp_path)
    kept.keep(kept.put("d" * 64, writes(b"engine")))
    assert [gone.key[0] for gone in cache.prune()] == ["a"]
    del kept
    assert [gone.key[0] for gone in cache.prune()] == ["d"]


def test_a_build_never_fails_because_another_process_clears_the_cache(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from tstitch_engines.bundle.cache import Cache\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    Cache(pathlib.Path(sys.argv[1])).prune()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    made = 0

    def make(folder: Path) -> dict[str, Any]:
        nonlocal made
        made += 1
        (folder / "engine").write_bytes(b"engine" * 10_000)
        return {}

    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        index, deadline = 0, time.monotonic() + 120
        while (made < 4 or index < 20) and time.monotonic() < deadline:
            index += 1
            with from_cache(Cache(tmp_path), KEY, make, "engine") as entry:
                copied = copy_component(entry.files["engine"], tmp_path / "copies", str(index))
            assert copied.bytes == 60_000
            time.sleep(0.01)  # for the other one, which removes nothing while it is in use
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert made > 1, "nothing was cleared meanwhile"


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b"9" * 5000, b"[]", b'{"key": NaN}', b"\xff", None])
def test_records_that_are_none_are_a_miss(content: bytes | None, tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), "a" * 64
    folder = tmp_path / "v1" / key[:2] / key
    folder.mkdir(parents=True)
    if content is None:
        os.mkfifo(folder / "entry.json")
    else:
        (folder / "entry.json").write_bytes(content)
    assert cache.get(key) is None
    assert cache.stored() == []
