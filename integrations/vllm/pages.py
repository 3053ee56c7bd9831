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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from kvshare.integrations.vllm.gather import I64, Device, Lane, PageRows, Pinned, Stager
from kvshare.integrations.vllm.layout import Layout
from kvshare.loading import LoadPlan
from kvshare.transport.base import BlockStatus, Completion, Transfer

if TYPE_CHECKING:
    from kvshare.mover import Mover, SaveJob

log = logging.getLogger("kvshare")
Work = TypeVar("Work")

SAVE_BYTES = 32 << 20  # handed over at once
PINNED_AT_START_BYTES = 64 << 20  # before the first request, which would have to wait for it


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


class AtOnce:
    """A device that is the CPU: all is done when it is given. For tests, and for rehearsing what needs a GPU."""

    def mark(self) -> None:
        pass

    def lane(self) -> Lane:
        return self

    def wait(self, mark: None) -> None:
        pass

    def run(self, work: Callable[[], object]) -> None:
        work()

    def after(self, mark: None) -> None:
        pass

    def pinned(self, rows: int, row_bytes: int) -> torch.Tensor:
        return torch.zeros((rows, row_bytes), dtype=torch.uint8)


@dataclass
class Landing:
    """Blocks of a save, at their places in pinned memory when ``mark`` is reached."""

    keys: list[bytes]
    places: I64
    mark: Any = None


@dataclass
class DeviceSave:
    """Blocks on their way from the device into pinned memory; `done` as soon as they are there."""

    keys: list[bytes]
    block_ids: list[int]
    mark: Any
    saved: int = 0
    cancelled: bool = False
    landings: deque[Landing] = field(default_factory=deque)  # not handed over yet
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

    places: I64
    block_ids: list[int]
    mark: Any
    completion: Completion
    transfer: Transfer


class DevicePages:
    """See the module's docstring."""

    def __init__(self, layout: Layout, kv_caches: Mapping[str, torch.Tensor], mover: Mover, device: Device) -> None:
        self._mover = mover
        self._device = device
        self._pinned = Pinned(device, layout.block_bytes)
        self._pinned.give(self._pinned.take(max(1, PINNED_AT_START_BYTES // layout.block_bytes)))
        self._stager = Stager(PageRows(layout, kv_caches), self._pinned, device)
        self._work: queue.SimpleQueue[DeviceSave | Arrived | None] = queue.SimpleQueue()
        self._staged: list[tuple[SaveJob, I64]] = []  # places that the mover still reads
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvshare-device", daemon=True)
        self._thread.start()

    def load(self, plan: LoadPlan, block_ids: Sequence[int]) -> Transfer:
        transfer, ids, mark = Transfer(), list(block_ids), self._device.mark()
        try:
            places = self._pinned.take(len(plan))
        except RuntimeError as error:
            transfer.complete(_failed(len(plan), f"no pinned memory: {error}"))
            return transfer
        inner = self._mover.load(plan, self._pinned.targets(places))
        inner.then(lambda completion: self._work.put(Arrived(places, ids, mark, completion, transfer)))
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
                self._carry_out(self._copy_out, work)
                for landing in work.landings:  # none, unless it failed
                    self._pinned.give(landing.places)
                work.finished.set()
            else:
                error = self._carry_out(self._copy_in, work)
                self._pinned.give(work.places)
                work.transfer.complete(_failed(len(work.block_ids), error) if error else work.completion)

    def _carry_out(self, action: Callable[[Work], None], work: Work) -> str:
        """Whatever goes wrong: blocks are misses, and nothing is under way when this returns. The reason, or empty."""
        try:
            action(work)
        except Exception as error:  # of the device, which the engine will meet as well, or ours
            log.warning("kvshare: copying blocks from or to the device failed: %s: %s", type(error).__name__, error)
            with contextlib.suppress(RuntimeError):  # a device that is lost writes nothing any more
                self._stager.settle()
            return str(error) or type(error).__name__
        return ""

    def _copy_out(self, job: DeviceSave) -> None:
        """While one part is handed over the next is on its way."""
        step = max(1, SAVE_BYTES // self._pinned.block_bytes)
        for start in range(0, len(job.keys), step):
            if job.cancelled or self._closed:
                break
            ids = job.block_ids[start : start + step]
            self._reclaim()
            landing = Landing(job.keys[start : start + step], self._pinned.take(len(ids)))
            job.landings.append(landing)
            landing.mark = self._stager.gather(ids, landing.places, job.mark)
            if len(job.landings) > 1:
                self._hand_over(job)
        if job.landings:
            self._hand_over(job)

    def _hand_over(self, job: DeviceSave) -> None:
        """The oldest part of the job, which the device has all of."""
        landing = job.landings[0]
        self._device.wait(landing.mark)
        save = self._mover.save(landing.keys, self._pinned.targets(landing.places))
        job.landings.popleft()
        self._staged.append((save, landing.places))
        job.saved += len(landing.keys)

    def _reclaim(self) -> None:
        for save, places in self._staged:
            if save.done:
                self._pinned.give(places)
        self._staged = [(save, places) for save, places in self._staged if not save.done]

    def _copy_in(self, load: Arrived) -> None:
        good = np.flatnonzero(load.completion.statuses == BlockStatus.OK)
        if len(good):
            ids = np.array(load.block_ids, np.int64)[good]
            self._device.wait(self._stager.scatter(load.places[good], ids, load.mark))


def _failed(blocks: int, error: str) -> Completion:
    return Completion(np.full(blocks, BlockStatus.UNREACHABLE, np.uint8), 0, 0.0, error)
