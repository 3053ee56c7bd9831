"""The contract of a transport: it moves block bytes between regions and knows nothing of keys, models or Ray.

    owner                                   reader
    Region (slots + header table)           Targets (any memory: arena slots, an engine's KV pages)
        │  register()                           │  read(description, request) -> Transfer
        └──────────── bytes ────────────────────┘  wait() -> Completion: one BlockStatus per block

A read is validated (DESIGN section 4): the reader copies slots, *then* compares generations with those that it asked for,
then compares each block's xxh3 checksum. A block is `OK` only when both hold; its bytes in the targets are then exactly what
was saved under its key, since the checksum is seeded with the key. Every other status is a miss for that block, and what its
targets hold is undefined.

An implementor guarantees:

1. `read` does not block and does not raise for what a peer does; all outcomes are in the `Completion`.
2. `Transfer.wait` returns a `Completion` within ``request.seconds`` without progress, plus 0.5 s, whatever the peer does.
3. After the `Completion` nothing writes to the targets any more, cancelled or not (it is a fence).
4. Bulk bytes are moved by single calls that release the GIL. Idle, a transport uses no processor time.
5. `close` may be called twice and ends running transfers (`CANCELLED`). `register`/`deregister` come in pairs.

Threads: all methods may be called from any thread. The owner never pins, leases or waits for a reader.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvshare.native import BlockStatus

if TYPE_CHECKING:
    from kvshare.places import RegionDescription
    from kvshare.slots import Region

__all__ = [
    "I64",
    "U64",
    "BlockStatus",
    "Completion",
    "ReadRequest",
    "Tamper",
    "Targets",
    "Transfer",
    "Transport",
    "failed",
]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Targets:
    """Where blocks go: block i is the concatenation of the byte ranges ``addresses[i, j], page_bytes[j]``.

    addresses: uint64 [blocks, pages], memory that the caller keeps alive and mapped until the `Completion`.
    page_bytes: uint64 [pages]; their sum, ``block_bytes``, is the length of every block in the request.
    """

    addresses: U64
    page_bytes: U64
    block_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.addresses.ndim == 2 and self.addresses.dtype == np.uint64
        object.__setattr__(self, "addresses", np.ascontiguousarray(self.addresses))
        object.__setattr__(self, "page_bytes", np.ascontiguousarray(self.page_bytes))
        object.__setattr__(self, "block_bytes", int(self.page_bytes.sum()))
        assert self.page_bytes.shape == (self.addresses.shape[1],) and self.page_bytes.dtype == np.uint64

    @classmethod
    def strided(cls, base: int, stride: int, indices: npt.ArrayLike, length: int) -> Targets:
        """One page per block, at ``base + index * stride``: slots of a region, rows of an array."""
        addresses = np.uint64(base) + np.asarray(indices, np.uint64) * np.uint64(stride)
        return cls(addresses.reshape(-1, 1), np.array([length], np.uint64))


@dataclass(frozen=True)
class ReadRequest:
    """Read ``slots[i]`` at ``generations[i]``, its first ``targets.block_bytes`` bytes, into block i of ``targets``.

    seeds: uint64 [blocks], `kvshare.keys.seed_of` each key. seconds: longest time without progress.
    """

    slots: I64
    generations: U64
    seeds: U64
    targets: Targets
    seconds: float = 2.0

    def __post_init__(self) -> None:
        n = len(self.slots)
        assert self.slots.dtype == np.int64 and self.generations.dtype == np.uint64 and self.seeds.dtype == np.uint64
        assert len(self.generations) == len(self.seeds) == len(self.targets.addresses) == n
        assert self.seconds > 0
        for name in ("slots", "generations", "seeds"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class Completion:
    """The end of a read: ``statuses`` uint8 [blocks] of `BlockStatus`, bytes of the OK blocks, seconds it took,
    and for people why blocks failed (empty when none did)."""

    statuses: npt.NDArray[np.uint8]
    bytes: int
    seconds: float
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.statuses.any()


class Transfer:
    """A running read. Made by a transport; `wait` may be called by any number of threads.

    Whoever starts a read waits for it or asks for a callback: a small one may be left undone until then.
    """

    def __init__(self) -> None:
        self._done = threading.Lock()  # held until the completion is there: a latch, cheaper than an Event
        self._done.acquire()
        self._cancelled = False
        self._completion: Completion | None = None
        self._callbacks: list[Callable[[Completion], None]] = []
        self._lock = threading.Lock()
        self.on_cancel: Callable[[], None] | None = None  # set by a transport that can interrupt its I/O
        # Set by a transport whose work the waiting thread can do itself: cheaper than waking another one for it.
        self.help: Callable[[], None] | None = None
        # Set by a transport that leaves a small read to whoever will wait for it: called when somebody does so with a
        # time limit, or asks for a callback, and a thread has to be woken after all.
        self.start: Callable[[], None] | None = None

    def wait(self, timeout: float | None = None) -> Completion | None:
        """The completion, or None when ``timeout`` seconds pass first."""
        work = self.help if timeout is None else self.start
        if work is not None:
            work()
        if self._completion is None and self._done.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            self._done.release()  # for the next one who waits
        return self._completion

    def cancel(self) -> None:
        """Ask for an early end. Not a fence: only the `Completion` is."""
        self._cancelled = True
        on_cancel = self.on_cancel
        if on_cancel is not None:
            on_cancel()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def then(self, callback: Callable[[Completion], None]) -> None:
        """Call ``callback(completion)`` in the thread that completes the transfer (at once if it is complete)."""
        with self._lock:
            completion = self._completion
            if completion is None:
                self._callbacks.append(callback)
        start = self.start
        if completion is not None:
            callback(completion)
        elif start is not None:
            start()

    def complete(self, completion: Completion) -> None:
        """For transports: set the outcome, once."""
        with self._lock:
            assert self._completion is None
            self._completion = completion
            callbacks, self._callbacks = self._callbacks, []
            self.on_cancel = self.help = self.start = None  # they hold the transport's side of us, in a circle
        self._done.release()
        for callback in callbacks:
            callback(completion)


Tamper = Callable[[U64, U64], None]


def failed(request: ReadRequest, status: BlockStatus, error: str) -> Completion:
    """A completion in which every block has ``status``."""
    return Completion(np.full(len(request), status, np.uint8), 0, 0.0, error)


class Transport(ABC):
    """Moves bytes. See the module's docstring for what an implementor guarantees."""

    name: ClassVar[str]

    # For tests and `FaultyTransport`: called as ``tamper(addresses, lengths)``, uint64 [blocks, pages], with blocks that
    # have landed, before they are verified. What it does to them must be found out.
    tamper: Tamper | None = None

    @abstractmethod
    def register(self, region: Region) -> None:
        """Serve ``region`` to peers. The owner keeps it mapped until `deregister` returned."""

    @abstractmethod
    def deregister(self, region: Region) -> None:
        """Stop serving ``region``. Running reads of it fail."""

    def endpoint(self) -> str:
        """ "host:port" where peers reach this transport's server; empty when it has none."""
        return ""

    @abstractmethod
    def reaches(self, description: RegionDescription) -> bool:
        """Can this transport read that region from here? A question: no connection is made."""

    @abstractmethod
    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        """Start a validated read. Never raises for what the peer does."""

    @abstractmethod
    def forget(self, node: str) -> None:
        """A node is gone: drop what is kept for it (connections, mappings)."""

    @abstractmethod
    def close(self) -> None:
        """End everything; idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
