"""Sockets around the directory. Goal: strangers and hung nodes harm nobody, the end is clean; method: real TCP on this host."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
import pytest

from kvshare import wire
from kvshare.cluster_messages import (
    AskDirectory,
    DirectoryStatus,
    Find,
    Found,
    FromDirectory,
    Join,
    NodeJoined,
    NodeLost,
    Publish,
    Resync,
    Welcome,
)
from kvshare.config import Settings
from kvshare.directory_server import DirectoryServer
from kvshare.errors import AuthenticationError, ConfigError, ProtocolError, Unavailable
from kvshare.fingerprints import ALL_PARTS
from kvshare.inventories import INVENTORIES_MAX
from kvshare.messages import PROTOCOL_VERSION, Message
from kvshare.places import NodeDescription, Stored
from kvshare.runs import keys_of, runs_of

SECRET = "a secret of the cluster"
KEY = bytes(58)
SECONDS = 10.0  # longer than anything here takes; only a failure waits for it

T = TypeVar("T", bound=Message)


def join(name: str, shard: int = 0, shards: int = 1) -> Join:
    return Join(PROTOCOL_VERSION, NodeDescription(name, 1, name, "127.0.0.1:1", ()), False, shard, shards)


class Client:
    """A node as the directory sees one: a socket and its messages."""

    def __init__(self, server: DirectoryServer, name: str = "") -> None:
        self.socket = wire.connect_tcp(server.endpoint, SECRET, "directory", SECONDS)
        self.socket.settimeout(SECONDS)
        self.decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromDirectory)
        self.name = name
        if name:
            self.send(join(name))
            self.receive(Welcome)
            assert self.receive(Resync).parts == ALL_PARTS

    def send(self, message: Message) -> None:
        wire.send_frame(self.socket, msgspec.msgpack.encode(message))

    def receive(self, kind: type[T]) -> T:
        message = self.decoder.decode(wire.receive_frame(self.socket, 1 << 26))
        assert isinstance(message, kind), message
        return message

    def publish(self, *keys: bytes) -> None:
        blocks = runs_of(Stored(key, 8, 0, 2, 8) for key in keys)
        self.send(Publish(self.name, 1, 1, ALL_PARTS, False, blocks, [], 0))

    def find(self, ask: int, *keys: bytes) -> list[list[str]]:
        """Names of nodes for each key."""
        self.send(Find(ask, keys_of(keys)))
        found = self.receive(Found)
        assert found.ask == ask
        return [[where.node for where in places] for places in found.places.locations()]

    def closed(self) -> bool:
        """The directory has ended this connection (what it sent before is passed over)."""
        try:
            while True:
                wire.receive_frame(self.socket, 1 << 26)
        except (ProtocolError, ConnectionError):
            return True

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def start() -> Iterator[Callable[..., DirectoryServer]]:
    servers: list[DirectoryServer] = []

    def make(**settings: Any) -> DirectoryServer:
        server = DirectoryServer(Settings.load({"secret": SECRET, **settings}, {}))
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        server.stop()
        assert server.join(0)


@pytest.fixture
def server(start: Callable[..., DirectoryServer]) -> DirectoryServer:
    return start()


@pytest.fixture
def connect(server: DirectoryServer) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(name: str = "", to: DirectoryServer = server) -> Client:
        clients.append(Client(to, name))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_nodes_join_publish_find_and_are_forgotten_when_their_connection_ends(
    server: DirectoryServer, connect: Callable[..., Client]
) -> None:
    a = connect("a")
    a.publish(KEY)
    eventually(lambda: server.status().keys == 1)
    b = connect("b")
    assert a.receive(NodeJoined).node.node == "b"
    assert b.find(3, KEY) == [["a"]]
    a.close()
    assert b.receive(NodeLost).node == "a"
    assert b.find(4, KEY) == [[]]


def test_a_supervisor_in_another_thread_reports_a_dead_node(server: DirectoryServer, connect: Callable[..., Client]) -> None:
    a, b = connect("a"), connect("b")
    server.node_lost("a")
    server.node_lost("nobody")
    assert b.receive(NodeLost).node == "a"
    assert a.closed()


def test_a_silent_node_is_forgotten_after_three_heartbeats(
    start: Callable[..., DirectoryServer], connect: Callable[..., Client]
) -> None:
    server = start(heartbeat_seconds=0.02)
    assert connect("a", server).closed()
    assert server.status().nodes == []


def test_who_does_not_know_the_secret_is_refused_and_told_once(
    server: DirectoryServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kvshare")
    for _ in range(2):
        with pytest.raises((AuthenticationError, ProtocolError, Unavailable)):
            wire.connect_tcp(server.endpoint, "another cluster's secret", "directory", SECONDS)
    eventually(lambda: "does not know the cluster's secret" in caplog.text)
    assert server.status().nodes == []
    assert caplog.text.count("does not know the cluster's secret") == 1


def test_a_connection_for_another_purpose_is_closed(server: DirectoryServer) -> None:
    with wire.connect_tcp(server.endpoint, SECRET, "data", SECONDS) as sock:
        sock.settimeout(SECONDS)
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n" * 20, b"\0" * 200, b"\xff\xff\xff\xff" * 50],
    ids=["http", "zeros", "ones"],
)
def test_garbage_on_the_port_harms_nobody(server: DirectoryServer, connect: Callable[..., Client], garbage: bytes) -> None:
    a = connect("a")
    with socket.create_connection(wire.split_endpoint(server.endpoint), SECONDS) as sock:
        sock.sendall(garbage)
        with pytest.raises((ConnectionError, ProtocolError)):
            while True:
                wire.receive_exactly(sock, 1)
    assert a.find(1, KEY) == [[]]


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",
        b"\3\0\0\0abc",
        b"\x0c\0\0\0" + msgspec.msgpack.encode(["Beat", "too many"]),
        b"\x0b\0\0\0" + b"\x99\xa7Publis\xe1\xe4\xe6",
    ],
    ids=["too long", "no message", "a field too many", "text that is none"],
)
def test_a_node_that_sends_nonsense_is_cut_off_and_told_as_lost(
    server: DirectoryServer, connect: Callable[..., Client], caplog: pytest.LogCaptureFixture, frame: bytes
) -> None:
    a, b = connect("a"), connect("b")
    a.socket.sendall(frame + bytes(16))
    assert b.receive(NodeLost).node == "a"
    assert a.closed()
    assert "a failure of its own" not in caplog.text


def test_a_node_that_does_not_read_is_cut_off(
    start: Callable[..., DirectoryServer], connect: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kvshare")
    server = start(message_bytes_max=1 << 16)
    giver = connect("giver", server)
    giver.publish(KEY)
    deaf = connect("deaf", server)
    with pytest.raises(OSError):
        while True:
            deaf.send(Find(1, keys_of([KEY] * 1000)))
    assert giver.receive(NodeJoined) and giver.receive(NodeLost).node == "deaf"
    assert "does not read" in caplog.text


def test_an_answer_over_the_limit_is_not_sent_and_its_asker_stays(
    start: Callable[..., DirectoryServer], connect: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kvshare")
    server = start(message_bytes_max=1 << 16)
    for name in "abc":  # so many that their places outgrow the question
        connect(name, server).publish(KEY)
    eventually(lambda: server.status().counters["locations"] == 3)
    asking = connect("asking", server)
    asking.send(Find(1, keys_of([KEY] * 1800)))
    asking.send(Find(2, keys_of([KEY])))
    assert asking.receive(Found).ask == 2
    assert "message_bytes_max" in caplog.text


def test_a_shard_is_joined_by_those_who_take_it_for_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "kvshare")
    server = DirectoryServer(Settings.load({"secret": SECRET}, {}), shard=1, shards=3)
    server.start()
    try:
        for shard, shards in ((0, 3), (1, 2)):
            client = Client(server)
            client.send(join("a", shard, shards))
            assert client.closed()
            client.close()
        client = Client(server)
        client.send(join("a", 1, 3))
        assert client.receive(Welcome).purges == []
        client.close()
        assert "connection 1 takes this for shard 0 of 3, it is shard 1 of 3" in caplog.text
    finally:
        server.stop()


def test_nodes_that_come_at_once_tell_what_they_hold_one_after_the_other(
    server: DirectoryServer, connect: Callable[..., Client]
) -> None:
    clients = []
    for number in range(INVENTORIES_MAX + 2):
        client = connect()
        client.name = f"n{number}"
        client.send(join(client.name))
        client.receive(Welcome)
        clients.append(client)
    eventually(lambda: server.status().counters["inventories_waiting"] == 2)
    asking = clients[-1]
    assert asking.find(1, KEY) == [[]], "who waits is answered"
    clients[0].publish(KEY)
    eventually(lambda: server.status().counters["inventories_waiting"] == 1)
    assert asking.find(2, KEY) == [["n0"]]
    clients[1].close()
    assert asking.receive(NodeLost).node == "n1"
    assert asking.receive(Resync).parts == ALL_PARTS, "the turn of one that is gone"


def test_who_only_wants_the_status_gets_it(server: DirectoryServer, connect: Callable[..., Client]) -> None:
    connect("a")
    asking = connect()
    asking.send(AskDirectory(7))
    answer = asking.receive(DirectoryStatus)
    assert (answer.ask, [node.node for node in answer.nodes]) == (7, ["a"])
    assert answer.nodes == server.status().nodes


def test_a_taken_port_is_one_sentence_with_a_remedy(server: DirectoryServer) -> None:
    _, port = wire.split_endpoint(server.endpoint)
    second = DirectoryServer(Settings.load({"secret": SECRET, "port": port}, {}))
    with pytest.raises(ConfigError, match=rf"'port' cannot be .*{port}: .*free"):
        second.start()
    second.stop()


def test_a_directory_without_a_secret_does_not_start() -> None:
    server = DirectoryServer(Settings.load({}, {}))
    with pytest.raises(ConfigError, match="'secret'"):
        server.start()
    server.stop()


def test_a_stopped_directory_closes_its_connections_and_frees_its_port(
    start: Callable[..., DirectoryServer], connect: Callable[..., Client]
) -> None:
    first = start()
    _, port = wire.split_endpoint(first.endpoint)
    a = connect("a", first)
    unfinished = socket.create_connection(("127.0.0.1", port), SECONDS)  # never shakes hands
    first.stop()
    first.stop()
    assert first.join(0)
    assert a.closed()
    unfinished.close()
    with pytest.raises(Unavailable):
        first.status()
    first.node_lost("a")
    assert start(port=port).endpoint == first.endpoint
    assert [thread.name for thread in threading.enumerate()].count("kvshare-directory") == 2  # this one's and the fixture's
