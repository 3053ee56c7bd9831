"""What kvshare costs while nothing happens: processor time of an engine with node and directory, less an engine without.

Both engines live at the same time and have served a few prompts; then all rest, and over the same windows the processor time
of all processes of each side is read from ``/proc``. The figure is the median difference, in cores.
"""

from __future__ import annotations

import time

from common import Child, Fleet, arguments, progress, prompt, report, summary

WINDOW_SECONDS = 30.0
SETTLE_SECONDS = 3.0


def main() -> None:
    options = arguments(__doc__ or "")
    windows = 1 if options.quick else 3
    with Fleet() as fleet:
        directory = fleet.start_directory()
        settings = fleet.settings("node")
        node = fleet.start_node(settings)
        attached = fleet.start_engine("engine-kvshare", settings)
        alone = fleet.start_engine("engine-alone", None)
        for engine in (attached, alone):
            engine.generate([prompt(1, 1000), prompt(2, 1000)])
        sides: dict[str, list[Child]] = {
            "engine_alone": [alone],
            "engine_attached": [attached],
            "node": [node],
            "directory": [directory],
        }
        time.sleep(SETTLE_SECONDS)
        cores = measure(sides, windows)
    added = [
        with_kvshare + node_cores + directory_cores - without
        for with_kvshare, node_cores, directory_cores, without in zip(
            cores["engine_attached"], cores["node"], cores["directory"], cores["engine_alone"], strict=True
        )
    ]
    detail = {"window_s": WINDOW_SECONDS, "added": summary(added), **{name: summary(values) for name, values in cores.items()}}
    report({"idle_cores_added": (detail["added"]["median"], "cores")}, detail, options.json)


def measure(sides: dict[str, list[Child]], windows: int) -> dict[str, list[float]]:
    """Cores used by each side in each window."""
    cores: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(windows):
        before = {name: sum(child.processor_seconds() for child in children) for name, children in sides.items()}
        began = time.monotonic()
        time.sleep(WINDOW_SECONDS)
        seconds = time.monotonic() - began
        for name, children in sides.items():
            cores[name].append((sum(child.processor_seconds() for child in children) - before[name]) / seconds)
        progress(", ".join(f"{name} {values[-1]:.4f}" for name, values in cores.items()))
    return cores


if __name__ == "__main__":
    main()
