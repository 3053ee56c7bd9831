"""One load against sources that do what the test says: batches, ends that come early, fences."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvshare import keys
from kvshare.loading import LoadPlan, Measured, Source, SourceRead
from kvshare.places import RegionDescription
from kvshare.pull import FIRST_BYTES, Pull
from kvshare.transport.base import I64, BlockStatus, Completion, ReadRequest, Targets, Transfer

OK, STALE, CORRUPT, CANCELLED = BlockStatus.OK, BlockStatus.STALE, BlockStatus.CORRUPT, BlockStatus.CANCELLED
UNREACHABLE, TIMEOUT = BlockStatus.UNREACHABLE, BlockStatus.TIMEOUT
BLOCK_BYTES = FIRST_BYTES // 4
NEVER, AT_ONCE = 1e6, 1e-9  # seconds
A, B = ("a", "host"), ("b", "host")


@dataclass
class Read:
    """A batch that a source was asked for; the test ends it."""

    node: str
    request: ReadRequest
    transfer: Transfer

    def end(self, *statuses: BlockStatus) -> None:
        """All blocks OK, unless said otherwise."""
        found = np.array(statuses or [OK] * len(self.request), np.uint8)
        moved = int((found == OK).sum()) * BLOCK_BYTES
        self.transfer.complete(Completion(found, moved, 0.0, "said so" if found.any() else ""))


@dataclass
class Mover:
    """Keeps what it is told; `resume` is left to the test, as to a thread that comes later."""

    rates: dict[Source, float] = field(default_factory=dict)
    own: str = ""
    reads: list[Read] = field(default_factory=list)
    slow: list[Measured] = field(default_factory=list)
    quarantined: list[int] = field(default_factory=list)
    missing: list[bytes] = field(default_factory=list)
    resumed: int = 0
    busy: int = 0
    moved: int = 0

    def read(self, description: RegionDescription, request: ReadRequest) -> Transfer:
        transfer = Transfer()
        read = Read(description.node, request, transfer)
        transfer.on_cancel = lambda: read.end(*[CANCELLED] * len(request))
        self.reads.append(read)
        return transfer

    def is_own(self, description: RegionDescription) -> bool:
        return description.node == self.own

    def rate(self, source: Source) -> float:
        return self.rates.get(source, 0.0)

    def began(self, source: Source) -> None:
        self.busy += 1

    def ended(self, source: Source, moved: int) -> None:
        self.busy -= 1
        self.moved += moved

    def gave_up(self, measured: Measured) -> None:
        self.slow.append(measured)

    def corrupt(self, read: SourceRead, blocks: I64) -> None:
        self.quarantined += read.slots[blocks].tolist()

    def missed(self, keys: list[bytes]) -> None:
        self.missing += keys

    def resume(self, pull: Pull) -> None:
        self.resumed += 1

    def sizes(self) -> list[int]:
        return [len(read.request) for read in self.reads]


def plan(blocks: int, seconds: float = 0.0, grace: float = 0.0, nodes: Sequence[str] = ("a",)) -> LoadPlan:
    """Block i is in slot 100 + i of node i modulo their number."""
    reads = []
    for number, node in enumerate(nodes):
        positions = np.arange(number, blocks, len(nodes))
        region = RegionDescription(node, BLOCK_BYTES, BLOCK_BYTES, 1000, "", "", "", "there:1")
        reads.append(SourceRead(region, positions, 100 + positions, positions.astype(np.uint64)))
    prefix = keys.prefix(b"f" * keys.FAMILY_BYTES, keys.variant(b"", ""))
    return LoadPlan(prefix, [i.to_bytes(32, "big") for i in range(blocks)], reads, seconds, grace)


def pull_of(mover: Mover, made: LoadPlan) -> Pull:
    """Nothing is written: the addresses are made up."""
    return Pull(made, Targets.strided(4096, BLOCK_BYTES, np.arange(len(made)), BLOCK_BYTES), 2.0, mover)


def statuses_of(pull: Pull) -> list[int]:
    completion = pull.wait(0)
    assert completion is not None
    return completion.statuses.tolist()


def test_a_load_without_a_limit_is_one_read_of_each_source() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(9, nodes="ab"))
    pull.advance()
    assert [(read.node, read.request.slots.tolist()) for read in mover.reads] == [
        ("a", [100, 102, 104, 106, 108]), ("b", [101, 103, 105, 107]),
    ]  # fmt: skip
    mover.reads[0].end()
    assert pull.wait(0) is None
    mover.reads[1].end(OK, STALE, OK, OK)
    assert statuses_of(pull) == [OK, OK, OK, STALE] + [OK] * 5
    assert mover.busy == 0 and mover.moved == 8 * BLOCK_BYTES and mover.slow == []


def test_what_our_own_node_holds_is_one_read_whatever_the_limit() -> None:
    mover = Mover(own="a")
    pull_of(mover, plan(40, NEVER, NEVER)).advance()
    assert mover.sizes() == [40]


def test_an_unmeasured_source_is_measured_by_its_first_batch() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(40, NEVER, NEVER))
    pull.advance()
    assert mover.sizes() == [4]
    mover.rates[A] = 1e12
    mover.reads[0].end()
    assert mover.resumed == 1
    pull.advance()
    assert mover.sizes() == [4, 36]
    mover.reads[1].end()
    assert statuses_of(pull) == [OK] * 40


def test_a_batch_takes_half_of_what_may_be_spent() -> None:
    mover = Mover(rates={A: 10.0 * BLOCK_BYTES})
    pull = pull_of(mover, plan(1000, NEVER, 10.0))
    pull.advance()
    assert 48 <= mover.sizes()[0] <= 50


def test_a_slow_source_is_read_block_by_block_while_that_pays() -> None:
    mover = Mover(rates={A: 0.1})
    pull = pull_of(mover, plan(3, NEVER, NEVER))
    for _ in range(3):
        pull.advance()
        pull.advance()  # of another source, say: nothing new begins
        mover.reads[-1].end()
    assert mover.sizes() == [1, 1, 1] and statuses_of(pull) == [OK] * 3


def test_a_load_that_does_not_pay_ends_and_keeps_what_has_arrived() -> None:
    mover = Mover(rates={A: BLOCK_BYTES / 10})
    pull = pull_of(mover, plan(3, 1.0, 0.2))
    pull.advance()
    assert mover.sizes() == [1]
    mover.reads[0].end()  # it has saved a third of a second
    pull.advance()
    assert mover.sizes() == [1, 1] and pull.wait(0) is None
    time.sleep(max(0.0, pull.deadline - time.monotonic()) + 0.001)
    pull.advance()
    completion = pull.wait(0)
    assert completion is not None and completion.statuses.tolist() == [OK, CANCELLED, CANCELLED]
    assert "slower than computing" in completion.error and completion.bytes == BLOCK_BYTES
    assert [(one.source, one.bytes, one.slow) for one in mover.slow] == [(A, BLOCK_BYTES, True)]


def test_only_leading_blocks_have_saved_anything() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(8, 8.0, 10.0, nodes="ab"))
    pull.advance()
    before = pull.deadline
    mover.reads[1].end()
    assert pull.deadline == before
    mover.reads[0].end()
    assert pull.deadline == pytest.approx(before + 8.0)


def test_our_own_nodes_part_of_a_late_load_is_not_interrupted() -> None:
    mover = Mover(own="b")
    pull = pull_of(mover, plan(4, 1.0, 0.005, nodes="ab"))
    pull.advance()
    time.sleep(max(0.0, pull.deadline - time.monotonic()) + 0.001)
    pull.advance()
    assert pull.wait(0) is None, "the own part still runs: no fence yet"
    assert not pull.limited, "nobody has to look after it any more"
    mover.reads[1].end()
    assert statuses_of(pull) == [CANCELLED, OK, CANCELLED, OK]
    assert [one.source for one in mover.slow] == [A]


def test_a_load_that_is_late_before_it_begins_reads_nothing() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(4, 1.0, AT_ONCE))
    time.sleep(0.001)
    pull.advance()
    assert mover.reads == [] and statuses_of(pull) == [CANCELLED] * 4


def test_a_peer_that_fails_is_asked_for_no_more() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(10, NEVER, NEVER))
    pull.advance()
    mover.reads[0].end(OK, UNREACHABLE, UNREACHABLE, UNREACHABLE)
    assert mover.sizes() == [4] and statuses_of(pull) == [OK] + [UNREACHABLE] * 9
    assert mover.slow == []


def test_a_peer_that_hangs_is_slow() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(4))
    pull.advance()
    mover.reads[0].end(OK, TIMEOUT, TIMEOUT, TIMEOUT)
    assert [(one.source, one.bytes, one.slow) for one in mover.slow] == [(A, BLOCK_BYTES, True)]


def test_stale_and_corrupt_blocks_do_not_end_the_load_and_corrupt_ones_are_told() -> None:
    mover, nine = Mover(), plan(9, NEVER, NEVER)
    pull, pull_keys = pull_of(mover, nine), nine.keys
    pull.advance()
    mover.reads[0].end(OK, STALE, OK, OK)
    pull.advance()
    mover.reads[1].end(OK, CORRUPT, OK, OK, OK)
    assert mover.quarantined == [105]
    assert mover.missing == [pull_keys[1], pull_keys[5]], "where they were is forgotten"
    assert statuses_of(pull) == [OK, STALE, OK, OK, OK, CORRUPT, OK, OK, OK]


def test_cancelling_ends_what_runs_and_begins_nothing_more() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(9, NEVER, NEVER))
    pull.advance()
    pull.cancel()
    assert statuses_of(pull) == [CANCELLED] * 9
    pull.advance()
    assert mover.sizes() == [4] and mover.slow == [], "nobody was slow"


def test_cancelling_before_the_first_read_completes_at_once() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(8))
    pull.cancel()
    assert statuses_of(pull) == [CANCELLED] * 8
    pull.advance()
    assert mover.reads == []


def test_a_read_begun_while_the_load_is_cancelled_is_cancelled_too() -> None:
    mover = Mover()
    pull = pull_of(mover, plan(4))
    asked: Callable[[RegionDescription, ReadRequest], Transfer] = mover.read

    def read(description: RegionDescription, request: ReadRequest) -> Transfer:
        transfer = asked(description, request)
        other = threading.Thread(target=pull.cancel)
        other.start()
        other.join()
        assert pull.wait(0) is None, "a read is under way: no fence"
        return transfer

    mover.read = read  # type: ignore[method-assign]
    pull.advance()
    assert statuses_of(pull) == [CANCELLED] * 4


@pytest.mark.parametrize("blocks", [0, 5])
def test_a_plan_without_sources_completes(blocks: int) -> None:
    pull = pull_of(Mover(), plan(blocks, nodes=""))
    pull.advance()
    assert statuses_of(pull) == [UNREACHABLE] * blocks


def test_a_plan_that_does_not_fit_its_targets_reads_nothing() -> None:
    mover, made = Mover(), plan(4, nodes="ab")
    pull = Pull(made, Targets.strided(4096, BLOCK_BYTES, np.arange(3), BLOCK_BYTES), 2.0, mover)
    pull.advance()
    assert mover.reads == [] and statuses_of(pull) == [UNREACHABLE] * 4
