"""Work that overlaps: items made ahead in a thread, calls side by side in order, copies to and from a GPU behind it."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

MOST_LANES = 16
"""threads that run one model side by side: beyond that Python itself becomes what they wait for"""


def ahead(items: Iterable[T], depth: int = 2) -> Generator[T]:
    """The same items, made in a thread while the caller is busy; at most ``depth`` wait.

    An exception in the thread is raised here. The thread ends when the caller stops asking.
    """
    box: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                return box.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:
            put(end, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = box.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()


@contextmanager
def lanes(device: torch.device) -> Iterator[tuple[Executor | None, int]]:
    """Threads for calls side by side, and how many: on a CPU one for each core, else none but the caller's own.

    A small model runs faster as several passes of one thread each than as one pass whose every operation is divided
    among the cores and waits for the slowest; torch lets the others go on while it computes.
    """
    cores = torch.get_num_threads()
    n = min(cores, MOST_LANES) if device.type == "cpu" else 1
    if n == 1:
        yield None, 1
        return
    try:
        with ThreadPoolExecutor(n, "lane", torch.set_num_threads, (cores // n,)) as pool:
            yield pool, n
    finally:
        torch.set_num_threads(cores)


def in_order(pool: Executor | None, function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """Results of the calls in the order of the items, of which at most ``depth`` wait or are being worked on.

    Without a pool the caller does the work, one item at a time.
    """
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def memory(device: torch.device) -> int:
    """Bytes of a device, in use or not: the same number whenever it is asked for."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return psutil.virtual_memory().total


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for (on a CPU the tensor itself)."""
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def download(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy to the CPU behind what the device does next; calling the result waits for the copy."""
    if not x.is_cuda:
        near = x.cpu()
        return lambda: near
    stream = _copies(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        x.record_stream(stream)
        done = stream.record_event()

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait


_streams: dict[torch.device, Any] = {}


def _copies(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
