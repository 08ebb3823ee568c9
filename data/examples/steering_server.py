"""One model, one batch, a dial for each request: ``uvicorn --app-dir data/examples steering_server:app``, then
``curl -d '{"prompt": "How was the concert?", "steer": -1}' -H 'content-type: application/json' localhost:8000``.

What a stranger sends is bounded before the model sees it: the body in bytes, the prompt in tokens, the requests that
wait (503 beyond). Words that hold a special token of the chat template are refused (422), as is every value that is no
number. Long prompts are computed in batches of their own, so that they don't make short ones wait for their padding.

Memory: what a batch needs grows with its tokens (keys and values of 16 prompts of 1,600 tokens are 1.2 GB), and the C
library keeps much of it in the thread's arena after it is free. So the tokens of a batch are bounded, and one thread
computes.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

import glassbox_utils as gb

FULL, NEW_TOKENS = 0.0125, 24  # steer = 1 is FULL times the typical norm at each of 13 layers
SHORT, LONGEST = 64, 256  # tokens of a prompt with its template: what counts as short, and what is refused
BATCH = {False: 16, True: 4}  # is it long -> requests in a batch: about as many tokens either way
QUEUE, BODY = 64, 16_384  # requests that may wait, bytes that a request may have

model, tone, queue = gb.load_model(), gb.load_vector("tone"), asyncio.Queue(QUEUE)
pending = set()  # replies that somebody waits for


class Ask(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    prompt: str = Field(min_length=1, max_length=2000)
    steer: float = Field(0.0, ge=-1.5, le=1.5)


async def work():
    waiting, is_long = [], False
    while True:
        if not waiting:
            waiting.append(await queue.get())
            await asyncio.sleep(0.02)  # who comes now shares the batch
        waiting += [queue.get_nowait() for _ in range(queue.qsize())]
        waiting = [one for one in waiting if not one[-1].done()]  # some callers gave up
        if waiting:
            if any(one[1] != is_long for one in waiting):  # by turns, so that neither kind starves
                is_long = not is_long
            batch = [one for one in waiting if one[1] == is_long][: BATCH[is_long]]
            waiting = [one for one in waiting if one not in batch]
            await compute(batch)


async def compute(batch):
    prompts, _, dials, replies = zip(*batch, strict=True)
    try:
        with gb.steer(model, tone, [FULL * dial for dial in dials]):
            answers = await asyncio.to_thread(gb.generate, model, list(prompts), NEW_TOKENS)
    except Exception as error:  # the callers are told, the next batch is served
        answers = [error] * len(batch)
    for reply, answer in zip(replies, answers, strict=True):
        if not reply.done():
            reply.set_exception(answer) if isinstance(answer, Exception) else reply.set_result(answer)


@asynccontextmanager
async def lifespan(app):
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "model"))
    task = asyncio.create_task(work())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/")
async def answer(ask: Ask):
    try:
        prompt = gb.chat(model, ask.prompt)
        n_tokens = gb.tokenize(model, prompt).input_ids.shape[1]
    except gb.GlassboxError as error:
        raise HTTPException(422, str(error)) from None
    if n_tokens > (most := min(LONGEST, model.n_context - NEW_TOKENS)):
        raise HTTPException(422, f"prompt has {n_tokens} tokens with its template. Allowed: {most}. Shorten it.")
    if len(pending) >= QUEUE or queue.full():
        raise HTTPException(503, "Too many requests wait. Try again in a few seconds.", {"Retry-After": "5"})
    reply = asyncio.get_running_loop().create_future()
    pending.add(reply)
    try:
        queue.put_nowait((prompt, n_tokens > SHORT, ask.steer, reply))
        return {"answer": await reply}
    finally:
        pending.discard(reply)


@app.exception_handler(RequestValidationError)
async def refused(request, error):
    """What was wrong, without the value: NaN and half a character can't be sent back as JSON."""
    found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return JSONResponse({"detail": [text.encode("ascii", "backslashreplace").decode() for text in found]}, 422)


class Bounded:
    """An app that reads no more than BODY bytes of a request."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        parts, size, more = [], 0, True
        while more and size <= BODY:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            parts.append(message)
        if size > BODY:
            response = JSONResponse({"detail": f"The request has more than {BODY} bytes. Shorten it."}, 413)
            return await response(scope, receive, send)
        parts.reverse()

        async def again():
            return parts.pop() if parts else await receive()

        return await self.app(scope, again, send)


app.add_middleware(Bounded)
