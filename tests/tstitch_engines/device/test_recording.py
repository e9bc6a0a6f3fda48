"""The lock of recordings, in a fork. What holds it is tested with what does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_FORKING = """
import os, threading
from tstitch_engines.device.recording import RECORDING

held, mine = threading.Event(), {mine}

def hold():
    with RECORDING:
        held.set()
        threading.Event().wait()

if mine:
    RECORDING.acquire()
else:
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
if os.fork() == 0:
    with RECORDING:
        pass
    if mine:
        RECORDING.release()
    os._exit(RECORDING._is_owned())
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("mine", [False, True], ids=["another thread's", "its own"])
def test_a_fork_waits_for_no_thread_that_it_lacks(mine: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKING.format(mine=mine)], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr
