"""One host: what is saved through one session is loaded, verified, through another; faults of the node are misses."""

from __future__ import annotations

import signal
import socket
from dataclasses import replace

import numpy as np
import pytest

import kvshare
from kvshare.messages import AskStatus
from kvshare.session import call
from tests.node.conftest import BLOCK_BYTES, BLOCK_SIZE, SPACE, Cluster, blocks_of, eventually

TOKENS = list(range(100, 100 + 10 * BLOCK_SIZE))


def test_blocks_saved_by_one_session_are_loaded_by_another(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    blocks = blocks_of(TOKENS)
    with host.connect() as first:
        assert first.match(TOKENS) == 0
        assert first.save(TOKENS, blocks) == 10
        assert first.save(TOKENS, blocks) == 0  # known blocks are not written twice
    with host.connect() as second:
        assert eventually(lambda: second.match([*TOKENS, 1, 2]) == len(TOKENS))
        filled = np.zeros_like(blocks)
        assert second.load(TOKENS, filled) == len(TOKENS)
        assert (filled == blocks).all()
        assert second.match([7, *TOKENS[1:]]) == 0  # another first token, another chain


def test_a_prefix_is_shared_and_the_rest_is_not(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    longer = [*TOKENS[: 6 * BLOCK_SIZE], *range(900, 900 + 4 * BLOCK_SIZE)]
    with host.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS))
        assert cache.match(longer) == 6 * BLOCK_SIZE


def test_salt_and_lora_never_cross(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    with host.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS), salt="tenant a")
        cache.save(TOKENS, blocks_of(TOKENS), lora=b"digest of an adapter")
        assert cache.match(TOKENS, salt="tenant a") == len(TOKENS)
        assert cache.match(TOKENS, lora=b"digest of an adapter") == len(TOKENS)
        assert cache.match(TOKENS) == 0
        assert cache.match(TOKENS, salt="tenant b") == 0
        assert cache.match(TOKENS, salt="tenant a", lora=b"digest of an adapter") == 0


def test_unequal_namespaces_share_nothing_and_the_engine_is_told_which_fields_differ(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    from kvshare.session import Session

    other = replace_namespace(weights="blake2b:2", label="other model")
    with host.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS))
        session = Session.connect(host.settings, other, engine="other", block_bytes=BLOCK_BYTES)
        assert len(session.notices) == 1
        assert "weights: 'blake2b:2' here, 'blake2b:1' there" in session.notices[0]
        assert "block_size" not in session.notices[0]
        session.close()
    with host.connect(other) as cache:
        assert cache.match(TOKENS) == 0


def replace_namespace(**changes: str) -> kvshare.Namespace:
    import msgspec

    return msgspec.structs.replace(SPACE, **changes)


def test_torch_tensors_are_taken_as_they_are(cluster: Cluster) -> None:
    torch = pytest.importorskip("torch")
    host = cluster.host("a").start()
    blocks = torch.arange(10 * BLOCK_BYTES // 4, dtype=torch.float32).reshape(10, -1)
    with host.connect() as cache:
        assert cache.save(TOKENS, blocks) == 10
        filled = torch.zeros_like(blocks)
        assert cache.load(TOKENS, filled) == len(TOKENS)
        assert torch.equal(filled, blocks)
        with pytest.raises(ValueError, match="must hold 8192 bytes"):
            cache.save(TOKENS, torch.zeros(10, 3))


def test_a_corrupted_block_is_a_miss_and_is_taken_out(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    with host.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS))
        assert host.node is not None
        arena = host.node.memory.arenas[BLOCK_BYTES]
        data = np.memmap(arena.data_path, np.uint8, "r+")
        slot = next(block.slot for block in host.node.memory.inventory() if block.key.endswith(chain()[3]))
        data[slot * BLOCK_BYTES + 77] ^= 1
        filled = np.zeros((10, BLOCK_BYTES), np.uint8)
        assert cache.load(TOKENS, filled) == 3 * BLOCK_SIZE
        assert (filled[:3] == blocks_of(TOKENS)[:3]).all()
        assert eventually(lambda: cache.match(TOKENS) == 3 * BLOCK_SIZE)
        assert eventually(lambda: cache.save(TOKENS, blocks_of(TOKENS)) == 1)  # and can be saved anew
        assert eventually(lambda: cache.match(TOKENS) == len(TOKENS))


def chain() -> list[bytes]:
    from kvshare.keys import chain as hashes

    return hashes(TOKENS, BLOCK_SIZE)


def test_a_full_arena_evicts_and_never_fails(cluster: Cluster) -> None:
    host = cluster.host("a").start()  # 4 MiB: 512 blocks
    with host.connect() as cache:
        for turn in range(8):
            tokens = list(range(turn * 1000, turn * 1000 + 100 * BLOCK_SIZE))
            assert cache.save(tokens, blocks_of(tokens)) >= 90
        last = list(range(7000, 7000 + 100 * BLOCK_SIZE))
        filled = np.zeros((100, BLOCK_BYTES), np.uint8)
        loaded = cache.load(last, filled) // BLOCK_SIZE
        assert loaded >= 50
        assert (filled[:loaded] == blocks_of(last)[:loaded]).all()


def test_blocks_outlive_a_killed_node_and_the_session_attaches_again(cluster: Cluster) -> None:
    host = cluster.host("a").spawn()
    cache = host.connect()
    blocks = blocks_of(TOKENS)
    assert cache.save(TOKENS, blocks) == 10
    host.kill()
    assert eventually(lambda: cache.match(TOKENS) == 0)  # a miss, at once
    assert cache.load(TOKENS, np.zeros_like(blocks)) == 0
    assert cache.save(TOKENS, blocks) == 0
    host.spawn()
    assert eventually(lambda: cache.match(TOKENS) == len(TOKENS), 15)
    filled = np.zeros_like(blocks)
    assert cache.load(TOKENS, filled) == len(TOKENS)
    assert (filled == blocks).all()
    cache.close()


def test_a_stopped_node_delays_a_lookup_by_no_more_than_its_limit(cluster: Cluster) -> None:
    host = cluster.host("a", lookup_seconds=0.2).spawn()
    with host.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS))
        assert host.process is not None
        host.process.send_signal(signal.SIGSTOP)
        try:
            assert cache.match(list(range(500, 540))) == 0  # unknown: the question is never answered
            assert cache.match(TOKENS) == len(TOKENS)  # known: answered from memory, loaded from the mapped arena
            assert cache.load(TOKENS, np.zeros((10, BLOCK_BYTES), np.uint8)) == len(TOKENS)
        finally:
            host.process.send_signal(signal.SIGCONT)


def test_slots_of_a_session_that_dies_while_saving_come_back(cluster: Cluster) -> None:
    from kvshare.messages import Reserve, Reserved
    from kvshare.session import Session

    host = cluster.host("a", arena_bytes=1 << 20, quarantine_seconds=0.3).start()
    session = Session.connect(host.settings, SPACE, engine="dies", block_bytes=BLOCK_BYTES)
    keys = [bytes(26) + bytes([i]) for i in range(128)]  # all slots of 1 MiB
    answer = session.call(lambda ask: Reserve(ask, BLOCK_BYTES, keys, BLOCK_BYTES), 2.0)
    assert isinstance(answer, Reserved)
    assert sum(slot >= 0 for slot in answer.slots) == 128
    with host.connect() as cache:
        assert cache.save(TOKENS, blocks_of(TOKENS)) == 0  # nothing to be had: a save is dropped, nothing else
        session.close()
        assert eventually(lambda: cache.save(TOKENS, blocks_of(TOKENS)) == 10)


def test_garbage_on_the_socket_harms_nobody(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    with host.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS))
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", b"\x04\0\0\0abcd"):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(5.0)
                stranger.connect(host.settings.socket_path)
                stranger.sendall(garbage)
                if garbage[:1] != b"G":
                    assert stranger.recv(100) == b""
        assert cache.match(TOKENS) == len(TOKENS)


def test_a_second_node_of_the_same_name_is_refused_with_the_remedy(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    from kvshare.node import Node

    with pytest.raises(kvshare.ConfigError, match=r"'node_name' cannot be 'a'.*kvshare stop"):
        Node(host.settings).start()


def test_status_counts_sessions_and_blocks(cluster: Cluster) -> None:
    host = cluster.host("a").start()
    with host.connect() as cache:
        cache.save(TOKENS, blocks_of(TOKENS))
        status = call(host.settings, AskStatus, 2.0)
        assert status.node.node == "a"
        assert status.sessions == 2  # the cache's and this question's
        assert [region.region for region in status.node.regions] == [BLOCK_BYTES]


def test_without_a_node_connecting_ends_in_time_and_says_what_to_do(cluster: Cluster) -> None:
    settings = replace(cluster.settings("nobody"), attach_seconds=0.2)
    with pytest.raises(kvshare.Unavailable, match="start one with 'kvshare node'"):
        kvshare.connect(SPACE, block_bytes=BLOCK_BYTES, **{n: getattr(settings, n) for n in settings.__dataclass_fields__})
