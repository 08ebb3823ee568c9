"""Ranks: several processes that torchrun started, on one machine or on several with a shared file system.

``torchrun --nproc-per-node 2 -m glassbox_utils.cli harvest CONFIG`` and the like. Without torchrun there is one rank,
and nothing here has an effect. Tensors on the CPU travel through gloo, those on CUDA through NCCL.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=7)
"""how long a rank waits for the others: one may have hours of work left when another has none"""


@contextmanager
def ranks() -> Iterator[None]:
    """Join the other ranks inside the block, if torchrun started this process; each takes the GPU of its number."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Is this the rank that writes what all share and prints?"""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))


def gathered(x: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which have one shape, in their order."""
    if world() == 1:
        return [x]
    found = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(found, x)
    return found


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, in place."""
    if world() > 1:
        for x in tensors:
            dist.all_reduce(_dense(x))


def all_reduce_mean(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place."""
    if world() > 1:
        for x in tensors:
            dist.all_reduce(_dense(x))
            x /= world()


def broadcast(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Replace each tensor by that of one rank, in place."""
    if world() > 1:
        for x in tensors:
            dist.broadcast(_dense(x), source)


def _dense(x: Tensor) -> Tensor:
    """The same memory, row by row: a transposed matrix as what it was made from."""
    return x if x.is_contiguous() else x.t()
