"""Gathering and scattering of paged blocks, and the staged path of a device's memory that stands on it.

The device is a stand-in whose streams run in any order that streams may run in, seeded: a missing wait shows as wrong bytes.
"""

from __future__ import annotations

import ctypes
import math
import random
import threading
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's own making
    torch = pytest.importorskip("torch")

from kvshare.integrations.vllm.gather import PageRows, Pinned, Stager, digests
from kvshare.integrations.vllm.layout import Layout, pages_of
from kvshare.integrations.vllm.pages import DevicePages
from kvshare.loading import LoadPlan
from kvshare.transport.base import BlockStatus, Completion, Targets, Transfer

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 9, 2, 4, 6
SIZES = {"L": LAYERS, "B": BLOCKS, "H": HEADS, "N": TOKENS, "C": CONTENT}
BLOCK_BYTES = LAYERS * HEADS * TOKENS * CONTENT * 2
# Memory orders of vLLM: where layers, blocks, heads, tokens, content lie, outermost first; "|": an allocation per layer.
ORDERS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC", "|BHNC", "|BNHC", "|HBNC"]


class Mark:
    reached = False


class ShuffledLane:
    def __init__(self, device: Shuffled) -> None:
        self._device = device
        self.given: deque[Callable[[], object] | Mark | tuple[Mark]] = deque()

    def run(self, work: Callable[[], object]) -> None:
        self.given.append(work)
        self._device.maybe_go_on()

    def mark(self) -> Mark:
        mark = Mark()
        self.given.append(mark)
        return mark

    def after(self, mark: Mark) -> None:
        self.given.append((mark,))

    @property
    def waits(self) -> bool:
        return not self.given or (isinstance(self.given[0], tuple) and not self.given[0][0].reached)

    def step(self) -> None:
        first = self.given.popleft()
        if isinstance(first, Mark):
            first.reached = True
        elif not isinstance(first, tuple):
            first()


class Shuffled:
    """A device that does what it was given late, in a random one of the orders that its lanes allow: one of them is mostly
    ahead, another one behind. ``fails``: which calls of `wait` raise, counted from 0."""

    def __init__(self, seed: int = 0, fails: tuple[int, ...] = ()) -> None:
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._lanes: list[ShuffledLane] = []  # from the foremost
        self._eager_steps = self._random.choice([1, 4])
        self._fails = list(fails)
        self._waits = 0
        self.pinned_calls = 0
        self.engine = self.lane()

    def lane(self) -> ShuffledLane:
        lane = ShuffledLane(self)
        self._lanes.insert(self._random.randint(0, len(self._lanes)), lane)
        return lane

    def mark(self) -> Mark:
        with self._lock:
            return self.engine.mark()

    def wait(self, mark: Mark) -> None:
        with self._lock:
            self._waits += 1
            if self._waits - 1 in self._fails:
                raise RuntimeError("the device is lost")
            while not mark.reached:
                self._step()

    def pinned(self, rows: int, row_bytes: int) -> Any:
        self.pinned_calls += 1
        return torch.zeros((rows, row_bytes), dtype=torch.uint8)

    def maybe_go_on(self) -> None:
        with self._lock:
            for _ in range(self._random.randrange(self._eager_steps)):
                if any(not lane.waits for lane in self._lanes):
                    self._step()

    def _step(self) -> None:
        ready = [lane for lane in self._lanes if not lane.waits]
        assert ready, "lanes wait for each other"
        (ready[0] if self._random.random() < 0.8 else self._random.choice(ready)).step()


def caches(order: str, dtype: Any = torch.int16) -> dict[str, Any]:
    """A KV cache in this memory order, as views [B, H, N, C] per layer, random."""
    generator = torch.Generator().manual_seed(len(order))
    if order.startswith("|"):
        inner = order[1:]
        layers = [torch.randint(-100, 100, [SIZES[d] for d in inner], dtype=dtype, generator=generator) for _ in range(LAYERS)]
        return {f"layer.{i}": layer.permute([inner.index(d) for d in "BHNC"]) for i, layer in enumerate(layers)}
    memory = torch.randint(-100, 100, [SIZES[d] for d in order], dtype=dtype, generator=generator)
    logical = memory.permute([order.index(d) for d in "LBHNC"])
    return {f"layer.{i}": logical[i] for i in range(LAYERS)}


def layout_of(kv_caches: dict[str, Any]) -> Layout:
    pages = [page for tensor in kv_caches.values() for page in pages_of(tensor, BLOCKS)[0]]
    bases, strides, lengths = (np.array(column, np.uint64) for column in zip(*pages, strict=True))
    return Layout(bases, strides, lengths, "test", "cpu")


def bytes_at(targets: Targets, block: int) -> bytes:
    return b"".join(
        ctypes.string_at(int(address), int(length))
        for address, length in zip(targets.addresses[block], targets.page_bytes, strict=True)
    )


def content(kv_caches: dict[str, Any], block: int) -> bytes:
    """A block as the CPU reads it."""
    return bytes_at(layout_of(kv_caches).targets([block]), 0)


def fill(kv_caches: dict[str, Any], block: int, value: int) -> None:
    for tensor in kv_caches.values():
        tensor[block] = value


def stager_of(kv_caches: dict[str, Any], device: Shuffled, piece_blocks: int = 2) -> tuple[Stager, Pinned]:
    pinned = Pinned(device, BLOCK_BYTES, slab_bytes=3 * BLOCK_BYTES)
    return Stager(PageRows(layout_of(kv_caches), kv_caches), pinned, device, piece_blocks * BLOCK_BYTES), pinned


block_lists = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS, unique=True)


# --- gather and scatter ---------------------------------------------------------------------------------------------------


@given(st.sampled_from(ORDERS), block_lists, st.integers(1, 4), st.integers(0, 10**6))
def test_gathered_blocks_are_what_the_engine_wrote_before_in_whatever_order_streams_run(
    order: str, block_ids: list[int], piece_blocks: int, seed: int
) -> None:
    kv_caches, device = caches(order), Shuffled(seed)
    stager, pinned = stager_of(kv_caches, device, piece_blocks)
    places = np.array(random.Random(seed).sample(pinned.take(BLOCKS).tolist(), len(block_ids)), np.int64)
    for block in block_ids[::2]:
        device.engine.run(partial(fill, kv_caches, block, block))
    device.wait(stager.gather(block_ids, places, device.mark()))
    targets = pinned.targets(places)
    assert [bytes_at(targets, i) for i in range(len(block_ids))] == [content(kv_caches, block) for block in block_ids]


@given(st.sampled_from(ORDERS), block_lists, st.integers(1, 4), st.integers(0, 10**6))
def test_scattered_blocks_lie_where_they_belong_after_all_that_the_engine_did_before(
    order: str, block_ids: list[int], piece_blocks: int, seed: int
) -> None:
    source, target, device = caches("LBHNC"), caches(order), Shuffled(seed)
    if order.endswith("NHC"):
        source = caches("LBNHC")
    from_pages, pinned = stager_of(source, device, piece_blocks)
    places = pinned.take(len(block_ids))
    device.wait(from_pages.gather(list(range(len(block_ids))), places, device.mark()))
    others = {block: content(target, block) for block in range(BLOCKS) if block not in block_ids}
    to_pages = Stager(PageRows(layout_of(target), target), pinned, device, piece_blocks * BLOCK_BYTES)
    for block in block_ids:  # a former owner's step that is still under way
        device.engine.run(partial(fill, target, block, 99))
    device.wait(to_pages.scatter(places, block_ids, device.mark()))
    device.wait(device.mark())  # the engine's stream has come to its end, when it may
    assert [content(target, block) for block in block_ids] == [content(source, i) for i in range(len(block_ids))]
    assert {block: content(target, block) for block in others} == others, "nothing else is written"


@given(st.integers(0, 10**6))
def test_one_stager_serves_gathers_and_scatters_in_turn(seed: int) -> None:
    chance, device, kv_caches = random.Random(seed), Shuffled(seed), caches("|BHNC")
    stager, pinned = stager_of(kv_caches, device)
    expected = [content(kv_caches, block) for block in range(BLOCKS)]
    for _ in range(4):  # nothing is waited for in between: the order of the lanes is enough
        count = chance.randint(1, BLOCKS)
        sources, targets = (chance.sample(range(BLOCKS), count) for _ in range(2))
        places = pinned.take(count)
        gathered = stager.gather(sources, places, device.mark())
        stager.scatter(places, targets, gathered)
        old = list(expected)
        for target, source in zip(targets, sources, strict=True):
            expected[target] = old[source]
    stager.settle()
    assert [content(kv_caches, block) for block in range(BLOCKS)] == expected


@pytest.mark.parametrize(
    ("dtype", "order", "words"),
    [(torch.int16, "LBHNC", torch.int64), (torch.int16, "LBNHC", torch.int64), (torch.int64, "|BHNC", torch.int64)],
)
def test_memory_is_moved_in_the_widest_words_that_its_pages_allow(dtype: Any, order: str, words: Any) -> None:
    kv_caches = caches(order, dtype)
    assert PageRows(layout_of(kv_caches), kv_caches).view.dtype == words


@pytest.mark.parametrize("step", [1, 2, 4, 8])
def test_pages_of_unequal_length_and_alignment_are_moved_as_well(step: int) -> None:
    memory = torch.arange(8192, dtype=torch.int16).view(torch.uint8)
    start = memory.data_ptr()
    offsets, strides, lengths = [step, 2048 + 3 * step, 5000 + step], [24 * step, 16 * step, 40 * step], [8, 16, 24]
    columns = [[start + offset for offset in offsets], strides, [length * step for length in lengths]]
    layout = Layout(*(np.array(column, np.uint64) for column in columns), "test", "cpu")
    pages, device = PageRows(layout, {"all": memory}), Shuffled(1)
    assert pages.view.element_size() == step
    pinned = Pinned(device, layout.block_bytes)
    places = pinned.take(3)
    device.wait(Stager(pages, pinned, device).gather([5, 0, 11], places, device.mark()))
    assert [bytes_at(pinned.targets(places), i) for i in range(3)] == [
        bytes_at(layout.targets([block]), 0) for block in (5, 0, 11)
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_the_last_block_is_known_and_none_behind_it(order: str) -> None:
    kv_caches = caches(order)
    pages = PageRows(layout_of(kv_caches), kv_caches)
    assert pages.blocks == BLOCKS and len(pages.rows([BLOCKS - 1])) == pages.rows_per_block
    for block in (-1, BLOCKS):
        with pytest.raises(AssertionError):
            pages.rows([block])


# --- pinned memory --------------------------------------------------------------------------------------------------------


def test_pinned_memory_is_used_again_and_grows_to_what_is_needed_at_once() -> None:
    device = Shuffled()
    pinned = Pinned(device, 64, slab_bytes=4 * 64)
    first, second = pinned.take(3), pinned.take(3)
    assert device.pinned_calls == 2 and not set(first) & set(second)
    pinned.give(first)
    assert set(pinned.take(3)) == set(first) and device.pinned_calls == 2


def test_neighbours_are_one_run_within_a_slab() -> None:
    pinned = Pinned(Shuffled(), 64, slab_bytes=4 * 64)
    pinned.take(8)
    places = np.array([0, 1, 3, 4, 5, 2])
    runs = list(pinned.runs(places))
    assert [(which.start, which.stop) for _, which in runs] == [(0, 2), (2, 3), (3, 5), (5, 6)]
    addresses = pinned.targets(places).addresses[:, 0].tolist()
    assert [memory.data_ptr() + 64 * i for memory, which in runs for i in range(which.stop - which.start)] == addresses


# --- digests --------------------------------------------------------------------------------------------------------------


def digest_of(block: bytes) -> int:
    """The same by whole numbers of Python."""
    word, mask, total = math.gcd(len(block), 8), (1 << 64) - 1, 0

    def mixed(number: int) -> int:
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & mask
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & mask
        return number ^ (number >> 31)

    for i in range(len(block) // word):
        value = int.from_bytes(block[i * word : (i + 1) * word], "little", signed=word > 1) & mask
        total += mixed((value + mixed((i + 1) * 0x9E3779B97F4A7C15 & mask)) & mask)
    total &= mask
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("order", ["LBHNC", "BLHNC", "LHBNC", "|BHNC"])
def test_a_digest_is_of_the_bytes_of_a_block_wherever_they_lie(order: str) -> None:
    kv_caches = caches(order)
    pages = PageRows(layout_of(kv_caches), kv_caches)
    blocks = [4, 0, 8, 4]
    assert digests(pages, blocks).tolist() == [digest_of(content(kv_caches, block)) for block in blocks]


@given(st.integers(0, BLOCK_BYTES // 8 - 1), st.integers(1, 2**64 - 1))
def test_any_change_within_one_word_changes_the_digest(word: int, change: int) -> None:
    kv_caches = {"layer.0": torch.zeros(BLOCKS, 1, 1, BLOCK_BYTES // 2, dtype=torch.int16)}
    pages = PageRows(layout_of(kv_caches), kv_caches)
    before = digests(pages, [3])
    kv_caches["layer.0"][3].view(torch.int64).view(-1)[word] ^= change - (1 << 64) if change >> 63 else change
    assert digests(pages, [3]) != before
    assert digests(pages, [2]) == before


@given(st.permutations(range(8)))
def test_the_order_of_words_matters(order: list[int]) -> None:
    words = torch.arange(8, dtype=torch.int64)
    kv_caches = {"layer.0": torch.stack([words, words[torch.tensor(order)]]).view(2, 1, 1, 8)}
    pages = [(tensor.data_ptr(), 64, 64) for tensor in kv_caches.values()]
    layout = Layout(*(np.array(column, np.uint64) for column in zip(*pages, strict=True)), "test", "cpu")
    same, changed = digests(PageRows(layout, kv_caches), [0, 1]).tolist()
    assert (same == changed) == (order == sorted(order))


# --- DevicePages ----------------------------------------------------------------------------------------------------------


class MemoryMover:
    """As `kvshare.mover.Mover`, with a dictionary for an arena; ``bad`` keys arrive corrupt."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.bad: set[bytes] = set()

    def save(self, block_keys: list[bytes], sources: Targets) -> Any:
        self.blocks.update((key, bytes_at(sources, i)) for i, key in enumerate(block_keys))
        return SimpleNamespace(done=True)

    def load(self, plan: LoadPlan, targets: Targets) -> Transfer:
        statuses: npt.NDArray[np.uint8] = np.zeros(len(plan), np.uint8)
        for i, key in enumerate(plan.keys):
            bad = key in self.bad
            statuses[i] = BlockStatus.CORRUPT if bad else BlockStatus.OK
            data = bytes(targets.block_bytes) if bad else self.blocks[key]
            ctypes.memmove(int(targets.addresses[i, 0]), data, len(data))
        transfer = Transfer()
        transfer.complete(Completion(statuses, 0, 0.0))
        return transfer


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_device_travel_through_staging_and_back(order: str) -> None:
    kv_caches, mover = caches(order), MemoryMover()
    before = [content(kv_caches, block) for block in range(BLOCKS)]
    pages = DevicePages(layout_of(kv_caches), kv_caches, mover, Shuffled(7))
    assert pages.save([b"p0", b"p1", b"p2"], [4, 1, 7]).wait(5.0)
    mover.bad = {b"p0"}
    completion = pages.load(LoadPlan(b"p", [b"1", b"0", b"2"], []), [0, 2, 5]).wait(5.0)
    pages.close()
    assert mover.blocks[b"p0"] == before[4], "what the CPU would have saved"
    assert completion is not None and completion.statuses.tolist() == [BlockStatus.OK, BlockStatus.CORRUPT, BlockStatus.OK]
    expected = [before[1], *before[1:5], before[7], *before[6:]]
    assert [content(kv_caches, block) for block in range(BLOCKS)] == expected, "corrupt blocks are not written"


@pytest.mark.parametrize("seed", range(20))
def test_a_save_has_what_the_engine_wrote_before_it_and_nothing_that_it_writes_when_it_is_done(seed: int) -> None:
    kv_caches, mover, device = caches("LBHNC"), MemoryMover(), Shuffled(seed)
    pages = DevicePages(layout_of(kv_caches), kv_caches, mover, device)
    device.engine.run(lambda: fill(kv_caches, 3, 11))
    save = pages.save([b"k"], [3])
    assert save.wait(5.0)
    device.engine.run(lambda: fill(kv_caches, 3, 22))
    device.wait(device.mark())
    pages.close()
    assert save.saved == 1 and mover.blocks[b"k"] == np.full(BLOCK_BYTES // 2, 11, np.int16).tobytes()
    assert content(kv_caches, 3) == np.full(BLOCK_BYTES // 2, 22, np.int16).tobytes()


@pytest.mark.parametrize("seed", range(20))
def test_a_load_comes_after_all_that_the_engine_did_before_it_and_before_all_that_it_does_when_it_is_complete(
    seed: int,
) -> None:
    kv_caches, mover, device = caches("LBHNC"), MemoryMover(), Shuffled(seed)
    loaded = mover.blocks[b"p0"] = bytes(range(BLOCK_BYTES % 256)) + bytes(BLOCK_BYTES - BLOCK_BYTES % 256)
    pages = DevicePages(layout_of(kv_caches), kv_caches, mover, device)
    read: list[bytes] = []
    device.engine.run(lambda: fill(kv_caches, 3, 11))  # a former owner's step that is still under way
    completion = pages.load(LoadPlan(b"p", [b"0"], []), [3]).wait(5.0)
    device.engine.run(lambda: read.append(content(kv_caches, 3)))
    device.wait(device.mark())
    pages.close()
    assert completion is not None and completion.ok and read == [loaded]


def test_a_device_that_fails_makes_blocks_misses_and_the_next_ones_are_served() -> None:
    kv_caches, mover, device = caches("LBHNC"), MemoryMover(), Shuffled(3, fails=(0, 3))
    pages = DevicePages(layout_of(kv_caches), kv_caches, mover, device)
    pinned_before = device.pinned_calls
    lost = pages.save([b"p0"], [1])
    assert lost.wait(5.0) and lost.saved == 0 and not mover.blocks
    mover.blocks[b"p0"] = bytes(BLOCK_BYTES)
    completion = pages.load(LoadPlan(b"p", [b"0"], []), [2]).wait(5.0)
    assert completion is not None and completion.statuses.tolist() == [BlockStatus.UNREACHABLE]
    assert "lost" in completion.error
    completion = pages.load(LoadPlan(b"p", [b"0"], []), [5]).wait(5.0)
    pages.close()
    assert completion is not None and completion.ok and content(kv_caches, 5) == bytes(BLOCK_BYTES)
    assert device.pinned_calls == pinned_before, "pinned memory came back"


def test_without_pinned_memory_a_load_is_a_miss() -> None:
    class Poor(Shuffled):
        def pinned(self, rows: int, row_bytes: int) -> Any:
            if self.pinned_calls > 20:
                raise RuntimeError("ulimit -l is 64 KiB")
            return super().pinned(rows, row_bytes)

    kv_caches, device = caches("LBHNC"), Poor()
    pages = DevicePages(layout_of(kv_caches), kv_caches, MemoryMover(), device)
    device.pinned_calls = 99
    many = 1 + (256 << 20) // BLOCK_BYTES
    completion = pages.load(LoadPlan(b"p", [b"0"] * many, []), [0] * many).wait(5.0)
    pages.close()
    assert completion is not None and "no pinned memory: ulimit" in completion.error
    assert set(completion.statuses.tolist()) == {BlockStatus.UNREACHABLE}


def test_a_cancelled_save_ends_without_reading_more() -> None:
    class Held(MemoryMover):
        gate = threading.Event()

        def save(self, block_keys: list[bytes], sources: Targets) -> Any:
            assert self.gate.wait(5.0)
            return super().save(block_keys, sources)

    kv_caches, mover = caches("LBHNC"), Held()
    pages = DevicePages(layout_of(kv_caches), kv_caches, mover, Shuffled())
    first, second = pages.save([b"a"], [1]), pages.save([b"b"], [2])
    second.cancel()
    mover.gate.set()
    assert first.wait(5.0) and second.wait(5.0)
    pages.close()
    assert set(mover.blocks) == {b"a"} and second.saved == 0
