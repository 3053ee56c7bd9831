"""What only a network does: strangers, peers that die, hang, restart or never read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvshare import native, wire
from kvshare.errors import ConfigError
from kvshare.places import RegionDescription
from kvshare.slots import Region
from kvshare.transport.base import BlockStatus, Targets
from kvshare.transport.tcp import TcpTransport
from kvshare.transport.tcp_protocol import PURPOSE, ReadBlocks
from kvshare.transport.tcp_server import DataServer

from .conftest import HOST, SECRET, SLOT_BYTES, SLOTS, Block, House, Landing, request_for, write

OK, STALE, UNREACHABLE, TIMEOUT = BlockStatus.OK, BlockStatus.STALE, BlockStatus.UNREACHABLE, BlockStatus.TIMEOUT
LENGTH = 1 << 20
Eventually = Callable[[Callable[[], bool]], None]


@dataclass
class Child:
    """An owner in another process."""

    process: subprocess.Popen[str]
    description: RegionDescription
    blocks: list[Block]


@pytest.fixture
def start_child() -> Iterator[Callable[..., Child]]:
    running: list[subprocess.Popen[str]] = []

    def start(port: int = 0) -> Child:
        command = [sys.executable, str(Path(__file__).with_name("serve_child.py")), SECRET, str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        description = RegionDescription("child", LENGTH, LENGTH, 2, "elsewhere", "", "", told["endpoint"])
        data = [np.full(LENGTH, slot + 1, np.uint8) for slot in range(2)]
        blocks = [Block(slot, told["generations"][slot], slot, data[slot]) for slot in range(2)]
        return Child(process, description, blocks)

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def endless(child: Child, seconds: float) -> tuple[object, np.ndarray]:  # type: ignore[type-arg]
    """A read of 16 GiB, all into the same two places: seconds of work."""
    memory = np.zeros(2 * LENGTH, np.uint8)
    targets = Targets.strided(native.address_of(memory), LENGTH, np.tile([0, 1], 8192), LENGTH)
    return request_for(child.blocks * 8192, targets, seconds), memory


# --- strangers ------------------------------------------------------------------------------------------------------------


def test_a_reader_with_another_secret_gets_nothing_and_harms_nothing(tcp_house: House, eventually: Eventually) -> None:
    blocks = tcp_house.save([1])
    request = request_for(blocks, Landing(1, [SLOT_BYTES]).targets)
    with TcpTransport("not the cluster's secret") as stranger:
        completion = stranger.read(tcp_house.description, request).wait()
        assert completion is not None
        assert completion.statuses.tolist() == [UNREACHABLE]
    assert isinstance(tcp_house.owner, TcpTransport)
    counters = tcp_house.owner.counters
    eventually(lambda: counters().get("strangers") == 1)
    assert tcp_house.read(request).ok
    assert counters()["blocks"] == 1


def test_a_server_with_another_secret_is_not_believed(start_child: Callable[..., Child]) -> None:
    child = start_child()
    with TcpTransport("not the child's secret") as reader:
        completion = reader.read(child.description, request_for(child.blocks, Landing(2, [LENGTH]).targets)).wait()
        assert completion is not None
        assert completion.statuses.tolist() == [UNREACHABLE] * 2


def test_without_a_secret_nothing_listens_and_nothing_is_reached(tcp_house: House) -> None:
    with TcpTransport("", "127.0.0.1") as transport:
        assert transport.endpoint() == ""
        assert not transport.reaches(tcp_house.description)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), b"KVSH\xff\xff" + bytes(200), bytes(1 << 20)],
    ids=["nothing", "a byte", "http", "noise", "another version", "a megabyte of zeros"],
)
def test_garbage_on_the_port_is_closed_and_counted(tcp_house: House, garbage: bytes, eventually: Eventually) -> None:
    host, port = wire.split_endpoint(tcp_house.description.endpoint)
    with socket.create_connection((host, port)) as sock:
        try:
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed before we were done: just as well
    assert isinstance(tcp_house.owner, TcpTransport)
    counters = tcp_house.owner.counters
    eventually(lambda: counters().get("strangers") == 1)
    assert tcp_house.read(request_for(tcp_house.save([1]), Landing(1, [SLOT_BYTES]).targets)).ok


def _asked(**changes: object) -> ReadBlocks:
    whole = ReadBlocks(SLOT_BYTES, SLOT_BYTES, 1, bytes(8), bytes(8), "eu")
    return msgspec.structs.replace(whole, **changes)


@pytest.mark.parametrize(
    "request_frame",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"region": 1}),
        msgspec.msgpack.encode([1, 2, 3, b"", b"", b"more"]),
        msgspec.msgpack.encode(_asked(slots=bytes(7), generations=bytes(7))),
        msgspec.msgpack.encode(_asked(slots=bytes(16))),
        msgspec.msgpack.encode(_asked(portion_blocks=0)),
        msgspec.msgpack.encode(["a", "b", "c", "d", "e"]),
        bytes(1 << 20),
    ],
    ids=["empty", "no msgpack", "a map", "too many", "seven bytes", "unequal", "no portion", "texts", "too long"],
)
def test_a_request_that_is_none_ends_the_connection(tcp_house: House, request_frame: bytes, eventually: Eventually) -> None:
    with wire.connect_tcp(tcp_house.description.endpoint, SECRET, PURPOSE, 5.0) as sock:
        try:
            wire.send_frame(sock, request_frame)
            assert sock.recv(1) == b""
        except ConnectionError:
            pass  # a reset is an end as well
    assert isinstance(tcp_house.owner, TcpTransport)
    counters = tcp_house.owner.counters
    eventually(lambda: counters().get("garbage", 0) + counters().get("broken", 0) == 1)
    assert tcp_house.read(request_for(tcp_house.save([1]), Landing(1, [SLOT_BYTES]).targets)).ok


def test_a_connection_for_another_purpose_is_refused(tcp_house: House) -> None:
    with wire.connect_tcp(tcp_house.description.endpoint, SECRET, "directory", 5.0) as sock:
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    ("region", "length", "expected"),
    [
        (SLOT_BYTES + 1, SLOT_BYTES, UNREACHABLE),
        (SLOT_BYTES, 0, UNREACHABLE),
        (SLOT_BYTES, -1, UNREACHABLE),
        (SLOT_BYTES, 1 << 60, STALE),
    ],
)
def test_an_impossible_request_is_answered_with_a_verdict(
    tcp_house: House, region: int, length: int, expected: BlockStatus
) -> None:
    with wire.connect_tcp(tcp_house.description.endpoint, SECRET, PURPOSE, 5.0) as sock:
        wire.send_frame(sock, msgspec.msgpack.encode(_asked(region=region, length=length)))
        assert wire.receive_exactly(sock, 9) == b"KVSV\x01\0\0\0" + bytes([expected])


def test_a_server_that_answers_nonsense_is_unreachable(eventually: Eventually) -> None:
    """A peer that knows the secret but speaks another data protocol."""
    listener = socket.create_server(("127.0.0.1", 0))
    endpoint = f"127.0.0.1:{listener.getsockname()[1]}"

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            wire.accept_tcp(sock, SECRET)
            wire.receive_frame(sock, 1 << 20)
            sock.sendall(b"what?" * 100)
            with contextlib.suppress(ConnectionError):
                sock.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with TcpTransport(SECRET) as reader:
        description = RegionDescription("a", SLOT_BYTES, SLOT_BYTES, SLOTS, "", "", "", endpoint)
        blocks = [Block(0, 2, 0, np.zeros(1, np.uint8))]
        completion = reader.read(description, request_for(blocks, Landing(1, [SLOT_BYTES]).targets)).wait()
        assert completion is not None
        assert completion.statuses.tolist() == [UNREACHABLE]
    thread.join()
    listener.close()


# --- peers that fail ------------------------------------------------------------------------------------------------------


def test_a_peer_killed_in_mid_read_is_unreachable(start_child: Callable[..., Child]) -> None:
    child = start_child()
    with TcpTransport(SECRET) as reader:
        request, _memory = endless(child, seconds=20)
        transfer = reader.read(child.description, request)  # type: ignore[arg-type]
        assert transfer.wait(0.3) is None
        os.kill(child.process.pid, signal.SIGKILL)
        completion = transfer.wait(10)
        assert completion is not None, "long before request.seconds"
        assert set(completion.statuses.tolist()) <= {OK, UNREACHABLE}
        assert completion.statuses[-1] == UNREACHABLE


def test_a_peer_stopped_in_mid_read_times_out_and_its_queue_with_it(start_child: Callable[..., Child]) -> None:
    child = start_child()
    with TcpTransport(SECRET, streams=1) as reader:
        patient, _memory = endless(child, seconds=30)
        hurried, _other = endless(child, seconds=0.3)
        first = reader.read(child.description, patient)  # type: ignore[arg-type]
        assert first.wait(0.3) is None
        os.kill(child.process.pid, signal.SIGSTOP)
        queued = reader.read(child.description, hurried).wait(10)  # type: ignore[arg-type]
        assert queued is not None
        assert set(queued.statuses.tolist()) == {TIMEOUT}
        assert first.wait(0) is None
        first.cancel()
        completion = first.wait(10)
        assert completion is not None
        assert completion.statuses[-1] == BlockStatus.CANCELLED


def test_a_read_of_a_stopped_peer_ends_after_its_seconds(start_child: Callable[..., Child]) -> None:
    child = start_child()
    with TcpTransport(SECRET) as reader:
        request, _memory = endless(child, seconds=0.5)
        transfer = reader.read(child.description, request)  # type: ignore[arg-type]
        assert transfer.wait(0.2) is None
        os.kill(child.process.pid, signal.SIGSTOP)
        completion = transfer.wait(10)
        assert completion is not None
        assert completion.statuses[-1] == TIMEOUT
        # And one that cannot even begin: the system accepts the connection, the process does not.
        again = reader.read(child.description, request).wait(10)  # type: ignore[arg-type]
        assert again is not None
        assert set(again.statuses.tolist()) == {UNREACHABLE}


def test_a_peer_that_failed_is_left_alone_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    description = RegionDescription("gone", SLOT_BYTES, SLOT_BYTES, SLOTS, "", "", "", endpoint)
    blocks = [Block(0, 2, 0, np.zeros(1, np.uint8))]
    with TcpTransport(SECRET) as reader:
        errors = []
        for _ in range(3):
            completion = reader.read(description, request_for(blocks, Landing(1, [SLOT_BYTES]).targets)).wait()
            assert completion is not None
            assert completion.statuses.tolist() == [UNREACHABLE]
            errors.append("left alone" in completion.error)
    assert errors == [False, True, True]
    assert caplog.text.count("cannot be read") == 1, "a failure is told once"


def test_a_peer_that_restarts_at_its_old_place_is_read_at_once(start_child: Callable[..., Child]) -> None:
    child = start_child()
    with TcpTransport(SECRET) as reader:
        assert _all_ok(reader, child)
        child.process.kill()
        child.process.wait()
        reborn = start_child(port=wire.split_endpoint(child.description.endpoint)[1])
        assert _all_ok(reader, reborn), "the dead connection that was kept costs no miss"


def test_a_peer_that_restarts_elsewhere_is_read_there(start_child: Callable[..., Child]) -> None:
    child = start_child()
    with TcpTransport(SECRET) as reader:
        assert _all_ok(reader, child)
        child.process.kill()
        reborn = start_child()
        reborn.description = msgspec.structs.replace(reborn.description, node=child.description.node)
        assert _all_ok(reader, reborn)


def _all_ok(reader: TcpTransport, child: Child) -> bool:
    completion = reader.read(child.description, request_for(child.blocks, Landing(2, [LENGTH]).targets)).wait()
    return completion is not None and completion.ok


# --- readers that fail ----------------------------------------------------------------------------------------------------


def _server(region: Region, **limits: float) -> DataServer:
    server = DataServer(SECRET, "127.0.0.1", **limits)  # type: ignore[arg-type]
    server.register(region)
    return server


def test_a_reader_that_never_takes_its_answer_is_dropped(eventually: Eventually) -> None:
    region = Region.anonymous(SLOT_BYTES, 1)
    block = write(region, 0, np.ones(SLOT_BYTES, np.uint8), 0)
    server = _server(region, send_seconds=0.1)
    with wire.connect_tcp(server.endpoint, SECRET, PURPOSE, 5.0) as sock:
        generation = np.full(4000, block.generation, np.uint64).tobytes()
        wire.send_frame(sock, msgspec.msgpack.encode(_asked(slots=bytes(32000), generations=generation)))
        eventually(lambda: server.counters["broken"] == 1)
    server.close()


def test_a_stranger_that_says_nothing_is_dropped(eventually: Eventually) -> None:
    server = DataServer(SECRET, "127.0.0.1", handshake_seconds=0.1)
    with socket.create_connection(wire.split_endpoint(server.endpoint)):
        eventually(lambda: server.counters["strangers"] == 1)
    server.close()


def test_half_a_request_is_not_waited_for(eventually: Eventually) -> None:
    server = DataServer(SECRET, "127.0.0.1", handshake_seconds=0.2)
    with wire.connect_tcp(server.endpoint, SECRET, PURPOSE, 5.0) as sock:
        sock.sendall(b"\x10\0")
        eventually(lambda: server.counters["garbage"] == 1)
    server.close()


def test_a_full_server_lets_the_longest_idle_connection_go(eventually: Eventually) -> None:
    region = Region.anonymous(SLOT_BYTES, 1)
    server = _server(region, connections_max=2)
    sockets = []
    for count in range(1, 4):
        sockets.append(wire.connect_tcp(server.endpoint, SECRET, PURPOSE, 5.0))
        eventually(lambda count=count: server.counters["connections"] == count)  # type: ignore[misc]
    assert sockets[0].recv(1) == b""
    for sock in sockets[1:]:
        wire.send_frame(sock, msgspec.msgpack.encode(_asked(region=1)))
        assert wire.receive_exactly(sock, 9)
    for sock in sockets:
        sock.close()
    server.close()


def test_a_server_full_of_busy_connections_refuses_more(eventually: Eventually) -> None:
    server = DataServer(SECRET, "127.0.0.1", connections_max=1, handshake_seconds=30)
    with socket.create_connection(wire.split_endpoint(server.endpoint)) as first:
        assert first.recv(1)  # within its handshake
        with socket.create_connection(wire.split_endpoint(server.endpoint)) as second:
            assert second.recv(1) == b""
    server.close()
    assert server.counters["refused"] == 1


# --- the rest -------------------------------------------------------------------------------------------------------------


def test_a_peer_gets_as_many_connections_as_there_are_streams_and_no_more() -> None:
    region = Region.anonymous(SLOT_BYTES, SLOTS)
    blocks = [write(region, slot, np.full(SLOT_BYTES, slot, np.uint8), slot) for slot in range(SLOTS)]
    with TcpTransport(SECRET, "127.0.0.1") as owner, TcpTransport(SECRET, streams=3) as reader:
        owner.register(region)
        description = region.describe("a", HOST, owner.endpoint())
        for _ in range(3):
            landings = [Landing(SLOTS, [SLOT_BYTES]) for _ in range(20)]
            transfers = [reader.read(description, request_for(blocks, one.targets, 60)) for one in landings]
            assert all(completion is not None and completion.ok for completion in (one.wait(60) for one in transfers))
        assert 1 <= owner.counters()["connections"] <= 3


def test_a_long_read_takes_several_requests(tcp_house: House) -> None:
    blocks = tcp_house.save(range(10), length=300) * 1000
    stale = replace(blocks[3], generation=blocks[3].generation + 2)
    blocks[5000] = stale
    landing = Landing(len(blocks), [100, 200])
    completion = tcp_house.read(request_for(blocks, landing.targets))
    assert np.flatnonzero(completion.statuses).tolist() == [5000]
    assert np.array_equal(landing.block(9999), blocks[9999].data)
    assert isinstance(tcp_house.owner, TcpTransport)
    assert tcp_house.owner.counters()["requests"] == 3


def test_a_port_that_is_taken_is_a_setting_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="bind"):
        DataServer(SECRET, "127.0.0.1", taken.getsockname()[1])


def test_an_ipv6_server_tells_an_endpoint_that_can_be_connected_to() -> None:
    try:
        server = DataServer(SECRET, "::1")
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    wire.connect_tcp(server.endpoint, SECRET, PURPOSE, 5.0).close()
    server.close()


# --- a limited rate -------------------------------------------------------------------------------------------------------


def test_a_limited_owner_sends_the_right_bytes_many_times_slower() -> None:
    """Two MB at 1 MB/s, of which the kernel lets the first few hundred KB pass; a local socket moves GB/s."""
    rates = []
    region = Region.anonymous(LENGTH, 2)
    random = np.random.default_rng(5)
    blocks = [write(region, slot, random.integers(0, 256, LENGTH, np.uint8), slot) for slot in range(2)]
    for limit in (0, 10**6):
        with TcpTransport(SECRET, "127.0.0.1", bytes_per_second=limit) as owner, TcpTransport(SECRET) as reader:
            owner.register(region)
            landing = Landing(2, [LENGTH])
            description = region.describe("a", HOST, owner.endpoint())
            completion = reader.read(description, request_for(blocks, landing.targets)).wait()
            assert completion is not None and completion.ok
            assert all((landing.block(i) == block.data).all() for i, block in enumerate(blocks))
            rates.append(completion.bytes / completion.seconds)
    assert rates[1] < rates[0] / 4
