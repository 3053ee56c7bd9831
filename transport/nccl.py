"""The wire of group transfers: torch.distributed, NCCL on GPUs and gloo on CPUs.

A group is a private object: an engine's own default group in the same process is not touched, and whoever fails in a group may
take part in others. The ranks find each other over our own authenticated board (`kvshare.transport.group`). With "nccl", a
portion passes through a buffer on the current GPU on either side, between pinned host memory.

What torch does not do for us: neither gloo's `abort` nor its `shutdown` ends a broadcast under way, only its time limit does.
So each one has a limit, one is under way at a time, and destructors, which wait for it, run in a thread of their own. NCCL's
watchdog ends the process when a group fails: it is told to leave that to us.

Threads: as `kvshare.transport.group_transfer`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from kvshare.errors import TransportError, Unavailable
from kvshare.places import GroupPlan
from kvshare.transport.base import BlockStatus
from kvshare.transport.group import Board, Member, announce
from kvshare.transport.group_frames import U8
from kvshare.transport.group_source import DeviceSource, RegionSource, Source
from kvshare.transport.group_transfer import Broken, Buffer, GroupTransfer

__all__ = ["DeviceSource", "GroupPlan", "GroupTransfer", "RegionSource", "Source", "announce", "join"]

_CLOSE_SECONDS = 0.25  # patience with the backend's destructor, which waits for what is under way
_LATE_SECONDS = 0.1  # by which we wait longer than the backend, so that it can say what was wrong


class _Staging:
    """``memory``: uint8 of host memory, one frame. ``tensor``: what the backend moves, the same memory or a copy on the GPU."""

    def __init__(self, torch: Any, length: int, device: Any) -> None:
        self.host = torch.empty(length, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.tensor = self.host if device.type == "cpu" else torch.empty(length, dtype=torch.uint8, device=device)
        self.memory: U8 = self.host.numpy()


def _store(dist: Any, notices: Board | Member, seconds: float) -> Any:
    """A store of torch.distributed over our board: the backends ask it for nothing but these three."""

    class Store(dist.Store):  # type: ignore[misc]
        def set(self, name: str, value: bytes) -> None:
            notices.tell(name, bytes(value))

        def get(self, name: str) -> bytes:
            return notices.ask([name], seconds)[0]

        def wait(self, names: list[str], timeout: timedelta = timedelta(seconds=seconds)) -> None:
            notices.ask(names, timeout.total_seconds())

    return Store()


@contextlib.contextmanager
def _watchdog_off() -> Iterator[None]:
    """NCCL groups made meanwhile leave errors to us instead of ending the process. torch reads it from the environment only."""
    ours = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Wire:
    """As `Wire`.

    Raises:
        Unavailable: not all ranks came within ``seconds``. TransportError: torch lacks the backend.
    """

    def __init__(self, torch: Any, plan: GroupPlan, notices: Board | Member, seconds: float) -> None:
        self._torch, self._plan = torch, plan
        self._store = _store(torch.distributed, notices, seconds)
        self._work: Any = None
        self._used: _Staging | None = None
        self.device = torch.device("cpu")
        make = self._nccl if plan.backend == "nccl" else self._gloo
        limit = timedelta(seconds=seconds)
        try:
            self._backend = _within(seconds + _LATE_SECONDS, lambda: make(torch.distributed, notices.address, limit))
        except (RuntimeError, OSError) as error:
            raise Unavailable(f"the group did not come together: {_reason(error)}") from None

    def _gloo(self, dist: Any, address: str, limit: timedelta) -> Any:
        if not dist.is_gloo_available():
            raise TransportError("this torch has no gloo: groups on CPUs need one that has")
        options = dist.ProcessGroupGloo._Options()
        # By default it listens wherever the host's name points to.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout, options._threads = limit, 1
        return dist.ProcessGroupGloo(self._store, self._plan.rank, self._plan.ranks, options)

    def _nccl(self, dist: Any, _: str, limit: timedelta) -> Any:
        cuda = self._torch.cuda
        if not dist.is_nccl_available() or not cuda.is_available():
            raise TransportError("backend 'nccl' needs a GPU and a torch built for it: use 'gloo'")
        self.device = self._torch.device("cuda", cuda.current_device())
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        with _watchdog_off():
            backend = dist.ProcessGroupNCCL(self._store, self._plan.rank, self._plan.ranks, options)
        # NCCL comes together with its first operation, which has no limit of time while it does.
        first = self._torch.zeros(1, dtype=self._torch.uint8, device=self.device)
        backend.broadcast([first], self._options(limit)).wait(limit)
        return backend

    def buffer(self, length: int) -> _Staging:
        return _Staging(self._torch, length, self.device)

    def start(self, buffer: Buffer) -> None:
        assert self._work is None and isinstance(buffer, _Staging)
        try:
            if buffer.tensor is not buffer.host and self._plan.rank == 0:
                buffer.tensor.copy_(buffer.host, non_blocking=True)  # NCCL's stream waits for ours
            self._work = self._backend.broadcast([buffer.tensor], self._options(timedelta(seconds=self._plan.seconds)))
            self._used = buffer
        except RuntimeError as error:
            raise Broken(BlockStatus.UNREACHABLE, f"the group failed: {_reason(error)}") from None

    def finish(self) -> None:
        began, work, buffer = time.monotonic(), self._work, self._used
        self._work = self._used = None
        assert work is not None and buffer is not None
        try:
            work.wait(timedelta(seconds=self._plan.seconds + _LATE_SECONDS))
            if buffer.tensor is not buffer.host and self._plan.rank != 0:
                buffer.host.copy_(buffer.tensor)
        except RuntimeError as error:
            late = time.monotonic() - began >= 0.9 * self._plan.seconds
            status = BlockStatus.TIMEOUT if late else BlockStatus.UNREACHABLE
            raise Broken(status, f"the group failed: {_reason(error)}") from None

    def close(self) -> None:
        self._work = self._used = None
        rest = [self._store, self._backend]
        self._store = self._backend = None

        def let_go() -> None:
            rest.pop()  # the backend, which uses the store to its end
            rest.pop()

        thread = threading.Thread(target=let_go, name="kvshare-group-end", daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)

    def _options(self, limit: timedelta) -> Any:
        options = self._torch.distributed.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = limit
        return options


def join(plan: GroupPlan, secret: str, listener: socket.socket | None = None) -> GroupTransfer:
    """Come together with the other ranks; takes as long as the last of them. The donor gives the ``listener`` that `announce`
    made, which is ours then.

    Raises:
        Unavailable: not all ranks came within ``plan.join_seconds``, or one died meanwhile. AuthenticationError,
            ProtocolError: the donor does not know our secret, or refuses us. TransportError: no torch, or not the backend.
    """
    assert (plan.rank == 0) == (listener is not None)
    deadline = time.monotonic() + plan.join_seconds
    notices: Board | Member | None = None
    try:
        # Before torch, whose import takes seconds: whoever is not let in shall know at once.
        notices = Member(plan, secret, plan.join_seconds) if listener is None else Board(plan, secret, listener)
        wire = _Wire(_import_torch(), plan, notices, max(0.01, deadline - time.monotonic()))
        return GroupTransfer(plan, secret, notices, wire)
    except BaseException:
        if notices is not None:
            notices.close()
        elif listener is not None:
            listener.close()
        raise


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises; TimeoutError when that takes longer. It is then left to itself, in a thread."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="kvshare-group-join", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"it takes longer than {seconds:.1f} s")
    value, failure = outcome.pop()
    if failure is not None:
        raise failure
    return value


def _import_torch() -> Any:
    try:
        import torch
        import torch.distributed
    except ImportError as error:
        raise TransportError(f"groups need torch: {error}") from error
    return torch


def _reason(error: Exception) -> str:
    """What a backend says, without the place in its source and its advice."""
    first = str(error).partition("\n")[0].partition(". This is typically")[0]
    return first.partition("] ")[2] if first.startswith("[/") else first
