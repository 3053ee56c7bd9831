"""Moving blocks between the arena and vLLM's KV cache: in place where the CPU can address it, else through pinned memory.

`HostPages`: loads and saves go straight from and into the KV cache's pages.

`DevicePages`: one thread, and two streams of its own (`kvshare.integrations.vllm.gather`).

    save: mark in the engine's stream ──> our streams wait for it, gather pages, copy into pinned memory ──> Mover.save
    load: Mover.load into pinned memory, verified there ──> copied to the device, scattered into pages ──> complete
          another GPU's blocks: our thread waits for the mark ──> Mover.load into the pages themselves ──> complete

Saved pages are read after all that the engine was given before `save`; loaded pages are written to after all that it was given
before `load`, since they may have belonged to a request whose last step is still under way. A load completes when our
streams are done: what the engine is given from then on finds the blocks.

Which blocks land directly, and what is done when such a read hangs, is in `kvshare.integrations.vllm.direct`.

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
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from kvshare.integrations.vllm.direct import Direct, DirectLoad, Ended, Held, Joined, may_be_written_to, part_of
from kvshare.integrations.vllm.gather import I64, Device, Lane, PageRows, Pinned, Stager
from kvshare.integrations.vllm.layout import Layout
from kvshare.loading import LoadPlan, SourceRead
from kvshare.places import DEVICE
from kvshare.transport.base import BlockStatus, Completion, Transfer

if TYPE_CHECKING:
    from kvshare.mover import Mover
    from kvshare.saving import SaveJob

log = logging.getLogger("kvshare")
Work = TypeVar("Work")

SAVE_BYTES = 32 << 20  # handed over at once
PINNED_AT_START_BYTES = 64 << 20  # before the first request, which would have to wait for it
HELD_SECONDS = 0.05  # between two looks at reads that were given up and are not over


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
    """See the module's docstring. ``direct``: None where all blocks have to take the way through pinned memory."""

    def __init__(
        self,
        layout: Layout,
        kv_caches: Mapping[str, torch.Tensor],
        mover: Mover,
        device: Device,
        direct: Direct | None = None,
    ) -> None:
        self._layout = layout
        self._mover = mover
        self._device = device
        self._direct = direct
        self._pinned = Pinned(device, layout.block_bytes)
        self._pinned.give(self._pinned.take(max(1, PINNED_AT_START_BYTES // layout.block_bytes)))
        pages = PageRows(layout, kv_caches)
        self._blocks = pages.blocks
        self._stager = Stager(pages, self._pinned, device)
        self._work: queue.SimpleQueue[DeviceSave | Arrived | DirectLoad | Ended | None] = queue.SimpleQueue()
        self._held = Held(layout, direct) if direct is not None else None
        self._staged: list[tuple[SaveJob, I64]] = []  # places that the mover still reads
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvshare-device", daemon=True)
        self._thread.start()

    def load(self, plan: LoadPlan, block_ids: Sequence[int]) -> Transfer:
        ids, mark = list(block_ids), self._device.mark()
        lands = [self._lands(read) for read in plan.reads]
        if not any(lands):
            return self._load_staged(plan, ids, mark)
        if all(lands):
            return self._load_directly(plan, ids, mark)
        parts = []
        for way, chosen in ((self._load_directly, lands), (self._load_staged, [not one for one in lands])):
            part, positions = part_of(plan, list(compress(plan.reads, chosen)))
            parts.append((way(part, [ids[i] for i in positions.tolist()], mark), positions))
        return Joined(len(plan), parts)

    def _lands(self, read: SourceRead) -> bool:
        """Host regions never, even where a transport could do it: their checksums would remain unverified."""
        return self._direct is not None and read.description.kind == DEVICE and self._direct.lands_directly(read.description)

    def _load_directly(self, plan: LoadPlan, ids: list[int], mark: Any) -> Transfer:
        load = DirectLoad(plan, ids, mark)
        self._work.put(load)
        return load.transfer

    def _load_staged(self, plan: LoadPlan, ids: list[int], mark: Any) -> Transfer:
        transfer = Transfer()
        try:
            places = self._pinned.take(len(plan))
        except RuntimeError as error:
            transfer.complete(_failed(len(plan), f"no pinned memory: {error}"))
            return transfer
        inner = self._mover.load(plan, self._pinned.targets(places))
        transfer.on_cancel = inner.cancel
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
        while (work := self._next()) is not None:
            if isinstance(work, DeviceSave):
                self._carry_out(self._copy_out, work)
                for landing in work.landings:  # none, unless it failed
                    self._pinned.give(landing.places)
                work.finished.set()
            elif isinstance(work, Arrived):
                error = self._carry_out(self._copy_in, work)
                self._pinned.give(work.places)
                work.transfer.complete(_failed(len(work.block_ids), error) if error else work.completion)
            elif isinstance(work, DirectLoad):
                error = self._carry_out(self._begin, work)
                if error:
                    work.transfer.complete(_failed(len(work.block_ids), error))
            elif self._held is not None:
                self._held.add(work)
        if self._held is not None:
            self._held.let_all_go()

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

    # --- blocks that land directly ------------------------------------------------------------------------------------

    def _begin(self, load: DirectLoad) -> None:
        """In the order of the queue: what was saved from these blocks before has been read when this comes to them."""
        ids = load.block_ids
        assert not ids or (min(ids) >= 0 and max(ids) < self._blocks)  # elsewhere a read would do harm
        # A former owner's step may still write to these blocks, and no stream can hold a network card or a peer's copy back.
        # The load's limit of time begins here: to compute these blocks the engine would have had to wait as well.
        self._device.wait(load.mark)
        inner = self._mover.load(load.plan, self._layout.targets(ids))
        load.transfer.on_cancel = inner.cancel
        if load.transfer.cancelled:  # before there was anything to tell
            inner.cancel()
        inner.then(partial(self._landed, load))

    def _landed(self, load: DirectLoad, completion: Completion) -> None:
        """In a thread of the mover. Nothing more is needed for the engine to see the blocks: NIXL says that a read is over when
        the copy between GPUs has ended on the device, or when the network card has written the bytes and then told the CPU;
        kernels that the engine launches afterwards, and it launches none on these blocks before it hears of the completion,
        begin with caches that do not hold what was there before."""
        if may_be_written_to(completion).any():
            self._work.put(Ended(load, completion))
        else:
            load.transfer.complete(completion)

    def _next(self) -> DeviceSave | Arrived | DirectLoad | Ended | None:
        """What to do next; meanwhile looks after the loads that are held back."""
        while self._held:
            self._held.let_go()
            with contextlib.suppress(queue.Empty):
                return self._work.get(timeout=HELD_SECONDS)
        return self._work.get()


def _failed(blocks: int, error: str) -> Completion:
    return Completion(np.full(blocks, BlockStatus.UNREACHABLE, np.uint8), 0, 0.0, error)
