"""Moving blocks between the arena and vLLM's KV cache: in place where the CPU can address it, else through pinned memory.

`HostPages`: loads and saves go straight from and into the KV cache's pages.

`DevicePages`: one thread and one stream of its own.

    save: event on the engine's stream ──> our stream waits for it, gathers pages, copies into pinned memory ──> Mover.save
    load: Mover.load into pinned memory, verified there ──> copied to the device, scattered into pages ──> complete

The device path follows vLLM's ordering rules by reading; it has been run against a stand-in for the device only.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from kvshare.integrations.vllm.layout import Layout
from kvshare.loading import LoadPlan
from kvshare.transport.base import BlockStatus, Completion, Targets, Transfer

if TYPE_CHECKING:
    from kvshare.mover import Mover, SaveJob

log = logging.getLogger("kvshare")

CHUNK_BYTES = 32 << 20  # gathered on the device at once: what it needs of the device's memory


class Saving(Protocol):
    """Blocks being saved. When `done`, or `wait` returned True, the KV cache's pages are not read any more."""

    saved: int

    @property
    def done(self) -> bool: ...

    def wait(self, timeout: float | None = None) -> bool: ...

    def cancel(self) -> None: ...


class Pages(Protocol):
    """Both methods return at once. A load's completion is a fence: nothing writes to its blocks afterwards."""

    def load(self, plan: LoadPlan, block_ids: Sequence[int]) -> Transfer: ...

    def save(self, block_keys: list[bytes], block_ids: Sequence[int]) -> Saving: ...

    def close(self) -> None: ...


class HostPages:
    """A KV cache in memory that the CPU addresses."""

    def __init__(self, layout: Layout, mover: Mover) -> None:
        self._layout = layout
        self._mover = mover

    def load(self, plan: LoadPlan, block_ids: Sequence[int]) -> Transfer:
        return self._mover.load(plan, self._layout.targets(block_ids))

    def save(self, block_keys: list[bytes], block_ids: Sequence[int]) -> Saving:
        return self._mover.save(block_keys, self._layout.targets(block_ids))

    def close(self) -> None:
        pass


class Device(Protocol):
    """What `DevicePages` needs of an accelerator; `Cuda` is the real one."""

    def mark(self) -> Any:
        """A point in the engine's stream, after all that it was given so far."""

    def stream(self) -> AbstractContextManager[Any]:
        """Within it, work goes to our stream."""

    def after(self, mark: Any) -> None:
        """Our stream goes on when the engine's has passed ``mark``."""

    def synchronize(self) -> None:
        """Wait until our stream is done."""

    def staging(self, rows: int, row_bytes: int) -> torch.Tensor:
        """uint8 [rows, row_bytes] in host memory that the device copies from and to."""


class Cuda:
    """CUDA and ROCm."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stream(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def after(self, mark: Any) -> None:
        self._stream.wait_event(mark)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def staging(self, rows: int, row_bytes: int) -> torch.Tensor:
        return torch.empty((rows, row_bytes), dtype=torch.uint8, pin_memory=True)


@dataclass
class DeviceSave:
    """Blocks on their way from the device into pinned memory; `done` as soon as they are there."""

    keys: list[bytes]
    block_ids: list[int]
    mark: Any
    saved: int = 0
    cancelled: bool = False
    finished: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self.finished.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self.finished.wait(timeout)

    def cancel(self) -> None:
        self.cancelled = True


@dataclass(frozen=True)
class Arrived:
    """A load whose verified blocks lie in pinned memory."""

    staging: torch.Tensor
    block_ids: list[int]
    completion: Completion
    transfer: Transfer


class DevicePages:
    """See the module's docstring."""

    def __init__(self, layout: Layout, kv_caches: Mapping[str, torch.Tensor], mover: Mover, device: Device) -> None:
        self._layout = layout
        self._mover = mover
        self._device = device
        self._views = list(_page_views(layout, kv_caches))
        self._work: queue.SimpleQueue[DeviceSave | Arrived | None] = queue.SimpleQueue()
        self._staged: list[tuple[SaveJob, torch.Tensor]] = []  # pinned memory that the mover still reads
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvshare-device", daemon=True)
        self._thread.start()

    def load(self, plan: LoadPlan, block_ids: Sequence[int]) -> Transfer:
        staging = self._device.staging(len(plan), self._layout.block_bytes)
        transfer = Transfer()
        inner = self._mover.load(plan, self._rows(staging))
        inner.then(lambda completion: self._work.put(Arrived(staging, list(block_ids), completion, transfer)))
        return transfer

    def save(self, block_keys: list[bytes], block_ids: Sequence[int]) -> Saving:
        job = DeviceSave(block_keys, list(block_ids), self._device.mark())
        self._work.put(job)
        return job

    def close(self) -> None:
        """End the thread; idempotent. Loads must have completed: close the mover first."""
        if not self._closed:
            self._closed = True
            self._work.put(None)
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if isinstance(work, DeviceSave):
                    self._copy_out(work)
                else:
                    self._copy_in(work)
            except RuntimeError as error:  # the device's errors: blocks are misses, the engine will say what it has
                log.warning("kvshare: copying blocks from or to the device failed: %s", error)
                if isinstance(work, Arrived):
                    work.transfer.complete(_failed(work.completion, str(error)))
            finally:
                if isinstance(work, DeviceSave):
                    work.finished.set()

    def _copy_out(self, job: DeviceSave) -> None:
        self._staged = [(save, staging) for save, staging in self._staged if not save.done]
        step = max(1, CHUNK_BYTES // self._layout.block_bytes)
        for start in range(0, len(job.keys), step):
            if job.cancelled or self._closed:
                return
            ids = job.block_ids[start : start + step]
            staging = self._device.staging(len(ids), self._layout.block_bytes)
            with self._device.stream():
                self._device.after(job.mark)
                for view, columns in self._views:
                    rows = torch.tensor(ids, device=view.device)
                    staging[:, columns].copy_(view.index_select(0, rows), non_blocking=True)
            self._device.synchronize()
            save = self._mover.save(job.keys[start : start + step], self._rows(staging))
            self._staged.append((save, staging))
            job.saved += len(ids)

    def _copy_in(self, load: Arrived) -> None:
        good = np.flatnonzero(load.completion.statuses == BlockStatus.OK).tolist()
        step = max(1, CHUNK_BYTES // self._layout.block_bytes)
        for start in range(0, len(good), step):
            chosen = good[start : start + step]
            with self._device.stream():
                for view, columns in self._views:
                    rows = torch.tensor([load.block_ids[i] for i in chosen], device=view.device)
                    view.index_copy_(0, rows, load.staging[chosen][:, columns].to(view.device, non_blocking=True))
            self._device.synchronize()
        load.transfer.complete(load.completion)

    def _rows(self, staging: torch.Tensor) -> Targets:
        row_bytes = self._layout.block_bytes
        return Targets.strided(staging.data_ptr(), row_bytes, np.arange(len(staging)), row_bytes)


def _page_views(layout: Layout, kv_caches: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, slice]]:
    """For each page: uint8 [blocks, page bytes] over the KV cache, and its columns in a staged block."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in kv_caches.values()}
    end = 0
    for base, stride, length in zip(layout.bases.tolist(), layout.strides.tolist(), layout.page_bytes.tolist(), strict=True):
        start = max(address for address in storages if address <= base)
        owner = storages[start]
        storage = owner.untyped_storage()
        blocks = 1 + (storage.nbytes() - (base - start) - length) // stride
        view = torch.empty(0, dtype=torch.uint8, device=owner.device)
        view.set_(storage, base - start, (blocks, length), (stride, 1))
        yield view, slice(end, end + length)
        end += length


def _failed(completion: Completion, error: str) -> Completion:
    return Completion(np.full(len(completion.statuses), BlockStatus.UNREACHABLE, np.uint8), 0, completion.seconds, error)
