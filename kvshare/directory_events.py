"""What the directory hears and what it wants done: its interface to whoever puts sockets around it.

Threads: none; frozen values.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvshare.messages import Message


@dataclass(frozen=True)
class Connected:
    """Someone who knows the secret connected. ``connection`` is a number that is never used again."""

    connection: int


@dataclass(frozen=True)
class Heard:
    """A message (of `ToDirectory`) came in on a connection."""

    connection: int
    message: Message


@dataclass(frozen=True)
class Disconnected:
    """A connection ended, whoever ended it."""

    connection: int


@dataclass(frozen=True)
class Lost:
    """Someone who supervises nodes (Ray) says that this one is dead."""

    node: str


@dataclass(frozen=True)
class Tick:
    """Time has passed: see `Directory.next_deadline`."""


Event = Connected | Heard | Disconnected | Lost | Tick


@dataclass(frozen=True)
class Send:
    """Send a message (of `FromDirectory`)."""

    connection: int
    message: Message


@dataclass(frozen=True)
class Broadcast:
    """Send one message to several connections."""

    connections: tuple[int, ...]
    message: Message


@dataclass(frozen=True)
class Close:
    """End a connection. The directory has forgotten it already; its `Disconnected` is ignored."""

    connection: int
    reason: str


@dataclass(frozen=True)
class Tell:
    """A line for the log, said once."""

    text: str


Command = Send | Broadcast | Close | Tell
