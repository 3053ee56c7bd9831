"""Frames and the handshake: both sides prove the secret; what a stranger sends costs nothing."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from kvshare import wire
from kvshare.errors import AuthenticationError, ProtocolError, Unavailable

SECRET = "a secret of the tests"


def accept_in_thread(secret: str = SECRET, seconds: float = 2.0) -> tuple[str, list[object], threading.Thread]:
    """A server for one connection: endpoint, its outcome (purpose or error), its thread."""
    server = socket.create_server(("127.0.0.1", 0))
    outcome: list[object] = []

    def run() -> None:
        with server:
            connection, _ = server.accept()
            with connection:
                try:
                    outcome.append(wire.accept_tcp(connection, secret, seconds))
                    outcome.append(wire.receive_frame(connection, 100))
                except (ProtocolError, OSError) as error:
                    outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return f"127.0.0.1:{server.getsockname()[1]}", outcome, thread


def test_two_that_know_the_secret_exchange_frames() -> None:
    endpoint, outcome, thread = accept_in_thread()
    with wire.connect_tcp(endpoint, SECRET, "data", 2.0) as sock:
        wire.send_frame(sock, b"hello")
        thread.join()
    assert outcome == ["data", b"hello"]


def test_a_client_with_another_secret_is_refused() -> None:
    endpoint, outcome, thread = accept_in_thread()
    with pytest.raises(ProtocolError):
        wire.connect_tcp(endpoint, "another secret", "data", 2.0)
    thread.join()
    assert isinstance(outcome[0], AuthenticationError)


def test_a_server_that_only_repeats_what_it_was_sent_is_not_trusted() -> None:
    client, server = wire.ClientHandshake(SECRET, "data"), wire.ServerHandshake(SECRET)
    answer = client.hello(server.hello())
    with pytest.raises(AuthenticationError, match="server does not know"):
        client.proof(answer[-wire.MAC_BYTES :])  # the client's own proof, reflected


def test_an_answer_cannot_be_replayed_to_another_connection() -> None:
    client, first, second = wire.ClientHandshake(SECRET, "data"), wire.ServerHandshake(SECRET), wire.ServerHandshake(SECRET)
    answer = client.hello(first.hello())
    assert first.answer(answer)[0] == "data"
    with pytest.raises(AuthenticationError, match="client does not know"):
        second.answer(answer)


def test_another_version_is_named() -> None:
    hello = bytearray(wire.ServerHandshake(SECRET).hello())
    hello[4] = 99
    with pytest.raises(ProtocolError, match="version 99, we speak 1"):
        wire.ClientHandshake(SECRET, "data").hello(bytes(hello))


def test_a_server_without_a_secret_refuses_to_be_one() -> None:
    with pytest.raises(AuthenticationError, match="setting 'secret'"):
        wire.ServerHandshake("")


def test_a_client_that_says_nothing_is_given_up() -> None:
    endpoint, outcome, thread = accept_in_thread(seconds=0.1)
    with socket.create_connection(wire.split_endpoint(endpoint)):
        thread.join(10.0)
    assert isinstance(outcome[0], TimeoutError)


def test_nobody_listening_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(Unavailable, match="cannot be reached"):
        wire.connect_tcp(endpoint, SECRET, "data", 1.0)


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall((1 << 30).to_bytes(4, "little"))
        with pytest.raises(ProtocolError, match="over the limit of 100"):
            wire.receive_frame(right, 100)


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":1", "host:port"])
def test_what_is_no_endpoint_is_said_to_be_none(endpoint: str) -> None:
    with pytest.raises(ProtocolError, match="no 'host:port'"):
        wire.split_endpoint(endpoint)


def test_the_same_on_asyncio_streams() -> None:
    async def run() -> tuple[str, bytes]:
        outcome: asyncio.Future[tuple[str, bytes]] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            purpose = await wire.accept_async(reader, writer, SECRET)
            outcome.set_result((purpose, await wire.read_frame(reader, 100)))
            writer.close()

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        with pytest.raises(Unavailable):
            await wire.connect_async("127.0.0.1:1", SECRET, "directory", 1.0)
        _, writer = await wire.connect_async(f"{host}:{port}", SECRET, "directory", 2.0)
        wire.write_frame(writer, b"hello")
        result = await asyncio.wait_for(outcome, 5.0)
        writer.close()
        server.close()
        await server.wait_closed()
        return result

    assert asyncio.run(run()) == ("directory", b"hello")
