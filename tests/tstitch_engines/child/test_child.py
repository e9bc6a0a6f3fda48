"""Children: whatever their work does, its caller gets an answer or an error of ours in time, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.child_work import Order, carry_out
from tstitch_engines.child import Array, Job, Limits, end_children, memory, run_in_child
from tstitch_engines.errors import BadInput, BuildFailed, FailedWork, OutOfMemory, OutOfTime


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    end_children()
    assert [pid for pid in children(os.getpid()) if b"tstitch_engines.child.serve" in command(pid)] == []


def children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def ask(word: str, *, time_limit: Any = 30, memory_limit: Any = None, **rest: Any) -> Any:
    fields = {name: rest.pop(name) for name in ("number", "array") if name in rest}
    progress = {name: rest.pop(name) for name in ("progress",) if name in rest}
    job = Job(what="the work", seconds=30.0, limits=Limits.of(time_limit, memory_limit), error=BuildFailed, **rest)
    return run_in_child(carry_out, Order(word=word, **fields), job, **progress)


def test_a_child_answers_call_after_call() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    first = ask("double", array=Array.of(values))
    np.testing.assert_array_equal(first.array.numpy(), 2 * values)
    assert ask("add", number=3) == type(first)(pid=first.pid, number=4)
    assert first.pid != os.getpid()


def test_a_kept_child_follows_its_callers_folder_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask("where")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHO", "me")
    second = ask("where", temporary=tmp_path)
    assert second.pid == first.pid
    assert second.place == (str(tmp_path), "me", str(tmp_path))
    assert first.place[1] == ""
    assert ask("where").place[2] == first.place[2]


@pytest.mark.parametrize(
    ("limit", "used", "cached", "left"),
    [("max", 5, 0, None), ("1000", 300, 0, 700), ("1000", 900, 400, 500), ("1000", 1200, 0, 0), ("junk", 1, 0, None)],
)
def test_what_a_control_group_leaves(tmp_path: Path, limit: str, used: int, cached: int, left: int | None) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\n")
    assert memory._left(tmp_path, "memory.max", "memory.current", "inactive_file") == left
    assert memory._left(tmp_path / "none", "memory.max", "memory.current", "inactive_file") is None
    assert (memory.free_memory() or 1) > 0


def test_threads_have_a_child_each_and_none_ends_with_the_thread_that_started_it() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: ask("add", number=number).number, range(12)))
    assert found == list(range(1, 13))
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(ask, "add").result().pid
    assert ask("add").pid == started


@pytest.mark.parametrize("word", ["sleep", "spin", "print"])
def test_endless_work_is_ended_at_its_limit(word: str) -> None:
    started = time.monotonic()
    with pytest.raises(OutOfTime, match=r"the work took longer than its limit of 0\.5 s") as caught:
        ask(word, time_limit=0.5)
    assert time.monotonic() - started < 10
    assert "--time-limit" in caught.value.hint
    assert caught.value.exit_code == 1


def test_the_limit_is_for_each_of_several_pieces() -> None:
    assert ask("laps", number=8, time_limit=1.5).number == 9


@pytest.mark.parametrize("word", ["grow", "grow in its own child"])
def test_growing_work_is_ended_at_its_limit(word: str) -> None:
    with pytest.raises(OutOfMemory, match=r"its limit is 200\.0 MiB") as caught:
        ask(word, number=400 << 20, memory_limit="200MiB")
    assert "--memory-limit" in caught.value.hint


def test_one_absurd_block_is_refused_before_it_is_touched() -> None:
    with pytest.raises(OutOfMemory, match="the work ran out of memory"):
        ask("one block", number=1 << 42)


@pytest.mark.parametrize(
    ("word", "kind", "words"),
    [
        ("kill", BuildFailed, r"the work was killed \(SIGKILL\)"),
        ("crash", BuildFailed, "the work ended with signal SIGSEGV"),
        ("exit", BuildFailed, "the work ended with exit code 0"),
        ("close everything", BuildFailed, "the work closed its pipe, went on for 2 s, and was ended"),
        ("fail", BuildFailed, "the work failed: KeyError: 'nobody expects this'"),
        ("refuse", BadInput, "this is refused"),
    ],
)
def test_what_becomes_of_a_child_is_an_error(word: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        ask(word)
    assert ask("add", number=1).number == 2  # by another child, or by one that goes on


def test_a_full_disk_stays_what_it_is() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        ask("disk")
    assert (caught.value.errno, caught.value.filename) == (28, "/some/file")


def test_an_error_of_the_caller_ends_the_child() -> None:
    def stop(phase: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask("sleep", progress=stop)


def test_a_child_that_was_ended_while_it_waited_is_replaced() -> None:
    first = ask("add").pid
    os.kill(first, signal.SIGKILL)
    while not gone(first):
        time.sleep(0.01)
    assert ask("add").pid != first


def test_a_forked_process_has_children_of_its_own() -> None:
    first = ask("add").pid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that are not in the new process, as is meant here
        forked = os.fork()
    if forked == 0:
        try:
            os._exit(0 if ask("add").pid != first else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(forked, 0)[1] == 0
    assert ask("add").pid == first


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_child_ends_with_its_parent(number: signal.Signals) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "from support.child_work import Order, carry_out\n"
        "from tstitch_engines.child import Job, run_in_child\n"
        "run_in_child(carry_out, Order(word='spin'), Job(what='the work', seconds=60.0),"
        " progress=lambda name, share: print(flush=True))\n"
    )
    path = ":".join(entry for entry in sys.path if entry)
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"\n"
        (child,) = children(parent.pid)
        parent.send_signal(number)
        parent.wait(30)
    deadline = time.monotonic() + 30
    while not gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("goes_on", [False, True])
def test_ctrl_c_while_the_first_child_starts_does_not_hang_the_exit(goes_on: bool) -> None:
    """The worst moment: the thread that starts children runs, and its caller does not know it yet."""
    code = (
        "import sys, threading; sys.path[:0] = sys.argv[1].split(':')\n"
        "from support.child_work import Order, carry_out\n"
        "from tstitch_engines.child import Job, run_in_child\n"
        "start = threading.Thread.start\n"
        "def interrupted(thread):\n"
        "    start(thread)\n"
        "    raise KeyboardInterrupt\n"
        "threading.Thread.start = interrupted\n"
        "def work():\n"
        "    return run_in_child(carry_out, Order(word='add'), Job(what='the work', seconds=60.0))\n"
        "try:\n"
        "    work()\n"
        "except KeyboardInterrupt:\n"
        "    threading.Thread.start = start\n"
        f"    {'work()' if goes_on else ''}\n"
        "    sys.exit(3)\n"
    )
    path = ":".join(entry for entry in sys.path if entry)
    assert subprocess.run([sys.executable, "-c", code, path], timeout=60, check=False).returncode == 3


@pytest.mark.parametrize(
    ("time_limit", "memory_limit", "keyword"),
    [
        (0, None, "time_limit"),
        (-1, None, "time_limit"),
        (float("nan"), None, "time_limit"),
        (float("inf"), None, "time_limit"),
        (10**400, None, "time_limit"),
        pytest.param(10**5000, None, "time_limit", id="digits"),
        pytest.param(None, 10**5000, "memory_limit", id="more digits"),
        (True, None, "time_limit"),
        ("soon", None, "time_limit"),
        ("9" * 5000, None, "time_limit"),
        ([], None, "time_limit"),
        (None, 0, "memory_limit"),
        (None, -5, "memory_limit"),
        (None, "8 elephants", "memory_limit"),
        (None, "9" * 5000, "memory_limit"),
        (None, 1 << 70, "memory_limit"),
        (None, 1.5, "memory_limit"),
    ],
)
def test_limits_that_are_none_are_refused(time_limit: Any, memory_limit: Any, keyword: str) -> None:
    with pytest.raises(BadInput, match=keyword):
        Limits.of(time_limit, memory_limit)


def test_limits_are_read_as_people_write_them() -> None:
    assert Limits.of("30m", "8GiB") == Limits(time=1800.0, memory=8 << 30)
    assert Limits.of("1.5h", "500MB") == Limits(time=5400.0, memory=500_000_000)
    assert Limits.of(np.float32(90), np.int64(1 << 30)) == Limits.of(90, 1 << 30)
    assert Limits.of(90, 1 << 30) == Limits(time=90.0, memory=1 << 30)
    assert issubclass(OutOfTime, FailedWork)
