"""The control plane's messages: what is sent arrives, and nothing else is taken for a message."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvshare import cluster_messages, messages
from kvshare.cluster_messages import Erase, FromDirectory, ToDirectory
from kvshare.keys import Namespace
from kvshare.messages import Message, ToNode, ToSession
from kvshare.overlap import Held
from kvshare.places import GroupPlan, Location, NodeDescription, ProcessMemory, RegionDescription, Stored, WarmItem
from kvshare.purge import NodePurge, PurgeScope, TierPurge
from kvshare.runs import Keys, Place, Places, Run, Seen

CHANNELS = {"ToNode": ToNode, "ToSession": ToSession, "ToDirectory": ToDirectory, "FromDirectory": FromDirectory}

MEMORY = ProcessMemory(7, 2**40, "space", "DRAM", 0, (2**63, 2**62), (8192, 4096), (4096, 100), 2**47, 8, "agent", b"\x00\xff")
REGION = RegionDescription("a", 4096, 4096, 9, "host", "/shm/a.data", "/shm/a.table", "10.0.0.1:7", "device", MEMORY)
NODE = NodeDescription("a", 2**31, "host", "10.0.0.1:7", (REGION,))
LOCATION = Location("a", 4096, 8, 2**63 + 4, 4000)
KEYS = Keys(b"\x00\xff" * 16, 4, b"\xff\x00" * 4)
EXAMPLES: dict[Any, Any] = {
    int: 2**63 + 1,
    float: 0.5,
    str: "naïve",
    bytes: b"\x00\xff" * 20,
    bool: True,
    Namespace: Namespace(
        weights="w",
        dtype="d",
        kv_dtype="k",
        block_size=1,
        page_bytes=2,
        layers=3,
        kv_heads=4,
        head_size=5,
        hash_algorithm="h",
        hash_seed="s",
        packing="p",
        label="l",
    ),
    NodeDescription: NODE,
    RegionDescription: REGION,
    ProcessMemory: MEMORY,
    Location: LOCATION,
    Stored: Stored(b"key", 4096, 8, 2**63 + 4, 4000),
    WarmItem: WarmItem(b"key", LOCATION),
    Keys: KEYS,
    Held: Held(2**63 + 1, 7),
    Run: Run(KEYS, 4096, 4000, 2**31, b"\x07\x00\x00\xff" * 2, b"\xfe\xff" * 8),
    Seen: Seen(KEYS, b"\x01\x00\x00\xff" * 2),
    Places: Places([Place("a", 4096, 4000)] * 2, b"\x01\x02", b"\x01\x00" * 3, b"\xff" * 12, b"\xfe" * 24, b"\x01" * 12),
    PurgeScope: PurgeScope(tenant="acme"),
    NodePurge: NodePurge("a", [TierPurge("arena", 3, 2**40)], ["said why"]),
    Erase: Erase(2**63 + 1, PurgeScope(family=b"\x00\xff" * 8), True),
    GroupPlan | None: GroupPlan(b"\xff" * 16, "10.0.0.1:7", 3, 2, "nccl", 0.5, 0.25, 1 << 29),
}


def example(kind: Any) -> Any:
    """A value of a field's type, containers with two items so that order shows."""
    if kind in EXAMPLES:
        return EXAMPLES[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return [example(arguments[0])] * 2
    if origin is dict:
        return {example(arguments[0]): example(arguments[1])}
    assert type(None) in arguments, f"no example for a field of type {kind}: add one to EXAMPLES"
    return None


def instance(kind: type[Message]) -> Message:
    return kind(**{field.name: example(field.type) for field in msgspec.structs.fields(kind)})


KINDS = [(name, kind) for name, union in CHANNELS.items() for kind in typing.get_args(union)]
every_message = pytest.mark.parametrize(("channel", "kind"), KINDS, ids=[f"{name}-{kind.__name__}" for name, kind in KINDS])


def decoder(channel: str) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(CHANNELS[channel])


def test_every_message_travels_on_exactly_one_channel() -> None:
    kinds = [*vars(messages).values(), *vars(cluster_messages).values()]
    defined = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Message)} - {Message}
    travelling = [kind for _, kind in KINDS]
    assert set(travelling) == defined and len(travelling) == len(defined)


@every_message
def test_what_is_sent_arrives(channel: str, kind: type[Message]) -> None:
    sent = instance(kind)
    assert decoder(channel).decode(msgspec.msgpack.encode(sent)) == sent


@every_message
def test_a_message_cannot_be_rewritten(channel: str, kind: type[Message]) -> None:
    fields = msgspec.structs.fields(kind)
    if fields:
        with pytest.raises(AttributeError):
            setattr(instance(kind), fields[0].name, None)


@every_message
def test_a_message_of_one_channel_is_refused_on_every_other(channel: str, kind: type[Message]) -> None:
    sent = msgspec.msgpack.encode(instance(kind))
    for stranger in set(CHANNELS) - {channel}:
        with pytest.raises(msgspec.ValidationError):
            decoder(stranger).decode(sent)


@every_message
def test_a_message_cut_short_or_followed_by_garbage_is_refused(channel: str, kind: type[Message]) -> None:
    sent = msgspec.msgpack.encode(instance(kind))
    with pytest.raises(msgspec.DecodeError):
        decoder(channel).decode(sent[:-1])
    with pytest.raises(msgspec.DecodeError):
        decoder(channel).decode(sent + b"\x00")


@every_message
def test_a_message_with_one_field_too_many_or_too_few_is_refused(channel: str, kind: type[Message]) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(instance(kind)))
    with pytest.raises(msgspec.ValidationError):
        decoder(channel).decode(msgspec.msgpack.encode([*fields, 1]))
    if len(fields) > 1:
        with pytest.raises(msgspec.ValidationError):
            decoder(channel).decode(msgspec.msgpack.encode(fields[:-1]))


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("sent", [["Launch", 1], [], {}, 7, None, ["Beat", 1], [1, 2], "Beat"])
def test_what_is_no_message_is_refused(channel: str, sent: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decoder(channel).decode(msgspec.msgpack.encode(sent))


@every_message
def test_a_question_and_its_answer_carry_the_number_first(channel: str, kind: type[Message]) -> None:
    """``ask`` leads, so a frame can be matched to its question without knowing the rest of it."""
    names = [field.name for field in msgspec.structs.fields(kind)]
    assert "ask" not in names or names[0] == "ask"


def test_a_field_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decoder("ToNode").decode(msgspec.msgpack.encode(["Locate", "one", [b"key"]]))
    with pytest.raises(msgspec.ValidationError):
        decoder("ToNode").decode(msgspec.msgpack.encode(["Locate", 1, ["no bytes"]]))


def test_the_protocol_page_names_every_message() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
    missing = sorted({kind.__name__ for _, kind in KINDS if f"`{kind.__name__}`" not in page})
    assert not missing, f"docs/protocol.md does not explain {', '.join(missing)}"
