"""OpenAI's own Python client against the server: what it gets is what ``Runtime.sample`` draws alone."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from support.http_server import Server, picture_file

OURS = {"steps": 6, "seed": 7, "fraction": 0.5, "rounding": "lcm", "guidance": 2.0, "solver": "dpmpp-2m"}


@pytest.fixture
def ai(server: Server) -> Iterator[OpenAI]:
    with OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


def pixels(text: str | None) -> NDArray[np.uint8]:
    assert text is not None
    with Image.open(BytesIO(base64.b64decode(text))) as picture:
        return np.asarray(picture)


def test_images_equal_those_of_sample(server: Server, ai: OpenAI) -> None:
    answer = ai.images.generate(model="tiny", prompt="3", n=2, size="8x8", user="me", extra_body=OURS)
    alone = server.alone.sample(labels=[3, 3], **OURS)
    assert answer.data is not None
    for image, expected in zip(answer.data, alone.images, strict=True):
        np.testing.assert_array_equal(pixels(image.b64_json), expected)
    assert (answer.size, answer.output_format, answer.background) == ("8x8", "png", "opaque")
    assert answer.safety_identifier == "me"
    drawn = answer.model_extra["tstitch"]  # type: ignore[index]
    assert drawn["seeds"] == [7, 8]
    assert drawn["labels"] == [3, 3]
    assert drawn["schedule"] == str(alone.schedule)
    assert (drawn["steps"], drawn["solver"], drawn["adapted"]) == (6, "dpmpp-2m", None)


def test_without_a_seed_each_request_has_its_own_and_tells_it(server: Server, ai: OpenAI) -> None:
    one, two = (ai.images.generate(prompt="", extra_body={"class_labels": 5, "steps": 2}) for _ in range(2))
    assert one.data != two.data
    (seed,) = one.model_extra["tstitch"]["seeds"]  # type: ignore[index]
    assert one.data is not None
    alone = server.alone.sample(labels=[5], seed=seed, steps=2)
    np.testing.assert_array_equal(pixels(one.data[0].b64_json), alone.images[0])


def test_async(server: Server) -> None:
    async def run() -> list[Any]:
        async with AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
            asked = [client.images.generate(prompt=str(label), extra_body=OURS) for label in range(4)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(run())
    for label, answer in enumerate(answers):
        alone = server.alone.sample(labels=[label], **OURS)
        np.testing.assert_array_equal(pixels(answer.data[0].b64_json), alone.images[0])


def test_a_stream_has_previews_and_the_images(server: Server, ai: OpenAI) -> None:
    """Fewer previews than were asked for come where the images are ready before them."""
    ours = {**OURS, "steps": 600}
    events: list[Any] = list(
        ai.images.generate(prompt="4", n=2, stream=True, partial_images=3, output_format="webp", extra_body=ours)
    )
    partial, done = events[:-2], events[-2:]
    assert {event.type for event in partial} == {"image_generation.partial_image"}
    assert [event.type for event in done] == ["image_generation.completed"] * 2
    for image in (0, 1):
        mine = [event for event in partial if event.image_index == image]
        assert [event.partial_image_index for event in mine] == list(range(len(mine)))
        assert [event.step for event in mine] == [150, 300, 450][: len(mine)]
    assert all(event.output_format == "webp" and event.size == "8x8" for event in events)
    assert done[0].usage.total_tokens == 0
    with ai.images.generate(prompt="4", stream=True, extra_body=OURS) as stream:
        (only,) = stream
    alone = server.alone.sample(labels=[4], **OURS)
    np.testing.assert_array_equal(pixels(only.b64_json), alone.images[0])


def test_an_async_stream(server: Server) -> None:
    async def run() -> list[str]:
        async with AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
            stream = await client.images.generate(
                prompt="1", stream=True, partial_images=1, extra_body={**OURS, "steps": 600}
            )
            return [event.type async for event in stream]

    assert asyncio.run(run()) == ["image_generation.partial_image", "image_generation.completed"]


def test_an_edit_keeps_what_the_mask_covers(server: Server, ai: OpenAI) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 4), np.uint8)
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, :4] = 0
    mask = np.dstack([np.zeros((8, 8, 3), np.uint8), alpha])
    answer = ai.images.edit(
        image=("a.png", picture_file(picture)), mask=("m.png", picture_file(mask)), prompt="2",
        extra_body={"steps": 6, "seed": 3, "strength": 0.5},
    )  # fmt: skip
    alone = server.alone.sample(labels=[2], steps=6, seed=3, strength=0.5, image=picture, mask=alpha == 0)
    assert answer.data is not None
    found = pixels(answer.data[0].b64_json)
    np.testing.assert_array_equal(found, alone.images[0])
    np.testing.assert_array_equal(found[:, 4:], picture[:, 4:])


def test_an_edit_of_a_list_and_as_a_stream(ai: OpenAI) -> None:
    picture = np.zeros((16, 24, 3), np.uint8)  # brought to the size that was asked for
    events = ai.images.edit(
        image=[("a.png", picture_file(picture))], prompt="", stream=True, partial_images=1, size="8x8",
        extra_body={"class_labels": [2], "steps": 600},
    )  # fmt: skip
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_models(ai: OpenAI) -> None:
    assert [(model.id, model.object) for model in ai.models.list()] == [("tiny", "model")]
    found = ai.models.retrieve("tiny")
    assert (found.id, found.owned_by) == ("tiny", "tstitch-trt")
    assert found.model_extra is not None
    assert (found.model_extra["members"], found.model_extra["class_count"]) == (["small", "large"], 10)
    with pytest.raises(openai.NotFoundError, match="tiny"):
        ai.models.retrieve("tinny")


def test_errors_are_those_that_the_client_knows(ai: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.images.generate(prompt="1", quality="high")
    assert (caught.value.param, caught.value.code) == ("quality", "invalid_value")
    assert "hint: " in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        ai.images.generate(model="gpt-image-2", prompt="1")
    assert missing.value.code == "model_not_found"


def test_a_failure_in_the_middle_of_a_stream_is_raised(server: Server, ai: OpenAI) -> None:
    stream = ai.images.generate(
        prompt="1", stream=True, partial_images=3, extra_body={"steps": 1000}, extra_headers={"x-request-id": "midway"}
    )
    events = iter(stream)
    assert next(events).type == "image_generation.partial_image"
    server.handles["midway"].cancel()
    with pytest.raises(openai.APIError, match="try again"):
        list(events)
