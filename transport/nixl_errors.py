"""What NIXL's failures are to us, and what to do about each."""

from __future__ import annotations

from kvshare.errors import TransportError


class NixlError(TransportError):
    """NIXL did not do what we asked. The message says what to do."""


class NixlMissing(NixlError):
    """NIXL cannot be used in this process."""


class PeerDead(NixlError):
    """The connection to the peer is gone, or cannot be made."""


class NotRegistered(NixlError):
    """Memory that one side has not registered, or an agent that is not connected."""


class BadMetadata(NixlError):
    """A description of an agent that is damaged, of another version, or of another agent."""


class InvalidRequest(NixlError):
    """NIXL refuses the request as such: a bug of ours."""


KINDS: dict[str, tuple[type[NixlError], str]] = {
    "nixlRemoteDisconnectError": (
        PeerDead,
        "its process has ended or the network is down; it is reached again when it is back",
    ),
    "nixlBackendError": (
        PeerDead,
        "UCX cannot connect; is the peer alive, and do UCX_TLS and UCX_NET_DEVICES fit on both sides?",
    ),
    "nixlCancelledError": (PeerDead, "the transfer was ended under us"),
    "nixlNotFoundError": (NotRegistered, "the memory is not registered, or was described before it was; describe it afresh"),
    "nixlMismatchError": (
        BadMetadata,
        "the description is no NIXL metadata of our version; run one version of nixl on all hosts",
    ),
    "nixlNotAllowedError": (BadMetadata, "another description of that agent is in use; forget its node first"),
    "nixlInvalidParamError": (InvalidRequest, "the ranges of both sides differ, or the agent is unknown"),
    "nixlNotSupportedError": (InvalidRequest, "no UCX backend can move that kind of memory"),
}


def translated(error: Exception, doing: str) -> NixlError:
    """NIXL's exception as one of ours. ``doing``: what was asked, for people."""
    kind, remedy = KINDS.get(type(error).__name__, (NixlError, "see NIXL's log above"))
    return kind(f"NIXL, {doing}: {error}: {remedy}")
