"""How the ranks of a group find each other: the plan that each one is given, and the board on which they tell where they are.

    donor (rank 0)                          joiners (ranks 1 ..)
    announce() ─ listener, plan ──────────> the plan, in a control message
    Board ────────── authenticated TCP ───> Member: tell and ask for named values

The board takes the place of torch's TCPStore, which lets anybody in, listens on all addresses and waits without end for a
server that does not answer. Here both ends prove that they know the cluster's secret (`kvshare.wire`) and every question has a
time limit.

Threads: a board's questions may be asked from any thread; it accepts in one, and serves each member in one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Sequence
from typing import Union

import msgspec

from kvshare import wire
from kvshare.errors import ConfigError, ProtocolError, Unavailable
from kvshare.places import GROUP_RANKS_MAX, GroupPlan

log = logging.getLogger("kvshare")

MESSAGE_BYTES_MAX = 64 << 10  # a gloo address is some 200 bytes
STRANGERS_MAX = 16  # connections beyond the members', so that guests in the handshake cannot keep members out
PURPOSE = "group"


def announce(bind: str, ranks: int, **limits: object) -> tuple[socket.socket, GroupPlan]:
    """The listener of a new group's board and the donor's plan (`GroupPlan.for_rank` makes the joiners').

    bind: an address of this host that the joiners reach. limits: other fields of the plan. Members may connect from now on;
    they are answered when the donor joins, or refused when it closes the listener.

    Raises:
        ConfigError: it cannot listen there. ValueError: as `GroupPlan`.
    """
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    try:
        listener = socket.create_server((bind, 0), family=family, backlog=GROUP_RANKS_MAX)
    except OSError as error:
        raise ConfigError(f"cannot listen on {bind}: {error}; set 'bind' to an address of this host.") from error
    host = f"[{bind}]" if ":" in bind else bind
    endpoint = f"{host}:{listener.getsockname()[1]}"
    try:
        return listener, GroupPlan(os.urandom(16), endpoint, ranks, **limits)  # type: ignore[arg-type]
    except ValueError:
        listener.close()
        raise


# --- the board ------------------------------------------------------------------------------------------------------------


class _Here(msgspec.Struct, tag=True, frozen=True, array_like=True, forbid_unknown_fields=True):
    """First message of a member."""

    group: bytes
    rank: int


class _Tell(msgspec.Struct, tag=True, frozen=True, array_like=True, forbid_unknown_fields=True):
    """From now on ``name`` has this value. Not answered."""

    name: str
    value: bytes


class _Ask(msgspec.Struct, tag=True, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Answered by `_Answer` when all of these have values, or in ``seconds``, or when a member is lost."""

    names: list[str]
    seconds: float


class _Answer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``fault``: why there are no values; for people."""

    values: list[bytes]
    fault: str


_requests = msgspec.msgpack.Decoder(Union[_Here, _Tell, _Ask])
_answers = msgspec.msgpack.Decoder(_Answer)


class Board:
    """The donor's end: holds named values, serves them to the members. Owns the listener.

    address: of this host, as the other ranks reach it.
    """

    def __init__(self, plan: GroupPlan, secret: str, listener: socket.socket) -> None:
        self.address = wire.split_endpoint(plan.endpoint)[0]
        self._plan, self._secret, self._listener = plan, secret, listener
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._members: dict[int, socket.socket] = {}
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lost: list[int] = []
        self._closed = False
        self._spawn(self._accept)

    def tell(self, name: str, value: bytes) -> None:
        """Set a value for all to see."""
        with self._changed:
            self._values[name] = value
            self._changed.notify_all()

    def ask(self, names: Sequence[str], seconds: float) -> list[bytes]:
        """Their values, as soon as all have one. Raises Unavailable: not within ``seconds``, or one cannot come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._fault() or all(name in self._values for name in names), seconds)
            missing = [name for name in names if name not in self._values]
            if missing:
                raise Unavailable(self._fault() or f"nobody told {', '.join(missing)} within {seconds:.1f} s")
            return [self._values[name] for name in names]

    def outcomes(self, name: str, seconds: float) -> dict[int, bytes]:
        """What members told as ``name``/rank, when all have that are still here, or in ``seconds``."""
        ranks = range(1, self._plan.ranks)
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or all(f"{name}/{rank}" in self._values or rank in self._lost for rank in ranks), seconds
            )
            told = {rank: self._values.get(f"{name}/{rank}") for rank in ranks}
            return {rank: value for rank, value in told.items() if value is not None}

    def close(self) -> None:
        """End it; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            sockets = [self._listener, *self._sockets]
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _fault(self) -> str:
        if self._closed:
            return "the group was closed"
        return f"rank {self._lost[0]} is gone" if self._lost else ""

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="kvshare-group", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._changed:
                full = self._closed or len(self._sockets) >= self._plan.ranks + STRANGERS_MAX
                if not full:
                    self._sockets.add(sock)
            if full:
                sock.close()
            else:
                self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        rank = 0
        try:
            rank = self._admit(sock, wire.accept_tcp(sock, self._secret))
            while True:
                self._handle(sock, _requests.decode(wire.receive_frame(sock, MESSAGE_BYTES_MAX)))
        except (OSError, ProtocolError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            if not rank and not self._closed:
                log.warning("kvshare: somebody was refused in a group of ours: %s", error)
        finally:
            with self._changed:
                self._sockets.discard(sock)
                if rank:
                    self._lost.append(rank)
                self._changed.notify_all()
            sock.close()

    def _admit(self, sock: socket.socket, purpose: str) -> int:
        sock.settimeout(wire.HANDSHAKE_SECONDS)
        here = _requests.decode(wire.receive_frame(sock, MESSAGE_BYTES_MAX))
        sock.settimeout(None)
        if (
            purpose != PURPOSE
            or not isinstance(here, _Here)
            or here.group != self._plan.group
            or not 0 < here.rank < self._plan.ranks
        ):
            raise ProtocolError("it belongs to another group")
        with self._changed:
            if here.rank in self._members:
                raise ProtocolError(f"rank {here.rank} is here already")
            self._members[here.rank] = sock
        return here.rank

    def _handle(self, sock: socket.socket, request: object) -> None:
        match request:
            case _Tell(name, value):
                self.tell(name, value)
            case _Ask(names, seconds):
                try:
                    answer = _Answer(self.ask(names, min(seconds, self._plan.join_seconds)), "")
                except Unavailable as error:
                    answer = _Answer([], str(error))
                wire.send_frame(sock, msgspec.msgpack.encode(answer))
            case _:
                raise ProtocolError("a member says who it is once")


class Member:
    """A joiner's end: one connection to the donor's board, with the same questions, which raise Unavailable if it is gone.

    Raises:
        Unavailable: the donor does not answer within ``seconds``. AuthenticationError, ProtocolError: it is not ours, or
            finds that we are not.
    """

    def __init__(self, plan: GroupPlan, secret: str, seconds: float) -> None:
        self._sock = wire.connect_tcp(plan.endpoint, secret, PURPOSE, seconds)
        self._using = threading.Lock()
        self.address = str(self._sock.getsockname()[0])
        self._send(_Here(plan.group, plan.rank))

    def tell(self, name: str, value: bytes) -> None:
        with self._using:
            self._send(_Tell(name, value))

    def ask(self, names: Sequence[str], seconds: float) -> list[bytes]:
        with self._using:
            self._send(_Ask(list(names), seconds))
            try:
                # A donor that is stopped answers nothing: the limit is ours.
                self._sock.settimeout(seconds + 0.25)
                answer = _answers.decode(wire.receive_frame(self._sock, GROUP_RANKS_MAX * MESSAGE_BYTES_MAX))
            except (OSError, ProtocolError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                self.close()  # an answer that comes late would be taken for the next one
                raise Unavailable(f"the donor does not answer: {error}") from error
        if len(answer.values) != len(names):
            raise Unavailable(answer.fault or "the donor left values out")
        return answer.values

    def close(self) -> None:
        self._sock.close()

    def _send(self, message: object) -> None:
        try:
            wire.send_frame(self._sock, msgspec.msgpack.encode(message))
        except OSError as error:
            raise Unavailable(f"the donor is gone: {error}") from error
