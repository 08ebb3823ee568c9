"""One model, one batch, a dial for each request: ``uvicorn --app-dir data/examples steering_server:app``, then
``curl -d '{"prompt": "How was the concert?", "steer": -1}' -H 'content-type: application/json' localhost:8000``."""

import asyncio
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel, Field

import glassbox_utils as gb

model, tone, queue = gb.load_model(), gb.load_vector("tone"), asyncio.Queue()
FULL, BATCH, NEW_TOKENS = 0.0125, 16, 24  # steer = 1 is FULL times the typical norm at each of 13 layers


class Ask(BaseModel):
    prompt: str = Field(min_length=1, max_length=2000)
    steer: float = Field(0.0, ge=-1.5, le=1.5)


async def work():
    while True:
        waiting = [await queue.get()]
        await asyncio.sleep(0.02)  # who comes now shares the batch
        waiting += [queue.get_nowait() for _ in range(min(queue.qsize(), BATCH - 1))]
        try:
            with gb.steer(model, tone, [FULL * ask.steer for ask, _ in waiting]):
                prompts = [gb.chat(model, ask.prompt) for ask, _ in waiting]
                answers = await asyncio.to_thread(gb.generate, model, prompts, NEW_TOKENS)
        except Exception as error:  # the callers are told, the next batch is served
            answers = [error] * len(waiting)
        for (_, reply), answer in zip(waiting, answers, strict=True):
            reply.set_exception(answer) if isinstance(answer, Exception) else reply.set_result(answer)


@asynccontextmanager
async def lifespan(app):
    task = asyncio.create_task(work())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/")
async def answer(ask: Ask):
    reply = asyncio.get_running_loop().create_future()
    queue.put_nowait((ask, reply))
    return {"answer": await reply}
