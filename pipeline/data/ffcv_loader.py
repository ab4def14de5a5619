"""FFCV's Loader for operations that are plain Python calling C: what our loaders share, and the traps they avoid.

FFCV reads the file and runs ahead of the consumer in a separate thread. Which samples a batch holds is decided
before FFCV sees them: it takes the given positions as they come.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from queue import Full
from threading import Lock
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.graph import Graph
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.reader import Reader
from ffcv.traversal_order import Sequential

Ints = npt.NDArray[np.int64]
Read = Callable[[Ints, Any, Any], Any]
"""`(positions of the batch, the field's metadata, (file, pointers, sizes))` -> what the batch has for this output."""
_compiler_setting = Lock()

JOIN_S = 5.0
"""The thread looks every half second whether it is to end."""


class InOrderLoader(Loader):
    """FFCV's Loader over `positions` in this order, the last batch smaller; each `iter` starts from the first again.

    FFCV's own constructor is not called: that would map every sample to its page, for a memory manager that is not
    used here, and take 4 s and 1.5 GB for ImageNet at each epoch and rank.

    Args:
        outputs: for each output, the .beton's field whose metadata it wants, and the function that makes it.
    """

    def __init__(
        self, reader: Reader, positions: Ints, batch_size: int, outputs: Mapping[str, tuple[str, Read]]
    ) -> None:
        self.reader = reader
        self.indices = positions
        self.batch_size = batch_size
        self.batches_ahead = 3
        # FFCV sets torch's and numba's number of threads to this; our operations have threads of their own.
        self.num_workers = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self.seed, self.next_epoch = 0, 0
        self.drop_last = self.distributed = self.recompile = False
        self.memory_manager = _MappedFile(reader)
        self.traversal_order = Sequential(self)
        self.first_traversal_order = positions
        pipelines = {name: PipelineSpec(field, _Python(read)) for name, (field, read) in outputs.items()}
        fields = {name: position for position, name in enumerate(reader.handlers)}
        self.graph = Graph(pipelines, reader.handlers, fields, reader.metadata, memory_read=None)
        with _compiler_setting:
            # The operations are Python that calls C: there is nothing to compile.
            enabled = Compiler.is_enabled
            Compiler.set_enabled(False)
            try:
                self.generate_code()
            finally:
                Compiler.set_enabled(enabled)

    def __iter__(self) -> Iterator[Any]:
        """A tuple of the outputs for each batch; raises the error that kept one from being made."""
        if not len(self.indices):
            return
        batches = _Batches(self, self.indices)
        try:
            for outputs in batches:
                for output in outputs:
                    if isinstance(output, Exception):
                        raise output
                yield outputs
        finally:
            batches.close()  # or its thread would wait for ever for someone to take a batch
            batches.join(JOIN_S)  # at the interpreter's end it would be ended inside C++, which aborts the process


class _Batches(EpochIterator):
    """FFCV's thread, whose own errors (as of CUDA) reach the consumer: it would end silently and leave that waiting."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put((0, (error,)), timeout=0.5)
                    return
                except Full:
                    continue


class _MappedFile(OSCacheManager):
    """FFCV's memory-mapped file, without the map of every sample to its page."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
        self.ptrs, self.sizes = table["ptr"], table["size"]
        self.context = OSCacheContext(self)


class _Python(Operation):
    """A decoder in plain Python, with memory of its own. It returns its errors: FFCV's thread has no other way to hand
    one over, it would die and leave the consumer waiting."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=False), None

    def generate_code(self) -> Callable[..., Any]:
        def run(positions: Ints, _: None, metadata: Any, storage: Any) -> Any:
            try:
                return self.read(positions, metadata, storage)
            except Exception as error:
                return error

        return run
