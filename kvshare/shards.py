"""The directory as a node sees it: K shards, each a `DirectoryLink`, each for the keys that belong to it.

    changed, looked, find, plan, leave ──split by key──> shard 0 .. shard K-1 ──joined again──> one answer
    declare, purge ────────────────────────────────────> shard 0

A shard that is away or silent: its keys are unknown, and what others know is answered all the same; it is told everything when
it comes back. A peer is here while any shard that we are connected to lists it; where none is connected, as was last heard.

Threads: all on the node's loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvshare.cluster_messages import AskPlan, AskPurge, Declare, Declared, Find, Leave, Left, Plan, PurgeDone
from kvshare.config import Settings
from kvshare.errors import Unavailable
from kvshare.fingerprints import index_seed, shard_of
from kvshare.keys import KEY_BYTES_MAX, PREFIX_BYTES, Namespace
from kvshare.leaving import HOTTEST_MAX
from kvshare.link import DirectoryLink, Member
from kvshare.places import Location, NodeDescription, Stored, WarmItem
from kvshare.purge import PurgeScope
from kvshare.runs import COLUMN_SLOT, Keys, Seen, keys_of

LEAVE_KEYS_MAX = 1 << 14  # of one message
READY_SECONDS = 5.0  # waited for the other shards when one is ready

T = TypeVar("T")


@dataclass(frozen=True)
class Handed:
    """What came of a `Shards.leave`. moved: blocks that others took. hottest: of the others, hottest first; ``all_told``: there
    are no more. interrupted: a shard was lost on the way."""

    moved: int
    hottest: list[bytes]
    all_told: bool
    interrupted: bool


class Shards:
    """See the module's docstring. resolve: the "host:port" of a shard by its number, "" while there is none; called in
    threads."""

    def __init__(self, settings: Settings, member: Member, resolve: Callable[[int], str], shards: int = 1) -> None:
        assert shards >= 1
        self._member = member
        self._seed = index_seed(settings.secret)
        self._known: dict[str, NodeDescription] = {}
        self._links = [
            DirectoryLink(settings, member, lambda shard=shard: resolve(shard), self._listed, shard, shards)  # type: ignore[misc]
            for shard in range(shards)
        ]

    def __len__(self) -> int:
        return len(self._links)

    @property
    def connected(self) -> bool:
        """Is any shard there?"""
        return any(link.connected for link in self._links)

    @property
    def endpoint(self) -> str:
        """Of all shards, in order; empty while none is there."""
        return ",".join(link.endpoint or "away" for link in self._links) if self.connected else ""

    @property
    def counters(self) -> dict[str, int]:
        return dict(
            sum((Counter(link.counters) for link in self._links), Counter({name: 0 for name in self._links[0].counters}))
        )

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for link in self._links:
                group.create_task(link.run())

    async def ready(self) -> None:
        """Returns when the directory can answer for the cluster and knows what we hold. Shards that are away are waited for for
        a moment only."""
        waiting = [asyncio.ensure_future(link.until_ready()) for link in self._links]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(waiting, timeout=READY_SECONDS)
        finally:
            for each in waiting:
                each.cancel()

    # --- telling ------------------------------------------------------------------------------------------------------

    def described(self) -> None:
        """Our description changed (a new region)."""
        for link in self._links:
            link.described()

    def changed(self, stored: Iterable[Stored], removed: Iterable[bytes]) -> None:
        """These blocks came, those went; told within ``publish_seconds``."""
        if len(self._links) == 1:
            self._links[0].changed(stored, removed)
            return
        came, gone = list(stored), list(removed)
        to_store = self._split([block.key for block in came])
        to_remove = self._split(gone)
        for link, some, others in zip(self._links, to_store, to_remove, strict=True):
            if len(some) or len(others):
                link.changed([came[i] for i in some.tolist()], [gone[i] for i in others.tolist()])

    def looked(self, chain: list[bytes]) -> None:
        """An engine looked up this chain."""
        packed = keys_of(chain)
        if len(packed) != 1 or not packed[0].well_formed():
            return  # empty, or no chain: that has one prefix
        if len(self._links) == 1:
            self._links[0].looked(Seen(packed[0]))
            return
        for link, positions in zip(self._links, self._split(chain), strict=True):
            if len(positions):
                link.looked(_seen_of(packed[0], positions))

    async def settle(self, seconds: float) -> None:
        """Return when all shards that are there know what has changed, or can't be told."""
        await self._all([link.ask_behind(lambda ask: [Find(ask, [])], seconds) for link in self._links if link.connected])

    # --- asking -------------------------------------------------------------------------------------------------------

    async def find(self, keys: Sequence[bytes], seconds: float) -> list[list[Location]]:
        """Where each of these keys is, best first; no locations where nobody knows, or who does is away or silent."""
        packed = keys_of(keys)
        found: list[list[Location]] = [[] for _ in keys]
        if not all(each.well_formed() for each in packed):
            return found  # whoever asks this has no keys of ours
        if len(self._links) == 1:
            told = (await self._links[0].find(packed, seconds)).locations()
            found[: len(told)] = told[: len(found)]
            return found
        links, parts, questions = [], [], []
        for link, positions in zip(self._links, self._split(keys), strict=True):
            if len(positions):
                links.append(link)
                parts.append(positions.tolist())
                questions.append(keys_of([keys[i] for i in parts[-1]]))
        answers = await asyncio.gather(*(link.find(question, seconds) for link, question in zip(links, questions, strict=True)))
        for part, answer in zip(parts, answers, strict=True):
            for position, places in zip(part, answer.locations(), strict=False):
                found[position] = places
        return found

    async def plan(
        self,
        family: bytes,
        tenant: bytes,
        bytes_max: int,
        seconds_max: float,
        group: bool,
        rates: dict[str, float],
        patience_seconds: float,
    ) -> Plan:
        """What to pull to be warm: the shards' plans, this tenant's first, hottest first as far as can be told. ``group``: take
        part in one, if the directory is one shard. rates: bytes per second of the nodes that we have read from. Raises
        Unavailable when no shard answers."""
        links = [link for link in self._links if link.connected]
        alone, share = len(self._links) == 1, max(1, len(links))

        def question(ask: int) -> AskPlan:
            return AskPlan(ask, family, tenant, bytes_max // share, seconds_max / share, group and alone, rates)

        answers = await self._some([link.ask(question, patience_seconds) for link in links], Plan)
        if alone:
            return answers[0]
        return Plan(0, _interleaved([answer.items for answer in answers]), sum(answer.present for answer in answers), None)

    async def leave(self, keys: Sequence[bytes], seconds: float, patience_seconds: float) -> Handed:
        """Have what only we hold of ``keys`` taken by others. Raises Unavailable when no shard answers."""
        links, questions = [], []
        for link, positions in zip(self._links, self._split(keys), strict=True):
            if link.connected:
                links.append(link)
                questions.append([keys[i] for i in positions.tolist()] if len(self._links) > 1 else list(keys))
        asked = [
            link.ask_behind(lambda ask, own=own: _leave_messages(ask, seconds, own), patience_seconds)  # type: ignore[misc]
            for link, own in zip(links, questions, strict=True)
        ]
        answers = await self._some(asked, Left)
        return Handed(
            sum(left.moved for left in answers),
            _interleaved([left.hottest for left in answers]),
            all(len(left.hottest) < HOTTEST_MAX for left in answers),
            len(answers) < len(links),
        )

    async def declare(self, namespace: Namespace, seconds: float) -> list[Namespace]:
        """Namespaces of other engines, the nearest first. Raises Unavailable."""
        answer = await self._links[0].ask(lambda ask: Declare(ask, namespace), seconds)
        assert isinstance(answer, Declared)
        return answer.others

    async def purge(self, scope: PurgeScope, destroy_key: bool, seconds: float) -> PurgeDone:
        """Have all nodes give up what ``scope`` names. Raises Unavailable."""
        answer = await self._links[0].ask(lambda ask: AskPurge(ask, scope, destroy_key), seconds)
        assert isinstance(answer, PurgeDone)
        return answer

    # --- parts --------------------------------------------------------------------------------------------------------

    def _split(self, keys: Sequence[bytes]) -> list[npt.NDArray[np.intp]]:
        """For each shard the positions of its keys, ascending. An engine may tell nonsense: what is no key belongs to none."""
        packed, positions = keys_of(keys), np.arange(len(keys))
        if not all(each.well_formed() for each in packed):
            proper = [i for i, key in enumerate(keys) if PREFIX_BYTES < len(key) <= KEY_BYTES_MAX]
            packed, positions = keys_of([keys[i] for i in proper]), np.array(proper, np.intp)
        owners = shard_of(packed, self._seed, len(self._links))
        return [positions[owners == shard] for shard in range(len(self._links))]

    def _listed(self, names: Iterable[str] | None) -> None:
        """What shards list of these names, or of any, has changed. One that lags behind names an earlier start, or fewer
        regions."""
        here = [link for link in self._links if link.welcomed]
        if not here:
            return
        for name in {*self._known, *chain(*(link.nodes for link in here))} if names is None else names:
            listed = [link.nodes[name] for link in here if name in link.nodes]
            known = self._known.get(name)
            if not listed:
                if known is not None:
                    del self._known[name]
                    self._member.on_lost(name)
                continue
            latest = max(listed, key=lambda node: (node.epoch, len(node.regions)))
            if known is None or (latest != known and latest.epoch >= known.epoch):
                self._known[name] = latest
                self._member.on_joined(latest)

    async def _some(self, questions: Sequence[Coroutine[Any, Any, Any]], kind: type[T]) -> list[T]:
        """The answers that came. Raises Unavailable when there are none."""
        if not questions:
            raise Unavailable("no directory")
        answers = await self._all(questions)
        given = [answer for answer in answers if isinstance(answer, kind)]
        if not given:
            raise next(answer for answer in answers if isinstance(answer, Unavailable))
        return given

    @staticmethod
    async def _all(questions: Sequence[Awaitable[Any]]) -> list[Any]:
        """Their answers, or that they are unavailable."""
        answers = await asyncio.gather(*questions, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Unavailable):
                raise answer
        return answers


def _seen_of(keys: Keys, positions: npt.NDArray[np.intp]) -> Seen:
    """What a shard is told of a chain of which it has the keys at these positions."""
    hashes = np.frombuffer(keys.hashes, np.uint8).reshape(-1, keys.hash_bytes)
    own = Keys(keys.prefix, keys.hash_bytes, hashes[positions].tobytes())
    return Seen(own, positions.astype(COLUMN_SLOT).tobytes())


def _leave_messages(ask: int, seconds: float, keys: Sequence[bytes]) -> Iterator[Leave]:
    for start in range(0, max(1, len(keys)), LEAVE_KEYS_MAX):
        piece = keys[start : start + LEAVE_KEYS_MAX]
        yield Leave(ask, seconds, keys_of(piece), start + LEAVE_KEYS_MAX < len(keys))


Hot = TypeVar("Hot", bytes, WarmItem)


def _interleaved(ranked: Sequence[Sequence[Hot]]) -> list[Hot]:
    """The first of each, then the second of each, and so on: keys are spread over shards by chance, so equal ranks are about
    equally hot, and what is cut off at the end is about the same everywhere."""
    return [item for item in chain.from_iterable(zip_longest(*ranked)) if item is not None]
