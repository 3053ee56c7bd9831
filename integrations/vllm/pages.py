"""Moving blocks between the arena and vLLM's KV cache: in place where the CPU can address it, else through pinned memory.

`HostPages`: loads and saves go straight from and into the KV cache's pages.

`DevicePages`: one thread, and two streams of its own (`kvshare.integrations.vllm.gather`).

    save: mark in the engine's stream ──> our streams wait for it, gather pages, copy into pinned memory ──> Mover.save
    load: Mover.load into pinned memory, verified there ──> copied to the device, scattered into pages ──> complete

Saved pages are read after all that the engine was given before `save`; loaded pages are written to after all that it was given
before `load`, since they may have belonged to a request whose last step is still under way. A load completes when our
streams are done: what the engine is given from then on finds the blocks.

The device path follows vLLM's ordering rules by reading; it has been run against stand-ins for the device only, one of
which does things in any order that streams allow.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from kvshare.integrations.vllm.gather import Device, Lane, PageRows, Stager
from kvshare.integrations.vllm.layout import Layout
from kvshare.loading import LoadPlan
from kvshare.transport.base import BlockStatus, Completion, Targets, Transfer

if TYPE_CHECKING:
    from kvshare.mover import Mover, SaveJob

log = logging.getLogger("kvshare")

SLAB_BYTES = 32 << 20  # of pinned memory; the unit of a save
SLABS_AT_START = 4  # pinned before the first request: ten milliseconds each


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


class CudaLane:
    """A stream of ours."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Any:
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def after(self, mark: Any) -> None:
        self._stream.wait_event(mark)


class Cuda:
    """CUDA and ROCm."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def lane(self) -> Lane:
        return CudaLane(self._device)

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def pinned(self, rows: int, row_bytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):  # else a thread's first pinning would begin a context on GPU 0
            return torch.empty((rows, row_bytes), dtype=torch.uint8, pin_memory=True)


class Slabs:
    """Pinned memory that is used again and again; there is never less of it than the most that was needed at once.

    A slab is uint8 [blocks, block_bytes]. Threads: any.
    """

    def __init__(self, device: Device, block_bytes: int) -> None:
        self._device = device
        self.blocks = max(1, SLAB_BYTES // block_bytes)
        self.block_bytes = block_bytes
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()
        self.give(self.take(SLABS_AT_START * self.blocks))

    def take(self, blocks: int) -> list[torch.Tensor]:
        """As many as these blocks fill. Raises RuntimeError when the system has no more pinned memory to give."""
        wanted = -(-blocks // self.blocks)
        with self._lock:
            kept = max(0, len(self._free) - wanted)
            slabs, self._free = self._free[kept:], self._free[:kept]
        try:
            while len(slabs) < wanted:
                slabs.append(self._device.pinned(self.blocks, self.block_bytes))
        except RuntimeError:
            self.give(slabs)
            raise
        return slabs

    def give(self, slabs: Sequence[torch.Tensor]) -> None:
        """Back, when nothing uses them any more."""
        with self._lock:
            self._free += slabs

    def targets(self, slabs: Sequence[torch.Tensor], blocks: int) -> Targets:
        """The first ``blocks`` blocks of these slabs."""
        slab, row = np.divmod(np.arange(blocks), self.blocks)
        bases = np.array([one.data_ptr() for one in slabs], np.uint64)
        addresses = bases[slab] + row.astype(np.uint64) * np.uint64(self.block_bytes)
        return Targets(addresses.reshape(-1, 1), np.array([self.block_bytes], np.uint64))


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

    slabs: list[torch.Tensor]
    block_ids: list[int]
    mark: Any
    completion: Completion
    transfer: Transfer


@dataclass(frozen=True)
class Landing:
    """Blocks of a save that are in the slab when ``mark`` is reached."""

    keys: list[bytes]
    slab: torch.Tensor
    mark: Any


class DevicePages:
    """See the module's docstring."""

    def __init__(self, layout: Layout, kv_caches: Mapping[str, torch.Tensor], mover: Mover, device: Device) -> None:
        self._mover = mover
        self._device = device
        self._stager = Stager(PageRows(layout, kv_caches), device)
        self._slabs = Slabs(device, layout.block_bytes)
        self._work: queue.SimpleQueue[DeviceSave | Arrived | None] = queue.SimpleQueue()
        self._staged: list[tuple[SaveJob, torch.Tensor]] = []  # slabs that the mover still reads
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvshare-device", daemon=True)
        self._thread.start()

    def load(self, plan: LoadPlan, block_ids: Sequence[int]) -> Transfer:
        transfer, ids, mark = Transfer(), list(block_ids), self._device.mark()
        try:
            slabs = self._slabs.take(len(plan))
        except RuntimeError as error:
            reason = f"no pinned memory for {len(plan)} blocks: {error}"
            transfer.complete(_failed(len(plan), 0.0, reason))
            return transfer
        inner = self._mover.load(plan, self._slabs.targets(slabs, len(plan)))
        inner.then(lambda completion: self._work.put(Arrived(slabs, ids, mark, completion, transfer)))
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
            if isinstance(work, DeviceSave):
                with self._reported():
                    self._copy_out(work)
                work.finished.set()
            else:
                completion = _failed(len(work.block_ids), work.completion.seconds, "copying to the device failed")
                with self._reported():
                    self._copy_in(work)
                    completion = work.completion
                work.transfer.complete(completion)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Whatever goes wrong: blocks are misses, and nothing is under way any more. The engine will meet what its device has."""
        try:
            yield
        except Exception as error:
            log.warning("kvshare: copying blocks from or to the device failed: %s: %s", type(error).__name__, error)
            with contextlib.suppress(RuntimeError):  # of a device that is lost: it writes nothing any more either
                self._stager.settle()

    def _copy_out(self, job: DeviceSave) -> None:
        """Slab by slab; while one is handed over the next is on its way."""
        landing: Landing | None = None
        step = self._slabs.blocks
        for start in range(0, len(job.keys), step):
            if job.cancelled or self._closed:
                break
            self._reclaim()
            ids, (slab,) = job.block_ids[start : start + step], self._slabs.take(1)
            mark = self._stager.gather(ids, slab[: len(ids)], job.mark)
            self._hand_over(job, landing)
            landing = Landing(job.keys[start : start + step], slab, mark)
        self._hand_over(job, landing)

    def _hand_over(self, job: DeviceSave, landing: Landing | None) -> None:
        if landing is not None:
            self._device.wait(landing.mark)
            save = self._mover.save(landing.keys, self._slabs.targets([landing.slab], len(landing.keys)))
            self._staged.append((save, landing.slab))
            job.saved += len(landing.keys)

    def _reclaim(self) -> None:
        self._slabs.give([slab for save, slab in self._staged if save.done])
        self._staged = [(save, slab) for save, slab in self._staged if not save.done]

    def _copy_in(self, load: Arrived) -> None:
        good = np.flatnonzero(load.completion.statuses == BlockStatus.OK)
        ids = np.array(load.block_ids, np.int64)
        mark = None
        for number, slab in enumerate(load.slabs):
            first = number * self._slabs.blocks
            here = good[(good >= first) & (good < first + self._slabs.blocks)]
            if len(here):
                mark = self._stager.scatter(slab, here - first, ids[here], load.mark)
        if mark is not None:
            self._device.wait(mark)
        self._slabs.give(load.slabs)


def _failed(blocks: int, seconds: float, error: str) -> Completion:
    return Completion(np.full(blocks, BlockStatus.UNREACHABLE, np.uint8), 0, seconds, error)
