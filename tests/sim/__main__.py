"""Plays one seed after the other for as long as wanted: `make sim SEED=1 SECONDS=60`.

Prints each seed that fails, why, and how to play it again; ends with 1 if one did.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter

from tests.sim.cluster import Cluster, Plot
from tests.sim.world import Broken


def main() -> int:
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--seconds", type=float, default=60.0, help="of real time; 0: one seed only")
    parser.add_argument("--nodes", type=int, default=0, help="in every play; 0: as the seed has it")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    counts: Counter[str] = Counter()
    failed: list[int] = []
    began, seed, events = time.monotonic(), given.seed, 0
    while True:
        cluster = Cluster(Plot.drawn(seed, given.nodes or None))
        try:
            cluster.play()
        except Broken as broken:
            print(f"FAILED {broken}")
            failed.append(seed)
        except Exception:
            print(f"FAILED seed {seed}, second {cluster.world.now:.3f}:\n{traceback.format_exc()}")
            failed.append(seed)
        if failed[-1:] == [seed]:
            nodes = f" NODES={given.nodes}" if given.nodes else ""
            print(f"       {cluster.plot}\n       again: make sim SEED={seed} SECONDS=0{nodes}", flush=True)
        counts += cluster.world.counts
        events += cluster.world.events
        seed += 1
        if time.monotonic() - began >= given.seconds:
            break
    seconds = time.monotonic() - began
    print(f"{seed - given.seed} plays, {events} events, {events / seconds:.0f} a second; {len(failed)} failed")
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
