"""What to do when a micro-batch does not fit, said by the run that met it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from pipeline.cluster import BatchSplit
from pipeline.errors import UserError

# The CPU allocator's message; cuBLAS and cuDNN have no exception of their own either.
_SIGNS = ("can't allocate memory", "STATUS_ALLOC_FAILED")


@contextmanager
def explained(layout: BatchSplit, device: torch.device, *, activation_checkpointing: bool) -> Iterator[None]:
    """Turn running out of memory inside into a UserError that says which profile would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        remedies = _remedies(layout, activation_checkpointing)
        raise UserError(
            f"out of memory with {layout.micro_batch_size} images at a time on one device "
            f"({peak_memory_gb(device):.1f} of {_memory_gb(device):.1f} GB used): in the cluster profile, "
            f"{' or '.join(remedies)}; the run goes on from its last checkpoint"
        ) from error


def peak_memory_gb(device: torch.device) -> float:
    """Most that was allocated on the device so far, or on a CPU the process's largest resident set, in 2**30 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not getrusage's ru_maxrss: a process starts with its parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return float(psutil.virtual_memory().total) / 2**30


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in _SIGNS)


def _remedies(layout: BatchSplit, activation_checkpointing: bool) -> list[str]:
    remedies = []
    if (smaller := layout.halved()) is not None:
        remedies.append(
            f"max_images_per_device: {smaller.micro_batch_size} needs about half "
            f"({smaller.accumulation} micro-batches a step in place of {layout.accumulation}, the same result)"
        )
    if not activation_checkpointing:
        remedies.append("activation_checkpointing: true keeps less for the backward pass (slower, the same result)")
    remedies.append("more ranks give each a smaller share of the batch")
    return remedies
