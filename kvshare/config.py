"""Settings: one frozen dataclass, read once, validated once, never rewritten.

Sources, later wins: defaults, the card of the Ray node that we run on (`kvshare.cards`), environment
(``KVSHARE_ARENA_BYTES=8GiB``), a mapping (vLLM's ``kv_connector_extra_config``, keyword arguments of the Python API, options
of the command line). An unknown or unusable setting is a `ConfigError` whose
one sentence names the setting, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvshare import cards
from kvshare.errors import ConfigError
from kvshare.places import GROUP_RANKS_MAX

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PREFIX = "KVSHARE_"
PACE_MIN = 10**6  # bytes/s: slower, what the kernel buffers takes longer than a peer waits for progress
DIRECTORY_SHARDS_MAX = 64
TRANSPORTS = ("shm", "process", "nixl", "tcp")
LEAVE_SHARE = 1 / 4  # of `drain_seconds`: an engine that ends saves so long what it has queued, and its node waits for that
ADMISSIONS = ("used", "all")
# Set by the launcher, not settings: read by other modules under these names.
RESERVED = frozenset({"KVSHARE_LOG_LEVEL"})
_UNITS = {"": 1, "b": 1, "k": KIB, "kib": KIB, "kb": 1000, "m": MIB, "mib": MIB, "mb": 10**6, "g": GIB, "gib": GIB, "gb": 10**9}


def _default_runtime_dir() -> str:
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return str(Path(base) / f"kvshare-{os.getuid()}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, in the groups of the people who would change them."""

    # Who we are. Engines and their node agree on these three; they name the socket and the arena's files.
    cluster: str = "default"
    node_name: str = "node"
    runtime_dir: str = dataclasses.field(default_factory=_default_runtime_dir)

    # Memory. Whoever sizes the host changes these.
    shm_dir: str = "/dev/shm"
    arena_bytes: int = 4 * GIB  # ceiling of the host arena; it grows to it chunk by chunk
    arena_chunk_bytes: int = 64 * MIB  # the step by which it grows
    index_keys_max: int = 8_000_000  # keys that a directory, or each shard of it, holds before it refuses new ones

    # Network. Whoever runs more than one host changes these.
    secret: str = dataclasses.field(default="", repr=False)  # shared by the cluster; without it nothing listens on TCP
    bind: str = "127.0.0.1"  # address that peers reach this host by
    port: int = 0  # control port; 0 takes a free one
    directory: str = ""  # "host:port" of the directory, of its shards in order with commas between; empty: this host is alone
    directory_shards: int = 1  # into so many the directory is divided by key: processes `kvshare directory`, or Ray actors
    transports: tuple[str, ...] = TRANSPORTS  # in order of preference
    tcp_streams: int = 2  # data connections to one peer
    tcp_bytes_per_second: int = 0  # sent over one data connection at most; 0: without limit
    message_bytes_max: int = 64 * MIB

    # Slow tiers. Whoever wants blocks to outlive the machine's memory sets these.
    disk_dir: str = ""  # folder on a local disk, one per node; empty: no disk region
    disk_bytes: int = 64 * GIB  # ceiling of what is kept there
    disk_threads: int = 4  # reads and writes in flight
    disk_admit: str = "used"  # "used": blocks that were asked for again, and those of who leaves; "all": whatever is saved
    disk_seconds: float = 5.0  # an operation that takes longer means a stalled device, left alone for a while
    object_url: str = ""  # "s3://bucket/prefix" or "file:///folder", shared by the cluster; credentials from AWS_* variables
    object_segment_bytes: int = 32 * MIB  # blocks are packed into objects of this size
    object_seconds: float = 10.0  # as disk_seconds, of one request to the store
    object_region: str = ""  # where the store stands, as `region`; tenants that are bound to others keep nothing there
    drain_seconds: float = 20.0  # a node that leaves hands over what only it holds, for so long at most

    # Governance. Whoever answers for the data sets these.
    tenant: str = ""  # whose the blocks of this engine are, where a request names nobody
    tenants_file: str = ""  # JSON: what each tenant may use, keep, and where (docs/operations.md); empty: no limits
    keys_dir: str = ""  # folder of the tenants' keys; empty: disk and object store hold blocks as they are
    region: str = ""  # where this host stands, e.g. "eu"; tenants may be bound to regions

    # Patience. Whoever prefers waiting to recomputing, or the reverse, changes these.
    lookup_seconds: float = 0.5  # a request's question to node and directory; then it is a miss
    transfer_seconds: float = 2.0  # a transfer without progress is given up after this
    attach_seconds: float = 10.0  # an engine waits this long for its node at start, then runs without
    publish_seconds: float = 0.02  # changes are collected this long before the directory hears of them
    heartbeat_seconds: float = 5.0  # a node unheard of for three of these is forgotten
    quarantine_seconds: float = 10.0  # a slot whose writer may still be writing rests this long

    # Warm join. Whoever scales the fleet changes these.
    warm_bytes: int = 2 * GIB
    warm_seconds: float = 30.0
    hot_half_life_seconds: float = 300.0
    warm_group_ranks: int = 0  # so many joiners at once are given their blocks by one broadcast; 0: each by reads of its own
    warm_gather_seconds: float = 1.0  # a joiner waits this long for the others

    # Engines.
    autostart: bool = True  # start a node when the host has none
    idle_exit_seconds: float = 3600.0  # an autostarted node without engines ends after this; 0: never
    save_bytes_max: int = 512 * MIB  # blocks waiting to be saved; beyond it saves are skipped, never waited for
    load_bytes_max: int = 512 * MIB  # bytes being loaded at once; beyond it requests compute instead
    head_shards: int = 0  # by heads a block is cut into so many; 0: one for each tensor-parallel rank of the engine

    @classmethod
    def load(cls, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
        """Read defaults, the Ray node's card (unless ``node_name`` or ``runtime_dir`` say which node), environment and
        ``overrides``.

        Raises:
            ConfigError: unknown setting, or a value that cannot be used.
        """
        environ = os.environ if environ is None else environ
        given: dict[str, tuple[str, Any]] = {}
        for variable, value in environ.items():
            if variable.startswith(PREFIX) and variable not in RESERVED:
                given[variable.removeprefix(PREFIX).lower()] = (variable, value)
        for name, value in (overrides or {}).items():
            given[name] = (name, value)
        if not given.keys() & {"node_name", "runtime_dir"}:
            cluster = given["cluster"][1] if "cluster" in given else None
            for name, value in cards.locate(_default_runtime_dir(), environ, cluster).items():
                given.setdefault(name, (f"{name} (on the Ray node's card)", value))
        known = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, (spelled, value) in given.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(sorted(known))}."
                raise ConfigError(f"unknown setting {spelled!r} (value {value!r}): {hint}")
            values[name] = _parse(spelled, str(known[name].type), value)
        settings = cls(**values)
        settings._validate()
        return settings

    @property
    def directories(self) -> tuple[str, ...]:
        """Endpoints of the directory's shards, in order; empty: this host is alone, or Ray knows them."""
        return tuple(endpoint.strip() for endpoint in self.directory.split(",")) if self.directory else ()

    @property
    def socket_path(self) -> str:
        """The well-known Unix socket of this host's node."""
        return str(Path(self.runtime_dir) / self.cluster / f"{self.node_name}.sock")

    @property
    def arena_stem(self) -> str:
        """Arena files are ``{stem}-{slot bytes}.data`` and ``.table``."""
        return str(Path(self.shm_dir) / f"kvshare-{os.getuid()}-{self.cluster}@{self.node_name}")

    def _validate(self) -> None:
        for name in ("cluster", "node_name", "tenant", "region", "object_region"):
            value = getattr(self, name)
            may_be_empty = name in ("tenant", "region", "object_region")
            _require(
                re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value) is not None or (may_be_empty and not value),
                name,
                value,
                "use 1 to 64 letters, digits, '_', '.', '-'",
            )
        minimum = {
            "arena_bytes": MIB,
            "arena_chunk_bytes": MIB,
            "index_keys_max": 1,
            "tcp_streams": 1,
            "tcp_bytes_per_second": 0,
            "message_bytes_max": 64 * KIB,
            "save_bytes_max": 0,
            "load_bytes_max": 0,
            "head_shards": 0,
            "warm_bytes": 0,
            "warm_group_ranks": 0,
            "disk_bytes": MIB,
            "disk_threads": 1,
            "object_segment_bytes": MIB,
        }
        for name, least in minimum.items():
            _require(getattr(self, name) >= least, name, getattr(self, name), f"use {least} or more")
        _require(
            self.arena_chunk_bytes <= self.arena_bytes, "arena_chunk_bytes", self.arena_chunk_bytes, "use at most arena_bytes"
        )
        pace = self.tcp_bytes_per_second
        _require(pace == 0 or pace >= PACE_MIN, "tcp_bytes_per_second", pace, "use 0 for no limit, or 1MB or more")
        _require(self.tcp_streams <= 64, "tcp_streams", self.tcp_streams, "use 1 to 64")
        ranks, most = self.warm_group_ranks, GROUP_RANKS_MAX - 1
        _require(ranks == 0 or 2 <= ranks <= most, "warm_group_ranks", ranks, f"use 2 to {most}, or 0 for no groups")
        _require(0 <= self.port < 65536, "port", self.port, "use 0 to 65535")
        for field in dataclasses.fields(self):
            if field.name.endswith("_seconds"):
                value = getattr(self, field.name)
                positive = value > 0 or (
                    value == 0 and field.name in ("warm_seconds", "idle_exit_seconds", "publish_seconds", "drain_seconds")
                )
                _require(positive and value < 1e9, field.name, value, "use a positive number of seconds")
        for transport in self.transports:
            _require(transport in TRANSPORTS, "transports", transport, f"use some of {', '.join(TRANSPORTS)}")
        _require(bool(self.transports), "transports", self.transports, f"name at least one of {', '.join(TRANSPORTS)}")
        _require(self.disk_admit in ADMISSIONS, "disk_admit", self.disk_admit, f"use one of {', '.join(ADMISSIONS)}")
        _require(self.disk_threads <= 64, "disk_threads", self.disk_threads, "use 1 to 64")
        url = re.fullmatch(r"(s3://[^/\s]+(/\S*)?|file:///\S+|)", self.object_url)
        _require(url is not None, "object_url", self.object_url, "use 's3://bucket/prefix' or 'file:///folder'")
        self._validate_directory()
        _require(
            len(self.socket_path.encode()) < 104,
            "runtime_dir",
            self.runtime_dir,
            "choose a shorter path: a socket's name holds 103 bytes",
        )

    def _validate_directory(self) -> None:
        most = DIRECTORY_SHARDS_MAX
        _require(1 <= self.directory_shards <= most, "directory_shards", self.directory_shards, f"use 1 to {most}")
        if not self.directory:
            return
        endpoints = self.directories
        spelled = all(re.fullmatch(r"[^\s,]+:\d{1,5}", endpoint) for endpoint in endpoints)
        _require(spelled, "directory", self.directory, "use 'host:port', with commas between those of several shards")
        different = len(set(endpoints)) == len(endpoints) <= most
        _require(different, "directory", self.directory, f"name 1 to {most} shards, each once")
        _require(
            len(self.secret) >= 16,
            "secret",
            "*" * len(self.secret),
            "a cluster needs a secret of 16 characters or more, the same on every host",
        )


def parse_bytes(text: str) -> int:
    """``"64MiB"`` to 67108864. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(text)
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _parse(name: str, kind: str, value: Any) -> Any:
    try:
        if kind == "str":
            if isinstance(value, str):
                return value
        elif kind == "bool":
            if isinstance(value, bool):
                return value
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[str(value).lower()]
        elif kind == "int":
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            return parse_bytes(str(value))
        elif kind == "float":
            if not isinstance(value, bool):
                return float(value)
        elif kind == "tuple[str, ...]":
            parts = value.split(",") if isinstance(value, str) else list(value)
            return tuple(str(part).strip() for part in parts if str(part).strip())
    except (ValueError, TypeError, KeyError):
        pass
    example = {"int": "a whole number, or bytes as '512MiB'", "float": "a number of seconds", "bool": "true or false"}.get(
        kind, "text"
    )
    raise ConfigError(f"setting {name!r} cannot be {value!r}: use {example}.")


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"setting {name!r} cannot be {value!r}: {remedy}.")
