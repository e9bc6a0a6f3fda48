"""Messages can be printed whatever they are about."""

from __future__ import annotations

import pickle

from tstitch_engines.errors import BadInput


def test_what_moves_a_terminals_cursor_is_escaped() -> None:
    error = BadInput("the name \x1b]0;owned\x07 \u202efdp.exe\r\n\tsecond line", hint="take a\x9b2J other")
    assert error.message == "the name \\x1b]0;owned\\x07 \\u202efdp.exe\\x0d\n\tsecond line"
    assert error.hint == "take a\\x9b2J other"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_messages_have_a_length() -> None:
    error = BadInput(f"the name {'a' * 1_000_000} is unknown", hint="b" * 1_000_000)
    assert len(str(error)) < 12_100
    assert error.message.startswith("the name aaa")
    assert error.message.endswith("aaa is unknown")
