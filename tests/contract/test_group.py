"""Groups: one donor, three joiners, all of them processes that can be killed or stopped; and what needs no process.

Four children do all of it, since each one imports torch. A donor that pauses within a broadcast makes "in the middle" a place.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare import native
from kvshare.device import DeviceTable
from kvshare.errors import AuthenticationError, ConfigError, ProtocolError, RegionError, TransportError, Unavailable
from kvshare.places import GroupPlan
from kvshare.slots import Region
from kvshare.transport import nccl
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets
from kvshare.transport.group import Board, Member, announce
from kvshare.transport.group_frames import HEAD, MAGIC, ROW, Frames, Rows, Shape
from kvshare.transport.group_source import DeviceSource, RegionSource
from kvshare.transport.ranges import page_addresses

from .conftest import SECRET, SLOT_BYTES, write

OK, STALE, CORRUPT = BlockStatus.OK, BlockStatus.STALE, BlockStatus.CORRUPT
UNREACHABLE, TIMEOUT = BlockStatus.UNREACHABLE, BlockStatus.TIMEOUT
BLOCKS, LENGTH = 64, 64 << 10
PORTION_BLOCKS = 8
LIMITS = {"portion_bytes": PORTION_BLOCKS * LENGTH, "seconds": 2.0}
NEVER = 1 << 30
ANSWER_SECONDS = 60  # of a child: no working machine needs it

pytest.importorskip("torch", reason="groups need torch")


class Rank:
    """A child process."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("group_child.py")), SECRET]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )

    def ask(self, do: str, **arguments: Any) -> None:
        self._write(json.dumps({"do": do, **arguments}))

    def go_on(self) -> None:
        self._write("go on")

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([self.process.stdout], [], [], ANSWER_SECONDS)
            assert readable, "a child hangs"
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            assert part, "a child died"
            line += part
        told: dict[str, Any] = json.loads(line)
        return told

    def do(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.ask(do, **arguments)
        return self.answer()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(how)
        if how == signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")


class Fleet:
    """A donor and three joiners; those that a test ended are replaced for the next."""

    def __init__(self) -> None:
        self.ranks = [Rank() for _ in range(4)]
        self.generations: list[int] = []
        self.endpoint = ""

    @property
    def donor(self) -> Rank:
        return self.ranks[0]

    @property
    def joiners(self) -> list[Rank]:
        return self.ranks[1:]

    def begin(self, **limits: Any) -> None:
        """Fresh blocks, and a group of all."""
        for i, rank in enumerate(self.ranks):
            if rank.process.poll() is not None:
                rank.end()
                self.ranks[i] = Rank()
        told = self.donor.do("serve", blocks=BLOCKS, length=LENGTH)
        self.generations, self.endpoint = told["generations"], told["endpoint"]
        plan = self.donor.do("announce", ranks=4, limits={**LIMITS, **limits})["plan"]
        answers = self.all("join", [{"plan": plan, "rank": i, "secret": SECRET} for i in range(4)])
        assert answers == [{}] * 4

    def all(self, do: str, arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for rank, given in zip(self.ranks, arguments, strict=True):
            rank.ask(do, **given)
        return [rank.answer() for rank in self.ranks]

    def start(self, pause_at: int = NEVER, positions: list[list[int] | None] | None = None, overwrite: bool = False) -> None:
        """Everybody at it; with ``pause_at`` the donor stands before that portion when this returns."""
        for rank, chosen in zip(self.joiners, positions or [None] * 3, strict=True):
            rank.ask("receive", generations=self.generations, length=LENGTH, positions=chosen)
        told = {"generations": self.generations, "length": LENGTH, "pause_at": pause_at, "overwrite": overwrite}
        self.donor.ask("broadcast", **told)
        if pause_at != NEVER:
            assert self.donor.answer() == {"paused": True}

    def close(self) -> None:
        for rank in self.ranks:
            rank.end()


@pytest.fixture(scope="module")
def all_ranks() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(all_ranks: Fleet) -> Fleet:
    all_ranks.begin()
    return all_ranks


def landed(answer: dict[str, Any]) -> int:
    """Blocks at the front that are OK; nothing behind them is."""
    statuses = answer["statuses"]
    count = next((i for i, status in enumerate(statuses) if status != OK), len(statuses))
    assert OK not in statuses[count:]
    assert set(statuses[count:]) <= {UNREACHABLE, TIMEOUT}
    return count


def ends(rank: Rank) -> bool:
    """Does all that belongs to its group end, by itself, well before ``join_seconds``?"""
    for _ in range(100):
        if not [name for name in rank.do("leave")["threads"] if name.startswith("kvshare-group")]:
            return True
        threading.Event().wait(0.1)
    return False


# --- several processes ----------------------------------------------------------------------------------------------------


def test_all_joiners_get_all_blocks_and_what_is_stale_is_stale_for_all(fleet: Fleet) -> None:
    fleet.start()
    for rank in fleet.ranks:
        answer = rank.answer()
        assert answer["statuses"] == [OK] * BLOCKS and answer["error"] == ""
        assert answer.get("wrong", 0) == 0
    # The same group again, with blocks that went meanwhile.
    fleet.donor.do("retire", slots=[3, 40])
    fleet.start()
    expected = [STALE if slot in (3, 40) else OK for slot in range(BLOCKS)]
    for rank in fleet.ranks:
        answer = rank.answer()
        assert answer["statuses"] == expected and answer["error"] != ""
        assert answer.get("wrong", 0) == 0


def test_joiners_take_what_they_want_of_a_broadcast(fleet: Fleet) -> None:
    fleet.start(positions=[[], [0, 1, 7, 8, 63], list(range(0, BLOCKS, 3))])
    assert fleet.donor.answer()["error"] == ""
    counts = []
    for rank in fleet.joiners:
        answer = rank.answer()
        assert set(answer["statuses"]) <= {OK} and answer["wrong"] == 0
        counts.append(len(answer["statuses"]))
    assert counts == [0, 5, 22]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [1, 2])
def test_a_joiner_that_dies_or_hangs_ends_the_group_and_the_others_read_the_rest_singly(
    fleet: Fleet, victim: int, how: signal.Signals
) -> None:
    fleet.start(pause_at=4)
    fleet.ranks[victim].kill(how)
    fleet.donor.go_on()
    answer = fleet.donor.answer()
    assert landed(answer) < BLOCKS and answer["error"] != ""
    for rank in fleet.joiners:
        if rank is not fleet.ranks[victim]:
            answer = rank.answer()
            assert landed(answer) >= 2 * PORTION_BLOCKS and answer["wrong"] == 0
            again = rank.do("rest", endpoint=fleet.endpoint, slots=BLOCKS)
            assert again["all"] == [OK] * BLOCKS and again["wrong"] == 0
    fleet.ranks[victim].kill()
    # The processes that were in it are as before.
    fleet.begin()
    fleet.start()
    assert [rank.answer()["statuses"] for rank in fleet.ranks] == [[OK] * BLOCKS] * 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_donor_that_dies_or_hangs_leaves_what_has_landed(fleet: Fleet, how: signal.Signals) -> None:
    fleet.start(pause_at=4)
    fleet.donor.kill(how)
    for rank in fleet.joiners:
        answer = rank.answer()
        assert 2 * PORTION_BLOCKS <= landed(answer) <= 4 * PORTION_BLOCKS
        assert answer["wrong"] == 0 and answer["error"] != ""
    for rank in fleet.joiners:
        assert ends(rank), "while the donor hangs on"
    fleet.donor.kill()


def test_no_wrong_byte_from_a_donor_that_overwrites_its_slots(fleet: Fleet) -> None:
    accepted = missed = 0
    for _ in range(10):
        fleet.begin(portion_bytes=3 * LENGTH)
        fleet.start(overwrite=True)
        sent = fleet.donor.answer()["statuses"]
        for rank in fleet.joiners:
            answer = rank.answer()
            assert answer["wrong"] == 0
            assert answer["statuses"] == sent
        accepted, missed = accepted + sent.count(OK), missed + sent.count(STALE)
    assert accepted and missed, "the writer was too slow or too fast to show anything"


def test_a_wrong_secret_is_refused_with_a_typed_error_and_the_others_end_in_time(all_ranks: Fleet) -> None:
    all_ranks.begin()  # replaces who is missing
    plan = all_ranks.donor.do("announce", ranks=4, limits={**LIMITS, "join_seconds": 3.0})["plan"]
    secrets = [SECRET, SECRET, "a guess", SECRET]
    answers = all_ranks.all("join", [{"plan": plan, "rank": i, "secret": secret} for i, secret in enumerate(secrets)])
    assert answers[2]["raised"] in ("AuthenticationError", "ProtocolError")
    assert [answers[i]["raised"] for i in (0, 1, 3)] == ["Unavailable"] * 3
    all_ranks.begin()


def test_groups_leave_nothing_behind_and_an_engines_default_group_alone(fleet: Fleet) -> None:
    fleet.joiners[0].do("default_group")
    left = []
    for _ in range(3):
        fleet.begin()
        fleet.start()
        assert [rank.answer()["statuses"] for rank in fleet.ranks] == [[OK] * BLOCKS] * 4
        left.append([rank.do("leave") for rank in fleet.ranks])
    assert left[1] == left[2]
    assert not [name for ranks in left for rank in ranks for name in rank["threads"] if name.startswith("kvshare-group")]
    assert fleet.joiners[0].do("default_group_works")["sum"] == 3.0


# --- within one process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plan_and_listener() -> Iterator[tuple[GroupPlan, Any]]:
    listener, plan = announce("127.0.0.1", 3, join_seconds=5.0, seconds=1.0)
    yield plan, listener
    listener.close()


def test_members_see_what_the_others_tell_and_learn_who_is_gone(plan_and_listener: tuple[GroupPlan, Any]) -> None:
    plan, listener = plan_and_listener
    board = Board(plan, SECRET, listener)
    first, second = (Member(plan.for_rank(rank), SECRET, 5.0) for rank in (1, 2))
    first.tell("a", b"1")
    assert second.ask(["a"], 5.0) == board.ask(["a"], 5.0) == [b"1"]
    with pytest.raises(Unavailable, match="nobody told b"):
        second.ask(["a", "b"], 0.05)
    second.tell("end/2", b"done")
    second.close()
    assert board.outcomes("end", 0.05) == {2: b"done"}
    with pytest.raises(Unavailable, match="rank 2 is gone"):
        first.ask(["b"], 60.0)
    board.close()
    with pytest.raises(Unavailable):
        first.ask(["a"], 5.0)


@pytest.mark.parametrize("strange", ["rank", "group", "twice", "purpose"])
def test_a_board_lets_only_its_own_ranks_in(plan_and_listener: tuple[GroupPlan, Any], strange: str) -> None:
    plan, listener = plan_and_listener
    board = Board(plan, SECRET, listener)
    known = Member(plan.for_rank(1), SECRET, 5.0)
    known.tell("a", b"1")
    board.ask(["a"], 5.0)
    claimed = {
        "rank": msgspec.structs.replace(plan, ranks=9, rank=8),
        "group": msgspec.structs.replace(plan, group=bytes(16), rank=2),
        "twice": plan.for_rank(1),
        "purpose": plan.for_rank(2),
    }
    if strange == "purpose":
        from kvshare import wire

        with wire.connect_tcp(plan.endpoint, SECRET, "blocks", 5.0) as sock:
            wire.send_frame(sock, msgspec.msgpack.encode(("_Here", plan.group, 2)))
            sock.settimeout(10)
            assert sock.recv(1) == b""
    else:
        stranger = Member(claimed[strange], SECRET, 5.0)
        with pytest.raises(Unavailable):
            stranger.ask(["a"], 5.0)
    assert known.ask(["a"], 5.0) == [b"1"], "a stranger changes nothing for those who are in"
    known.close()
    board.close()


def test_a_stranger_without_the_secret_reaches_no_board(plan_and_listener: tuple[GroupPlan, Any]) -> None:
    plan, listener = plan_and_listener
    board = Board(plan, SECRET, listener)
    with pytest.raises((AuthenticationError, ProtocolError)):
        Member(plan.for_rank(1), "a guess", 5.0).ask(["a"], 5.0)
    board.close()
    with pytest.raises(Unavailable):
        Member(plan.for_rank(1), SECRET, 0.5)


def test_a_donor_that_never_answers_is_unavailable(plan_and_listener: tuple[GroupPlan, Any]) -> None:
    plan, _ = plan_and_listener  # it listens, and that is all
    with pytest.raises(Unavailable):
        nccl.join(msgspec.structs.replace(plan, join_seconds=0.2).for_rank(1), SECRET)


def test_a_group_that_nobody_joins_ends_in_time() -> None:
    listener, plan = announce("127.0.0.1", 2, join_seconds=0.3)
    with pytest.raises(Unavailable):
        nccl.join(plan, SECRET, listener)


def test_nccl_without_a_gpu_says_what_to_use() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    listener, plan = announce("127.0.0.1", 2, backend="nccl", join_seconds=5.0)
    with pytest.raises(TransportError, match="use 'gloo'"):
        nccl.join(plan, SECRET, listener)


def exchange(source: nccl.Source, request: ReadRequest, times: int = 1, **limits: Any) -> list[tuple[Completion, Completion]]:
    """Outcomes of donor and joiner of a group of two, both in this process."""
    listener, plan = announce("127.0.0.1", 2, **{"seconds": 2.0, **limits})
    sent, received = [], []

    def donate() -> None:
        with nccl.join(plan, SECRET, listener) as group:
            sent.extend(group.broadcast(source) for _ in range(times))

    donor = threading.Thread(target=donate)
    donor.start()
    with nccl.join(plan.for_rank(1), SECRET) as group:
        received.extend(group.receive(request) for _ in range(times))
    donor.join()
    return list(zip(sent, received, strict=True))


class Treacherous:
    """A source that tells the truth about its blocks and sends something else of some, and cannot read others."""

    def __init__(self, inner: nccl.Source, lie: int, fail: int) -> None:
        self.block_bytes = inner.block_bytes
        self._inner, self._lie, self._fail = inner, lie, fail

    def __len__(self) -> int:
        return len(self._inner)

    def gather(self, start: int, stop: int, targets: np.ndarray) -> Rows:  # type: ignore[type-arg]
        if start <= self._fail < stop:
            raise RegionError("it is gone")
        rows = self._inner.gather(start, stop, targets)
        if start <= self._lie < stop:
            native.view(int(targets[self._lie - start]) + self.block_bytes - 1, 1, writable=True)[0] ^= 1
        return rows


def blocks_of(region: Region, count: int, length: int) -> tuple[RegionSource, ReadRequest, np.ndarray]:  # type: ignore[type-arg]
    """Saved blocks, as a source and as a request for them; and where they go."""
    saved = [write(region, slot, np.full(length, slot + 1, np.uint8), slot) for slot in range(count)]
    slots, memory = np.arange(count), np.zeros((count, length), np.uint8)
    generations = np.array([block.generation for block in saved], np.uint64)
    targets = Targets.strided(native.address_of(memory), length, slots, length)
    request = ReadRequest(slots, generations, slots.astype(np.uint64), targets)
    return RegionSource(region, slots, generations.copy(), request.seeds, length), request, memory


@pytest.mark.parametrize("length", [100, SLOT_BYTES])
def test_bytes_that_change_on_the_way_are_corrupt_and_a_failing_read_costs_its_portion(length: int) -> None:
    source, request, memory = blocks_of(Region.anonymous(SLOT_BYTES, 6), 6, length)
    request.generations[5] += np.uint64(2)  # what the joiner was told is older, or newer
    ((sent, received),) = exchange(Treacherous(source, lie=1, fail=3), request, portion_bytes=length)
    assert sent.statuses.tolist() == [OK, OK, OK, UNREACHABLE, OK, OK]
    assert received.statuses.tolist() == [OK, CORRUPT, OK, UNREACHABLE, OK, STALE]
    assert received.bytes == 3 * length
    assert memory[[0, 2, 4]].tolist() == [[slot + 1] * length for slot in (0, 2, 4)]
    assert not memory[[3, 5]].any()


def test_an_empty_broadcast_and_several_in_one_group_complete() -> None:
    source, request, _ = blocks_of(Region.anonymous(SLOT_BYTES, 1), 0, SLOT_BYTES)
    for sent, received in exchange(source, request, times=3):
        assert sent.ok and received.ok and sent.error == received.error == ""


def test_a_donor_is_told_who_did_not_take_it_to_the_end() -> None:
    nothing, _, _ = blocks_of(Region.anonymous(SLOT_BYTES, 1), 0, SLOT_BYTES)
    _, request, _ = blocks_of(Region.anonymous(SLOT_BYTES, 1), 1, SLOT_BYTES)
    ((sent, received),) = exchange(nothing, request)
    assert received.statuses.tolist() == [UNREACHABLE]
    assert "not taken to the end by rank 1" in sent.error


def test_two_ranks_that_expect_different_blocks_part_without_a_wrong_byte() -> None:
    source, request, memory = blocks_of(Region.anonymous(SLOT_BYTES, 1), 1, SLOT_BYTES)
    half = Targets(request.targets.addresses, np.array([SLOT_BYTES // 2], np.uint64))
    outcomes = exchange(source, ReadRequest(request.slots, request.generations, request.seeds, half), times=2)
    for sent, received in outcomes:
        assert received.statuses.tolist() == [UNREACHABLE], "a group that failed stays so"
        assert "the donor sends 1 blocks of 65536 bytes" in received.error
        assert sent.error != ""
    assert not memory.any()


def test_a_cancelled_transfer_and_a_closed_group_end_as_such() -> None:
    source, request, _ = blocks_of(Region.anonymous(SLOT_BYTES, 4), 4, SLOT_BYTES)
    listener, plan = announce("127.0.0.1", 2, seconds=2.0, portion_bytes=SLOT_BYTES)
    heard = []

    def receive() -> None:
        with nccl.join(plan.for_rank(1), SECRET) as group:
            heard.append(group.receive(request))

    joiner = threading.Thread(target=receive)
    joiner.start()
    with nccl.join(plan, SECRET, listener) as group:
        group.cancel()
        assert set(group.broadcast(source).statuses.tolist()) == {BlockStatus.CANCELLED}
    assert set(group.broadcast(source).statuses.tolist()) == {BlockStatus.CANCELLED}
    group.close()
    joiner.join()
    assert set(heard[0].statuses.tolist()) <= {UNREACHABLE, TIMEOUT}


@pytest.mark.parametrize("fault", ["flipped", "replayed", "cut", "other key"])
def test_a_frame_that_is_not_the_donors_is_found_out(fault: str) -> None:
    plan = GroupPlan(bytes(16), "h:1", 2)
    shape = Shape(10, 32, 4)
    rows = np.zeros(4, ROW)
    rows["generation"] = range(4)
    memory = np.zeros(shape.frame_bytes, np.uint8)
    frames = Frames(plan, SECRET)
    frames.seal(memory, 1, 2, shape, rows)
    told, found = frames.opened(memory, 1, 2, 4)
    assert told == shape and np.array_equal(found, rows)
    if fault == "flipped":
        memory[HEAD.itemsize + 8] ^= 1
    numbers = {"replayed": (1, 3, 4), "cut": (1, 2, 3)}.get(fault, (1, 2, 4))
    judge = Frames(plan, "another") if fault == "other key" else frames
    with pytest.raises(ProtocolError):
        judge.opened(memory, *numbers)
    assert memory[: len(MAGIC)].tobytes() == MAGIC


def test_a_group_without_a_secret_is_refused() -> None:
    with pytest.raises(AuthenticationError, match="secret"):
        Frames(GroupPlan(bytes(16), "h:1", 2), "")


IMPOSSIBLE: list[dict[str, Any]] = [
    {"ranks": 1},
    {"ranks": 65},
    {"rank": 2},
    {"rank": -1},
    {"backend": "mpi"},
    {"seconds": 0},
    {"portion_bytes": 0},
    {"group": b""},
]


@pytest.mark.parametrize("wrong", IMPOSSIBLE)
def test_an_impossible_plan_is_refused_here_and_when_it_comes_over_the_wire(wrong: dict[str, Any]) -> None:
    fields = {"group": bytes(16), "endpoint": "h:1", "ranks": 2, "rank": 0, "backend": "gloo"}
    limits = {"join_seconds": 1.0, "seconds": 1.0, "portion_bytes": 1}
    with pytest.raises(ValueError):
        GroupPlan(**{**fields, **limits, **wrong})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(list({**fields, **limits, **wrong}.values())), type=GroupPlan)


def test_a_group_needs_an_address_of_this_host() -> None:
    with pytest.raises(ConfigError, match="bind"):
        announce("192.0.2.1", 2)


# --- sources --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, SLOT_BYTES])
def test_a_region_gives_what_is_whole_and_at_its_generation(length: int) -> None:
    region = Region.anonymous(SLOT_BYTES, 8)
    blocks = [write(region, slot, np.full(length, slot + 1, np.uint8), slot) for slot in range(4)]
    region.retire(1)
    native.view(region.slot_address(2), 1, writable=True)[0] ^= 1
    slots = np.array([0, 1, 2, 3, 99])
    generations = np.array([block.generation for block in blocks] + [2], np.uint64)
    source = RegionSource(region, slots, generations, slots.astype(np.uint64), length)
    memory = np.zeros((5, length), np.uint8)
    rows = source.gather(0, 5, _rows_of(memory))
    assert rows["status"].tolist() == [OK, STALE, CORRUPT, OK, STALE]
    assert np.array_equal(memory[[0, 3]], np.stack([blocks[0].data, blocks[3].data]))
    assert rows["checksum"][3] == region.checksums([3])[0]


def test_a_live_kv_cache_gives_blocks_that_were_complete_before_and_after(short_dir: Path) -> None:
    pages, page = 3, 512
    cache = np.random.default_rng(0).integers(0, 256, (pages, 6, page), np.uint8)
    table = DeviceTable.create(str(short_dir / "table"), 6, pages * page)
    table.begin([0, 1, 2, 3])
    table.finish([0, 1, 2, 3], table.generations([0, 1, 2, 3]))
    generations = table.generations([0, 1, 2, 3, 4])
    table.begin([1])
    bases = [native.address_of(cache) + j * 6 * page for j in range(pages)]
    slots = np.array([0, 1, 2, 3, 4])
    where = page_addresses(bases, [page] * pages, slots)
    seeds = slots.astype(np.uint64)
    source = DeviceSource(table, slots, generations, seeds, where, np.full(pages, page, np.uint64))
    memory = np.zeros((5, pages * page), np.uint8)
    rows = source.gather(0, 5, _rows_of(memory))
    assert rows["status"].tolist() == [OK, STALE, OK, OK, STALE]
    assert np.array_equal(memory[2], cache[:, 2].reshape(-1))
    digest = native.checksum(_rows_of(memory)[2:3], np.array([pages * page], np.uint64), 2)
    assert rows["checksum"][2] == digest
    with pytest.raises(IndexError):
        DeviceSource(table, np.array([6]), generations[:1], seeds[:1], where[:1], np.full(pages, page, np.uint64))


def test_a_block_that_is_handed_out_while_it_is_gathered_is_stale(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, memory = np.ones((2, 512), np.uint8), np.zeros((2, 512), np.uint8)
    table = DeviceTable.create(str(short_dir / "table"), 2, 512)
    table.begin([0, 1])
    table.finish([0, 1], table.generations([0, 1]))
    slots = np.array([0, 1])
    where = page_addresses([native.address_of(cache)], [512], slots)
    source = DeviceSource(table, slots, table.generations(slots), slots.astype(np.uint64), where, np.array([512], np.uint64))
    copy = native.copy_blocks

    def copy_then_begin(*arguments: Any) -> Any:
        digests = copy(*arguments)
        table.begin([1])
        return digests

    monkeypatch.setattr(native, "copy_blocks", copy_then_begin)
    assert source.gather(0, 2, _rows_of(memory))["status"].tolist() == [OK, STALE]


def _rows_of(memory: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return Targets.strided(native.address_of(memory), memory.shape[1], np.arange(len(memory)), memory.shape[1]).addresses[:, 0]
