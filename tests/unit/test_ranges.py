"""Spans and coalescing against an oracle that copies byte by byte."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as some
import numpy as np
import numpy.typing as npt
import pytest

from kvshare.transport.ranges import Spans, coalesce, page_addresses, spans

U64 = npt.NDArray[np.uint64]


def u64(values: object) -> U64:
    return np.array(values, np.uint64)


def copies_of(ranges: Spans) -> list[tuple[int, int]]:
    """(target, source) of every byte, in order."""
    triples = zip(*(side.tolist() for side in ranges), strict=True)
    return [(target + i, source + i) for target, source, length in triples for i in range(length)]


def bytes_of(addresses: U64, page_bytes: list[int]) -> list[int]:
    """Address of every byte of a block whose pages lie at ``addresses``."""
    return [at + i for at, length in zip(addresses.tolist(), page_bytes, strict=True) for i in range(length)]


@some.composite
def cut_blocks(draw: some.DrawFn) -> tuple[U64, list[int], U64, list[int]]:
    """Pages of a few blocks, cut one way at the targets and another way at the sources, somewhere or side by side."""
    length, blocks = draw(some.integers(1, 60)), draw(some.integers(0, 4))

    def side(total: int) -> tuple[U64, list[int]]:
        cuts = sorted(draw(some.lists(some.integers(0, total), max_size=4)))
        page_bytes = [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
        places = np.arange(blocks * len(page_bytes)).reshape(blocks, len(page_bytes))
        if draw(some.booleans()):  # every block in one piece, one behind the other: neighbours join
            starts = np.cumsum([0, *page_bytes[:-1]])
            return u64(1000 + np.arange(blocks)[:, None] * total + starts[None, :]), page_bytes
        order = draw(some.permutations(range(places.size)))
        return u64(100 * np.array(order, np.int64).reshape(places.shape)), page_bytes

    return *side(length), *side(length + draw(some.integers(0, 20)))


@hypothesis.given(cut_blocks())
@hypothesis.settings(max_examples=300)
def test_spans_copy_every_byte_of_every_block_once_and_in_order(blocks: tuple[U64, list[int], U64, list[int]]) -> None:
    targets, target_bytes, sources, source_bytes = blocks
    made = spans(targets, u64(target_bytes), sources, u64(source_bytes))
    expected: list[tuple[int, int]] = []
    for target, source in zip(targets, sources, strict=True):
        padding_left_out = bytes_of(source, source_bytes)[: sum(target_bytes)]
        expected += zip(bytes_of(target, target_bytes), padding_left_out, strict=True)
    assert copies_of(made) == expected
    joined = coalesce(made)
    assert copies_of(joined) == expected
    triples = list(zip(*(side.tolist() for side in joined), strict=True))
    for (target, source, length), after in itertools.pairwise(triples):
        assert after[:2] != (target + length, source + length), "neighbours on both sides are one range"


def test_whole_regions_side_by_side_are_one_range() -> None:
    slots = np.arange(100)
    rows = page_addresses([1 << 40], [4096], slots), page_addresses([1 << 41], [4096], slots)
    whole = coalesce(spans(rows[0], u64([4096]), rows[1], u64([4096])))
    assert [side.tolist() for side in whole] == [[1 << 40], [1 << 41], [409_600]]


def test_pages_lie_at_their_strides() -> None:
    assert page_addresses([1000, 5000], [10, 300], [0, 3]).tolist() == [[1000, 5000], [1030, 5900]]
    assert page_addresses([1000], [10], np.empty(0, np.int64)).shape == (0, 1)


def test_a_source_that_is_shorter_than_its_target_is_refused() -> None:
    with pytest.raises(ValueError, match="19 bytes cannot fill blocks of 20"):
        spans(u64([[0, 10]]), u64([10, 10]), u64([[100]]), u64([19]))
