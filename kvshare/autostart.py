"""Start a node for a host that has none: a process of its own, so that its memory outlives the engine."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys

from kvshare.config import Settings

log = logging.getLogger("kvshare")

_started: list[subprocess.Popen[bytes]] = []  # kept so that one which ends is reaped at the next start


def ensure_node(settings: Settings) -> bool:
    """Start ``kvshare node`` detached, with our settings. Returns True when a process was started.

    Two engines may do so at once: the node's lock lets one of the two processes live, the other ends by itself.
    """
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value != getattr(Settings(), name)}
    command = [sys.executable, "-m", "kvshare", "node", "--autostarted"]
    # Settings travel in the environment, not in arguments: the secret must not show in a process list.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSHARE_")}
    for name, value in given.items():
        environment[f"KVSHARE_{name.upper()}"] = ",".join(value) if isinstance(value, tuple) else str(value)
    # The engine's own OpenMP and Python settings are nothing to the node.
    environment.pop("LD_PRELOAD", None)
    for process in list(_started):
        if process.poll() is not None:
            _started.remove(process)
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        log.warning("kvshare: cannot start a node (%s)", error)
        return False
    _started.append(process)
    log.info("kvshare: started a node for this host (%s)", json.dumps(sorted(given)))
    return True
