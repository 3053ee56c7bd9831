"""Which blocks a joining node should pull, and from whom: a pure function of what is hot and who holds it.

    hottest first ──> held by the asking node?  ──yes──> present
                  ──> the block before it held or planned?  ──no──> of no use, skipped
                  ──> donors that are reachable and have time left  ──none──> skipped, and what follows it
                  ──> the donor that is done with it first gives it

The plan is prefix-closed: whatever it is cut to (bytes, seconds, a donor's death), each block in it can be used as soon as
those before it are there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvshare.hotness import NO_PARENT, HotKey
from kvshare.places import Location, WarmItem

# What a plan assumes of a donor that nobody has measured. Being wrong by a factor only makes a plan too short or lets it be cut
# by the node's own deadline.
DONOR_BYTES_PER_SECOND = 1 << 30


@dataclass(frozen=True)
class WarmPlan:
    """``items`` hottest first; ``present`` more hot blocks are on the asking node; ``seconds`` of work for each donor."""

    items: list[WarmItem]
    present: int
    seconds: dict[str, float]


def plan_warm(
    ranked: Iterable[HotKey],
    holds: Callable[[bytes], bool],
    locate: Callable[[bytes], Sequence[Location]],
    reachable: Callable[[str], bool],
    bytes_max: int,
    seconds_max: float,
    busy: Mapping[str, float] | None = None,
    rates: Mapping[str, float] | None = None,
) -> WarmPlan:
    """Plan for one node.

    ranked: a prefix-closed ranking, hottest first. holds: does the asking node hold this block? locate: where others do.
    reachable: is this node alive and can the asking node read from it? busy: seconds of work that donors have been given by
    other plans; it spreads the load and takes nothing from this plan's time. rates: bytes per second of the donors that have
    been measured, positive. The plan ends before the first block that would take it over ``bytes_max``, and gives no donor more
    than ``seconds_max`` of work.
    """
    usable = {NO_PARENT}
    items: list[WarmItem] = []
    seconds: dict[str, float] = {}
    busy, rates = busy or {}, rates or {}
    present = planned_bytes = 0

    for key, parent in ranked:
        if parent not in usable or key in usable:
            continue
        if holds(key):
            present += 1
            usable.add(key)
            continue
        chosen, work, earliest = None, 0.0, math.inf
        for where in locate(key):
            name = where.node
            given = seconds.get(name, 0.0) + where.length / rates.get(name, DONOR_BYTES_PER_SECOND)
            done = given + busy.get(name, 0.0)
            # The first of equals: locate names the freshest first.
            if done < earliest and given <= seconds_max and reachable(name):
                chosen, work, earliest = where, given, done
        if chosen is None:
            continue
        if planned_bytes + chosen.length > bytes_max:
            break
        planned_bytes += chosen.length
        seconds[chosen.node] = work
        items.append(WarmItem(key, chosen))
        usable.add(key)
    return WarmPlan(items, present, seconds)


def plan_group(
    ranked: Sequence[HotKey],
    held: Sequence[Container[bytes]],
    locate: Callable[[bytes], Sequence[Location]],
    bytes_max: int,
    seconds_max: float,
    busy: Mapping[str, float] | None = None,
    rates: Mapping[str, float] | None = None,
) -> WarmPlan:
    """Plan for several nodes at once: all items lie in one region of one donor, the one that has most, and have one length.

    held: what each of the nodes holds; only what all of them hold is left out. locate: where donors have a block from which
    all of the nodes can be served. Others as `plan_warm`; empty when no donor has anything.
    """

    def all_hold(key: bytes) -> bool:
        return all(key in keys for keys in held)

    busy = busy or {}
    blocks = Counter(_lot(where) for key, _ in ranked if not all_hold(key) for where in locate(key))
    if not blocks:
        return WarmPlan([], 0, {})
    lot = max(blocks, key=lambda lot: (blocks[lot], -busy.get(lot[0], 0.0)))

    def in_lot(key: bytes) -> list[Location]:
        return [where for where in locate(key) if _lot(where) == lot]

    return plan_warm(ranked, all_hold, in_lot, lambda _: True, bytes_max, seconds_max, busy, rates)


def _lot(where: Location) -> tuple[str, int, int]:
    """Locations of one lot can be given by one broadcast."""
    return where.node, where.region, where.length
