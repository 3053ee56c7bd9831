"""Frames and authentication: how control messages and data connections begin, on blocking sockets and on asyncio streams.

A frame is a 4-byte little-endian length and that many bytes. A length over the limit ends the connection: nothing that a
stranger sends makes us allocate.

On TCP both sides prove that they know the cluster's secret before anything else is read:

    server -> client   MAGIC, version, server nonce (32)
    client -> server   MAGIC, version, client nonce (32), purpose (16, padded), HMAC-SHA256("client", nonces, purpose)
    server -> client   HMAC-SHA256("server", nonces, purpose)

All three are of fixed size, so the exchange needs no parser. The HMACs cover both nonces and the role: neither a replay nor
a reflection passes. The exchange authenticates; it does not encrypt (block bytes and keys travel in the clear, as with the
engines' own transports: keep the network private).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import socket
import struct
import time

from kvshare.errors import AuthenticationError, ProtocolError, Unavailable

MAGIC = b"KVSH"
VERSION = 1
NONCE_BYTES = 32
PURPOSE_BYTES = 16
MAC_BYTES = 32
HANDSHAKE_SECONDS = 5.0

_LENGTH = struct.Struct("<I")
_HELLO_BYTES = len(MAGIC) + 2 + NONCE_BYTES
_ANSWER_BYTES = _HELLO_BYTES + PURPOSE_BYTES + MAC_BYTES


def _hello(nonce: bytes) -> bytes:
    return MAGIC + VERSION.to_bytes(2, "little") + nonce


def _nonce_of(hello: bytes) -> bytes:
    if hello[:4] != MAGIC:
        raise ProtocolError("the other side does not speak kvshare's protocol")
    version = int.from_bytes(hello[4:6], "little")
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks protocol version {version}, we speak {VERSION}: run one version of kvshare in a cluster"
        )
    return hello[6:_HELLO_BYTES]


def _mac(secret: str, role: bytes, server_nonce: bytes, client_nonce: bytes, purpose: bytes) -> bytes:
    return hmac.digest(secret.encode(), role + server_nonce + client_nonce + purpose, hashlib.sha256)


class ServerHandshake:
    """The server's side of the exchange, without I/O: send `hello`, feed `answer`, send what it returns."""

    def __init__(self, secret: str) -> None:
        if not secret:
            raise AuthenticationError("no secret is set: a server on TCP needs one (setting 'secret')")
        self._secret = secret
        self._nonce = os.urandom(NONCE_BYTES)

    def hello(self) -> bytes:
        return _hello(self._nonce)

    def answer(self, message: bytes) -> tuple[str, bytes]:
        """Check the client's answer. Returns its purpose and our proof. Raises ProtocolError or AuthenticationError."""
        client_nonce = _nonce_of(message)
        purpose = message[_HELLO_BYTES : _HELLO_BYTES + PURPOSE_BYTES]
        expected = _mac(self._secret, b"client", self._nonce, client_nonce, purpose)
        if not hmac.compare_digest(expected, message[-MAC_BYTES:]):
            raise AuthenticationError("the client does not know the cluster's secret")
        return purpose.rstrip(b"\0").decode(errors="replace"), _mac(self._secret, b"server", self._nonce, client_nonce, purpose)


class ClientHandshake:
    """The client's side: feed `hello`, send what it returns, feed `proof`."""

    def __init__(self, secret: str, purpose: str) -> None:
        self._secret = secret
        self._purpose = purpose.encode().ljust(PURPOSE_BYTES, b"\0")
        assert len(self._purpose) == PURPOSE_BYTES
        self._nonce = os.urandom(NONCE_BYTES)
        self._expected = b""

    def hello(self, message: bytes) -> bytes:
        server_nonce = _nonce_of(message)
        self._expected = _mac(self._secret, b"server", server_nonce, self._nonce, self._purpose)
        proof = _mac(self._secret, b"client", server_nonce, self._nonce, self._purpose)
        return _hello(self._nonce) + self._purpose + proof

    def proof(self, message: bytes) -> None:
        if not hmac.compare_digest(self._expected, message):
            raise AuthenticationError("the server does not know the cluster's secret")


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """``"host:port"`` to its parts. Raises ProtocolError."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise ProtocolError(f"{endpoint!r} is no 'host:port'")
    return host.strip("[]"), int(port)


# --- blocking sockets -----------------------------------------------------------------------------------------------


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """``count`` bytes. Raises ProtocolError when the other side closes before."""
    data = bytearray(count)
    view = memoryview(data)
    got = 0
    while got < count:
        received = sock.recv_into(view[got:])
        if received == 0:
            raise ProtocolError("the other side closed the connection")
        got += received
    return bytes(data)


def send_frame(sock: socket.socket, payload: bytes) -> None:
    sock.sendall(_LENGTH.pack(len(payload)) + payload)


def receive_frame(sock: socket.socket, bytes_max: int) -> bytes:
    """One frame's payload. Raises ProtocolError for one that is too long or when the other side closes."""
    (length,) = _LENGTH.unpack(receive_exactly(sock, _LENGTH.size))
    if length > bytes_max:
        raise ProtocolError(f"a frame of {length} bytes is over the limit of {bytes_max} (setting 'message_bytes_max')")
    return receive_exactly(sock, length)


def connect_tcp(endpoint: str, secret: str, purpose: str, seconds: float) -> socket.socket:
    """Connect and authenticate. The socket has no timeout afterwards.

    Raises:
        Unavailable: nobody answers within ``seconds``. AuthenticationError, ProtocolError: who answers is not ours.
    """
    deadline = time.monotonic() + seconds
    try:
        sock = socket.create_connection(split_endpoint(endpoint), timeout=seconds)
    except OSError as error:
        raise Unavailable(f"{endpoint} cannot be reached: {error}") from error
    try:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        handshake = ClientHandshake(secret, purpose)
        sock.sendall(handshake.hello(receive_exactly(sock, _HELLO_BYTES)))
        handshake.proof(receive_exactly(sock, MAC_BYTES))
        sock.settimeout(None)
    except OSError as error:
        sock.close()
        raise Unavailable(f"{endpoint} did not finish the handshake: {error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def accept_tcp(sock: socket.socket, secret: str, seconds: float = HANDSHAKE_SECONDS) -> str:
    """Authenticate an accepted connection; returns the client's purpose. The socket has no timeout afterwards.

    Raises AuthenticationError, ProtocolError or OSError; the caller closes the socket.
    """
    sock.settimeout(seconds)
    handshake = ServerHandshake(secret)
    sock.sendall(handshake.hello())
    purpose, proof = handshake.answer(receive_exactly(sock, _ANSWER_BYTES))
    sock.sendall(proof)
    sock.settimeout(None)
    return purpose


# --- asyncio streams ------------------------------------------------------------------------------------------------


def write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    writer.write(_LENGTH.pack(len(payload)))
    writer.write(payload)


async def read_frame(reader: asyncio.StreamReader, bytes_max: int) -> bytes:
    """One frame's payload. Raises ProtocolError for one that is too long or when the other side closes."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > bytes_max:
            raise ProtocolError(f"a frame of {length} bytes is over the limit of {bytes_max} (setting 'message_bytes_max')")
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise ProtocolError("the other side closed the connection") from error


async def connect_async(
    endpoint: str, secret: str, purpose: str, seconds: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As `connect_tcp`, on the running loop."""
    host, port = split_endpoint(endpoint)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(host, port)
            set_nodelay(writer)
            handshake = ClientHandshake(secret, purpose)
            writer.write(handshake.hello(await reader.readexactly(_HELLO_BYTES)))
            handshake.proof(await reader.readexactly(MAC_BYTES))
            return reader, writer
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        if writer is not None:
            writer.close()
        raise Unavailable(f"{endpoint} cannot be reached: {type(error).__name__} {error}") from error
    except BaseException:  # cancelled, too
        if writer is not None:
            writer.close()
        raise


async def accept_async(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, seconds: float = HANDSHAKE_SECONDS
) -> str:
    """As `accept_tcp`, on asyncio streams. Raises AuthenticationError or ProtocolError; the caller closes the writer."""
    set_nodelay(writer)
    handshake = ServerHandshake(secret)
    try:
        async with asyncio.timeout(seconds):
            writer.write(handshake.hello())
            purpose, proof = handshake.answer(await reader.readexactly(_ANSWER_BYTES))
            writer.write(proof)
            await writer.drain()
            return purpose
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise ProtocolError(f"the client did not finish the handshake: {type(error).__name__} {error}") from error


def set_nodelay(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
