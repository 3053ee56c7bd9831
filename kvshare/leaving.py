"""A node that leaves: what only it holds goes to peers with room, hottest first, share by share. The directory's part.

    Leave, Leave .. ─> its keys
    begin ─> the hottest that nobody else keeps ─> Take to a peer with room ─> Taken ─┬─> held there now: moved
                       ^                                                             │
                       └── not held: another peer, at most `TRIES_MAX` times <── silence, loss
    nothing waits and nothing is under way, or the time is over ─> Left

* What counts as kept elsewhere: a node's own memory or disk, of a node that stays. An engine's live cache gives blocks up at
  any time and does not count.
* The index is the truth: a peer publishes what it took before it says `Taken`, so a block is known at its new place before
  anybody is told that it moved. The leaving node answers reads all the while.
* A peer's room is what it said with its last publish, less what is on its way to it. It takes into free room only.
* A peer that took nothing of a share, or did not answer, is given no more. One share after the other goes out, a few at a time
  for each peer: what a slow or dead peer costs is little, and the hottest travel first.

The state of a leaving node lasts until it is gone, so that nobody is sent to it or given its plans meanwhile.

A pure state machine, part of the directory's: time is an argument. Threads: none; one caller.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvshare.cluster_messages import Leave, Left, Take
from kvshare.directory_events import Command, Send
from kvshare.index import RANK_NEVER, Index
from kvshare.places import Location, WarmItem
from kvshare.runs import Place, keys_of

SHARE_BYTES = 32 << 20  # of one Take: fills a wire, and costs little if its peer dies
SHARE_BLOCKS_MAX = 1024
SHARES_MAX = 2  # under way to one peer: it reads one while it publishes the other
SHARE_SECONDS = 5.0
ANSWER_SECONDS = 1.0  # beyond that, for publishing and for the way
TRIES_MAX = 3  # of one block
LEAVE_KEYS_MAX = 1 << 18  # looked at of one node: more than can be moved while it leaves
LOOKED_AT_MAX = 1 << 12  # keys in one go: the directory has others to answer
LOOK_KEYS = 1 << 8  # of these, found at once
PAUSE_SECONDS = 0.001
ASIDE_SECONDS = 0.05  # until those that others of the leaving move are looked at again
HOTTEST_MAX = 1 << 16  # told of what was not taken


@dataclass
class Taker:
    """A peer that may read from the leaving node. ``room``: bytes that are free for more, as far as known."""

    name: str
    connection: int
    room: int


@dataclass
class _Share:
    """Blocks on their way to a taker, which answers until ``deadline``."""

    taker: str
    items: list[WarmItem]
    bytes: int
    deadline: float


@dataclass
class _Leaving:
    """A node that leaves. ``keys``: its blocks that nobody has looked at yet, hottest first; ``again``: those that are to be
    tried (again) before them."""

    connection: int
    ask: int
    deadline: float
    keys: Iterator[bytes]
    again: deque[bytes] = field(default_factory=deque)
    aside: list[bytes] = field(default_factory=list)  # under way from others that leave
    shares: dict[int, _Share] = field(default_factory=dict)
    tries: Counter[bytes] = field(default_factory=Counter)
    useless: set[str] = field(default_factory=set)  # takers that get no more
    left: list[bytes] = field(default_factory=list)  # what nobody takes
    moved: int = 0
    go_on: float | None = None  # when to look at further keys
    over: bool = False


class Leavings:
    """See the module's docstring.

    stays: is this a node, not an engine, whose blocks count as kept? Asked of holders; those that leave are known here. takers:
    who may read from the leaving node of this name. may_hold: may this node have that block?
    """

    def __init__(
        self,
        index: Index,
        stays: Callable[[str], bool],
        takers: Callable[[str], list[Taker]],
        may_hold: Callable[[str, bytes], bool],
    ) -> None:
        self._index = index
        self._stays = stays
        self._takers = takers
        self._may_hold = may_hold
        self._leaving: dict[str, _Leaving] = {}
        self._telling: dict[str, tuple[int, dict[bytes, None]]] = {}  # who says so in several messages: its ask, its keys
        self._asks = itertools.count(1)

    # --- questions ----------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return name in self._leaving

    def __len__(self) -> int:
        return len(self._leaving)

    def deadlines(self) -> Iterator[float]:
        """When `tick` has something to do."""
        for leaving in self._leaving.values():
            if not leaving.over:
                yield leaving.deadline
                yield from (share.deadline for share in leaving.shares.values())
                if leaving.go_on is not None:
                    yield leaving.go_on

    def leaves_with(self, name: str) -> bool:
        """Is this a node that leaves, or an engine of one?"""
        return bool(self._leaving) and name.partition("/")[0] in self._leaving

    def check(self) -> list[str]:
        """Problems found, one sentence each; empty when all is well."""
        problems = []
        for name, leaving in self._leaving.items():
            if leaving.over and (leaving.shares or leaving.again or leaving.aside):
                problems.append(f"{name} has left, and blocks are under way")
            for share in leaving.shares.values():
                if share.taker == name or not 0 < len(share.items) <= SHARE_BLOCKS_MAX:
                    problems.append(f"{share.taker} is given {len(share.items)} blocks of {name}")
        return problems

    # --- events -------------------------------------------------------------------------------------------------------

    def told(self, name: str, leave: Leave) -> list[bytes] | None:
        """One message of a node that leaves. When it is the last one: all the keys that it told, each once, in its order."""
        ask, keys = self._telling.pop(name, (leave.ask, {}))
        if ask != leave.ask:
            keys = {}
        for key in itertools.chain.from_iterable(leave.keys):
            if len(keys) >= LEAVE_KEYS_MAX:
                break
            keys[key] = None
        if not leave.more:
            return list(keys)
        self._telling[name] = leave.ask, keys
        return None

    def begin(self, name: str, connection: int, leave: Leave, keys: Sequence[bytes], now: float) -> list[Command]:
        """A node leaves. ``keys``: what it holds, each once, hottest first."""
        leaving = self._leaving[name] = _Leaving(connection, leave.ask, now + max(0.0, leave.seconds), iter(keys))
        return self._go_on(name, leaving, now)

    def taken(self, taker: str, ask: int, now: float) -> list[Command]:
        """A taker has published what it took. Ignored when nobody waits for that any more."""
        for name, leaving in self._leaving.items():
            share = leaving.shares.get(ask)
            if share is not None and share.taker == taker:
                del leaving.shares[ask]
                missing = self._not_kept([item.key for item in share.items])
                leaving.moved += len(share.items) - len(missing)
                if len(missing) == len(share.items):
                    leaving.useless.add(taker)
                self._try_again(leaving, missing)
                return self._go_on(name, leaving, now)
        return []

    def lose(self, name: str, now: float) -> None:
        """A node is gone: one that left, or one that took."""
        self._leaving.pop(name, None)
        self._telling.pop(name, None)
        for leaving in self._leaving.values():
            shares = [ask for ask, share in leaving.shares.items() if share.taker == name]
            for ask in reversed(shares):
                leaving.again.extendleft(item.key for item in reversed(leaving.shares.pop(ask).items))
            if shares:
                leaving.go_on = now  # with the next tick, that is at once

    def tick(self, now: float) -> list[Command]:
        """Time has passed: takers that are silent get no more, and who has no time left has left."""
        commands: list[Command] = []
        for name, leaving in self._leaving.items():
            if leaving.over:
                continue
            late = [ask for ask, share in leaving.shares.items() if share.deadline <= now]
            for ask in reversed(late):
                share = leaving.shares.pop(ask)
                leaving.useless.add(share.taker)
                self._try_again(leaving, [item.key for item in share.items])
            if late or leaving.deadline <= now or (leaving.go_on is not None and leaving.go_on <= now):
                commands += self._go_on(name, leaving, now)
        return commands

    # --- how ----------------------------------------------------------------------------------------------------------

    def _not_kept(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those that no node that stays has."""
        counts = self._index.find(keys_of(keys), self._ranks(""), 1).counts
        return [key for key, count in zip(keys, counts, strict=True) if not count]

    def _ranks(self, name: str) -> npt.NDArray[np.uint8]:
        """Of all places: first those that keep, then those of the node of this name, no others."""

        def rank(place: Place | None) -> int:
            if place is not None and self._keeps(place.node):
                return 0
            return 1 if place is not None and place.node == name else RANK_NEVER

        places = self._index.places()
        return np.fromiter(map(rank, places), np.uint8, len(places))

    def _keeps(self, name: str) -> bool:
        return name not in self._leaving and self._stays(name)

    def _try_again(self, leaving: _Leaving, keys: Iterable[bytes]) -> None:
        """Before all others: these are hotter. Not for ever."""
        leaving.tries.update(keys)
        for key in reversed(list(keys)):
            if leaving.tries[key] < TRIES_MAX:
                leaving.again.appendleft(key)
            else:
                self._leave_behind(leaving, key)

    def _leave_behind(self, leaving: _Leaving, key: bytes) -> None:
        if len(leaving.left) < HOTTEST_MAX:
            leaving.left.append(key)

    def _go_on(self, name: str, leaving: _Leaving, now: float) -> list[Command]:
        """Give out what can be given out now; the last word when nothing remains to be done."""
        if leaving.over:
            return []
        leaving.go_on = None
        if now >= leaving.deadline:
            return self._finish(leaving)
        leaving.again.extend(leaving.aside)
        leaving.aside.clear()
        commands, exhausted = self._give(name, leaving, now)
        if leaving.aside and leaving.go_on is None:
            leaving.go_on = now + ASIDE_SECONDS
        elif exhausted and not leaving.shares:
            return self._finish(leaving)
        return commands

    def _finish(self, leaving: _Leaving) -> list[Command]:
        taking = [item.key for share in leaving.shares.values() for item in share.items]
        under_way = self._not_kept(taking)
        leaving.moved += len(taking) - len(under_way)  # published before their taker was done with the share
        waiting = itertools.chain(leaving.left, under_way, leaving.again, leaving.aside, leaving.keys)
        left = list(itertools.islice(waiting, HOTTEST_MAX))
        leaving.shares, leaving.left, leaving.over = {}, [], True
        leaving.again.clear()
        leaving.aside.clear()
        leaving.tries.clear()
        leaving.keys = iter(())
        return [Send(leaving.connection, Left(leaving.ask, leaving.moved, left))]

    def _give(self, name: str, leaving: _Leaving, now: float) -> tuple[list[Command], bool]:
        """Shares for takers; and whether all keys have been looked at."""
        takers = [taker for taker in self._takers(name) if taker.name not in leaving.useless | self._leaving.keys()]
        for taker in takers:
            taker.room -= sum(share.bytes for share in self._all_shares() if share.taker == taker.name)
        if not any(taker.room > 0 for taker in takers):
            return [], True
        giving = _Giving(takers, Counter(share.taker for share in leaving.shares.values()), self._may_hold)
        ranks = self._ranks(name)
        moving = {item.key for share in self._all_shares() for item in share.items} if len(self._leaving) > 1 else set()
        exhausted = False
        for _ in range(LOOKED_AT_MAX // LOOK_KEYS):
            keys = _draw(leaving, LOOK_KEYS)
            given = self._give_some(name, leaving, giving, keys, ranks, moving)
            if given < len(keys):
                leaving.again.extendleft(reversed(keys[given:]))  # when a taker is done
                break
            if len(keys) < LOOK_KEYS:
                exhausted = True
                break
        else:
            leaving.go_on = now + PAUSE_SECONDS
        return [self._take(leaving, taker, items, now) for taker, items in giving.shares], exhausted

    def _give_some(
        self,
        name: str,
        leaving: _Leaving,
        giving: _Giving,
        keys: Sequence[bytes],
        ranks: npt.NDArray[np.uint8],
        moving: set[bytes],
    ) -> int:
        """Up to all of these keys, in their order; returns how many: the next one has to wait."""
        found = self._index.find(keys_of(keys), ranks, 1).locations()
        for given, (key, places) in enumerate(zip(keys, found, strict=True)):
            if places and places[0].node != name:
                continue  # kept elsewhere
            if not places:
                self._leave_behind(leaving, key)  # it is not known here, or not any more; its node knows
            elif key in moving:
                leaving.aside.append(key)
            elif (able := giving.give(key, places[0])) is not None:
                if able:
                    return given
                self._leave_behind(leaving, key)
        return len(keys)

    def _take(self, leaving: _Leaving, taker: Taker, items: list[WarmItem], now: float) -> Command:
        ask, seconds = next(self._asks), min(SHARE_SECONDS, leaving.deadline - now)
        size = sum(item.location.length for item in items)
        leaving.shares[ask] = _Share(taker.name, items, size, now + seconds + ANSWER_SECONDS)
        return Send(taker.connection, Take(ask, items, seconds))

    def _all_shares(self) -> Iterator[_Share]:
        return (share for leaving in self._leaving.values() for share in leaving.shares.values())


class _Giving:
    """Blocks are put into shares. ``under_way``: shares by taker, those made here included. ``may_hold``: as `Leavings`."""

    def __init__(self, takers: list[Taker], under_way: Counter[str], may_hold: Callable[[str, bytes], bool]) -> None:
        self._takers = takers
        self._under_way = under_way
        self._may_hold = may_hold
        self.shares: list[tuple[Taker, list[WarmItem]]] = []

    def give(self, key: bytes, where: Location) -> bool | None:
        """Put a block into the last share, or a new one. None: done; True: later, all who could take it have enough to do;
        False: nobody can."""
        if not self.shares or not self._fits(self.shares[-1][0], where, key) or _is_full(self.shares[-1][1], where):
            able = [taker for taker in self._takers if self._fits(taker, where, key)]
            free = [taker for taker in able if self._under_way[taker.name] < SHARES_MAX]
            if not free:
                return bool(able)
            # Who has least to do; of those, who has most room.
            chosen = min(free, key=lambda taker: (self._under_way[taker.name], -taker.room))
            self._under_way[chosen.name] += 1
            self.shares.append((chosen, []))
        taker, items = self.shares[-1]
        taker.room -= where.length
        items.append(WarmItem(key, where))
        return None

    def _fits(self, taker: Taker, where: Location, key: bytes) -> bool:
        return taker.room >= where.length and self._may_hold(taker.name, key)


def _draw(leaving: _Leaving, keys_max: int) -> list[bytes]:
    """The next keys to be looked at."""
    again = [leaving.again.popleft() for _ in range(min(keys_max, len(leaving.again)))]
    return again + list(itertools.islice(leaving.keys, keys_max - len(again)))


def _is_full(items: list[WarmItem], where: Location) -> bool:
    return len(items) >= SHARE_BLOCKS_MAX or (len(items) + 1) * where.length > SHARE_BYTES
