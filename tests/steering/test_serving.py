"""The example server over real HTTP: simultaneous requests with different settings, answered as if alone."""

import asyncio
import importlib.util
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn

from glassbox_utils.steering import contrast

EXAMPLE = Path(__file__).resolve().parents[2] / "data" / "examples" / "steering_server.py"
STRENGTHS = [-1.0, -0.5, 0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def server():
    spec = importlib.util.spec_from_file_location("steering_server", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.NEW_TOKENS = 12
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    instance = uvicorn.Server(uvicorn.Config(module.app, port=port, log_level="warning"))
    thread = threading.Thread(target=instance.run, daemon=True)
    thread.start()
    while not instance.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    instance.should_exit = True
    thread.join(10)


async def _all(url, asks):
    async with httpx.AsyncClient(timeout=300) as client:
        replies = await asyncio.gather(*(client.post(url, json=ask) for ask in asks))
    return [reply.json()["answer"] for reply in replies]


@pytest.mark.slow
def test_simultaneous_requests_get_the_answers_they_get_alone(server):
    prompts = contrast.prompts("selection")[:32]
    asks = [{"prompt": p, "steer": STRENGTHS[i % 5]} for i, p in enumerate(prompts)]
    together = asyncio.run(_all(server, asks))
    alone = [httpx.post(server, json=ask, timeout=300).json()["answer"] for ask in asks]
    assert together == alone
    assert len(set(together)) == 32 and all(together)


@pytest.mark.slow
def test_a_bad_request_is_refused_and_the_next_one_served(server):
    assert httpx.post(server, json={"prompt": "Hello", "steer": 9}).status_code == 422
    assert httpx.post(server, json={"prompt": ""}).status_code == 422
    answers = asyncio.run(_all(server, [{"prompt": "Hello", "steer": s} for s in (-1.0, 1.0)]))
    assert answers[0] != answers[1]
