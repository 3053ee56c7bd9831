"""An onlooker asks a real directory over TCP. Goal: it is told who holds what, by one shard or several; a directory that is
away, silent or comes back costs it an answer, never more time than it gave. Method: servers in this process, nodes by hand.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest

from kvshare import wire
from kvshare.cluster_messages import Declare, FromDirectory, Join, Publish
from kvshare.config import Settings
from kvshare.directory_server import DirectoryServer
from kvshare.fingerprints import ALL_PARTS, index_seed, shard_of
from kvshare.keys import Namespace, prefix
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.onlooker import KEYS_MAX, Onlooker
from kvshare.overlap import Held
from kvshare.places import DISK, NodeDescription, RegionDescription, Stored
from kvshare.runs import keys_of, runs_of

SETTINGS = Settings(secret="a secret of the cluster", heartbeat_seconds=0.5)
SECONDS = 10.0  # longer than anything here takes; only a failure waits for it
SPACE = Namespace(
    weights="w", dtype="d", kv_dtype="k", block_size=16, page_bytes=1, layers=1, kv_heads=1, head_size=1, hash_algorithm="h",
    hash_seed="", packing="p", label="model",
)  # fmt: skip


def chain(count: int, seed: int = 1) -> list[bytes]:
    rng = random.Random(seed)
    return [prefix(bytes([seed]) * 16) + rng.randbytes(32) for _ in range(count)]


class Node:
    """Joins a shard and publishes; it never reads but what it waits for."""

    def __init__(self, server: DirectoryServer, name: str, shard: int, shards: int) -> None:
        self.name = name
        self.socket = wire.connect_tcp(server.endpoint, SETTINGS.secret, "directory", SECONDS)
        self.socket.settimeout(SECONDS)
        regions = tuple(RegionDescription(name, i, 100, 9, name, "", "", "h:1", kind) for i, kind in ((1, "host"), (2, DISK)))
        self.send(Join(PROTOCOL_VERSION, NodeDescription(name, 1, name, "h:1", regions), False, shard, shards))

    def send(self, message: Message) -> None:
        wire.send_frame(self.socket, msgspec.msgpack.encode(message))

    def wait_for(self, kind: type[Message]) -> None:
        decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDirectory)
        while not isinstance(decoder.decode(wire.receive_frame(self.socket, 1 << 26)), kind):
            pass

    def publish(self, keys: list[bytes], region: int = 1) -> None:
        stored = runs_of(Stored(key, region, slot, 2, 8) for slot, key in enumerate(keys))
        self.send(Publish(self.name, 1, 1, ALL_PARTS, False, stored, [], 0))


def eventually(question: Callable[[], Any], wanted: Any) -> Any:
    deadline = time.monotonic() + SECONDS
    while (answer := question()) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer


class Cluster:
    """Shards of a directory, and an onlooker that finds them."""

    def __init__(self, shards: int) -> None:
        self.servers = [DirectoryServer(SETTINGS, shard, shards) for shard in range(shards)]
        for server in self.servers:
            server.start()
        self.onlooker = Onlooker(SETTINGS, lambda shard: self.servers[shard].endpoint, shards)
        self.nodes: list[Node] = []

    def hold(self, name: str, keys: list[bytes], region: int = 1) -> None:
        shards = len(self.servers)
        belongs = shard_of(keys_of(keys), index_seed(SETTINGS.secret), shards)
        for shard, server in enumerate(self.servers):
            node = Node(server, name, shard, shards)
            node.publish([key for key, mine in zip(keys, belongs, strict=True) if mine == shard], region)
            self.nodes.append(node)

    def depths(self, keys: list[bytes], seconds: float = SECONDS) -> dict[str, Held] | None:
        return self.onlooker.depths(keys_of(keys), seconds).result(SECONDS * 2)

    def close(self) -> None:
        self.onlooker.close()
        for node in self.nodes:
            node.socket.close()
        for server in self.servers:
            server.stop()


@pytest.fixture(params=[1, 3])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = Cluster(request.param)
    yield made
    made.close()


def test_it_is_told_how_much_of_a_chain_each_node_holds_and_on_what(cluster: Cluster) -> None:
    keys = chain(90)
    cluster.hold("a", keys[:60])
    cluster.hold("b", keys[:30], region=2)
    cluster.hold("c", chain(90, 2))
    assert eventually(lambda: cluster.depths(keys), {"a": Held(60), "b": Held(30, 30)}) == {"a": Held(60), "b": Held(30, 30)}
    assert cluster.depths([]) == {}


def test_questions_from_many_threads_are_told_apart(cluster: Cluster) -> None:
    chains = [chain(20, seed) for seed in range(1, 7)]
    for i, keys in enumerate(chains):
        cluster.hold(f"n{i}", keys)
    assert all(eventually(partial(cluster.depths, keys), {f"n{i}": Held(20)}) for i, keys in enumerate(chains))
    wrong: list[Any] = []

    def ask(i: int) -> None:
        for _ in range(20):
            answer = cluster.depths(chains[i])
            if answer != {f"n{i}": Held(20)}:
                wrong.append(answer)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_of_a_longer_chain_than_a_question_takes_it_is_known_about_how_far_it_is_held(cluster: Cluster) -> None:
    keys = chain(10 * KEYS_MAX)
    cluster.hold("a", keys)
    cluster.hold("b", keys[: KEYS_MAX * 5 + 3])
    assert eventually(lambda: len(cluster.depths(keys) or ()), 2) == 2
    held = eventually(lambda: (cluster.depths(keys) or {}).get("a"), Held(10 * KEYS_MAX))
    assert held == Held(10 * KEYS_MAX)
    assert 0 <= KEYS_MAX * 5 + 3 - (cluster.depths(keys) or {})["b"].blocks <= 11


def test_namespaces_are_those_that_engines_declared(cluster: Cluster) -> None:
    node = Node(cluster.servers[0], "a", 0, len(cluster.servers))
    cluster.nodes.append(node)
    node.send(Declare(1, SPACE))
    assert eventually(lambda: cluster.onlooker.namespaces(SECONDS).result(SECONDS * 2), [SPACE]) == [SPACE]


def test_it_stays_connected_while_it_asks_nothing(cluster: Cluster) -> None:
    assert eventually(lambda: cluster.depths(chain(3)), {}) == {}
    time.sleep(4 * SETTINGS.heartbeat_seconds)
    assert cluster.depths(chain(3)) == {}


def test_a_directory_that_is_away_gives_no_answer_and_is_found_again() -> None:
    cluster = Cluster(1)
    try:
        keys = chain(5)
        cluster.hold("a", keys)
        assert eventually(lambda: cluster.depths(keys), {"a": Held(5)})
        cluster.servers[0].stop()
        assert eventually(lambda: cluster.depths(keys), None) is None
        cluster.servers[0] = DirectoryServer(SETTINGS)
        cluster.servers[0].start()
        cluster.hold("a", keys)
        assert eventually(lambda: cluster.depths(keys), {"a": Held(5)}) == {"a": Held(5)}
    finally:
        cluster.close()


def test_one_shard_of_several_that_is_away_costs_precision_only() -> None:
    cluster = Cluster(3)
    try:
        keys = chain(60)
        cluster.hold("a", keys)
        assert eventually(lambda: cluster.depths(keys), {"a": Held(60)}) == {"a": Held(60)}
        cluster.servers[1].stop()
        assert eventually(lambda: cluster.depths(keys), {"a": Held(60)}) == {"a": Held(60)}
    finally:
        cluster.close()


def test_a_directory_that_accepts_and_is_silent_gives_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        onlooker = Onlooker(SETTINGS, lambda _: f"127.0.0.1:{silent.getsockname()[1]}")
        try:
            assert onlooker.depths(keys_of(chain(3)), 0.05).result(SECONDS) is None
        finally:
            onlooker.close()
            onlooker.close()


def test_a_resolver_that_fails_is_asked_again() -> None:
    server = DirectoryServer(SETTINGS)
    server.start()
    calls: list[int] = []

    def resolve(shard: int) -> str:
        calls.append(shard)
        if len(calls) < 3:
            raise RuntimeError("no idea")
        return server.endpoint

    onlooker = Onlooker(SETTINGS, resolve)
    try:
        assert eventually(lambda: onlooker.depths(keys_of(chain(3)), SECONDS).result(SECONDS), {}) == {}
    finally:
        onlooker.close()
        server.stop()


def test_a_directory_that_hangs_is_waited_for_no_longer_than_was_given() -> None:
    """It has shaken hands, then answers nothing: every question ends, and none is left behind."""
    hung = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        wire.accept_tcp(connection, SETTINGS.secret)
        hung.wait(SECONDS * 2)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    onlooker = Onlooker(SETTINGS, lambda _: f"127.0.0.1:{server.getsockname()[1]}")
    try:
        for _ in range(5):
            assert onlooker.depths(keys_of(chain(3)), 0.05).result(SECONDS) is None
    finally:
        onlooker.close()
        hung.set()
        thread.join()
        server.close()
