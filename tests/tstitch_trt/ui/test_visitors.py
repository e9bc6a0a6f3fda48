"""The line of those who draw: its bound, its order, and that closed pages lose their place."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tstitch_engines.errors import Busy, Cancelled, Closed
from tstitch_trt.ui.visitors import Bucket, DrawingQueue


def waited(queue: DrawingQueue, session: str, address: str, order: list[str], *, units: int = 10) -> str:
    with queue.visitors.listening(session), queue.turn(session, address, units) as mine:
        for _ in queue.wait(mine):
            pass
        order.append(session)
        time.sleep(0.01)
    return session


def test_drawings_come_one_at_a_time_in_the_order_they_came() -> None:
    queue, order = DrawingQueue(8, seconds_per_unit=0.1), list[str]()
    with ThreadPoolExecutor(6) as pool, queue.visitors.listening("first"), queue.turn("first", "a", 20) as first:
        assert list(queue.wait(first)) == []
        futures = []
        for index in range(5):
            futures.append(pool.submit(waited, queue, str(index), f"address {index}", order))
            while queue.seconds() < 2 + index + 0.9:
                time.sleep(0.001)
        order.append("first")
        queue.timed(first, 10, 1.0)
        assert queue.seconds() == pytest.approx(6.0)
    assert order == ["first", "0", "1", "2", "3", "4"]
    assert all(future.done() for future in futures)
    assert queue.seconds() == 0


def test_who_finds_no_place_is_told_at_once_how_long_it_lasts() -> None:
    queue = DrawingQueue(2, seconds_per_unit=0.5, grace=60)
    with queue.turn("a", "1", 10), queue.turn("b", "2", 10), queue.turn("c", "3", 4):
        for session, words in (("d", "busy, about 12 s: 2 drawings wait"), ("a", "draws already, for about 12 s")):
            with pytest.raises(Busy, match=words), queue.turn(session, "4", 1):
                pass
    with queue.turn("d", "4", 1):
        pass


def test_one_address_can_not_take_all_places() -> None:
    queue = DrawingQueue(4, seconds_per_unit=0.5, grace=60)
    with (
        queue.turn("a", "1", 1), queue.turn("b", "1", 1), queue.turn("c", "1", 1), queue.turn("d", "2", 1),
        pytest.raises(Busy, match="of this address"), queue.turn("e", "1", 1),
    ):  # fmt: skip
        pass


def test_a_closed_page_loses_its_place() -> None:
    """Whether it draws, waits, or hangs where nobody asks it."""
    queue, order = DrawingQueue(4, seconds_per_unit=0.1, grace=0.5), list[str]()
    began = time.monotonic()
    with queue.turn("gone", "1", 1000) as gone:
        assert list(queue.wait(gone)) == []
        gone.check()  # it may still come back
        assert waited(queue, "next", "2", order) == "next"
        with pytest.raises(Cancelled, match="page was closed"):
            gone.check()
    assert time.monotonic() - began < 5
    with (
        queue.visitors.listening("first"), queue.turn("first", "1", 10), queue.turn("left", "2", 10) as left,
        pytest.raises(Cancelled),
    ):  # fmt: skip
        list(queue.wait(left))


def test_closing_ends_all_and_waits_for_it() -> None:
    queue = DrawingQueue(4, seconds_per_unit=0.1)
    started, ended = threading.Barrier(3), list[str]()

    def draw(session: str) -> None:
        with queue.visitors.listening(session), queue.turn(session, session, 10) as mine:
            started.wait()
            try:
                while True:
                    time.sleep(0.001)
                    mine.check()
            finally:
                ended.append(session)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(draw, session) for session in "ab"]
        started.wait()
        queue.close()
        assert sorted(ended) == ["a", "b"]
        assert queue.cut_off
        assert all(isinstance(future.exception(), Closed) for future in futures)
    with pytest.raises(Closed), queue.turn("c", "c", 1):
        pass


def test_a_bucket_forgets_addresses() -> None:
    bucket = Bucket(2, 1000)
    assert [bucket.take("a") for _ in range(2)] == [True, True]
    for index in range(5000):
        bucket.take(str(index))
    assert len(bucket._left) <= 4097
