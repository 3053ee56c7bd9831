"""Several hosts and a directory: blocks are found and pulled over tcp; deaths of nodes and directory are misses."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

from kvshare import keys, processes
from kvshare.device import STRIDE, DeviceTable, tag_of
from kvshare.messages import Expose, Shown
from kvshare.places import ProcessMemory, Stored
from kvshare.session import Session
from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, SPACE, Cluster, blocks_of, eventually

TOKENS = list(range(100, 100 + 40 * BLOCK_SIZE))


def load_all(cache, tokens=TOKENS) -> int:
    """Tokens loaded; what was loaded has the right bytes."""
    blocks = blocks_of(tokens)
    filled = np.zeros_like(blocks)
    count = cache.load(tokens, filled) // BLOCK_SIZE
    assert (filled[:count] == blocks[:count]).all()
    return count * BLOCK_SIZE


def test_a_block_saved_on_one_host_is_pulled_by_another_over_tcp(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a").start(), cluster.host("b", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS))
        assert load_all(taker) == len(TOKENS)


def test_the_hosts_of_one_machine_share_by_memory_when_allowed(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = (cluster.host(name, transports="shm", warm_bytes=0).start() for name in "ab")
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS))
        assert load_all(taker) == len(TOKENS)


def test_an_engines_block_is_read_only_as_the_one_that_it_was_completed_as(cluster: Cluster, tmp_path: Path) -> None:
    """An index may take a key for another's, and device blocks have no checksum: their generations carry tags."""
    cluster.start_directory()
    a, b = (cluster.host(name, transports="process", warm_bytes=0).start() for name in "ab")
    named = [keys.prefix(SPACE.family()) + each for each in keys.chain(TOKENS[: 4 * BLOCK_SIZE], BLOCK_SIZE)]
    table = DeviceTable.create(str(tmp_path / "generations"), len(named), BLOCK_BYTES)
    slots, blocks = np.arange(len(named)), blocks_of(TOKENS)[: len(named)].copy()
    table.begin(slots)
    begun, tags = table.generations(slots), np.array([tag_of(key) for key in named], np.uint64)
    tags[3] = tag_of(named[3]) ^ 1  # another key's
    assert table.finish(slots, begun, tags).all()
    place = os.getpid(), processes.started(os.getpid()), processes.pid_space(), "DRAM", 0
    memory = ProcessMemory(*place, (blocks.ctypes.data,), (BLOCK_BYTES,), (BLOCK_BYTES,), table.table_address, STRIDE)
    session = Session.connect(a.settings, SPACE, engine="engine", block_bytes=BLOCK_BYTES)
    session.send(Expose(5, table.path, len(named), BLOCK_BYTES, memory))
    told = zip(named, table.generations(slots).tolist(), strict=True)
    session.send(Shown([Stored(key, 5, slot, told, BLOCK_BYTES) for slot, (key, told) in enumerate(told)], []))
    assert eventually(lambda: cluster.directory is not None and cluster.directory.status().keys == len(named))
    with b.connect() as taker:
        assert eventually(lambda: taker.match(TOKENS) == 3 * BLOCK_SIZE)
        filled = np.zeros_like(blocks)
        assert taker.load(TOKENS[: 4 * BLOCK_SIZE], filled) == 3 * BLOCK_SIZE and (filled[:3] == blocks[:3]).all()
    session.close()


def test_an_engine_that_attaches_finds_the_hot_blocks_in_its_own_node(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a").start(), cluster.host("b").start()
    with a.connect() as giver:
        giver.save(TOKENS, blocks_of(TOKENS))
        for _ in range(3):
            assert giver.match(TOKENS) == len(TOKENS)
        cold = list(range(5000, 5000 + 8 * BLOCK_SIZE))
        giver.save(cold, blocks_of(cold))  # never looked up: not hot
        assert eventually(lambda: cluster.directory is not None and cluster.directory.status().keys >= 48)
        with b.connect() as joiner:
            state = joiner.wait_warm(20.0)
            assert state.done
            assert (state.wanted, state.present, state.pulled) == (40, 0, 40)
            assert state.bytes_pulled == 40 * BLOCK_BYTES
            assert state.donors == {"a": 40}
            assert b.node is not None
            held = {block.key for block in b.node.memory.inventory()}
            assert len(held) == 40
            a.stop()  # nothing is needed from the donor any more
            assert load_all(joiner) == len(TOKENS)


def test_a_warm_plan_takes_from_several_donors_and_keeps_to_its_bytes(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a").start(), cluster.host("b").start()
    c = cluster.host("c", warm_bytes=20 * BLOCK_BYTES).start()
    with a.connect() as one, b.connect() as two:
        one.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: two.match(TOKENS) == len(TOKENS))
        two.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: b.node is not None and len(list(b.node.memory.inventory())) == 40)
        assert one.match(TOKENS) == len(TOKENS)
        assert eventually(lambda: cluster.directory is not None and cluster.directory.status().counters["locations"] == 80)
        with c.connect() as joiner:
            assert eventually(lambda: joiner.wait_warm(5.0).pulled > 0)
            state = joiner.wait_warm(20.0)
            assert 0 < state.bytes_pulled <= 20 * BLOCK_BYTES
            assert set(state.donors) == {"a", "b"}


def test_a_dead_node_is_forgotten_by_everyone_and_its_blocks_are_misses(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    a, b = cluster.host("a").spawn(), cluster.host("b", warm_bytes=0).start()
    with b.connect() as taker:
        giver = a.connect()
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS))
        a.kill()
        assert load_all(taker) in (0, len(TOKENS))  # never a hang, never a wrong byte
        assert eventually(lambda: taker.match(TOKENS) == 0)
        assert [node.node for node in directory.status().nodes] == ["b"]
        giver.close()
        a.spawn()  # comes back with its blocks, under a new epoch
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS), 15)
        assert load_all(taker) == len(TOKENS)


def test_a_hung_peer_costs_a_bounded_wait(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a").spawn(), cluster.host("b", warm_bytes=0, transfer_seconds=0.5).start()
    with b.connect() as taker:
        giver = a.connect()
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS))
        assert a.process is not None
        a.process.send_signal(signal.SIGSTOP)
        assert load_all(taker) == 0
        a.process.send_signal(signal.SIGCONT)
        assert eventually(lambda: load_all(taker) == len(TOKENS))
        giver.close()


def test_a_stale_location_is_a_miss(cluster: Cluster) -> None:
    cluster.start_directory()
    a, b = cluster.host("a", publish_seconds=5.0).start(), cluster.host("b", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS), 15)
        for turn in range(1, 8):  # the directory won't hear for seconds that these pushed the first ones out
            tokens = list(range(turn * 10_000, turn * 10_000 + 100 * BLOCK_SIZE))
            giver.save(tokens, blocks_of(tokens))
        assert load_all(taker) < len(TOKENS)


def test_a_dead_directory_costs_nothing_but_peers_and_is_refilled_when_it_is_back(cluster: Cluster) -> None:
    directory = cluster.start_directory()
    port = int(directory.endpoint.rpartition(":")[2])
    a, b = cluster.host("a").start(), cluster.host("b", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as taker:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS))
        directory.stop()
        assert eventually(lambda: taker.match(TOKENS) == 0)
        assert load_all(giver) == len(TOKENS)  # the own node needs no directory
        more = list(range(9000, 9000 + 8 * BLOCK_SIZE))
        giver.save(more, blocks_of(more))
        cluster.start_directory(port)
        assert eventually(lambda: taker.match(TOKENS) == len(TOKENS), 15)
        assert eventually(lambda: taker.match(more) == len(more))


def test_a_node_with_another_secret_gets_nothing(cluster: Cluster) -> None:
    cluster.start_directory()
    a = cluster.host("a").start()
    b = cluster.host("b", secret="some other secret", warm_bytes=0).start()
    with a.connect() as giver, b.connect() as stranger:
        giver.save(TOKENS, blocks_of(TOKENS))
        assert stranger.match(TOKENS) == 0
        assert [node.node for node in cluster.directory.status().nodes] == ["a"]  # type: ignore[union-attr]
