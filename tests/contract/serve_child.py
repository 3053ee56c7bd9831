"""A process that owns a region of two blocks and serves it over TCP until it is killed. Prints what a reader must know."""

from __future__ import annotations

import json
import sys
import threading

from kvshare import native
from kvshare.slots import Region
from kvshare.transport.tcp import TcpTransport

LENGTH = 1 << 20


def main(secret: str, port: int) -> None:
    import numpy as np

    region = Region.anonymous(LENGTH, 2)
    generations = []
    for slot in range(2):
        generation = region.begin(slot)
        native.view(region.slot_address(slot), LENGTH, writable=True)[:] = bytes([slot + 1]) * LENGTH
        whole = np.array([region.slot_address(slot)], np.uint64), np.array([LENGTH], np.uint64)
        generations.append(region.finish(slot, generation, b"key", LENGTH, native.checksum(*whole, seed=slot)))
    transport = TcpTransport(secret, "127.0.0.1", port=port)
    transport.register(region)
    print(json.dumps({"endpoint": transport.endpoint(), "generations": generations}), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
