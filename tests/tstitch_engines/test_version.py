"""One version everywhere, also where the package is not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tstitch_engines.version import VERSION

ROOT = Path(__file__).parents[2]


def test_files_that_say_the_version_agree() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == VERSION


def test_a_tree_that_is_not_installed_has_it() -> None:
    """No metadata of packages is read for it: the metadata of an installed one may be another's."""
    script = (
        "import importlib.metadata as m, sys\n"
        "m.version = None\n"
        "from tstitch_trt.cli import main\n"
        "sys.exit(main(['--version']))"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": paths})
    assert done.stdout == f"tstitch-trt {VERSION}\n", done.stderr
