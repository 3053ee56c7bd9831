"""Where keys are, for one who asks: the best places first, and none that he may not have or that is not here.

    base     by number of place: how good it is for whoever stands elsewhere      255: nobody is sent there
    ranks    by asker: the same, his own host's a little better, his own places never

| rank | | |
|---|---|---|
| 0, 1 | memory | of the asker's host, of another |
| 2, 3 | disk | of the asker's host, of another |
| 4 to 7 | the same four | of a node that leaves |

Of a block that a node has which stays, no place is told that leaves. To a node that leaves only places that stay are told:
nodes, no engines. Ranks are made once for each asker and thrown away together, when somebody comes, goes, begins to leave or
has new places.

A part of `kvshare.directory`. Threads: none; one caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare.index import RANK_NEVER, Index
from kvshare.leaving import Leavings
from kvshare.members import Members
from kvshare.places import DISK, NodeDescription
from kvshare.runs import COLUMN_GENERATION, COLUMN_PLACE, COLUMN_SLOT, Keys, Place, Places, count_of

FIND_KEYS_MAX = 1 << 16  # answered in one message; the rest is said to be unknown
FOUND_LOCATIONS_MAX = 3
RANK_MEMORY, RANK_DISK, RANK_LEAVING = 1, 3, 4  # the last one on top

U8 = npt.NDArray[np.uint8]


class Finder:
    """See the module's docstring. Index, members and who leaves are the directory's."""

    def __init__(self, index: Index, members: Members, leavings: Leavings) -> None:
        self._index = index
        self._members = members
        self._leavings = leavings
        self._places: Sequence[Place | None] | None = None  # that the ranks below are for
        self._base = np.empty(0, np.uint8)
        self._hosts = np.empty(0, np.int32)
        self._passing = np.empty(0, np.bool_)  # not to be told to one who leaves
        self._host_numbers: dict[str, int] = {}
        self._own: dict[str, list[int]] = {}  # numbers of a node's places
        self._ranks: dict[str, U8] = {}  # by asker

    def changed(self) -> None:
        """Somebody came, went, was described anew, or begins to leave."""
        self._places = None

    def find(self, asker: NodeDescription, wanted: Sequence[Keys]) -> Places:
        """Where these are; what lies beyond the answer is unknown. Well-formed keys."""
        found = self._find(asker, _first(wanted, FIND_KEYS_MAX))
        return self._without_leaving(found) if self._leavings else found

    def _find(self, asker: NodeDescription, wanted: Sequence[Keys]) -> Places:
        ranks = self.ranks(asker)
        told = [self._members.may_hold(asker, keys.prefix) for keys in wanted]
        if all(told):
            return self._index.find(wanted, ranks, FOUND_LOCATIONS_MAX)
        found = self._index.find([keys for keys, may in zip(wanted, told, strict=True) if may], ranks, FOUND_LOCATIONS_MAX)
        counts, start = bytearray(), 0
        for keys, may in zip(wanted, told, strict=True):
            if may:
                counts += found.counts[start : start + len(keys)]
                start += len(keys)
            else:
                counts += bytes(len(keys))
        return msgspec.structs.replace(found, counts=bytes(counts))

    def ranks(self, asker: NodeDescription) -> U8:
        """How good each place of the index is for him: uint8, see the module's docstring."""
        places = self._index.places()
        if places is not self._places:
            self._look(places)
        ranks = self._ranks.get(asker.node)
        if ranks is None:
            near = self._hosts == self._host_numbers.get(asker.host_id, -1)
            ranks = self._base - near.astype(np.uint8) * (self._base != RANK_NEVER)
            ranks[self._own.get(asker.node, [])] = RANK_NEVER
            if asker.node in self._leavings:
                ranks[self._passing] = RANK_NEVER
            self._ranks[asker.node] = ranks
        return ranks

    def _without_leaving(self, found: Places) -> Places:
        """Nobody is sent to who leaves for what a node has that stays."""
        names = [place.node for place in found.places]
        leaves = np.array([self._leavings.leaves_with(name) for name in names], np.bool_)
        keeps = np.array([not self._members.description(name).is_engine for name in names], np.bool_) & ~leaves
        if not (leaves.any() and keeps.any()):
            return found
        place, counts = np.frombuffer(found.place, COLUMN_PLACE), np.frombuffer(found.counts, np.uint8)
        owners = np.repeat(np.arange(len(counts)), counts)
        kept = np.zeros(len(counts), np.bool_)
        kept[owners[keeps[place]]] = True
        told = ~(leaves[place] & kept[owners])
        return Places(
            found.places,
            np.bincount(owners[told], minlength=len(counts)).astype(np.uint8).tobytes(),
            place[told].tobytes(),
            np.frombuffer(found.slots, COLUMN_SLOT)[told].tobytes(),
            np.frombuffer(found.generations, COLUMN_GENERATION)[told].tobytes(),
            np.frombuffer(found.expires, COLUMN_SLOT)[told].tobytes() if found.expires else b"",
        )

    def _look(self, places: Sequence[Place | None]) -> None:
        """Rank all places anew."""
        self._ranks.clear()
        self._host_numbers.clear()
        self._own.clear()
        base = np.full(len(places), RANK_NEVER, np.uint8)
        hosts = np.full(len(places), -1, np.int32)
        passing = np.zeros(len(places), np.bool_)
        for number, place in enumerate(places):
            peer = None if place is None else self._members.nodes.get(place.node)
            if place is None or peer is None or peer.description is None:
                continue
            node = peer.description
            self._own.setdefault(place.node, []).append(number)
            leaves = self._leavings.leaves_with(place.node)
            base[number] = (RANK_DISK if node.kind_of(place.region) == DISK else RANK_MEMORY) + RANK_LEAVING * leaves
            hosts[number] = self._host_numbers.setdefault(node.host_id, len(self._host_numbers))
            passing[number] = leaves or node.is_engine
        self._base, self._hosts, self._passing, self._places = base, hosts, passing, places


def _first(wanted: Sequence[Keys], keys_max: int) -> Sequence[Keys]:
    """The first ``keys_max`` of these keys."""
    if count_of(wanted) <= keys_max:
        return wanted
    first, room = [], keys_max
    for keys in wanted:
        first.append(msgspec.structs.replace(keys, hashes=keys.hashes[: room * keys.hash_bytes]))
        room -= len(first[-1])
        if not room:
            break
    return first
