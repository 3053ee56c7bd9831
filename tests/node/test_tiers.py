"""What was saved once outlives arena, node and process: it is found on the disk, by its own node and by peers, or in the object
store; every failure of a slow tier is a miss."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvshare
from kvshare import disk_io, keys
from kvshare.errors import ConfigError
from kvshare.session import Session
from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, SPACE, Cluster, Host, blocks_of, eventually

TOKENS = list(range(100, 100 + 40 * BLOCK_SIZE))
BLOCKS = len(TOKENS) // BLOCK_SIZE
PREFIX = keys.prefix(SPACE.family(), keys.variant(b"", ""))
PATIENT = 20.0  # seconds to look something up, where a test is not about their end


def counter(host: Host, name: str) -> int:
    assert host.node is not None
    return host.node.status().counters[name]


def on_disk(host: Host) -> int:
    return counter(host, "disk_blocks")


def load_all(cache: kvshare.Cache, tokens: list[int] = TOKENS) -> int:
    """Tokens loaded; what was loaded has the right bytes."""
    blocks = blocks_of(tokens)
    filled = np.zeros_like(blocks)
    count = cache.load(tokens, filled) // BLOCK_SIZE
    assert (filled[:count] == blocks[:count]).all()
    return count * BLOCK_SIZE


def fill(host: Host, tokens: list[int] = TOKENS) -> None:
    """Save the blocks of ``tokens`` and wait until the disk has them."""
    with host.connect() as cache:
        wanted = on_disk(host) + cache.save(tokens, blocks_of(tokens))
        assert eventually(lambda: on_disk(host) == wanted)


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, object]:
    """Settings of a node that keeps all it saves."""
    return {"disk_dir": str(tmp_path / "disk"), "disk_admit": "all", "lookup_seconds": PATIENT}


def test_what_was_saved_is_loaded_from_disk_after_a_restart_without_the_arena(cluster: Cluster, disk) -> None:
    first = cluster.host("a", **disk).start()
    fill(first)
    first.stop()
    again = cluster.host("a", **disk).start()
    with again.connect() as cache:
        assert eventually(lambda: on_disk(again) == BLOCKS)
        assert cache.match(TOKENS) == len(TOKENS)
        assert load_all(cache) == len(TOKENS)
        assert counter(again, "promoted_blocks") == BLOCKS == counter(again, "blocks")


def test_what_was_kept_survives_a_kill(cluster: Cluster, disk, tmp_path: Path) -> None:
    host = cluster.host("a", **disk).spawn()
    with host.connect() as cache:
        assert cache.save(TOKENS, blocks_of(TOKENS)) == BLOCKS
        assert eventually(lambda: status_of(host).get("disk_blocks") == BLOCKS)
        host.kill()
    for path in tmp_path.glob("kvshare-*"):
        path.unlink()  # the machine's memory is gone
    host.start()
    with host.connect() as cache:
        assert eventually(lambda: on_disk(host) == BLOCKS)
        assert load_all(cache) == len(TOKENS)


def status_of(host: Host) -> dict[str, int]:
    from kvshare.messages import AskStatus, NodeStatus
    from kvshare.session import call

    answer = call(host.settings, AskStatus, 5.0)
    assert isinstance(answer, NodeStatus)
    return answer.counters


def test_only_what_is_used_again_goes_to_disk_unless_all_shall(cluster: Cluster, disk) -> None:
    host = cluster.host("a", **disk | {"disk_admit": "used"}).start()
    cold = list(range(5000, 5000 + 8 * BLOCK_SIZE))
    with host.connect() as cache:
        cache.save(cold, blocks_of(cold))
        cache.save(TOKENS, blocks_of(TOKENS))
        assert cache.match(TOKENS) == len(TOKENS)
        assert eventually(lambda: on_disk(host) == BLOCKS)
        assert cache.match(cold[:4]) == 4
        assert eventually(lambda: on_disk(host) == BLOCKS + 1)


def push_out(host: Host, cache: kvshare.Cache) -> None:
    """Save so much else that the arena has none of `TOKENS` any more."""
    hashes = keys.chain(TOKENS, BLOCK_SIZE)
    assert host.node is not None
    for turn in range(1, 40):
        tokens = list(range(turn * 10_000, turn * 10_000 + 100 * BLOCK_SIZE))
        cache.save(tokens, blocks_of(tokens))
        held = {block.key for block in host.node.memory.inventory() if block.region == BLOCK_BYTES}
        if held.isdisjoint(PREFIX + block_hash for block_hash in hashes):
            return
    raise AssertionError("the arena keeps them")


def test_a_block_that_left_the_arena_is_read_from_the_disk_by_its_own_engine_and_by_a_peer(cluster: Cluster, disk) -> None:
    cluster.start_directory()
    a = cluster.host("a", **disk).start()
    b = cluster.host("b", warm_bytes=0, lookup_seconds=PATIENT, transfer_seconds=PATIENT).start()
    fill(a)
    with a.connect() as giver, b.connect() as taker:
        push_out(a, giver)
        assert eventually(lambda: load_all(taker) == len(TOKENS))  # once the directory has heard where they are now
        assert counter(a, "promoted_blocks") == 0  # the peer was served from the disk itself
        assert b.node is not None
        assert "a disk" in b.node.status().paths
        assert load_all(giver) == len(TOKENS)
        assert counter(a, "promoted_blocks") >= BLOCKS


def test_a_sealed_disk_serves_its_node_and_peers_until_the_key_is_gone(cluster: Cluster, disk, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    (tmp_path / "keys").mkdir(mode=0o700)
    sealed = disk | {"keys_dir": str(tmp_path / "keys")}
    cluster.start_directory()
    first = cluster.host("a", **sealed).start()
    fill(first)
    first.stop()
    data = next(Path(str(disk["disk_dir"])).glob("*.data")).read_bytes()
    assert not any(block.tobytes() in data for block in blocks_of(TOKENS))
    a = cluster.host("a", **sealed).start()
    b = cluster.host("b", warm_bytes=0, lookup_seconds=PATIENT, transfer_seconds=PATIENT).start()
    with b.connect() as taker:
        assert eventually(lambda: load_all(taker) == len(TOKENS))
    with a.connect() as cache:
        assert load_all(cache) == len(TOKENS)
    a.stop()
    for path in (tmp_path / "keys").iterdir():
        path.unlink()
    again = cluster.host("a", **sealed).start()
    with again.connect() as cache:
        assert eventually(lambda: on_disk(again) == BLOCKS)
        assert cache.match(TOKENS) == 0
        assert eventually(lambda: on_disk(again) < BLOCKS)


def damage(folder: str, slots: range) -> None:
    """Turn a byte in each of these slots of the data file."""
    path = next(Path(folder).glob("*.data"))
    with path.open("r+b") as file:
        for slot in slots:
            file.seek(slot * BLOCK_BYTES + 77)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))


def test_damaged_blocks_are_misses_for_everybody_and_leave_the_disk(cluster: Cluster, disk) -> None:
    cluster.start_directory()
    first = cluster.host("a", **disk).start()
    fill(first)
    first.stop()
    damage(str(disk["disk_dir"]), range(BLOCKS))
    a = cluster.host("a", **disk).start()
    b = cluster.host("b", warm_bytes=0, lookup_seconds=PATIENT).start()
    with b.connect() as taker:
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS))
        assert load_all(taker) == 0
        assert eventually(lambda: on_disk(a) == 0)
        assert eventually(lambda: taker.match(TOKENS) == 0)
    with a.connect() as cache:
        assert cache.match(TOKENS) == 0


def test_a_damaged_block_in_the_middle_costs_what_comes_behind_it(cluster: Cluster, disk) -> None:
    first = cluster.host("a", **disk).start()
    fill(first)
    first.stop()
    damage(str(disk["disk_dir"]), range(20, 21))
    again = cluster.host("a", **disk).start()
    with again.connect() as cache:
        assert eventually(lambda: on_disk(again) == BLOCKS)
        assert 0 < cache.match(TOKENS) < len(TOKENS)
        assert 0 < load_all(cache) < len(TOKENS)


class Stall:
    """Makes calls on files block until `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._answers = threading.Event()
        self.waiting = threading.Event()

    def begin(self, name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            self.waiting.set()
            self._answers.wait()
            return real(*arguments)

        self._monkeypatch.setattr(disk_io.os, name, call)

    def release(self) -> None:
        self._answers.set()


@pytest.fixture
def stall(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stall]:
    made = Stall(monkeypatch)
    yield made
    made.release()


def test_a_disk_that_stalls_at_reads_is_a_miss_and_comes_back(cluster: Cluster, disk, stall: Stall) -> None:
    first = cluster.host("a", **disk).start()
    fill(first)
    first.stop()
    host = cluster.host("a", **disk | {"disk_seconds": 0.3, "lookup_seconds": 0.2}).start()
    with host.connect() as cache:
        assert eventually(lambda: on_disk(host) == BLOCKS)
        stall.begin("preadv")
        assert cache.match(TOKENS) == 0
        assert stall.waiting.is_set()
        for _ in range(3):
            assert cache.match(TOKENS) == 0  # asked and answered without the disk
        more = list(range(9000, 9000 + 8 * BLOCK_SIZE))
        assert cache.save(more, blocks_of(more)) == 8  # the arena works on
        assert load_all(cache, more) == len(more)
        stall.release()
        assert eventually(lambda: cache.match(TOKENS) == len(TOKENS))
        assert load_all(cache) == len(TOKENS)


def test_a_disk_that_stalls_at_writes_holds_up_nobody(cluster: Cluster, disk, stall: Stall) -> None:
    host = cluster.host("a", **disk | {"disk_seconds": 0.3}).start()
    with host.connect() as cache:
        stall.begin("pwritev")
        assert cache.save(TOKENS, blocks_of(TOKENS)) == BLOCKS
        assert stall.waiting.wait(10.0)
        more = list(range(9000, 9000 + 8 * BLOCK_SIZE))
        assert cache.save(more, blocks_of(more)) == 8
        assert load_all(cache) == len(TOKENS)
        assert load_all(cache, more) == len(more)
        assert on_disk(host) == 0
        stall.release()
        again = list(range(7000, 7000 + 8 * BLOCK_SIZE))
        cache.save(again, blocks_of(again))
        assert eventually(lambda: on_disk(host) >= 8)


def test_a_peer_whose_disk_stalls_costs_a_bounded_wait(cluster: Cluster, disk, stall: Stall) -> None:
    cluster.start_directory()
    a = cluster.host("a", **disk | {"disk_seconds": 0.5}).start()
    b = cluster.host("b", warm_bytes=0, lookup_seconds=PATIENT).start()
    fill(a)
    with a.connect() as giver, b.connect() as taker:
        push_out(a, giver)
        assert eventually(lambda: load_all(taker) == len(TOKENS))
        stall.begin("preadv")
        assert load_all(taker) == 0
        assert stall.waiting.is_set()
        stall.release()
        assert eventually(lambda: load_all(taker) == len(TOKENS))


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_is_said_once_and_the_arena_serves(cluster, disk, fault, monkeypatch, caplog) -> None:
    def refuse(*_: object) -> int:
        raise OSError(fault, os.strerror(fault))

    host = cluster.host("a", **disk).start()
    fill(host)
    monkeypatch.setattr(disk_io.os, "pwritev", refuse)
    with host.connect() as cache:
        for start in (1000, 2000, 3000):
            tokens = list(range(start, start + 8 * BLOCK_SIZE))
            cache.save(tokens, blocks_of(tokens))
            assert load_all(cache, tokens) == len(tokens)
        assert eventually(lambda: counter(host, "demotion_failed") >= 24)
        assert load_all(cache) == len(TOKENS)
    assert on_disk(host) == BLOCKS
    said = [record for record in caplog.records if "disk region" in record.getMessage()]
    assert len(said) == 1


def test_a_disk_folder_that_cannot_be_had_is_said_and_the_node_does_without(cluster: Cluster, disk, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("no folder")
    host = cluster.host("a", **disk | {"disk_dir": str(tmp_path / "file" / "disk")}).start()
    assert any("disk_dir" in record.getMessage() for record in caplog.records)
    with host.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS))
        assert load_all(cache) == len(TOKENS)


def test_a_second_node_is_refused_the_folder_of_another(cluster: Cluster, disk) -> None:
    cluster.host("a", **disk).start()
    second = cluster.host("b", **disk)
    with pytest.raises(ConfigError, match="disk_dir"):
        second.start()
    second.node = None


def test_two_askers_share_the_reads(cluster: Cluster, disk) -> None:
    first = cluster.host("a", **disk).start()
    fill(first)
    first.stop()
    host = cluster.host("a", **disk).start()
    with host.connect() as one, host.connect() as two:
        assert eventually(lambda: on_disk(host) == BLOCKS)
        threads = [threading.Thread(target=cache.match, args=(TOKENS,)) for cache in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert load_all(one) == len(TOKENS) == load_all(two)
        assert counter(host, "promoted_blocks") == BLOCKS


def ask(session: Session, fetch_seconds: float) -> int:
    """Leading blocks of `TOKENS` by a question that may wait for the disk so long."""
    question = session.ask(PREFIX, keys.chain(TOKENS, BLOCK_SIZE), 0.0, fetch_seconds)
    pause = threading.Event()
    while (count := question.available(0)) is None:
        pause.wait(0.001)
    return count


def test_a_question_waits_longer_for_the_disk_when_that_pays_and_not_when_it_does_not(cluster, disk, stall: Stall) -> None:
    first = cluster.host("a", **disk).start()
    fill(first)
    first.stop()
    host = cluster.host("a", **disk | {"lookup_seconds": 0.1}).start()
    session = Session.connect(host.settings, SPACE, engine="test", block_bytes=BLOCK_BYTES)
    try:
        assert eventually(lambda: on_disk(host) == BLOCKS)
        stall.begin("preadv")
        assert ask(session, 0.05) == 0  # computing takes next to nothing
        stall.release()
        assert eventually(lambda: ask(session, 1000.0) == BLOCKS)
    finally:
        session.close()


def test_what_nobody_waits_for_any_more_is_not_read(cluster, disk, stall: Stall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare.promotion.BATCH_BYTES", 8 * BLOCK_BYTES)
    first = cluster.host("a", **disk).start()
    fill(first)
    first.stop()
    host = cluster.host("a", **disk | {"disk_threads": 1}).start()
    session = Session.connect(host.settings, SPACE, engine="test", block_bytes=BLOCK_BYTES)
    try:
        assert eventually(lambda: on_disk(host) == BLOCKS)
        stall.begin("preadv")
        assert ask(session, 0.05) == 0
        stall.release()
        assert eventually(lambda: counter(host, "promoted_blocks") == 8)  # the batch that was under way
        assert ask(session, 1000.0) == BLOCKS
        assert counter(host, "promoted_blocks") == BLOCKS
    finally:
        session.close()


def test_blocks_of_the_object_store_are_found_by_a_machine_that_starts_with_nothing(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    shared = {"object_url": f"file://{tmp_path}/bucket", "disk_admit": "all", "lookup_seconds": PATIENT}
    (tmp_path / "bucket").mkdir()
    a = cluster.host("a", **shared).start()
    with a.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: counter(a, "object_blocks") == BLOCKS)
    a.stop()
    b = cluster.host("b", **shared).start()
    with b.connect() as cache:
        assert eventually(lambda: counter(b, "object_blocks") == BLOCKS)
        assert cache.match(TOKENS) == len(TOKENS)
        assert load_all(cache) == len(TOKENS)


def test_who_leaves_keeps_in_the_object_store_what_only_its_disk_has(cluster: Cluster, disk, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    (tmp_path / "bucket").mkdir()
    store = {"object_url": f"file://{tmp_path}/bucket"}
    a = cluster.host("a", **disk | store).start()
    fill(a)
    with a.connect() as cache:
        push_out(a, cache)
    assert a.node is not None
    held = len(list(a.node.memory.inventory()))
    drained = a.node.drain(60.0)
    assert drained is not None and (drained.kept, drained.lost) == (held, 0)
    assert counter(a, "object_blocks") == held
    a.stop()
    b = cluster.host("b", lookup_seconds=PATIENT, **store).start()
    with b.connect() as cache:
        assert eventually(lambda: counter(b, "object_blocks") == held)
        assert load_all(cache) == len(TOKENS)


def test_a_restarted_cluster_serves_from_disk_what_its_nodes_kept(cluster: Cluster, disk) -> None:
    """Scale to zero and back, in small: directory and nodes anew; a peer without a disk is warm from the other's."""
    cluster.start_directory()
    first = cluster.host("a", **disk).start()
    fill(first)
    first.stop()
    assert cluster.directory is not None
    cluster.directory.stop()
    directory = cluster.start_directory()
    a = cluster.host("a", **disk).start()
    b = cluster.host("b", lookup_seconds=PATIENT, transfer_seconds=PATIENT, warm_bytes=0).start()
    assert eventually(lambda: directory.status().keys == BLOCKS)
    assert a.node is not None
    kinds = [region.kind for region in a.node.description.regions]
    assert "disk" in kinds
    with b.connect() as taker:
        assert load_all(taker) == len(TOKENS)
