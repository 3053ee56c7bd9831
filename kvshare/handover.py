"""A node's leaving, and its taking from others that leave.

    drain ─> 1. saves under way end: until none came for `QUIET_SECONDS`, at most a quarter of the time; then no new ones
          ─> 2. `Leave` to the directory: peers with room take what only we have, hottest first (`kvshare.leaving`)
          ─> 3. what no node that stays has now (`Find`) goes to disk and object store, hottest first
          ─> 4. reads that were sent here before all that end ─> `Drained`

Reads are answered to the end, and a block is known at its new place before the old one goes: who asks meanwhile finds it at one
or the other. A directory that dies is asked again when it is back; one that stays away leaves 3. A peer or device that fails
costs what it should have got; the end is in time whatever fails.

Taking, the other side: blocks of a node that leaves are read into free room, pushing nothing out, published, and then answered
for with `Taken`.

Threads: all on the node's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvshare.cluster_messages import Take, Taken
from kvshare.config import LEAVE_SHARE
from kvshare.errors import KVShareError, Unavailable
from kvshare.link import Answer
from kvshare.messages import Drained

if TYPE_CHECKING:
    from kvshare.node import Node

log = logging.getLogger("kvshare")

QUIET_SECONDS = 0.3  # an engine that ends saves what it has queued without pauses as long as this
PEERS_SHARE = 0.6  # of what is left, where there are slow tiers that need the rest
LOOK_SECONDS = 0.02  # between looks at the saves; only while draining
ANSWER_SECONDS = 0.5  # for a directory's last word, beyond the time that it was given
RETURN_SECONDS = 2.5  # after a directory has come back, until its nodes are back too
FIND_SECONDS = 2.0
ROUNDS_MAX = 4
FIND_KEYS = 4096  # asked for at once
TAKES_MAX = 8  # at once, of one shard of the directory, which gives fewer


class Handover:
    """See the module's docstring. ``closed``: nothing is saved here any more."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.closed = False
        self._draining: asyncio.Task[Drained] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- leaving ------------------------------------------------------------------------------------------------------

    async def drain(self, seconds: float, to_peers: bool = True) -> Drained:
        """Hand over, within ``seconds``. Who calls while that is under way gets the same answer."""
        if self._draining is None:
            self._draining = self._spawn(self._drain(seconds, to_peers))
        return await asyncio.shield(self._draining)

    def leave_soon(self, seconds: float, keep_arena: bool = False, tell: Callable[[Drained], None] | None = None) -> None:
        """Hand over, ``tell`` what came of it, and end the node."""

        async def leave() -> None:
            try:
                drained = await self.drain(seconds)
                if tell is not None:
                    tell(drained)
            finally:
                self._node.stop_soon(unlink=not keep_arena)

        self._spawn(leave())

    async def close(self) -> None:
        """The node ends: what is under way is given up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drain(self, seconds: float, to_peers: bool) -> Drained:
        began = time.monotonic()
        end = began + max(0.0, seconds)
        await self._quiet(began + seconds * LEAVE_SHARE)
        self.closed = True
        while self._saves()[1] and time.monotonic() < began + seconds / 2:
            await asyncio.sleep(LOOK_SECONDS)  # slots that were reserved before: their blocks are ours yet
        tiers = self._node.memory.tiers
        # For reads that are on their way here when the last block has moved.
        linger = min(2 * self._node.settings.lookup_seconds, seconds / 4) if to_peers and self._peers() else 0.0
        share = PEERS_SHARE if tiers.enabled else 1.0
        moved, rest = 0, self._held()
        if to_peers:
            moved, rest = await self._to_peers(time.monotonic() + share * (end - linger - time.monotonic()))
        kept = await tiers.keep(rest, end - linger) if tiers.enabled and rest else 0
        if moved:
            await asyncio.sleep(max(0.0, min(linger, end - time.monotonic())))
        drained = Drained(0, moved, kept, len(rest) - kept, time.monotonic() - began)
        self._say(drained)
        return drained

    async def _quiet(self, deadline: float) -> None:
        """Until engines have saved what they had queued, if there are any."""
        seen, since = self._saves(), time.monotonic()
        while self._engines() and time.monotonic() < min(deadline, since + QUIET_SECONDS):
            await asyncio.sleep(LOOK_SECONDS)
            if (now := self._saves()) != seen or now[1]:
                seen, since = now, time.monotonic()

    def _engines(self) -> bool:
        return any(session.engine for session in self._node.sessions.values())

    def _saves(self) -> tuple[int, int]:
        """Blocks saved so far, and slots that are being written."""
        counters = [store.counters for store in self._node.memory.stores.values()]
        return sum(each["stored"] for each in counters), sum(each["reserved_slots"] for each in counters)

    def _peers(self) -> bool:
        """Is there anybody who could take something?"""
        peers = self._node.memory.peers.values()
        return self._node.link.connected and any(not peer.is_engine and peer.node != self._node.name for peer in peers)

    async def _to_peers(self, deadline: float) -> tuple[int, list[bytes]]:
        """Have peers take what they can. Returns how many blocks they took, and the keys that no node that stays has, hottest
        first. More than once if need be: a peer that took some may have died since, and so may the directory."""
        moved, hottest = 0, list[bytes]()
        for _ in range(ROUNDS_MAX):
            seconds = deadline - time.monotonic()
            if not self._peers() or seconds <= 0:
                break
            try:
                left = await self._node.link.leave(self._held(), seconds, seconds + ANSWER_SECONDS)
                moved, hottest = moved + left.moved, left.hottest
                if left.interrupted:
                    await self._directory_back(deadline)
                    continue
                rest = await self._only_here(hottest)
                # Others may have begun to leave, and were counted on: then there are more than the directory spoke of.
                more = left.all_told and not set(rest) <= set(hottest)
                if not rest or not (left.moved or more):
                    break
            except Unavailable as error:
                log.info("kvshare: handing over is interrupted: %s", error)
                await self._directory_back(deadline)
        rest = await self._only_here(hottest)
        return min(moved, len(self._held()) - len(rest)), rest  # what a peer took with it when it died has not moved

    async def _directory_back(self, deadline: float) -> None:
        """Until there is a directory again, and its nodes are back too; or until ``deadline``."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._node.link.ready()
                await asyncio.sleep(RETURN_SECONDS)
        except TimeoutError:
            pass

    def _held(self) -> list[bytes]:
        return list(dict.fromkeys(block.key for block in self._node.memory.inventory()))

    async def _only_here(self, hottest: list[bytes]) -> list[bytes]:
        """Keys of the blocks that no node that stays has, as far as anybody knows, ``hottest`` first."""
        held = self._held()
        here = set(held)
        ordered = list(dict.fromkeys([*(key for key in hottest if key in here), *held]))
        rest: list[bytes] = []
        for start in range(0, len(ordered), FIND_KEYS):
            wanted = ordered[start : start + FIND_KEYS]
            found = await self._node.link.find(wanted, FIND_SECONDS)
            rest += [key for key, where in zip(wanted, found, strict=True) if not where]
        return rest

    def _say(self, drained: Drained) -> None:
        line = "kvshare: handed over in %.1f s: %d blocks moved to peers, %d kept on disk or in the object store"
        log.info(line, drained.seconds, drained.moved, drained.kept)
        if drained.lost:
            remedy = "give the slow tier more room or 'drain_seconds' more time"
            if not self._node.memory.tiers.enabled:
                remedy = "set 'disk_dir' or 'object_url' to keep what peers have no room for"
            log.warning("kvshare: %d blocks are nowhere but in this node's memory: %s", drained.lost, remedy)

    # --- taking -------------------------------------------------------------------------------------------------------

    def take(self, take: Take, answer: Answer) -> None:
        """Begin to take what a node that leaves has; answered in any case."""
        if self.closed or len(self._tasks) >= TAKES_MAX * len(self._node.link):
            answer(Taken(take.ask))
        else:
            self._spawn(self._take(take, answer))

    async def _take(self, take: Take, answer: Answer) -> None:
        try:
            await self._node.warmer.take(take.items, take.seconds)
        except (KVShareError, OSError) as error:
            log.info("kvshare: blocks of a node that leaves were not taken: %s", error)
        finally:
            answer(Taken(take.ask))

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
