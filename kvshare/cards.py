"""A node's card: how a process that Ray started finds the kvshare node of its Ray node, without importing ray.

Several Ray nodes may share one machine, each with a kvshare node, socket and arena of its own. Every process below a raylet,
however deep (an engine's worker processes too), inherits the raylet's process id in ``RAY_RAYLET_PID``. So the node leaves a
card under that number in the folder that all processes of this user agree on; `Settings.load` reads it.

    {folder}/raylet-{pid}@{cluster}.json     who wrote it for which raylet, and the settings an engine needs to attach

A card outlives a killed node on purpose (Ray restarts the node, under the same name); it is void when its raylet is gone, by
boot and start time of the process, so a reused process id never misleads. It holds the cluster's secret: only its owner may
read it, and a card of another user is not believed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvshare.errors import ConfigError

VARIABLE = "RAY_RAYLET_PID"


def write(folder: str, raylet_pid: int, cluster: str, settings: Mapping[str, Any]) -> None:
    """Leave a card for the processes below ``raylet_pid``; replaces a former one. Raises OSError."""
    path = _path(folder, raylet_pid, cluster)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"raylet": _identity(raylet_pid), "settings": dict(settings)}, file)
    fresh.rename(path)  # in one step: a reader sees the former card or this one


def locate(folder: str, environ: Mapping[str, str], cluster: str | None) -> dict[str, Any]:
    """Settings of the node that serves the process with this environment; empty when Ray did not start it, or no node is
    there. cluster: the one to attach to; None: the only one, or the one called "default".

    Raises:
        ConfigError: several clusters have a node there and none is named.
    """
    pid = environ.get(VARIABLE, "")
    if not pid.isdecimal():
        return {}
    found = {_cluster(path): path for path in Path(folder).glob(f"raylet-{pid}@*.json")}
    if cluster is None:
        cluster = "default" if "default" in found or not found else next(iter(found))
        if len(found) > 1 and cluster != "default":
            raise ConfigError(
                f"setting 'cluster' is missing: this Ray node serves {', '.join(sorted(found))}; name one of them."
            )
    card = _load(found[cluster]) if cluster in found else None
    # The name says which raylet it is for; what is written there must agree.
    return dict(card["settings"]) if card is not None and card["raylet"][1:2] == [pid] and _valid(card) else {}


def remove(folder: str, raylet_pid: int, cluster: str) -> None:
    """Take the card back; fine when there is none."""
    _path(folder, raylet_pid, cluster).unlink(missing_ok=True)


def remove_void(folder: str) -> list[str]:
    """Remove cards whose raylet is gone. Returns their paths."""
    void = []
    for path in Path(folder).glob("raylet-*@*.json"):
        card = _load(path)
        # Other containers may share the folder: whether a process of theirs runs is not for us to say.
        if card is not None and card["raylet"][:1] == _here() and not _valid(card):
            path.unlink(missing_ok=True)
            void.append(str(path))
    return void


def _path(folder: str, raylet_pid: int, cluster: str) -> Path:
    return Path(folder) / f"raylet-{raylet_pid}@{cluster}.json"  # no cluster's name holds an '@'


def _cluster(path: Path) -> str:
    return path.name.partition("@")[2].removesuffix(".json")


def _load(path: Path) -> dict[str, Any] | None:
    """A card that is ours and whole, valid or not."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
            if os.fstat(file.fileno()).st_uid == os.getuid():
                card = json.load(file)
                if isinstance(card["raylet"], list) and isinstance(card["settings"], dict):
                    return dict(card)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # removed meanwhile, or no card of ours
    return None


def _valid(card: dict[str, Any]) -> bool:
    try:
        return bool(card["raylet"] == _identity(int(card["raylet"][1])))
    except (OSError, ValueError, IndexError):
        return False


def _here() -> list[str]:
    """This boot and this namespace of process ids, in one word."""
    return [f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"]


def _identity(pid: int) -> list[str]:
    """A process beyond doubt: where, process id, start time in ticks. Raises OSError when it does not run."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return [*_here(), str(pid), stat.rpartition(")")[2].split()[19]]
