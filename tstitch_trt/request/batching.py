"""How the images of a request are split: into chunks that fit one engine call, and those into lanes."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tstitch_engines.errors import OutOfProfile

__all__ = ["Splitting"]

Size = Annotated[int, msgspec.Meta(ge=1)]


class Splitting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``floor`` and ``limit``: rows per engine call that all members allow; a guided image has two rows.

    ``rounded``: lanes are rounded up to one of a few sizes (those of ``tuned`` rows, powers of two, the most), so that
    recorded graphs stay few. Nothing reads a spare lane.
    """

    floor: Size
    limit: Size
    tuned: tuple[int, ...] = ()
    rounded: bool = False

    def most(self, *, guided: bool) -> int:
        """Images of one chunk. ``guided``: some step of the request is. Raises ``OutOfProfile`` where there is none."""
        if not guided:
            return self.limit
        if self.limit < 2:
            raise OutOfProfile(
                f"guidance runs two halves per image, and the engines' largest batch is {self.limit}",
                hint="pass guidance=1 (--guidance 1), or build again with --batch 1:16:16",
            )
        return self.limit // 2

    def chunks(self, images: int, *, guided: bool) -> list[int]:
        """How many of the images each chunk has; all but the last have the most."""
        most = self.most(guided=guided)
        return [min(most, images - start) for start in range(0, images, most)]

    def lanes(self, count: int, *, guided: tuple[bool, ...]) -> int:
        """Lanes that run for a chunk of ``count`` images; ``guided``: which of the steps are. Raises ``OutOfProfile``.

        More than ``count`` where the smallest batch of the engines or the graphs ask for it.
        """
        most = self.most(guided=any(guided))
        floor = -(-self.floor // 2) if all(guided) else self.floor
        if floor > most:
            raise OutOfProfile(
                f"the engines' batch profile {self.floor}..{self.limit} has no room for both guided and unguided steps",
                hint="build again with --batch 1:8:16",
            )
        count = max(count, floor)
        if not self.rounded:
            return count
        sizes = {most, *(tuned // (2 if any(guided) else 1) for tuned in self.tuned), *(1 << i for i in range(31))}
        return min(size for size in sizes if count <= size <= most)
