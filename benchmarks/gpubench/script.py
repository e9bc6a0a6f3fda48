"""What the scripts of ``benchmarks/`` share: their command line and their records."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tstitch_engines.errors import TStitchError
from tstitch_trt.files import write_text
from tstitch_trt.progress import log

__all__ = ["parser_of", "run_script", "share_inductor_cache", "write_record"]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the script's docstring as it is."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_script(work: Callable[[], int | None]) -> int:
    """The exit code of ``work``, which may be interrupted and continued; its errors go to stderr."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        log("interrupted: the same command goes on from here")
        return 130
    except TStitchError as error:
        log(f"error: {error}")
        return error.exit_code


def share_inductor_cache(scratch: Path) -> None:
    """One folder for what TorchInductor compiles and tunes, in this process and those it starts, unless one is set.

    By default the baselines would use PyTorch's in /tmp and our engines ours.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((scratch / "inductor").resolve()))


def write_record(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
