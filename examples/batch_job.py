"""Draws every line of a file of jobs, many at a time; run again, it goes on where it was stopped.

python examples/batch_job.py fashion.bundle jobs.jsonl pictures

A line: {"name": "sneaker-1", "label": 7, "seed": 1, "steps": 20, "fraction": 0.4}
"""

import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec
from PIL import Image

from tstitch_trt import TStitchError
from tstitch_trt.serve import Engine, Handle

UNDER_WAY: Final = 128  # fewer than the engine lets wait


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """``name``: of the picture's file, without ``.png``."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[\w-]{1,100}$")]
    label: int
    seed: int = 0
    steps: int = 50
    fraction: float = 0.4


def read_lines(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            try:
                yield msgspec.json.decode(text, type=Line)
            except msgspec.DecodeError as error:
                raise SystemExit(f"{path}, line {number}: {error}") from None


def write(path: Path, handle: Handle) -> None:
    """Waits for the picture. The file is there whole or not at all."""
    images = handle.result().images
    assert images is not None, "the bundle has a decoder"
    partial = path.with_suffix(".part")
    Image.fromarray(images[0].squeeze()).save(partial, "PNG")
    partial.rename(path)


def main(bundle: str, jobs: str, folder: str) -> int:
    """Returns 1 where a line was not drawn."""
    pictures = Path(folder)
    pictures.mkdir(exist_ok=True)
    under_way: deque[tuple[Path, Handle]] = deque()
    failed: list[str] = []

    def tell(name: str, error: TStitchError) -> None:
        print(f"{name}: {error}", file=sys.stderr)
        failed.append(name)

    def finish(most: int) -> None:
        while len(under_way) > most:
            path, handle = under_way.popleft()
            try:
                write(path, handle)
            except TStitchError as error:
                tell(path.stem, error)

    with Engine(bundle) as engine:
        for line in read_lines(Path(jobs)):
            path = pictures / f"{line.name}.png"
            if path.exists():
                continue
            try:
                handle = engine.submit(labels=[line.label], seed=line.seed, steps=line.steps, fraction=line.fraction)
            except TStitchError as error:
                tell(line.name, error)
                continue
            under_way.append((path, handle))
            finish(UNDER_WAY)
        finish(0)
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
