"""The worker's half of the vLLM hook against pages whose loads and saves end when the test says so."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's and torch's own making
    pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")

from kvshare.integrations.vllm.metadata import Load, Reads, Save, StepMetadata
from kvshare.integrations.vllm.worker_half import WorkerHalf
from kvshare.loading import LoadPlan, Measured
from kvshare.transport.base import BlockStatus, Completion, Transfer


class HeldSave:
    def __init__(self, copying: bool) -> None:
        self.copying = copying
        self.cancelled = False
        self.saved = 0
        self.ended = threading.Event()

    @property
    def done(self) -> bool:
        return self.ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        if self.cancelled and not self.copying:
            self.ended.set()
        return self.ended.wait(timeout)

    def cancel(self) -> None:
        self.cancelled = True


class HeldPages:
    def __init__(self) -> None:
        self.transfers: list[Transfer] = []
        self.saves: list[HeldSave] = []
        self.copying = False
        self.closed = False

    def load(self, plan: LoadPlan, block_ids: list[int]) -> Transfer:
        self.transfers.append(Transfer())
        return self.transfers[-1]

    def save(self, block_keys: list[bytes], block_ids: list[int]) -> HeldSave:
        self.saves.append(HeldSave(self.copying))
        return self.saves[-1]

    def close(self) -> None:
        self.closed = True


def completion(*statuses: BlockStatus) -> Completion:
    return Completion(np.array(statuses, np.uint8), 100 * len(statuses), 0.0, "said so" if any(statuses) else "")


def load(name: str, *block_ids: int, epoch: int = 0) -> Load:
    hashes = [f"{name}{i}".encode() for i in block_ids]
    return Load(name, LoadPlan(b"p", hashes, []), list(block_ids), epoch)


@pytest.fixture
def pages() -> HeldPages:
    return HeldPages()


@pytest.fixture
def worker(pages: HeldPages) -> WorkerHalf:
    return WorkerHalf(pages, list, lambda: None, 2.0)


def test_a_load_is_reported_once_with_its_failed_blocks_in_the_same_step(pages: HeldPages, worker: WorkerHalf) -> None:
    first = StepMetadata(loads=[load("a", 7, 8, 9)], forward=True)
    worker.prepare(first)
    assert worker.finished(first) == set()
    pages.transfers[0].complete(completion(BlockStatus.OK, BlockStatus.CORRUPT, BlockStatus.STALE))
    second = StepMetadata(forward=True)
    worker.prepare(second)
    assert worker.finished(second) == {"a"} and worker.failed_blocks() == {8, 9}
    assert worker.finished(second) == set() and worker.failed_blocks() == set()
    stats = worker.stats()
    assert stats is not None and stats.data["blocks_loaded"] == 1 and stats.data["blocks_failed"] == 2
    assert worker.stats() is None


def test_a_step_is_begun_once_however_often_it_is_announced(pages: HeldPages, worker: WorkerHalf) -> None:
    step = StepMetadata(loads=[load("a", 7)])
    worker.prepare(step)
    worker.prepare(step)
    assert len(pages.transfers) == 1


def test_a_step_without_a_forward_returns_as_soon_as_a_load_arrives(pages: HeldPages, worker: WorkerHalf) -> None:
    step = StepMetadata(loads=[load("a", 7), load("b", 8)])
    worker.prepare(step)
    arrives = threading.Timer(0.0, pages.transfers[1].complete, [completion(BlockStatus.OK)])
    arrives.start()
    named: set[str] = set()
    for _ in range(1000):
        named |= worker.finished(step)
        if named:
            break
    arrives.join()
    assert named == {"b"}


def test_a_load_begun_under_other_weights_is_worthless(pages: HeldPages, worker: WorkerHalf) -> None:
    worker.prepare(StepMetadata(loads=[load("a", 7, 8)]))
    pages.transfers[0].complete(completion(BlockStatus.OK, BlockStatus.OK))
    assert worker.finished(StepMetadata(epoch=1)) == {"a"}
    assert worker.failed_blocks() == {7, 8}


def test_a_save_that_has_not_begun_is_dropped_when_its_block_is_handed_out(pages: HeldPages, worker: WorkerHalf) -> None:
    worker.start_saves(StepMetadata(saves=[Save([b"k"], [3]), Save([b"l"], [4])]))
    worker.prepare(StepMetadata(overwritten=[4, 5]))
    assert not pages.saves[0].cancelled and not pages.saves[0].done
    assert pages.saves[1].cancelled and pages.saves[1].done


def test_a_copy_under_way_is_waited_for_before_its_block_is_overwritten(pages: HeldPages, worker: WorkerHalf) -> None:
    pages.copying = True
    worker.start_saves(StepMetadata(saves=[Save([b"k"], [3])]))
    order: list[str] = []

    def copied() -> None:
        order.append("copied")
        pages.saves[0].ended.set()

    ends = threading.Timer(0.02, copied)
    ends.start()
    worker.prepare(StepMetadata(overwritten=[3]))
    order.append("overwritten")
    ends.join()
    assert order == ["copied", "overwritten"]


def test_saved_blocks_are_counted(pages: HeldPages, worker: WorkerHalf) -> None:
    worker.start_saves(StepMetadata(saves=[Save([b"k", b"l"], [3, 4])]))
    pages.saves[0].saved = 2
    pages.saves[0].ended.set()
    worker.prepare(StepMetadata())
    stats = worker.stats()
    assert stats is not None and stats.reduce() == {
        "blocks_loaded": 0, "bytes_loaded": 0, "blocks_failed": 0, "blocks_saved": 2,
    }  # fmt: skip


def test_a_leaving_engine_still_saves_what_it_has_computed(pages: HeldPages) -> None:
    order: list[str] = []
    worker = WorkerHalf(pages, list, lambda: order.append("closed"), 20.0)
    worker.start_saves(StepMetadata(saves=[Save([b"k"], [3])]))

    def saved() -> None:
        order.append("saved")
        pages.saves[0].ended.set()

    ends = threading.Timer(0.02, saved)
    ends.start()
    worker.close()
    ends.join()
    assert order == ["saved", "closed"] and not pages.saves[0].cancelled


def test_a_leaving_engine_does_not_wait_for_ever(pages: HeldPages) -> None:
    order: list[str] = []
    worker = WorkerHalf(pages, list, lambda: order.append("closed"), 0.01)
    worker.start_saves(StepMetadata(saves=[Save([b"k"], [3])]))
    worker.close()
    assert order == ["closed"] and not pages.saves[0].ended.is_set()


def test_what_reads_have_moved_is_told_once(pages: HeldPages) -> None:
    mover = [[Measured(("a", "host"), 100, 0.5)], []]
    worker = WorkerHalf(pages, lambda: mover.pop(0), lambda: None, 2.0)
    assert worker.reads() == Reads([Measured(("a", "host"), 100, 0.5)])
    assert worker.reads() is None


def test_what_several_workers_tell_is_put_together() -> None:
    one, two = Measured(("a", "host"), 100, 0.5), Measured(("b", "host"), 200, 0.5, slow=True)
    assert Reads([one]).aggregate(Reads([two])).measured == [one, two]


def test_closing_ends_the_pages(pages: HeldPages, worker: WorkerHalf) -> None:
    worker.close()
    assert pages.closed
