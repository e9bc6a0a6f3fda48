"""docs/troubleshooting.md: the messages that it quotes are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from support.messages import is_ours

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()


def test_messages_are_those_of_the_code() -> None:
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    quoted = [line for block in blocks for line in block.splitlines()]
    assert len(set(quoted)) == len(quoted) > 60
    assert [line for line in quoted if not is_ours(line) or not re.search(r"[a-z]{3}", line)] == []
