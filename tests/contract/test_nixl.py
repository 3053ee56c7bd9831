"""What only NIXL does: owners in processes of their own that die, hang and come back, memory that is not registered, lanes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from kvshare import native
from kvshare.device import DeviceTable
from kvshare.places import RegionDescription
from kvshare.slots import Region
from kvshare.transport.base import BlockStatus, Completion, ReadRequest, Targets
from kvshare.transport.nixl import NixlTransport, available
from kvshare.transport.nixl_agent import VERSION, Agent, packed, unpacked
from kvshare.transport.nixl_errors import BadMetadata, NotRegistered, PeerDead
from kvshare.transport.nixl_lane import has_rdma

from .conftest import HOST, SLOT_BYTES, SLOTS, Landing, request_for, write

OK, STALE, UNREACHABLE, TIMEOUT = BlockStatus.OK, BlockStatus.STALE, BlockStatus.UNREACHABLE, BlockStatus.TIMEOUT
CHILD = Path(__file__).with_name("nixl_child.py")
Pair = tuple[Region, RegionDescription, NixlTransport]
PATIENCE = 30.0  # seconds: longer than anything here takes on a working machine


@pytest.fixture(autouse=True)
def _only_where_nixl_works() -> None:
    if reason := available():
        pytest.skip(reason)


class Owner:
    """A child process that serves a region; ``table`` of a device region."""

    def __init__(self, kind: str, path: Path, slots: int, block_bytes: int, *more: str) -> None:
        command = [sys.executable, str(CHILD), kind, str(path), str(slots), str(block_bytes), *more]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.description = msgspec.json.decode(self.process.stdout.readline(), type=RegionDescription)
        self.table = DeviceTable.open(str(path)) if kind == "device" else None

    def generations(self, reader: NixlTransport, slots: list[int]) -> npt.NDArray[np.uint64]:
        """What the table says now; of a host region, which nobody else can see, by NIXL."""
        if self.table is not None:
            return self.table.generations(slots)
        memory = self.description.memory
        assert memory is not None
        agent = Agent()
        agent.hold(unpacked(memory.metadata))
        out = np.zeros(len(slots), np.uint64)
        registration = agent.register([(native.address_of(out), out.nbytes)])
        local = np.array([[native.address_of(out) + 8 * i, 8, 0] for i in range(len(slots))], np.uint64)
        remote = np.array([[memory.table_address + memory.table_stride * slot, 8, 0] for slot in slots], np.uint64)
        finish(agent, agent.request(memory.agent, local, remote))
        agent.deregister(registration)
        agent.let_go(memory.agent)
        agent.close()
        return out

    def kill(self) -> None:
        self.process.kill()
        with self.process:  # closes its pipes
            self.process.wait()


def finish(agent: Agent, handle: int) -> None:
    done, deadline = agent.post(handle), time.monotonic() + PATIENCE
    while not done and time.monotonic() < deadline:
        done = agent.done(handle)
    assert done
    agent.release(handle)


@pytest.fixture
def own(short_dir: Path) -> Iterator[Callable[..., Owner]]:
    """Start owners: kind, slots, bytes of a block, and "overwrite"."""
    owners: list[Owner] = []

    def start(kind: str, slots: int = 16, block_bytes: int = SLOT_BYTES, *more: str) -> Owner:
        owners.append(Owner(kind, short_dir / f"table-{len(owners)}", slots, block_bytes, *more))
        return owners[-1]

    yield start
    for owner in owners:
        owner.kill()


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents made in this test, and owners started in it, have only TCP."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")


def request(slots: list[int], generations: npt.NDArray[np.uint64], targets: Targets, seconds: float = 10.0) -> ReadRequest:
    numbers = np.array(slots, np.int64)
    return ReadRequest(numbers, generations.astype(np.uint64), numbers.astype(np.uint64), targets, seconds)


def read(reader: NixlTransport, description: RegionDescription, asked: ReadRequest) -> Completion:
    completion = reader.read(description, asked).wait(PATIENCE)
    assert completion is not None
    return completion


def holds(landing: Landing, index: int, generation: int) -> bool:
    """Is the block what the child wrote under that generation?"""
    return bool((landing.block(index).view(np.uint64) == generation).all())


# --- reads ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("pages", [1, 2, 16])
@pytest.mark.parametrize("host", ["this host", "another"])
def test_blocks_of_another_process_land_where_they_are_wanted(
    own: Callable[..., Owner], kind: str, pages: int, host: str
) -> None:
    owner = own(kind)
    slots = [3, 4, 5, 0, 15, 9]
    with NixlTransport(host, tcp=True) as reader:
        landing = Landing(len(slots), [SLOT_BYTES // pages] * pages)
        generations = owner.generations(reader, slots)
        for registered in (False, True):  # by way of memory of the transport, and directly
            if registered:
                reader.register_targets(native.address_of(landing.memory), landing.memory.nbytes)
            landing.memory[:] = 0xEE
            completion = read(reader, owner.description, request(slots, generations, landing.targets))
            assert completion.ok, completion
            assert all(holds(landing, i, int(generation)) for i, generation in enumerate(generations))
        assert reader.lanes()["a"][0] != ""


@pytest.mark.parametrize("host", ["this host", "another"])
def test_blocks_of_a_device_region_that_changed_are_stale(own: Callable[..., Owner], host: str) -> None:
    owner = own("device")
    assert owner.table is not None
    good = int(owner.table.generations([1])[0])
    asked = np.array([good, good + 2, good - 2, good + 1, 0], np.uint64)
    with NixlTransport(host, tcp=True) as reader:
        landing = Landing(5, [SLOT_BYTES])
        reader.register_targets(native.address_of(landing.memory), landing.memory.nbytes)
        first = Targets(landing.targets.addresses[:1], landing.targets.page_bytes)
        assert read(reader, owner.description, request([1], asked[:1], first)).ok
        completion = read(reader, owner.description, request([1] * 5, asked, landing.targets))
        assert completion.statuses.tolist() == [OK, STALE, STALE, STALE, STALE]
        outside = read(
            reader, owner.description, request([16, -1, 1 << 40], asked[[0, 0, 0]], Landing(3, [SLOT_BYTES]).targets)
        )
        assert outside.statuses.tolist() == [STALE] * 3
        short = read(reader, owner.description, request([1], asked[:1], Landing(1, [SLOT_BYTES // 2]).targets))
        assert short.statuses.tolist() == [STALE]


@pytest.mark.parametrize("lane", ["cma", "tcp"])
def test_large_blocks_are_read_by_either_lane(request: pytest.FixtureRequest, own: Callable[..., Owner], lane: str) -> None:
    """A block larger than what is fetched at once, and more of them than one portion."""
    if lane == "tcp":
        request.getfixturevalue("over_tcp")
    owner, slots = own("host", 4, 6 << 20), [2, 0, 3, 1]
    with NixlTransport(tcp=True) as reader:
        landing = Landing(4, [6 << 20])
        generations = owner.generations(reader, slots)
        numbers = np.array(slots, np.int64)
        asked = ReadRequest(numbers, generations, numbers.astype(np.uint64), landing.targets, 10.0)
        completion = read(reader, owner.description, asked)
        assert completion.ok, completion
        assert all(holds(landing, i, int(generation)) for i, generation in enumerate(generations))
        assert (reader.lanes()["a"][0] == "cma") == (lane == "cma")


@pytest.mark.parametrize("way", ["mapped table", "remote table", "tcp"])
@pytest.mark.parametrize("directly", [True, False])
def test_no_overwritten_block_is_accepted(
    request: pytest.FixtureRequest, own: Callable[..., Owner], way: str, directly: bool
) -> None:
    """The owner overwrites its few blocks all the time; what is accepted is what its generation says."""
    if way == "tcp":
        request.getfixturevalue("over_tcp")
    owner = own("device", 24, SLOT_BYTES, "overwrite")
    assert owner.table is not None
    slots, counts = list(range(24)), dict.fromkeys(BlockStatus, 0)
    with NixlTransport("this host" if way == "mapped table" else "another", tcp=True) as reader:
        landing = Landing(len(slots), [SLOT_BYTES // 2] * 2)
        if directly:
            reader.register_targets(native.address_of(landing.memory), landing.memory.nbytes)
        numbers = np.array(slots, np.int64)
        for _ in range(4000):
            generations = owner.table.generations(slots)
            asked = ReadRequest(numbers, generations, numbers.astype(np.uint64), landing.targets, 10.0)
            completion = read(reader, owner.description, asked)
            for i, status in enumerate(completion.statuses.tolist()):
                counts[BlockStatus(status)] += 1
                assert status != OK or holds(landing, i, int(generations[i])), f"a wrong block in slot {i}"
            if counts[OK] > 2000 and counts[STALE] > 2000:
                break
    assert counts[OK] > 100 and counts[STALE] > 100, counts
    assert counts[OK] + counts[STALE] == sum(counts.values()), counts


# --- owners that die, hang and come back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["cma", "tcp"])
def test_an_owner_killed_in_the_middle_is_unreachable_until_another_takes_its_place(
    request: pytest.FixtureRequest, own: Callable[..., Owner], lane: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    if lane == "tcp":
        request.getfixturevalue("over_tcp")
    owner = own("device", 64)
    slots = list(range(64)) * (100 if lane == "cma" else 4)
    numbers = np.array(slots, np.int64)
    memory = np.zeros(64 * SLOT_BYTES, np.uint8)
    targets = Targets.strided(native.address_of(memory), SLOT_BYTES, numbers, SLOT_BYTES)
    with NixlTransport("this host", tcp=True) as reader:

        def asked(one: Owner) -> ReadRequest:
            assert one.table is not None
            return ReadRequest(numbers, one.table.generations(slots), numbers.astype(np.uint64), targets, 5.0)

        old = asked(owner)
        assert read(reader, owner.description, old).ok
        transfer = reader.read(owner.description, old)
        threading.Event().wait(0.01)
        owner.kill()
        completion = transfer.wait(PATIENCE)
        assert completion is not None
        assert set(completion.statuses.tolist()) <= {OK, UNREACHABLE, TIMEOUT}
        again = read(reader, owner.description, old)
        assert set(again.statuses.tolist()) == {UNREACHABLE} and again.error != ""
        other = own("device", 64)
        eventually(lambda: read(reader, other.description, asked(other)).ok)
        assert set(read(reader, owner.description, old).statuses.tolist()) == {UNREACHABLE}


def test_a_stopped_owner_is_a_timeout_and_nothing_is_written_when_it_goes_on(
    over_tcp: None, own: Callable[..., Owner], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    owner, slots = own("device", 64), list(range(64))
    assert owner.table is not None
    with NixlTransport("this host", tcp=True) as reader:
        landing = Landing(64, [SLOT_BYTES])
        reader.register_targets(native.address_of(landing.memory), landing.memory.nbytes)
        asked = request(slots, owner.table.generations(slots), landing.targets, 0.5)
        assert read(reader, owner.description, asked).ok
        registrations = reader.registrations
        landing.memory[:] = 0xEE
        owner.process.send_signal(signal.SIGSTOP)
        completion = read(reader, owner.description, asked)
        assert set(completion.statuses.tolist()) == {TIMEOUT} and completion.error != ""
        again = read(reader, owner.description, asked)
        assert set(again.statuses.tolist()) == {UNREACHABLE}, "while it hangs it costs nobody a timeout"
        owner.process.send_signal(signal.SIGCONT)
        other = Landing(64, [SLOT_BYTES], seed=1)
        later = request(slots, owner.table.generations(slots), other.targets, 5.0)
        eventually(lambda: read(reader, owner.description, later).ok)
        assert (landing.memory == 0xEE).all()
        assert reader.quarantined() == []
        assert reader.registrations <= registrations + 1, "a second piece of memory to land in, while one was in quarantine"


def test_a_forgotten_owner_that_hangs_can_be_forgotten_and_closed(over_tcp: None, own: Callable[..., Owner]) -> None:
    owner, slots = own("device", 64), list(range(64))
    assert owner.table is not None
    landing = Landing(64, [SLOT_BYTES])
    with NixlTransport("this host", tcp=True) as reader:
        asked = request(slots, owner.table.generations(slots), landing.targets, 0.5)
        assert read(reader, owner.description, asked).ok
        owner.process.send_signal(signal.SIGSTOP)
        transfer = reader.read(owner.description, asked)
        threading.Event().wait(0.1)
        reader.forget("a")
        completion = transfer.wait(PATIENCE)
        assert completion is not None and set(completion.statuses.tolist()) == {TIMEOUT}
    landing.memory[:] = 0xEE
    owner.process.send_signal(signal.SIGCONT)
    threading.Event().wait(0.2)
    assert (landing.memory == 0xEE).all()


def test_an_owner_to_which_there_is_only_tcp_is_left_to_other_transports(over_tcp: None, own: Callable[..., Owner]) -> None:
    owner = own("device")
    assert owner.table is not None
    memory = owner.description.memory
    assert memory is not None
    elsewhere = msgspec.structs.replace(owner.description, memory=msgspec.structs.replace(memory, pid_space="another host's"))
    with NixlTransport("this host") as reader:
        assert reader.reaches(owner.description)
        asked = request([1], owner.table.generations([1]), Landing(1, [SLOT_BYTES]).targets)
        completion = read(reader, owner.description, asked)
        assert completion.statuses.tolist() == [UNREACHABLE] and "nothing but TCP" in completion.error
        assert not reader.reaches(owner.description)
        assert reader.reaches(elsewhere) == has_rdma()


# --- descriptions that are wrong ------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A region, its description, and a reader in this process."""
    region = Region.anonymous(SLOT_BYTES, SLOTS)
    with NixlTransport() as owner, NixlTransport(tcp=True) as reader:
        owner.register(region)
        yield region, msgspec.structs.replace(region.describe("a", HOST, ""), memory=owner.memory_of(region)), reader


def refused(pair: Pair, description: RegionDescription) -> str:
    """Why blocks of a wrong description are unreachable; right ones are read afterwards as before."""
    region, right, reader = pair
    block = write(region, 1, np.full(SLOT_BYTES, 7, np.uint8), 1)
    asked = request_for([block], Landing(1, [SLOT_BYTES]).targets)
    completion = read(reader, description, asked)
    assert completion.statuses.tolist() == [UNREACHABLE]
    reader.forget("a")
    after = read(reader, right, asked)
    assert after.ok, after
    return completion.error


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "flipped", "version", "no pieces"])
def test_damaged_metadata_is_refused_before_nixl_sees_it(pair: Pair, damage: str) -> None:
    memory = pair[1].memory
    assert memory is not None
    good = memory.metadata
    changed = {
        "empty": b"\x00",
        "garbage": b"garbage" * 50,
        "truncated": good[:-30],
        "flipped": good[:150] + bytes([good[150] ^ 1]) + good[151:],
        "version": msgspec.msgpack.encode((VERSION + 1, *msgspec.msgpack.decode(good)[1:])),
        "no pieces": packed(memory.agent, []),
    }[damage]
    with pytest.raises(BadMetadata):
        unpacked(changed)
    error = refused(pair, msgspec.structs.replace(pair[1], memory=msgspec.structs.replace(memory, metadata=changed)))
    assert "metadata" in error and ("run one kvshare" if damage == "version" else "described afresh") in error


def test_metadata_of_another_agent_is_refused(pair: Pair) -> None:
    memory = pair[1].memory
    assert memory is not None
    error = refused(pair, msgspec.structs.replace(pair[1], memory=msgspec.structs.replace(memory, agent="somebody else")))
    assert "another agent" in error


def test_a_region_of_another_size_than_was_described_is_refused(pair: Pair) -> None:
    assert "another version or size" in refused(pair, msgspec.structs.replace(pair[1], slots=SLOTS // 2))
    twice = msgspec.structs.replace(pair[1], slot_bytes=2 * SLOT_BYTES)
    assert "another version or size" in refused(pair, twice)


def test_memory_that_is_not_registered_is_refused_with_the_remedy(
    pair: Pair,
) -> None:
    memory = pair[1].memory
    assert memory is not None
    for wrong in (
        msgspec.structs.replace(memory, bases=(memory.bases[0] + (1 << 40),)),
        msgspec.structs.replace(memory, table_address=memory.table_address + (1 << 40)),
    ):
        assert "not registered" in refused(pair, msgspec.structs.replace(pair[1], memory=wrong))


# --- the agent ------------------------------------------------------------------------------------------------------------


def test_agents_write_and_send_messages() -> None:
    theirs, ours = np.zeros(4096, np.uint8), np.arange(4096).astype(np.uint8)
    owner, writer = Agent(), Agent()
    held = owner.register([(native.address_of(theirs), theirs.nbytes)])
    local = writer.register([(native.address_of(ours), ours.nbytes)])
    writer.hold(unpacked(owner.metadata([held])))
    rows = [np.array([[native.address_of(memory) + at, 1000, 0] for at in (0, 2000)], np.uint64) for memory in (ours, theirs)]
    handle = writer.request(owner.name, rows[0], rows[1], write=True)
    finish(writer, handle)
    assert np.array_equal(theirs[:1000], ours[:1000]) and not theirs[1000:2000].any()
    writer.notify(owner.name, b"\x00 done")
    heard: dict[str, list[bytes]] = {}
    deadline = time.monotonic() + PATIENCE
    while not heard and time.monotonic() < deadline:
        heard = owner.notifications()
    assert heard == {writer.name: [b"\x00 done"]}
    with pytest.raises(NotRegistered, match="describe it afresh"):
        writer.request(owner.name, rows[0], rows[1] + np.array([[4096, 0, 0]], np.uint64))
    writer.let_go(owner.name)
    writer.disconnect(owner.name)
    assert writer.peers == 0
    with pytest.raises(NotRegistered):
        writer.request(owner.name, rows[0], rows[1])
    connection = unpacked(owner.metadata([held]))
    owner.deregister(held)
    writer.deregister(local)
    owner.close()
    with pytest.raises(PeerDead):
        writer.hold(connection)
    assert (writer.registrations, owner.registrations, writer.peers) == (0, 0, 0)
    writer.close()


def test_an_idle_pair_uses_no_processor(pair: Pair) -> None:
    region, description, reader = pair
    block = write(region, 1, np.full(SLOT_BYTES, 7, np.uint8), 1)
    assert read(reader, description, request_for([block], Landing(1, [SLOT_BYTES]).targets)).ok
    before = time.process_time()
    threading.Event().wait(1.0)
    assert time.process_time() - before < 0.2  # of one second's; NIXL's own setting takes all of it, twice


def test_what_is_closed_leaves_no_thread_no_descriptor_and_no_registration(
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    region = Region.anonymous(SLOT_BYTES, SLOTS)
    block = write(region, 1, np.full(SLOT_BYTES, 7, np.uint8), 1)

    def use() -> None:
        landing = Landing(1, [SLOT_BYTES])
        with NixlTransport() as owner, NixlTransport(tcp=True) as reader:
            owner.register(region)
            description = msgspec.structs.replace(region.describe("a", HOST, ""), memory=owner.memory_of(region))
            reader.register_targets(native.address_of(landing.memory), landing.memory.nbytes)
            assert read(reader, description, request_for([block], landing.targets)).ok
            reader.deregister_targets(native.address_of(landing.memory), landing.memory.nbytes)
            owner.deregister(region)
            assert owner.registrations == 0
        assert owner.registrations == reader.registrations == 0

    def kept() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    use()  # UCX keeps what it opens first
    before = kept()
    for _ in range(3):
        use()
    eventually(lambda: kept() == before)


# --- without NIXL ---------------------------------------------------------------------------------------------------------


def _said(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_where_nixl_is_absent_it_says_so() -> None:
    program = "import sys; sys.modules['nixl'] = None\nfrom kvshare.transport.nixl import available\nprint(available())"
    assert "install the packages nixl" in _said(program)


def test_where_ucx_has_no_transport_that_nixl_can_use_it_says_which_setting() -> None:
    said = _said("from kvshare.transport.nixl import available\nprint(available())", UCX_TLS="cma")
    assert "must allow tcp" in said and "UCX_TLS=cma" in said
