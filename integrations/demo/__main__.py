"""``python -m kvshare.integrations.demo``: run the demo, print the table, write demo.json and demo.png.

Exit code 0 only when it showed all that it promises: equal outputs, a joiner faster than recomputing, the kill survived, the
first requests after scale to zero served from disk, and nothing left behind. 1 otherwise, 2 for wrong arguments, 130 after
Ctrl-C; it cleans up in every case.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kvshare.integrations.demo.cluster import Machine, first_line, interruptible, undisturbed
from kvshare.integrations.demo.report import Report, draw, table, to_json, write_json
from kvshare.integrations.demo.scenario import Options, Results, Scenario, report
from kvshare.integrations.testing import TOKENS_MAX

ARENA_BYTES = 4 << 30
PREFIX_TOKENS_MIN = 256
ROOM_TOKENS = 256  # of the small model's context, for tails and output


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshare.integrations.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a model of yours, name or path; default: a small one made on the spot")
    parser.add_argument("--prompts", type=int, default=12, help="that engine A serves at first (default 12, 3 of each prefix)")
    parser.add_argument("--prefix-tokens", type=int, default=3968, help="length of the shared prefixes (default 3968)")
    parser.add_argument("--output", type=Path, default=Path("build"), help="folder of demo.json and demo.png (default build)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, nothing else on stdout; no picture")
    parser.add_argument("--verbose", action="store_true", help="show what engines and nodes print")
    given = parser.parse_args()
    if given.prompts < 1:
        parser.error(f"--prompts cannot be {given.prompts}: use 1 or more")
    longest = TOKENS_MAX - ROOM_TOKENS if not given.model else sys.maxsize
    if not PREFIX_TOKENS_MIN <= given.prefix_tokens <= longest:
        parser.error(f"--prefix-tokens cannot be {given.prefix_tokens}: use {PREFIX_TOKENS_MIN} to {longest}")
    options = Options(given.model, given.prompts, given.prefix_tokens, given.output, given.verbose)
    with interruptible():
        return run(options, json_only=given.json)


def run(options: Options, json_only: bool) -> int:
    began = time.monotonic()
    progress = sys.stderr if json_only else sys.stdout  # bound now: Ray's own chatter is sent elsewhere

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=progress, flush=True)

    machine = Machine(ARENA_BYTES, say, options.verbose)
    try:
        return story(options, machine, json_only, say)
    finally:
        machine.discard()


def story(options: Options, machine: Machine, json_only: bool, say: Callable[[str], None]) -> int:
    scenario = Scenario(options, machine, say)
    results: Results | None = None
    code = 1
    with machine.quiet():
        try:
            results = scenario.run()
        except KeyboardInterrupt:
            say("interrupted")
            code = 130
        except Exception as error:
            # Whatever it was (Ray's, vLLM's, ours): told in a line, with the logs, after everything is cleaned up.
            say(f"the demo could not go on: {first_line(error)}")
        finally:
            with undisturbed():
                say("stopping everything")
                began_stopping = time.monotonic()
                left_behind = machine.stop()
                scenario.seconds["stopping"] = round(time.monotonic() - began_stopping, 3)
    if results is not None:
        code = tell(report(options, results, left_behind, scenario.seconds), options, json_only)
    elif left_behind:
        say(f"had to be removed by force: {', '.join(left_behind)}")
    if code == 1 and machine.keep_logs(options.output / "demo-logs"):
        say(f"what the processes of this run printed is in {options.output / 'demo-logs'}")
    return code


def tell(figures: Report, options: Options, json_only: bool) -> int:
    write_json(figures, options.output / "demo.json")
    if json_only:
        print(to_json(figures))
        return int(bool(figures.shortfalls))
    picture = f"picture: {options.output / 'demo.png'}, "
    try:
        draw(figures, options.output / "demo.png")
    except ImportError:
        picture = "no picture (it needs matplotlib), "
    print(f"\n{table(figures)}\n\n{picture}figures: {options.output / 'demo.json'}")
    return int(bool(figures.shortfalls))


if __name__ == "__main__":
    sys.exit(main())
