"""A node's part in purges: what a scope names goes, from memory and disk, and nothing of it can be read afterwards.

    session ── Purge ──> ask ── AskPurge ──> directory ── Erase ──> every node: begin
                                                       <── Erased ── arena, disk, engines' exposed blocks, the tenant's key
                         then the object store, which all share  <── PurgeDone

What the order is for:

1. `begin` bars the scope at once, before anything else is said or answered: nothing is reserved, told or found of it any more.
2. Slots are retired in slices, so that the loop goes on: whoever was told a location finds another generation.
3. Their bytes are overwritten, and those of free slots that were ever written to, in a thread. A slot that somebody may be
   writing to is overwritten when it has rested.
4. The directory hears of all removals before it hears that we are done.
5. The scope stays barred for `BARRED_SECONDS` more: blocks that were on their way, from a node whose turn came later, into an
   engine and out of it again, are not saved. From then on new blocks of the scope are welcome.

What engines hold in their own KV caches is theirs: it is no longer told of, nobody but the engine may read it any more, and it
goes as vLLM reuses it.

Threads: all on the node's loop; bytes are overwritten in its pool.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from kvshare.cluster_messages import Erase, Erased
from kvshare.errors import KVShareError, Unavailable
from kvshare.keys import tenant_tag
from kvshare.link import Answer
from kvshare.messages import Purge, Purged, Withdraw
from kvshare.purge import ARENA, ENGINES, Matches, NodePurge, PurgeScope, TierPurge, added_up
from kvshare.purge_rounds import GATHER_SECONDS, REMEMBERED_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvshare.node import Node
    from kvshare.store import Store

log = logging.getLogger("kvshare")

BARRED_SECONDS = 10.0  # longer than a transfer, a step of an engine and the save behind it take
SLICE_BLOCKS = 2048  # looked at and given up between two turns of the loop: about 5 ms
CLEAN_BYTES = 256 << 20  # overwritten by one call
DIRECTORY_SECONDS = GATHER_SECONDS + 5.0
SETTLE_SECONDS = 2.0


class Punched(Protocol):
    """A region whose slots can be overwritten."""

    slot_bytes: int

    def punch(self, slots: Sequence[int]) -> None: ...


async def purge_store(store: Store, region: Punched, matches: Matches, told: Callable[[], None]) -> tuple[int, int]:
    """Take what matches out of a store, and its bytes out of the region. ``told()`` is called whenever some have left. Returns
    blocks and the sum of their lengths. New ones must be barred. Raises as `clean_store`: then all is out but its bytes."""
    store.begin_purge(matches, time.monotonic())
    blocks = bytes_ = 0
    inventory = store.inventory()
    while looked_at := list(islice(inventory, SLICE_BLOCKS)):
        going = [block for block in looked_at if matches(block.key)]
        if going:
            store.purge([block.key for block in going])
            blocks, bytes_ = blocks + len(going), bytes_ + sum(block.length for block in going)
            told()
        await asyncio.sleep(0)
    store.end_purge()
    await clean_store(store, region)
    return blocks, bytes_


async def clean_store(store: Store, region: Punched) -> None:
    """Fill what is soiled with zeros, and give it back. Raises KVShareError, OSError: the medium fails; it stays soiled."""
    step = max(1, CLEAN_BYTES // region.slot_bytes)
    while True:
        slots = store.soiled.take(step)
        try:
            await asyncio.to_thread(region.punch, slots)  # of none too: a disk's table is to be as it is in memory
        except (KVShareError, OSError):
            store.soiled.again(slots)
            raise
        store.cleaned(slots)
        if not slots:
            return


class Purger:
    """See the module's docstring."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._one = asyncio.Lock()
        self._done: OrderedDict[int, NodePurge] = OrderedDict()  # by the directory's number
        self._begun: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self.counters = {"purges": 0, "purged_blocks": 0}

    # --- asked by a session -------------------------------------------------------------------------------------------

    async def ask(self, message: Purge) -> Purged:
        """Purge the cluster, or this node if it is alone; afterwards the object store."""
        scope, destroy_key = message.scope, message.destroy_key
        if destroy_key and not scope.tenant:
            return Purged(message.ask, [], ["keys belong to tenants: name one to destroy its key, nothing was purged"])
        nodes: list[NodePurge] = []
        silent: list[str] = []
        if self._node.clustered:
            try:
                answer = await self._node.link.purge(scope, destroy_key, DIRECTORY_SECONDS)
                nodes = list(answer.nodes)
                silent = [f"node {name} did not answer: it is asked again when it is back" for name in answer.silent]
            except Unavailable as error:
                silent = [f"the directory did not answer ({error}): only this node was purged; run it again when it is back"]
        if self._node.name not in [node.node for node in nodes]:
            nodes.append(await self._carry_out(scope, destroy_key, self._bar(scope)))
        if self._node.settings.object_url:
            nodes = [await self._with_objects(node, scope) if node.node == self._node.name else node for node in nodes]
        return Purged(message.ask, nodes, silent)

    async def _with_objects(self, ours: NodePurge, scope: PurgeScope) -> NodePurge:
        """What the object store has goes when no node can bring it back: the one that was asked does it for all."""
        matches = self._bar(scope)
        tiers, faults = list(ours.tiers), list(ours.faults)
        try:
            async with self._one:
                await self._try(faults, "the object store", self._purge_tiers(matches, True, tiers))
        finally:
            self._open_later(matches)
        return NodePurge(ours.node, [tier for tier in added_up(tiers) if tier.blocks], faults, ours.key_destroyed)

    # --- asked by the directory ---------------------------------------------------------------------------------------

    def begin(self, erase: Erase, answer: Answer) -> None:
        """Bar the scope now, and do the rest soon. What is done already is only answered again."""
        if erase.number in self._done:
            answer(Erased(erase.number, self._done[erase.number]))
        elif erase.number not in self._begun:
            self._begun.add(erase.number)
            self._spawn(self._obey(erase, self._bar(erase.scope), answer))

    async def _obey(self, erase: Erase, matches: Matches, answer: Answer) -> None:
        try:
            self._done[erase.number] = await self._carry_out(erase.scope, erase.destroy_key, matches)
        finally:
            self._begun.discard(erase.number)
        if len(self._done) > REMEMBERED_MAX:
            self._done.popitem(last=False)
        await self._node.link.settle(SETTLE_SECONDS)
        answer(Erased(erase.number, self._done[erase.number]))

    # --- doing it -----------------------------------------------------------------------------------------------------

    async def enforce(self) -> None:
        """Erase what former settings let into the arenas and the tenants' regions do not."""
        for number, store in list(self._node.memory.stores.items()):
            await clean_store(store, self._node.memory.arenas[number])

    async def close(self) -> None:
        """When this returns nothing is overwritten any more, but what a disk that does not answer holds up."""
        for timer in self._timers:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_out(self, scope: PurgeScope, destroy_key: bool, matches: Matches) -> NodePurge:
        began = time.monotonic()
        tiers: list[TierPurge] = []
        faults: list[str] = []
        destroyed: list[bool] = []
        try:
            async with self._one:
                if destroy_key:
                    # First: what a disk that fails does not erase cannot be read either.
                    work = self._destroy_key(tenant_tag(scope.tenant), destroyed)
                    await self._try(faults, "whoever has the tenant's key", work)
                await self._try(faults, "memory", self._purge_memory(matches, tiers))
                await self._try(faults, "the disk", self._purge_tiers(matches, False, tiers))
        finally:
            self._open_later(matches)
        self._later(self._node.settings.quarantine_seconds + 0.1, lambda: self._spawn(self._clean_rested()))
        blocks = sum(tier.blocks for tier in tiers)
        self.counters["purges"] += 1
        self.counters["purged_blocks"] += blocks
        log.info("kvshare: purged %s: %d blocks in %.2f s", scope, blocks, time.monotonic() - began)
        return NodePurge(self._node.name, [tier for tier in added_up(tiers) if tier.blocks], faults, any(destroyed))

    async def _try(self, faults: list[str], what: str, work: Awaitable[None]) -> None:
        try:
            await work
        except (KVShareError, OSError) as error:
            faults.append(f"{what} may still hold some of it ({error}): run it again")
            log.warning("kvshare: a purge: %s", faults[-1])
        except Exception as error:
            faults.append(f"{what} may still hold some of it ({type(error).__name__}): see the log of the node")
            log.exception("kvshare: a purge failed by a fault of ours")

    async def _purge_memory(self, matches: Matches, tiers: list[TierPurge]) -> None:
        node, memory = self._node, self._node.memory
        for number, exposed in list(node.exposed.items()):
            gone = exposed.purge(matches)
            if gone and number in node.sessions:
                node.sessions[number].send(Withdraw([block.key for block in gone]))
            tiers.append(TierPurge(ENGINES, len(gone), sum(block.length for block in gone)))
        for number, store in list(memory.stores.items()):
            told = partial(memory.flush, number)
            tiers.append(TierPurge(ARENA, *await purge_store(store, memory.arenas[number], matches, told)))
        for exposed in list(node.exposed.values()):
            await exposed.settle(SETTLE_SECONDS)

    async def _purge_tiers(self, matches: Matches, shared: bool, tiers: list[TierPurge]) -> None:
        tiers += await self._node.memory.tiers.purge(matches, shared)

    async def _destroy_key(self, tenant: bytes, destroyed: list[bool]) -> None:
        destroyed.append(await asyncio.to_thread(self._node.memory.tiers.vault.destroy, tenant))

    def _bar(self, scope: PurgeScope) -> Matches:
        matches = scope.matcher()
        self._node.gate.close(matches)
        self._node.answers.clear()
        return matches

    def _open_later(self, matches: Matches) -> None:
        self._later(BARRED_SECONDS, lambda: self._node.gate.open(matches))

    async def _clean_rested(self) -> None:
        """What somebody may have been writing to at the purge has rested by now."""
        memory = self._node.memory
        async with self._one:
            for number, store in list(memory.stores.items()):
                store.expire(time.monotonic())
                memory.flush(number)
                await clean_store(store, memory.arenas[number])
            if memory.tiers.disk is not None:
                await self._try([], "the disk", memory.tiers.disk.clean())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        def act() -> None:
            self._timers.discard(timer)
            action()

        timer = asyncio.get_running_loop().call_later(seconds, act)
        self._timers.add(timer)
