"""A simulation that cannot fail is worth nothing: each test breaks one rule on purpose, and the play must find it out.

Goal: every invariant of `tests.sim.cluster` is one that holds because the code keeps a rule. Method: one rule of `Rules` is
replaced, or a limit that it needs; one of a few plays has to end with the sentence that names the damage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import msgspec
import pytest

from kvshare.cluster_messages import AskPlan, Beat, Find, NodeLost, Publish, Resync
from kvshare.directory_events import Broadcast, Command, Event, Heard, Send, Tick
from kvshare.fingerprints import ALL_PARTS
from kvshare.messages import Message
from kvshare.outbox import Outbox
from kvshare.places import Stored
from tests.sim.cluster import Broken, Cluster, Plot
from tests.sim.setting import Rules

PLOT = Plot(1, nodes=24, shards=2, slots=16, prompts=60, seconds=40.0, requests_per_second=1.0, faults_per_second=3.0)
RESTLESS = dataclasses.replace(PLOT, nodes=6, slots=30, prompts=100, requests_per_second=8.0, faults_per_second=15.0)
ENGINES_DIE = dataclasses.replace(RESTLESS, faults=("kill_an_engine",))
UNSEEN = dataclasses.replace(PLOT, requests_per_second=3.0, faults_per_second=1.0, faults=("restart_unseen",))


class Forgetful(Outbox):
    """Now and then it does not hear that a block went."""

    def changed(self, stored: Iterable[Stored], removed: Iterable[bytes]) -> None:
        super().changed(stored, list(removed)[1:])


class Headstrong(Outbox):
    """It tells what it likes: parts that were asked for are not told anew."""

    def resync(self, parts: int) -> None:
        super().resync(parts)
        while self.next(0, 0) is not None:
            pass


def on_messages(change: Callable[[int, Message], Message | None]) -> Callable[[Event], Event | None]:
    """The directory hears something else, or nothing (None)."""

    def hears(event: Event) -> Event | None:
        if not isinstance(event, Heard):
            return event
        message = change(event.connection, event.message)
        return None if message is None else Heard(event.connection, message)

    return hears


def blind_to_gaps() -> Callable[[Event], Event | None]:
    """Whatever a node's sequence is, it looks like the next one; and no sums are looked at."""
    last: dict[int, int] = {}

    def change(connection: int, message: Message) -> Message:
        match message:
            case Publish(anew=anew, sequence=sequence):
                last[connection] = sequence if anew == ALL_PARTS else last.get(connection, 0) + 1
                return msgspec.structs.replace(message, sequence=last[connection])
            case Beat():
                return Beat(last.get(connection, 0), b"")
        return message

    return on_messages(change)


def greedy(connection: int, message: Message) -> Message:
    return msgspec.structs.replace(message, bytes_max=1 << 30) if isinstance(message, AskPlan) else message


def says_nothing_of(kind: type) -> Callable[[Command], bool]:
    return lambda command: not (isinstance(command, Send | Broadcast) and isinstance(command.message, kind))


SEEDS = 4  # what needs two rare things at once may not be found out by the first
WRONG_BLOCK, OTHER_SUMS = "accepts a wrong block", "has other sums"
BROKEN: dict[str, tuple[Callable[[], Rules], Plot, str]] = {
    "a reader that does not validate": (lambda: Rules(validate=lambda found, told: True), PLOT, WRONG_BLOCK),
    "a reader that takes whatever is complete": (lambda: Rules(validate=lambda found, told: found % 2 == 0), PLOT, WRONG_BLOCK),
    "a reader that takes what is being written": (
        lambda: Rules(validate=lambda found, told: found in (told, told + 1)),
        PLOT,
        WRONG_BLOCK,
    ),
    "a start with generations of the life before": (lambda: Rules(birth=lambda epoch, now: 1), UNSEEN, WRONG_BLOCK),
    "slots that do not rest": (Rules, dataclasses.replace(ENGINES_DIE, quarantine_seconds=1e-6), WRONG_BLOCK),
    "an outbox that loses a removal": (lambda: Rules(outbox=Forgetful), PLOT, OTHER_SUMS),
    "an outbox that keeps the inventory to itself": (lambda: Rules(outbox=Headstrong), PLOT, OTHER_SUMS),
    "a directory that sees no gap": (lambda: Rules(hears=blind_to_gaps()), dataclasses.replace(PLOT, lossy=0.1), OTHER_SUMS),
    "a directory that answers nobody": (
        lambda: Rules(hears=on_messages(lambda _, message: None if isinstance(message, Find) else message)),
        PLOT,
        "does not answer",
    ),
    "a directory that has no limit for plans": (lambda: Rules(hears=on_messages(greedy)), PLOT, "a plan of"),
    "a directory that never looks at its clock": (
        lambda: Rules(hears=lambda event: None if isinstance(event, Tick) else event),
        PLOT,
        "ticks for ever",
    ),
    "a directory that tells nobody of the dead": (lambda: Rules(says=says_nothing_of(NodeLost)), PLOT, "are wrong"),
    "a directory that asks for no inventory": (lambda: Rules(says=says_nothing_of(Resync)), PLOT, "had no turn"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_play_finds_out(name: str) -> None:
    rules, plot, sentence = BROKEN[name]
    for seed in range(SEEDS):
        try:
            Cluster(dataclasses.replace(plot, seed=seed), rules()).play()
        except Broken as broken:
            assert sentence in str(broken)
            return
    pytest.fail(f"{SEEDS} plays did not find out: {name}")


def test_the_same_play_by_the_rules_is_clean() -> None:
    """Else the tests above would show nothing."""
    for plot in (PLOT, ENGINES_DIE, UNSEEN):
        Cluster(dataclasses.replace(plot, lossy=0.1, seconds=20.0)).play()
