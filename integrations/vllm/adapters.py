"""Identity of LoRA adapters: digests of their files, taken in a thread so that the scheduler never reads a disk."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvshare.integrations.vllm.weights import digest_of

log = logging.getLogger("kvshare")

DIGEST_SECONDS = 5.0  # requests of an adapter wait this long for its identity, then run unshared
ADAPTERS_MAX = 4096  # identities kept


@dataclass(frozen=True)
class Wanted:
    """An adapter's identity on its way: an empty one means that its requests are not shared."""

    identity: Future[bytes]
    deadline: float


class Adapters:
    """Identities of the adapters that requests name. One per engine, used by its scheduler's thread."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[Any, ...], Wanted] = {}

    def identity(self, request: Any) -> bytes | None:
        """Of a ``LoRARequest``: its identity, b"" when it cannot be had, None while it is being read."""
        if request.load_inplace:
            # The same name may stand for other weights from now on: nothing tells which of the two a block is made of.
            return b""
        name = (request.lora_name, request.lora_int_id, request.lora_path)
        wanted = self._wanted.get(name)
        if wanted is None:
            if len(self._wanted) >= ADAPTERS_MAX:
                return b""
            wanted = self._wanted[name] = Wanted(Future(), time.monotonic() + DIGEST_SECONDS)
            threading.Thread(target=_read, args=(request, wanted.identity), name="kvshare-adapter", daemon=True).start()
        if wanted.identity.done():
            return wanted.identity.result()
        return None if time.monotonic() < wanted.deadline else b""


def _read(request: Any, identity: Future[bytes]) -> None:
    try:
        folder = Path(request.lora_path).expanduser()
        digest = digest_of(folder, extra=("adapter_config.json",))
        # How its files are read is a part of what they mean.
        result = hashlib.blake2b(f"{digest}|{request.is_3d_lora_weight}".encode(), digest_size=16).digest()
    except Exception as error:  # whatever the disk says: this adapter's requests run unshared, and that is said
        log.warning("kvshare: requests of LoRA adapter %r are not shared: %s", request.lora_name, error)
        result = b""
    identity.set_result(result)
