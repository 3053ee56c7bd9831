"""What is written to disk: blocks at their second use, in bounded memory."""

from __future__ import annotations

from kvshare.placement import Admission


def block_keys(name: str, count: int) -> list[bytes]:
    return [f"{name}/{i}".encode() for i in range(count)]


def test_a_block_is_written_when_it_is_saved_for_the_second_time() -> None:
    admission = Admission(everything=False)
    one, other = block_keys("one", 4), block_keys("other", 2)
    assert admission.saved(one) == []
    assert admission.saved(other) == []
    assert admission.saved([other[0], one[2], b"new", one[0]]) == [other[0], one[2], one[0]]


def test_all_means_at_once_and_remembers_nothing() -> None:
    admission = Admission(everything=True)
    assert admission.saved(block_keys("one", 4)) == block_keys("one", 4)
    assert len(admission) == 0


def test_keys_that_differ_only_in_their_beginning_are_different_blocks() -> None:
    """Shards and groups of a block end in the same hash."""
    admission = Admission(everything=False)
    assert admission.saved([b"group 0" + bytes(32), b"group 1" + bytes(32)]) == []


def test_what_was_saved_long_ago_is_forgotten_and_memory_is_bounded() -> None:
    admission = Admission(everything=False, remembered_max=100)
    admission.saved([b"early"])
    for i in range(40):
        admission.saved(block_keys(f"scan{i}", 10))
        assert len(admission) <= 100
    assert admission.saved([b"early"]) == []


def test_what_keeps_coming_is_not_forgotten() -> None:
    admission = Admission(everything=False, remembered_max=100)
    admission.saved([b"hot"])
    for i in range(40):
        admission.saved(block_keys(f"scan{i}", 10))
        assert admission.saved([b"hot"]) == [b"hot"]
