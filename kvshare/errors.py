"""Every error that kvshare raises on purpose.

    KVShareError
    ├── ConfigError        a setting is wrong; the message names setting, value and remedy
    ├── NamespaceError     this engine's blocks cannot be shared; the message says why and what to change
    ├── ProtocolError      a peer spoke something else than our protocol (version, frame size, bad message)
    │   └── AuthenticationError   the peer does not know the cluster's secret
    ├── RegionError        a region's files are missing, damaged or of another version
    │   └── RegionFull     no slot can be had, even by eviction
    ├── TransportError     bytes could not be moved
    ├── ObjectStoreError   the object store is away, denies, or answers what makes no sense; says what to do
    ├── VaultError         a tenant's keys could not be read, changed or erased
    └── Unavailable        the node or the directory cannot be reached in the time allowed

None of these reaches an engine: the integrations turn each one into a miss.
"""

from __future__ import annotations


class KVShareError(Exception):
    """Base of all errors that kvshare raises on purpose."""


class ConfigError(KVShareError):
    """A setting is wrong. One sentence: the setting, its value and the remedy."""


class NamespaceError(KVShareError):
    """This engine's blocks cannot be shared with others. Says why and what to change."""


class ProtocolError(KVShareError):
    """The other side spoke something else than our protocol."""


class AuthenticationError(ProtocolError):
    """The other side does not know the cluster's secret."""


class RegionError(KVShareError):
    """A region's files are missing, damaged or of another version."""


class RegionFull(RegionError):
    """No slot can be had, even by eviction."""


class TransportError(KVShareError):
    """Bytes could not be moved."""


class ObjectStoreError(KVShareError):
    """The object store is away, slow, full, denies, or answers what makes no sense. One sentence with the remedy."""


class VaultError(KVShareError):
    """A tenant's keys could not be read, changed or erased."""


class Unavailable(KVShareError):
    """The node or the directory cannot be reached in the time allowed."""
