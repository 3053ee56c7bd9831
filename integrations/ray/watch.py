"""A process's view of a kvshare cluster on Ray, for those that route: who holds what, and what its engines' blocks are.

It connects in the background, to the directory's shards by the names of their actors, and again when they are restarted.
Whoever asks before that, or while they are away, is told that nobody knows.

Threads: one that finds the cluster and then sleeps until a connection is lost, and that of a `kvshare.onlooker.Onlooker`.
Methods may be called from any.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray

from kvshare import actors
from kvshare.config import Settings
from kvshare.integrations.ray.cluster import OWN
from kvshare.keys import Namespace
from kvshare.onlooker import Onlooker
from kvshare.overlap import Held
from kvshare.runs import Keys

log = logging.getLogger("kvshare")

ANSWER_SECONDS = 5.0
PAUSE_SECONDS = 1.0  # between attempts to find the cluster
SPACE_SECONDS = 10.0  # after which a namespace is asked for again: engines come and go


class Watch:
    """Of ``cluster``. label: the namespace's, a model's name; "" for the one that was declared last."""

    def __init__(self, cluster: str, label: str) -> None:
        self._cluster = cluster
        self._label = label
        self._onlooker: Onlooker | None = None
        self._space: Namespace | None = None
        self._asked_at = 0.0
        self._lost = threading.Event()  # a shard is to be found (again): it may be one of a cluster that was started anew
        self._ended = False
        self._lost.set()
        threading.Thread(target=self._find, name="kvshare-watch", daemon=True).start()

    def depths(self, keys: Sequence[Keys], seconds: float) -> Future[dict[str, Held] | None]:
        """As `kvshare.onlooker.Onlooker.depths`."""
        onlooker = self._onlooker
        if onlooker is not None:
            return onlooker.depths(keys, seconds)
        nobody: Future[dict[str, Held] | None] = Future()
        nobody.set_result(None)
        return nobody

    def space(self) -> Namespace | None:
        """The engines' namespace, of shard 0 where blocks are cut into shards; None while nobody knows it. Never waits."""
        now, onlooker = time.monotonic(), self._onlooker
        if onlooker is not None and now - self._asked_at > (PAUSE_SECONDS if self._space is None else SPACE_SECONDS):
            self._asked_at = now
            onlooker.namespaces(ANSWER_SECONDS).add_done_callback(self._told)
        return self._space

    def close(self) -> None:
        """End; idempotent."""
        self._ended = True
        self._lost.set()
        onlooker, self._onlooker = self._onlooker, None
        if onlooker is not None:
            onlooker.close()

    def _told(self, answer: Future[list[Namespace] | None]) -> None:
        spaces = None if answer.cancelled() else answer.result()
        first = [space for space in spaces or () if space.tensor_parallel == "1" or space.tensor_parallel.startswith("0/")]
        mine = [space for space in first if self._label in ("", space.label)]
        if mine:
            self._space = mine[-1]
        elif first:
            log.debug("kvshare: no engine declared %r, only %s", self._label, {space.label for space in first})

    def _find(self) -> None:
        known: dict[str, Any] = {}
        while self._lost.wait() and not self._ended:
            self._lost.clear()
            try:
                directory = ray.get_actor(actors.directory_name(self._cluster), actors.NAMESPACE)
                values = ray.get(directory.values.remote(), timeout=ANSWER_SECONDS)
            except Exception as error:  # no Ray, no such actor, a directory that restarts: again
                log.debug("kvshare: cluster %r is not found: %s", self._cluster, error)
                time.sleep(PAUSE_SECONDS)
                self._lost.set()
                continue
            if values != known:
                known = values
                self._look(Settings.load({name: value for name, value in values.items() if name not in OWN}, {}))

    def _look(self, settings: Settings) -> None:
        before, self._onlooker = self._onlooker, Onlooker(settings, self._resolve, settings.directory_shards)
        if before is not None:
            before.close()
        if self._ended:
            self.close()

    def _resolve(self, shard: int) -> str:
        self._lost.set()
        return actors.resolve_directory(self._cluster, shard)
