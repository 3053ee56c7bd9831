"""Several hosts and a directory: blocks are found and pulled over tcp; deaths of nodes and directory are misses."""

from __future__ import annotations

import signal

import numpy as np

from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, Cluster, blocks_of, eventually

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
