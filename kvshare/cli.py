"""The command ``kvshare``: run a node or a directory, look at them, wait for warmth, check, stop, clean.

Settings come from the environment (``KVSHARE_ARENA_BYTES=8GiB``) and from ``--set arena_bytes=8GiB``, which wins. A wrong one
is one line on stderr and exit status 2. Other failures are one line and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import msgspec

from kvshare.config import Settings
from kvshare.errors import ConfigError, KVShareError, RegionError, Unavailable

log = logging.getLogger("kvshare")

ANSWER_SECONDS = 5.0
PURGE_SECONDS = 600.0  # an object store is rewritten segment by segment
STOP_SECONDS = 30.0  # giving back a large arena takes a while
RETRY_SECONDS = 0.2


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        settings = Settings.load(_overrides(options.set))
        return int(options.run(settings, options))
    except ConfigError as error:
        print(f"kvshare: {error}", file=sys.stderr)
        return 2
    except (KVShareError, OSError) as error:
        print(f"kvshare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvshare", description="Shares KV blocks between vLLM workers.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, as arena_bytes=8GiB; may be repeated"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Settings, argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[common], help=help, description=help)
        made.set_defaults(run=run)
        return made

    node = command("node", _node, "run this host's node until it is stopped")
    node.add_argument("--autostarted", action="store_true", help="end when there were no sessions for idle_exit_seconds")
    node.add_argument("--keep-arena", action="store_true", help="leave the arena's files for the next node when stopped")
    directory = command("directory", _directory, "run the cluster's directory until it is stopped; prints its 'host:port'")
    directory.add_argument(
        "--shard", type=int, default=0, metavar="NUMBER", help="which of 'directory_shards' it is, from 0 (default: 0)"
    )
    status = command("status", _status, "say what this host's node holds and whom it serves")
    status.add_argument("--json", action="store_true", help="as JSON")
    command("stop", _stop, "stop this host's node at once and give its memory back")
    drain = command("drain", _drain, "hand over what only this host's node holds, then stop it; exit 0 when nothing was lost")
    drain.add_argument("--timeout", type=float, metavar="SECONDS", help="take so long at most (default: drain_seconds)")
    drain.add_argument("--keep-arena", action="store_true", help="leave the arena's files for the next node")
    purge = command("purge", _purge, "erase blocks from every tier of every node; exit 0 when nothing of it is left")
    scope = purge.add_mutually_exclusive_group(required=True)
    scope.add_argument("--tenant", default="", metavar="NAME", help="all blocks of this tenant")
    scope.add_argument("--family", default="", metavar="HEX", help="all blocks of one namespace, by its fingerprint")
    scope.add_argument("--prefix", default="", metavar="HEX", help="all blocks whose keys begin so")
    purge.add_argument("--destroy-key", action="store_true", help="with --tenant: its key too, so that backups cannot be read")
    purge.add_argument("--yes", action="store_true", help="do not ask")
    rotate = command(
        "rotate-key", _rotate_key, "give a tenant a new key in 'keys_dir'; the old ones still open what they sealed"
    )
    rotate.add_argument("--tenant", required=True, metavar="NAME", help="whose; its blocks are sealed with the new key at once")
    warm = command("wait-warm", _wait_warm, "exit 0 when the engines' warm plans are done, 1 when they are not in time")
    warm.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="wait this long (default: 60)")
    command("check", _check, "verify this host's arena; exit 0 when all is well")
    command("clean", _clean, "remove what killed nodes of this cluster left on this host")
    return parser


def _overrides(given: list[str]) -> dict[str, str]:
    overrides = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"option '--set' cannot be {text!r}: use NAME=VALUE.")
        overrides[name.strip()] = value
    return overrides


# --- servers --------------------------------------------------------------------------------------------------------


class _Signalled(BaseException):
    """SIGTERM or SIGINT came. Like KeyboardInterrupt, no handler of ordinary errors may swallow it."""


@contextmanager
def _until_signalled() -> Iterator[None]:
    """Run the body until it ends or a signal comes. From then on signals are ignored: stopping is not cut short."""

    def signalled(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _Signalled

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signalled)
    try:
        yield
    except _Signalled:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _main_thread_hears() -> Iterator[None]:
    """Threads started in the body leave our signals to the main thread: one that took such a signal would not wake it."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _node(settings: Settings, options: argparse.Namespace) -> int:
    from kvshare.node import Node

    _log_to_stderr()
    node = Node(settings, idle_exit=options.autostarted)
    try:
        with _until_signalled():
            with _main_thread_hears():
                node.start()
            log.info("kvshare: node %s listens at %s", settings.node_name, settings.socket_path)
            node.join()
        if settings.drain_seconds and not node.join(0.0):
            with _until_signalled():  # a second signal ends it at once
                node.drain(settings.drain_seconds)
    finally:
        node.stop(unlink=not options.keep_arena)
    return 0


def _directory(settings: Settings, options: argparse.Namespace) -> int:
    from kvshare.directory_server import DirectoryServer

    shards = settings.directory_shards
    if not 0 <= options.shard < shards:
        raise ConfigError(
            f"option '--shard' cannot be {options.shard}: the directory has {shards} (setting 'directory_shards'), from 0."
        )
    _log_to_stderr()
    server = DirectoryServer(settings, options.shard, shards)
    try:
        with _until_signalled():
            with _main_thread_hears():
                server.start()
            print(server.endpoint, flush=True)  # for scripts, when port=0 took a free one
            server.join()
    finally:
        server.stop()
    return 0


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=os.environ.get("KVSHARE_LOG_LEVEL", "INFO"), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )


# --- questions ------------------------------------------------------------------------------------------------------


def _status(settings: Settings, options: argparse.Namespace) -> int:
    from kvshare.messages import AskStatus, NodeStatus
    from kvshare.session import call

    status = call(settings, AskStatus, ANSWER_SECONDS)
    if not isinstance(status, NodeStatus):
        raise Unavailable(f"the node at {settings.socket_path} answered {status!r}")
    described: dict[str, Any] = {
        "node": status.node.node,
        "epoch": status.node.epoch,
        "endpoint": status.node.endpoint,
        "directory": status.directory,
        "sessions": status.sessions,
        "regions": [msgspec.structs.asdict(region) for region in status.node.regions],
        "engines": [{"engine": engine.node, "blocks": engine.regions[0].slots} for engine in status.engines],
        "paths": status.paths,
        "counters": status.counters,
    }
    if options.json:
        print(json.dumps(described, indent=2))
        return 0
    for name in ("node", "endpoint", "directory", "sessions"):
        print(f"{name:<12}{described[name] if described[name] != '' else '-'}")
    for region in status.node.regions:
        where = region.data_path or f"the folder of setting '{region.kind}_dir'"
        print(f"{'region':<12}{region.kind}: slots of {region.slot_bytes} bytes, at most {region.slots}, in {where}")
    for engine in status.engines:
        print(f"{'engine':<12}{engine.node}, whose KV cache of {engine.regions[0].slots} blocks can be read where it lies")
    for where, way in sorted(status.paths.items()):
        print(f"{'path':<12}{where}: {way}")
    for name, count in sorted(status.counters.items()):
        print(f"{'counter':<12}{name} {count}")
    return 0


def _stop(settings: Settings, _options: argparse.Namespace) -> int:
    from kvshare.messages import Stop
    from kvshare.session import call

    path = Path(settings.socket_path)
    lock = path.with_suffix(".lock")
    if not _is_owned(lock):
        print(f"no node runs at {path}")
        return 0
    try:
        call(settings, Stop, ANSWER_SECONDS)
    except Unavailable as error:
        log.debug("kvshare: %s", error)  # a node that stops may close the connection before its answer is read
    _wait_stopped(path)
    print(f"stopped the node at {path}")
    return 0


def _drain(settings: Settings, options: argparse.Namespace) -> int:
    from kvshare.messages import Drain, Drained
    from kvshare.session import call

    seconds = settings.drain_seconds if options.timeout is None else max(0.0, options.timeout)
    ask = partial(Drain, seconds=seconds, keep_arena=options.keep_arena)
    drained = call(settings, ask, seconds + ANSWER_SECONDS)
    path = Path(settings.socket_path)
    if not isinstance(drained, Drained):
        raise Unavailable(f"the node at {path} answered {drained!r}")
    _wait_stopped(path)
    left = "left in the arena's files" if options.keep_arena else "lost"
    print(
        f"drained the node at {path} in {drained.seconds:.1f} s: {drained.moved} blocks moved to peers, {drained.kept} kept on "
        f"disk or in the object store, {drained.lost} {left}"
    )
    return 0 if not drained.lost or options.keep_arena else 1


def _wait_stopped(path: Path) -> None:
    """Until the node of this socket has given back all. Raises Unavailable."""
    deadline = time.monotonic() + STOP_SECONDS
    while _is_owned(path.with_suffix(".lock")):
        if time.monotonic() > deadline:
            raise Unavailable(f"the node at {path} did not stop within {STOP_SECONDS:g} s: kill it, then run 'kvshare clean'")
        time.sleep(0.05)


def _purge(settings: Settings, options: argparse.Namespace) -> int:
    from kvshare.messages import Purge
    from kvshare.purge import PurgeScope, purged_report
    from kvshare.session import call, purged

    try:
        scope = PurgeScope(options.tenant, bytes.fromhex(options.family), bytes.fromhex(options.prefix))
    except ValueError as error:
        raise ConfigError(f"this cannot be purged: {error}.") from error
    if options.destroy_key and not options.tenant:
        raise ConfigError("option '--destroy-key' cannot be without '--tenant': keys belong to tenants.")
    if not options.yes and _answer(f"Erase all blocks of {scope} from every node? Type 'yes': ") != "yes":
        print("nothing was purged")
        return 1
    done = purged(call(settings, partial(Purge, scope=scope, destroy_key=options.destroy_key), PURGE_SECONDS))
    for line in purged_report(scope, done.nodes, done.silent):
        print(line)
    return 0 if not (done.silent or any(node.faults for node in done.nodes)) else 1


def _rotate_key(settings: Settings, options: argparse.Namespace) -> int:
    from kvshare.tenants import NAME_REMEDY, tag_of
    from kvshare.vault import Vault

    tag = tag_of(options.tenant)
    if tag is None:
        raise ConfigError(f"option '--tenant' cannot be {options.tenant!r}: {NAME_REMEDY}.")
    if not settings.keys_dir:
        raise ConfigError("setting 'keys_dir' cannot be '': name the folder that the nodes keep their tenants' keys in.")
    print(f"key {Vault.open(settings.keys_dir).rotate(tag):016x} seals the blocks of tenant {options.tenant} from now on")
    return 0


def _answer(question: str) -> str:
    """What the user types; empty when nobody is there."""
    try:
        return input(question).strip()
    except EOFError:
        return ""


def _is_owned(lock: Path) -> bool:
    """Does a living node hold this lock?"""
    import fcntl

    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _wait_warm(settings: Settings, options: argparse.Namespace) -> int:
    from kvshare.messages import AskWarm
    from kvshare.session import call, warm_state

    deadline = time.monotonic() + options.timeout
    why = ""
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            # An empty family: all that the engines of this node want. Without any engine yet it is not done.
            state = warm_state(call(settings, partial(AskWarm, family=b"", wait_seconds=left), left + ANSWER_SECONDS))
        except Unavailable as error:
            why = str(error)
        else:
            if state.done:
                print(
                    f"warm: {state.wanted} blocks wanted, {state.present} were here, {state.pulled} pulled "
                    f"({state.bytes_pulled / 2**20:.1f} MiB in {state.seconds:.2f} s)"
                )
                return 0
            why = f"{state.pulled + state.present} of {state.wanted} blocks are here"
        if time.monotonic() + RETRY_SECONDS > deadline:
            print(f"kvshare: not warm within {options.timeout:g} s: {why}", file=sys.stderr)
            return 1
        time.sleep(RETRY_SECONDS)


def _check(settings: Settings, _options: argparse.Namespace) -> int:
    from kvshare.messages import AskStatus
    from kvshare.session import call
    from kvshare.slots import Region

    try:
        call(settings, AskStatus, ANSWER_SECONDS)
        answers = True
    except Unavailable:
        answers = False
    problems, count = [], 0
    stem = Path(settings.arena_stem)
    for table in sorted(stem.parent.glob(f"{stem.name}-*.table")):
        if table.stem.removeprefix(f"{stem.name}-").isdecimal():
            count += 1
            try:
                with Region.open(str(table.with_suffix(".data")), str(table)) as region:
                    problems += [f"{table.stem}: {problem}" for problem in region.check()]
            except RegionError as error:
                problems.append(str(error))
    for problem in problems:
        print(problem)
    print(f"the node {'answers' if answers else 'does not answer'}; {count} regions, {len(problems)} problems")
    return 0 if answers and not problems else 1


def _clean(settings: Settings, _options: argparse.Namespace) -> int:
    from kvshare.leftovers import remove_leftovers

    removed = remove_leftovers(settings)
    for path in removed:
        print(f"removed {path}")
    print(f"{len(removed)} files removed")
    return 0
