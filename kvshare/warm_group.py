"""This node's parts in groups: giving blocks of its arena to several joiners at once, and being one of those.

    directory ── Host ──> donor: host() ── Hosted ──> directory ── Plan ──> joiners: join(), read() batch by batch

A group gives its items in batches, which donor and joiners cut alike, so that a joiner can use those before it has all.

Threads: `host` and `join` are called on the node's loop, `close` in any other thread; joining and moving is done in threads of
the groups' own, which nobody waits for except when they may touch the arena.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
import time
from collections.abc import Callable
from socket import socket
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvshare import keys
from kvshare.cluster_messages import Host
from kvshare.config import Settings
from kvshare.errors import ConfigError, KVShareError, Unavailable
from kvshare.places import GroupPlan, WarmItem
from kvshare.region import Region
from kvshare.transport import nccl
from kvshare.transport.base import BlockStatus, ReadRequest, Transfer

if TYPE_CHECKING:
    from kvshare.memory import Memory

log = logging.getLogger("kvshare")

ENDED = [BlockStatus.UNREACHABLE, BlockStatus.TIMEOUT, BlockStatus.CANCELLED]  # of a group that has failed
BATCH_BYTES = 128 << 20  # of one broadcast: its end costs a pause
JOIN_SECONDS = 20.0  # within which all ranks come, importing torch; whoever dies before costs the others this


def batch_blocks(items: list[WarmItem]) -> int:
    """How many of a group's items are given by one broadcast: the same for all its ranks."""
    return max(1, BATCH_BYTES // items[0].location.length)


class Part:
    """A joiner's part in a group that stands."""

    def __init__(self, groups: Groups, transfer: nccl.GroupTransfer) -> None:
        self._groups, self._transfer = groups, transfer

    def read(self, request: ReadRequest, positions: npt.NDArray[np.int64], blocks: int) -> Transfer:
        """Take the donor's next broadcast, of so many ``blocks``; those at ``positions``, ascending, are wanted."""
        running = Transfer()
        running.on_cancel = self._transfer.cancel
        self._groups.run(lambda: running.complete(self._transfer.receive(request, positions, blocks)), fence=True)
        return running

    def close(self) -> None:
        """Leave the group; does not wait for what is running."""
        self._transfer.cancel()
        self._groups.run(lambda: self._groups.leave(self._transfer))


class Groups:
    """See the module's docstring. ``capable``: this node takes part in groups, by its settings and what is installed."""

    def __init__(self, memory: Memory, settings: Settings) -> None:
        self._memory, self._settings = memory, settings
        self.capable = settings.warm_group_ranks > 0 and importlib.util.find_spec("torch") is not None
        self._lock = threading.Lock()
        self._standing: set[nccl.GroupTransfer] = set()
        self._fences: set[threading.Thread] = set()  # threads that may write to the arena, or tell of its slots
        self._hosting = self._closed = False

    def host(self, question: Host) -> GroupPlan | None:
        """The donor's side: announce a group and give it the items in a thread. None: not now, not these."""
        items = question.items
        lots = {(item.location.node, item.location.region, item.location.length) for item in items}
        if len(lots) != 1:
            return None
        node, region, length = lots.pop()
        arena = self._memory.arenas.get(region)
        if arena is None or node != self._settings.node_name or not 0 < length <= arena.slot_bytes:
            return None
        if self._hosting or self._closed:
            return None  # two groups would share our network, and each is as fast as its slowest rank
        # Whoever is left waiting for a group that does not come together needs the rest of its time for reads of its own.
        join_seconds = min(JOIN_SECONDS, self._settings.warm_seconds / 2) or JOIN_SECONDS
        try:
            listener, plan = nccl.announce(self._settings.bind, question.ranks, join_seconds=join_seconds)
        except (ConfigError, ValueError) as error:
            log.warning("kvshare: no group: %s", error)
            return None
        self._hosting = True
        self.run(lambda: self._give(plan, listener, arena, items))
        return plan

    async def join(self, plan: GroupPlan) -> Part:
        """A joiner's side: come together with the others. Raises KVShareError."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Part] = loop.create_future()

        def settle(part: Part | None, error: KVShareError | None) -> None:
            if part is not None and future.cancelled():
                part.close()
            elif part is not None:
                future.set_result(part)
            elif error is not None and not future.done():
                future.set_exception(error)

        def come() -> None:
            part: Part | None = None
            failure: KVShareError | None = None
            try:
                part = Part(self, self._stand(nccl.join(plan, self._settings.secret)))
            except KVShareError as error:
                failure = error
            except Exception as error:  # torch's own: a group is no reason to fail
                failure = Unavailable(f"the group failed: {type(error).__name__}: {error}")
            try:
                loop.call_soon_threadsafe(settle, part, failure)
            except RuntimeError:
                pass  # the node stopped, and has closed what stood

        self.run(come)
        return await future

    def close(self) -> None:
        """End all; when this returns nothing touches the arena. Not to be called on the loop; idempotent."""
        with self._lock:
            self._closed = True
            standing, fences = list(self._standing), list(self._fences)
        for transfer in standing:
            transfer.cancel()
        for transfer in standing:
            self.leave(transfer)
        for thread in fences:
            thread.join()

    def run(self, work: Callable[[], None], fence: bool = False) -> None:
        """Do it in a thread, which does not keep the process from ending; ``fence``: `close` waits for it."""

        def do() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._fences.discard(thread)

        thread = threading.Thread(target=do, name="kvshare-warm-group", daemon=True)
        if fence:
            with self._lock:
                self._fences.add(thread)
        thread.start()

    def leave(self, transfer: nccl.GroupTransfer) -> None:
        """Takes as long as a portion that is under way."""
        transfer.close()
        with self._lock:
            self._standing.discard(transfer)

    def _stand(self, transfer: nccl.GroupTransfer) -> nccl.GroupTransfer:
        with self._lock:
            if not self._closed:
                self._standing.add(transfer)
                return transfer
        transfer.close()
        raise Unavailable("the node stops")

    def _give(self, plan: GroupPlan, listener: socket, arena: Region, items: list[WarmItem]) -> None:
        try:
            transfer = self._stand(nccl.join(plan, self._settings.secret, listener))
            try:
                self._give_batches(transfer, arena, items)
            finally:
                self.leave(transfer)
        except KVShareError as error:
            log.info("kvshare: a group of %d did not come together: %s", plan.ranks, error)
        except Exception:  # torch's own: a group is no reason to fail
            log.exception("kvshare: a group of %d failed", plan.ranks)
        finally:
            self._hosting = False

    @staticmethod
    def _give_batches(transfer: nccl.GroupTransfer, arena: Region, items: list[WarmItem]) -> None:
        began, step, given = time.monotonic(), batch_blocks(items), 0
        for start in range(0, len(items), step):
            batch = items[start : start + step]
            source = nccl.RegionSource(
                arena,
                np.array([item.location.slot for item in batch], np.int64),
                np.array([item.location.generation for item in batch], np.uint64),
                np.array(keys.seeds_of(item.key for item in batch), np.uint64),
                batch[0].location.length,
            )
            completion = transfer.broadcast(source)
            given += int(np.count_nonzero(completion.statuses == BlockStatus.OK))
            if completion.error:
                log.info("kvshare: a group of %d: %s", transfer.plan.ranks, completion.error)
            if np.isin(completion.statuses, ENDED).any():
                break
        told = given, len(items), transfer.plan.ranks, time.monotonic() - began
        log.info("kvshare: gave %d of %d blocks to a group of %d in %.1f s", *told)
