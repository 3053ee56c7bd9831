"""The Python API for custom serving stacks: match, load and save blocks by token ids.

    with kvshare.connect(namespace, block_bytes=2 << 20) as cache:
        cached = cache.match(tokens)                 # leading tokens that can be loaded
        loaded = cache.load(tokens[:cached], blocks) # verified and filled, from the front
        cache.save(tokens, blocks)

``tenant`` is whose the blocks are (default: setting ``tenant``): a tenant finds its own blocks only. A name that is none (it
has 1 to 64 letters, digits, '_', '.', '-') raises ValueError.

Calls here wait (bounded); an engine with a scheduler of its own uses `kvshare.session` and `kvshare.mover` directly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from kvshare import keys
from kvshare.config import Settings
from kvshare.messages import Purge, Purged
from kvshare.mover import Mover
from kvshare.purge import PurgeScope
from kvshare.question import Question
from kvshare.session import Session, WarmState, purged
from kvshare.tenants import NAME_REMEDY, tag_of
from kvshare.transport.base import Targets

PURGE_SECONDS = 600.0  # an object store is rewritten segment by segment
SAVE_SECONDS = 30.0  # to copy what was given into the arena; far more than it takes


class Cache:
    """A session for a custom stack. Made by `connect`; close it, or use it as a context manager."""

    def __init__(self, namespace: keys.Namespace, block_bytes: int, settings: Settings) -> None:
        self._settings = settings
        self._block_size = namespace.block_size
        self._block_bytes = block_bytes
        self._family = namespace.family()
        self._session = Session.connect(
            settings, namespace, engine=f"custom-{os.getpid()}", block_bytes=block_bytes, subscribe=True, warm=True
        )
        self._mover = Mover(self._session)

    def match(self, token_ids: Sequence[int], *, lora: bytes = b"", salt: str = "", tenant: str | None = None) -> int:
        """Leading tokens whose blocks can be loaded now: a multiple of the block size. Waits at most ``lookup_seconds``."""
        question, count = self._ask(token_ids, self._prefix(lora, salt, tenant))
        question.close(count)
        return count * self._block_size

    def load(
        self, token_ids: Sequence[int], blocks: Any, *, lora: bytes = b"", salt: str = "", tenant: str | None = None
    ) -> int:
        """Fill ``blocks`` from the front with the blocks of ``token_ids``.

        blocks: numpy array or torch tensor in host memory; C-contiguous rows along axis 0, one per block, each of
            ``block_bytes`` bytes; at least as many rows as blocks are wanted.

        Returns the leading tokens whose blocks are there and verified. Rows behind them are undefined. Raises ValueError
        for an array of another shape.
        """
        question, count = self._ask(token_ids, self._prefix(lora, salt, tenant))
        question.close(count)
        rows, _owner = self._rows(blocks)
        count = min(count, len(rows))
        if not count:
            return 0
        targets = Targets(rows[:count].reshape(-1, 1), np.array([self._block_bytes], np.uint64))
        completion = self._mover.load(question.plan(0, count), targets).wait()
        assert completion is not None
        failed = np.flatnonzero(completion.statuses)
        return (int(failed[0]) if len(failed) else count) * self._block_size

    def save(
        self, token_ids: Sequence[int], blocks: Any, *, lora: bytes = b"", salt: str = "", tenant: str | None = None
    ) -> int:
        """Save the full blocks of ``token_ids`` (``blocks`` as in `load`). Returns how many were new to the node.

        Waits until ``blocks`` may be overwritten.
        """
        hashes = keys.chain(token_ids, self._block_size)
        rows, _owner = self._rows(blocks)
        count = min(len(hashes), len(rows))
        prefix = self._prefix(lora, salt, tenant)
        sources = Targets(rows[:count].reshape(-1, 1), np.array([self._block_bytes], np.uint64))
        job = self._mover.save([prefix + block_hash for block_hash in hashes[:count]], sources)
        if not job.wait(SAVE_SECONDS):
            job.cancel()
            job.wait()
        return job.saved

    def wait_warm(self, timeout: float) -> WarmState:
        """Wait until this namespace's warm plan is done, at most ``timeout`` seconds. Raises Unavailable."""
        return self._session.warm(self._family, timeout)

    def purge(self, *, tenant: str = "", family: bytes = b"", prefix: bytes = b"", destroy_key: bool = False) -> Purged:
        """Erase blocks from every tier of every node: those of a tenant, of a namespace's family, or whose keys begin so.

        destroy_key: the tenant's key too. Returns what each node gave up; ``silent`` and ``faults`` of nodes are empty when
        nothing of it is left. What is in arrays of yours is yours. Raises ValueError (not exactly one scope), Unavailable.
        """
        ask = partial(Purge, scope=PurgeScope(tenant, family, prefix), destroy_key=destroy_key)
        return purged(self._session.call(ask, PURGE_SECONDS))

    def close(self) -> None:
        """Detach from the node; idempotent. What was saved stays with the node."""
        self._mover.close()
        self._session.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prefix(self, lora: bytes, salt: str, tenant: str | None) -> bytes:
        """What the keys of these blocks begin with."""
        tag = keys.tenant_tag(self._settings.tenant) if tenant is None else tag_of(tenant)
        if tag is None:
            raise ValueError(f"a tenant cannot be {tenant!r}: {NAME_REMEDY}")
        return keys.prefix(self._family, keys.variant(lora, salt), tenant=tag)

    def _ask(self, token_ids: Sequence[int], prefix: bytes) -> tuple[Question, int]:
        hashes = keys.chain(token_ids, self._block_size)
        question = self._session.ask(prefix, hashes)
        pause = threading.Event()
        while (count := question.available(0)) is None:
            pause.wait(0.0005)  # bounded: `available` answers by its deadline
        return question, count

    def _rows(self, blocks: Any) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], Any]:
        """Addresses of the rows, and the object that keeps them alive."""
        if hasattr(blocks, "data_ptr"):  # torch, without importing it
            if blocks.device.type != "cpu" or not blocks.is_contiguous():
                raise ValueError("blocks must be a contiguous tensor in host memory")
            address, count, total = blocks.data_ptr(), blocks.shape[0], blocks.numel() * blocks.element_size()
        else:
            array = np.asarray(blocks)
            if not array.flags.c_contiguous:
                raise ValueError("blocks must be a C-contiguous array")
            address, count, total = array.ctypes.data, array.shape[0], array.nbytes
        if total != count * self._block_bytes:
            raise ValueError(
                f"each of the {count} rows must hold {self._block_bytes} bytes, they hold {total / max(count, 1):g}"
            )
        return np.uint64(address) + np.arange(count, dtype=np.uint64) * np.uint64(self._block_bytes), blocks


def connect(namespace: keys.Namespace, *, block_bytes: int, **settings: Any) -> Cache:
    """Attach to this host's node (started if there is none).

    namespace: what makes your blocks interchangeable; block_bytes: length of every block; settings: see
    `kvshare.config.Settings`.

    Raises:
        ConfigError: a setting is wrong. Unavailable: no node in time. NamespaceError: the node refuses the namespace.
    """
    if block_bytes <= 0:
        raise ValueError(f"block_bytes cannot be {block_bytes}: it is the length of one block in bytes")
    return Cache(namespace, block_bytes, Settings.load(settings))
