"""The C extension against plain Python: every byte, every checksum, every error."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import socket
import subprocess
import threading

import hypothesis
import hypothesis.strategies as some
import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from kvshare import native
from kvshare.region import HEADER

U64 = npt.NDArray[np.uint64]


class Ranges:
    """``blocks`` x ``pages`` ranges of the given lengths, scattered in a memory of their own."""

    def __init__(self, lengths: list[list[int]], seed: int) -> None:
        self.lengths = np.array(lengths, np.uint64).reshape(len(lengths), -1)
        room = max(int(self.lengths.max(initial=1)), 1)
        places = list(range(self.lengths.size))
        random.Random(seed).shuffle(places)
        self.memory = np.frombuffer(random.Random(seed + 1).randbytes(max(1, len(places)) * room), np.uint8).copy()
        self._offsets = np.array(places, np.uint64).reshape(self.lengths.shape) * np.uint64(room)
        self.addresses = np.uint64(native.address_of(self.memory)) + self._offsets

    def block(self, index: int) -> bytes:
        spans = zip(self._offsets[index].tolist(), self.lengths[index].tolist(), strict=True)
        return b"".join(self.memory[at : at + length].tobytes() for at, length in spans)

    def digests(self, seeds: U64) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self.block(i), seed) for i, seed in enumerate(seeds.tolist())]


def random_seeds(count: int) -> U64:
    return np.random.default_rng(count).integers(0, 1 << 64, count, np.uint64)


shapes = some.integers(1, 4).flatmap(
    lambda pages: some.lists(some.lists(some.integers(0, 3000), min_size=pages, max_size=pages), min_size=1, max_size=5)
)


@hypothesis.given(shapes, some.integers(0, 1 << 30))
@hypothesis.settings(max_examples=150)
def test_copied_blocks_are_equal_and_so_are_their_checksums(lengths: list[list[int]], seed: int) -> None:
    sources, targets = Ranges(lengths, seed), Ranges(lengths, seed + 7)
    seeds = random_seeds(len(lengths))
    digests = native.copy_blocks(targets.addresses, sources.addresses, sources.lengths, seeds)
    assert [targets.block(i) for i in range(len(lengths))] == [sources.block(i) for i in range(len(lengths))]
    assert digests.tolist() == sources.digests(seeds)
    assert native.checksums(sources.addresses, sources.lengths, seeds).tolist() == digests.tolist()


@pytest.mark.parametrize("length", [*range(238, 260), 319, 320, 321, *range(1022, 1027), 1088, 2047, 2048, 2049, 1 << 20])
def test_the_checksum_is_xxh3_at_every_edge_of_its_formula(length: int) -> None:
    data = random.Random(length).randbytes(length)
    address = np.array([[native.address_of(data)]], np.uint64)
    for seed in (0, 1, (1 << 64) - 1):
        expected = xxhash.xxh3_64_intdigest(data, seed)
        lengths = np.array([[length]], np.uint64)
        assert native.checksums(address, lengths, np.array([seed], np.uint64)).tolist() == [expected]
        assert native.checksum(address[0], lengths[0], seed) == expected


def test_the_checksum_does_not_depend_on_how_a_block_is_cut() -> None:
    data = random.Random(1).randbytes(10_000)
    expected = xxhash.xxh3_64_intdigest(data, 5)
    base = native.address_of(data)
    for cut in [*range(1, 200), 1024, 4096, 9999]:
        starts = np.arange(0, len(data), cut, np.uint64)
        lengths = np.minimum(np.uint64(cut), np.uint64(len(data)) - starts)
        assert native.checksums((np.uint64(base) + starts)[None], lengths[None], np.array([5], np.uint64))[0] == expected


def test_copy_ranges_copies_each_range_and_nothing_else() -> None:
    source, target = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
    bases = np.uint64(native.address_of(source)), np.uint64(native.address_of(target))
    starts = np.array([3, 50, 99, 7], np.uint64)
    native.copy_ranges(bases[1] + starts, bases[0] + starts, np.array([4, 10, 1, 0], np.uint64))
    copied = [3, 4, 5, 6, *range(50, 60), 99]
    assert np.flatnonzero(target).tolist() == copied
    assert np.array_equal(target[copied], source[copied])


@pytest.mark.parametrize("blocking", [True, False])
def test_what_is_sent_from_ranges_arrives_in_ranges(blocking: bool) -> None:
    """More ranges than one system call takes, and more bytes than a socket holds."""
    sources, targets = Ranges([[977]] * 5000, 1), Ranges([[977]] * 5000, 2)
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(blocking)
        right.setblocking(blocking)
        sent: list[int] = []
        sender = threading.Thread(
            target=lambda: sent.append(
                native.send_ranges(left.fileno(), sources.addresses.reshape(-1), sources.lengths.reshape(-1), 10.0)
            )
        )
        sender.start()
        received = native.recv_ranges(right.fileno(), targets.addresses.reshape(-1), targets.lengths.reshape(-1), 10.0)
        sender.join()
    assert sent == [received] == [977 * 5000]
    assert all(sources.block(i) == targets.block(i) for i in range(5000))


class Table:
    """Six slots in random memory; 0, 1 and 5 hold blocks of ``length`` bytes that the tests ask for, 2 to 4 something else. The
    checksum of 5 is wrong."""

    def __init__(self, length: int, slot_bytes: int = 5000) -> None:
        self.data, self.headers, self.length, self.slot_bytes = (
            Ranges([[slot_bytes]] * 6, 3),
            np.zeros(6, HEADER),
            length,
            slot_bytes,
        )
        self.headers["generation"] = [2, 4, 6, 7, 8, 10]
        self.headers["length"] = [length, length, length, length, length - 1, length]
        self.addresses = (native.address_of(self.headers), native.address_of(self.data.memory))
        self.slots = np.array([1, 3, 4, 0, 5, -1, 6, 2, 0, 1 << 40], np.int64)
        self.expected = np.array([4, 7, 8, 4, 10, 4, 4, 8, 2, 2], np.uint64)
        # 3 is odd, 4 has another length, 0 and 2 (once) another generation; -1, 6 and 1 << 40 are no slots.
        self.there = [0, 4, 8]
        self.seeds = random_seeds(len(self.slots))

        for slot in range(6):
            self.headers["checksum"][slot] = xxhash.xxh3_64_intdigest(self.content(slot), int(self.seeds[0]))
        self.seeds[:] = self.seeds[0]
        self.headers["checksum"][5] += 1

    def content(self, slot: int) -> bytes:
        return self.data.memory[slot * self.slot_bytes :][: self.length].tobytes()

    def wanted(self, targets: Ranges) -> native.Wanted:
        count = len(self.slots)
        statuses = np.full(count, 255, np.uint8)
        return native.Wanted(
            self.expected, self.seeds, np.zeros(count, np.uint64), targets.addresses, targets.lengths[0], statuses
        )

    def check(self, targets: Ranges, wanted: native.Wanted, ok: int, there: list[int]) -> None:
        long = self.length >= native.FUSED_BYTES_MIN
        right = [block for block in there if self.slots[block] != 5 or not long]
        assert ok == len(right)
        assert np.flatnonzero(wanted.statuses == 0).tolist() == right
        assert np.flatnonzero(wanted.statuses == 2).tolist() == [block for block in there if block not in right]
        assert np.count_nonzero(wanted.statuses == 1) == len(self.slots) - len(there)
        for block in there:
            assert targets.block(block) == self.content(int(self.slots[block]))
            assert wanted.checksums[block] == self.headers["checksum"][self.slots[block]]


@pytest.mark.parametrize("portion_blocks", [1, 2, 3, 100])
@pytest.mark.parametrize("length", [90, 300, 5000])
def test_an_answer_brings_the_blocks_that_are_there(length: int, portion_blocks: int) -> None:
    table = Table(length)
    targets = Ranges([[30, length - 30]] * len(table.slots), 4)
    before = targets.memory.copy()
    wanted = table.wanted(targets)
    left, right = socket.socketpair()
    with left, right:
        asked = (table.slots, table.expected, length, portion_blocks)
        sent: list[int] = []
        sender = threading.Thread(
            target=lambda: sent.append(native.send_slots(left.fileno(), 5.0, table.addresses, 5000, 6, *asked))
        )
        sender.start()
        ok = native.recv_slots(right.fileno(), 5.0, portion_blocks, wanted)
        sender.join()
    assert sent == [len(table.there)]
    table.check(targets, wanted, ok, table.there)
    assert np.count_nonzero(targets.memory != before) <= length * len(table.there)


@pytest.mark.parametrize(
    "answer",
    [
        b"KVSV\x0b\0\0\0" + bytes([1] * 11),  # eleven blocks: ten were asked for
        b"kvsv\x0a\0\0\0" + bytes([1] * 10),
        b"KVSV\x0a\0\0\0" + bytes([1] * 9 + [2]),  # no verdict, but a judgement
        b"KVSV\x0a\0\0\0" + bytes([255] * 10),
    ],
)
def test_an_answer_that_is_none_is_a_value_error(answer: bytes) -> None:
    table, targets = Table(300), Ranges([[300]] * 10, 1)
    wanted = table.wanted(targets)
    left, right = socket.socketpair()
    with left, right:
        left.sendall(answer.ljust(64, b"\0"))
        with pytest.raises(ValueError, match="none"):
            native.recv_slots(right.fileno(), 5.0, 1, wanted)
    assert 0 not in wanted.statuses


def test_what_arrived_before_a_connection_broke_is_known() -> None:
    table, targets = Table(300), Ranges([[300]] * 10, 4)
    wanted = table.wanted(targets)
    verdict = b"KVSV\x0a\0\0\0" + bytes([0, 1, 0] + [3] * 7)
    trailer = np.array([4, table.headers["checksum"][1]], np.uint64).tobytes()
    left, right = socket.socketpair()
    with left, right:
        left.sendall(verdict.ljust(64, b"\0") + table.content(1) + trailer.ljust(64, b"\0") + table.content(4))
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError):
            native.recv_slots(right.fileno(), 5.0, 1, wanted)
    assert wanted.statuses.tolist() == [0, 1, 255] + [3] * 7
    assert targets.block(0) == table.content(1)


def test_a_silent_peer_is_a_timeout_and_a_closed_one_a_connection_error() -> None:
    target = Ranges([[1 << 22]], 1)
    where = target.addresses.reshape(-1), target.lengths.reshape(-1)
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(TimeoutError, match="no progress"):
            native.recv_ranges(left.fileno(), *where, 0.02)
        with pytest.raises(TimeoutError, match="no progress"):
            native.send_ranges(left.fileno(), *where, 0.02)
        right.close()
        with pytest.raises(ConnectionError):
            native.recv_ranges(left.fileno(), *where, 5.0)
        with pytest.raises(ConnectionError):
            native.send_ranges(left.fileno(), *where, 5.0)


def test_a_descriptor_that_is_none_is_a_connection_error() -> None:
    target = Ranges([[10]], 1)
    with pytest.raises(ConnectionError):
        native.recv_ranges(-1, target.addresses.reshape(-1), target.lengths.reshape(-1), 1.0)


def test_a_signal_within_a_transfer_is_handled_and_the_transfer_goes_on() -> None:
    target, heard = Ranges([[100]], 1), []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    left, right = socket.socketpair()
    main = threading.main_thread().ident
    assert main is not None

    def disturb() -> None:
        for _ in range(3):
            threading.Event().wait(0.02)
            signal.pthread_kill(main, signal.SIGUSR1)
        while len(heard) < 1:
            threading.Event().wait(0.01)
        right.sendall(bytes(100))

    with left, right:
        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            got = native.recv_ranges(left.fileno(), target.addresses.reshape(-1), target.lengths.reshape(-1), 10.0)
        finally:
            disturber.join()
            signal.signal(signal.SIGUSR1, before)
    assert got == 100
    assert target.block(0) == bytes(100)


def test_other_threads_run_while_bytes_are_awaited() -> None:
    target, ran = Ranges([[100]], 1), threading.Event()
    left, right = socket.socketpair()
    with left, right:

        def answer() -> None:
            ran.set()
            right.sendall(bytes(100))

        threading.Timer(0.02, answer).start()
        native.recv_ranges(left.fileno(), target.addresses.reshape(-1), target.lengths.reshape(-1), 10.0)
    assert ran.is_set()


def test_generations_are_stored_and_loaded_by_slot() -> None:
    table = np.zeros(10 * 16, np.uint64)
    base = native.address_of(table)
    for slot in range(10):
        native.store_generation(base + slot * 128, (1 << 63) + slot)
    out = np.zeros(4, np.uint64)
    native.load_generations(base, 128, np.array([9, 0, 3, 3], np.int64), out)
    assert out.tolist() == [(1 << 63) + slot for slot in (9, 0, 3, 3)]
    assert np.count_nonzero(table) == 10


def test_headers_are_where_the_region_module_says() -> None:
    offsets = {name: HEADER.fields[name][1] for name in ("generation", "checksum", "length")} if HEADER.fields else {}
    assert offsets == {"generation": 0, "checksum": 8, "length": 16}
    assert (HEADER.itemsize, HEADER["length"].itemsize) == (128, 4)


@pytest.mark.parametrize("length", [90, 241, 5000])
def test_slots_are_read_where_their_generation_length_and_place_are_right(length: int) -> None:
    table = Table(length)
    targets = Ranges([[30, length - 30]] * len(table.slots), 4)
    before = targets.memory.copy()
    wanted = table.wanted(targets)
    ok = native.read_slots(table.addresses, 5000, 6, table.slots, wanted)
    table.check(targets, wanted, ok, table.there)
    assert np.count_nonzero(targets.memory != before) <= length * len(table.there)


def test_slots_beyond_those_that_have_memory_are_not_read() -> None:
    table, targets = Table(300), Ranges([[300]] * 10, 4)
    wanted = table.wanted(targets)
    ok = native.read_slots(table.addresses, 5000, 5, table.slots, wanted)
    table.check(targets, wanted, ok, there=[0, 8])


def test_a_block_longer_than_its_slot_is_not_read() -> None:
    table, targets = Table(5000), Ranges([[5000]] * 10, 4)
    wanted = table.wanted(targets)
    assert native.read_slots(table.addresses, 4999, 6, table.slots, wanted) == 0
    assert set(wanted.statuses.tolist()) == {1}


@pytest.mark.parametrize("missing", ["expected", "checksums", "targets", "page_bytes", "statuses"])
def test_a_read_with_too_few_of_anything_is_refused(missing: str) -> None:
    table, targets = Table(300), Ranges([[100, 200]] * 10, 4)
    wanted = table.wanted(targets)
    short = wanted._replace(**{missing: getattr(wanted, missing)[:-1].copy()})
    with pytest.raises(ValueError, match=r"one |differ"):
        native.read_slots(table.addresses, 5000, 6, table.slots, short)
    assert 0 not in wanted.statuses


def test_a_view_reads_and_writes_memory_where_it_lies() -> None:
    memory = np.arange(10, dtype=np.uint8)
    assert bytes(native.view(native.address_of(memory) + 3, 4)) == bytes([3, 4, 5, 6])
    native.view(native.address_of(memory) + 9, 1, writable=True)[0] = 77
    assert memory[9] == 77
    with pytest.raises(TypeError):
        native.view(native.address_of(memory), 1)[0] = 1
    with pytest.raises(ValueError, match="negative"):
        native.view(native.address_of(memory), -1)


def test_arguments_that_do_not_fit_together_are_refused_before_memory_is_touched() -> None:
    one, two, wrong = np.zeros(1, np.uint64), np.zeros(2, np.uint64), np.zeros(2, np.uint32)
    with pytest.raises(ValueError, match="differ in length"):
        native.copy_ranges(one, two, two)
    with pytest.raises(AssertionError):
        native.copy_ranges(wrong, wrong, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in length"):
        native.load_generations(0, 8, np.zeros(1, np.int64), two)


# --- other processes -------------------------------------------------------------------------------------------------


@hypothesis.given(shapes, some.integers(0, 1 << 30))
@hypothesis.settings(max_examples=100)
def test_ranges_of_a_process_arrive_as_they_are(lengths: list[list[int]], seed: int) -> None:
    sources, targets = Ranges(lengths, seed), Ranges(lengths, seed + 7)
    copied = native.read_process(os.getpid(), targets.addresses.ravel(), sources.addresses.ravel(), sources.lengths.ravel())
    assert copied == sources.lengths.sum()
    assert [targets.block(i) for i in range(len(lengths))] == [sources.block(i) for i in range(len(lengths))]


@pytest.mark.parametrize("scattered", ["targets", "sources", "both", "neither"])
def test_more_ranges_than_one_system_call_takes_arrive(scattered: str) -> None:
    """On a side that is not scattered all ranges are one to the system: the two sides are cut differently."""
    count, length = 5000, 24
    order = np.random.default_rng(1).permutation(count).astype(np.uint64)
    source = np.random.default_rng(2).integers(0, 256, 2 * count * length, np.uint8)
    target = np.zeros(len(source), np.uint8)

    def side(memory: npt.NDArray[np.uint8], name: str) -> U64:
        places = order * np.uint64(2) if scattered in (name, "both") else np.arange(count, dtype=np.uint64)
        return np.uint64(native.address_of(memory)) + places * np.uint64(length)

    targets, sources = side(target, "targets"), side(source, "sources")
    assert native.read_process(os.getpid(), targets, sources, np.full(count, length, np.uint64)) == count * length
    expected = np.zeros_like(target)
    offsets = targets - np.uint64(native.address_of(target)), sources - np.uint64(native.address_of(source))
    for to, origin in zip(*(side.tolist() for side in offsets), strict=True):
        expected[to : to + length] = source[origin : origin + length]
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("at", [0, 1, 1023, 1024, 1999])
def test_memory_that_is_not_mapped_is_an_error_wherever_it_comes(at: int) -> None:
    memory = np.zeros(4096, np.uint8)
    sources = np.full(2000, native.address_of(memory), np.uint64)
    sources[at] = 16
    targets = np.uint64(native.address_of(memory)) + np.arange(2000, dtype=np.uint64)
    with pytest.raises(OSError) as raised:
        native.read_process(os.getpid(), targets, sources, np.ones(2000, np.uint64))
    assert raised.value.errno == errno.EFAULT
    with pytest.raises(OSError):
        native.read_process(os.getpid(), sources, targets, np.ones(2000, np.uint64))


def test_a_range_that_runs_into_memory_that_may_not_be_read_is_an_error() -> None:
    """The system stops in the middle of such a range and says how far it came."""
    with mmap.mmap(-1, 4 * mmap.PAGESIZE) as room, mmap.mmap(-1, 4 * mmap.PAGESIZE) as target:
        start = native.address_of(room)
        forbid = ctypes.c_void_p(start + 2 * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0
        assert ctypes.CDLL(None).mprotect(*forbid) == 0
        ranges = np.array([[native.address_of(target)], [start], [4 * mmap.PAGESIZE]], np.uint64)
        with pytest.raises(OSError) as raised:
            native.read_process(os.getpid(), *ranges)
        assert raised.value.errno == errno.EFAULT


def test_a_process_that_is_not_there_is_an_error() -> None:
    one = np.full(1, native.address_of(np.zeros(8, np.uint8)), np.uint64)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    with pytest.raises(ProcessLookupError):
        native.read_process(ended.pid, one, one, np.ones(1, np.uint64))


def test_no_ranges_of_a_process_are_no_call() -> None:
    none = np.empty(0, np.uint64)
    assert native.read_process(os.getpid(), none, none, none) == 0
    assert native.read_process(os.getpid(), *np.zeros((3, 5), np.uint64)) == 0


def test_unequal_numbers_of_ranges_of_a_process_are_an_error() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        native.read_process(os.getpid(), *(np.zeros(count, np.uint64) for count in (1, 2, 2)))
