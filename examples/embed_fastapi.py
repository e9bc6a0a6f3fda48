"""The batching engine in a FastAPI application of your own. pip install "tstitch-trt[cpu,serve]"

BUNDLE=fashion.bundle uvicorn --app-dir examples embed_fastapi:app
curl 'http://127.0.0.1:8000/classes/7.png?steps=20&seed=1' -o sneaker.png
"""

import io
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request, Response
from PIL import Image

from tstitch_trt import BadInput, OutOfTime, Overloaded
from tstitch_trt.serve import Engine


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with Engine(os.environ["BUNDLE"]) as engine:  # at the end it draws what it has accepted
        engine.warm_up()
        app.state.engine = engine
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/classes/{label}.png")
async def draw(
    request: Request, label: int, steps: Annotated[int, Query(ge=1, le=100)] = 50, fraction: float = 0.4, seed: int = 0
) -> Response:
    try:  # requests that are awaited at the same time share batches
        result = await request.app.state.engine.submit(
            labels=[label], steps=steps, fraction=fraction, seed=seed, timeout=60
        )
    except Overloaded as error:
        seconds = str(math.ceil(error.retry_after or 1))
        raise HTTPException(503, error.message, {"Retry-After": seconds}) from None
    except OutOfTime as error:
        raise HTTPException(504, error.message) from None
    except BadInput as error:
        raise HTTPException(400, f"{error.message}; {error.hint}") from None
    picture = io.BytesIO()
    Image.fromarray(result.images[0].squeeze()).save(picture, "PNG")
    return Response(picture.getvalue(), media_type="image/png")
