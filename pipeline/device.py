"""The ranks of a job: who am I, on which device, how do we talk."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Precision


@dataclass(frozen=True)
class World:
    """This process among the processes of its job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    cpus: int
    should_stop: Callable[[], bool] = lambda: False
    """Whether this rank has been told to write a checkpoint and leave."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def gather(self, own: Any) -> list[Any]:
        """What each rank passes, by rank, on all of them: a collective call."""
        everyone = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, own)
        return everyone


@contextmanager
def join(
    rank: int,
    size: int,
    local_rank: int,
    cpus: int,
    store: dist.Store | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[World]:
    """Set up device, threads and, with more than one rank, the process group; tear it down at the end.

    Where `size` > 1 the ranks find one another over `store`. NCCL on GPUs, gloo on CPUs.
    """
    keep_freed_memory()
    torch.set_num_threads(max(1, cpus))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    else:
        device = torch.device("cpu")
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
    try:
        yield World(rank, size, local_rank, device, cpus, should_stop)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def alone() -> World:
    """The world of a single process, for tests and benchmarks."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return World(0, 1, 0, device, os.cpu_count() or 1)


def keep_freed_memory() -> None:
    """Let this process reuse the memory of large tensors rather than give it back to the kernel at each free.

    Taking it back page by page was a fifth of a training step on CPUs.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch then asks for pages of 2 MB
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 on the device (CPU: with AMX; GPU: Ampere on).

    AVX512-BF16 is not enough: there a training step of S12 takes 1.4 times as long as in float32 (docs/speed.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context for a recipe's `precision`; whether float32 products use TF32 is set for what follows, too.

    `bf16` is bfloat16 autocast; `auto` is that where it is the faster one, else `fp32`. With `tf32` a GPU uses
    TF32 for products and convolutions of float32, as PyTorch 1.8 did by default; with `fp32` it does not.
    """
    if device.type == "cuda":
        products = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = products
        torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
    enabled = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def precision_in_use(device: torch.device, precision: Precision) -> str:
    """What `precision` came to on this device: 'bf16', 'tf32' or 'fp32'."""
    if autocast(device, precision)._enabled:
        return "bf16"
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32" if precision == "tf32" and has_tf32 else "fp32"
