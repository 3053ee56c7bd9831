"""Pull or compute, and from whom, by rates that the tests make up."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare import cost
from kvshare.cost import Candidate, Cost, Meter, Prefill, Rates, choose
from kvshare.loading import LoadPlan, Measured, Offer, SourceRead
from kvshare.places import DISK, RegionDescription

A, B, OWN = ("a", "host"), ("b", "host"), ("own", "host")
MB = 10**6
BLOCK_BYTES, BLOCK_TOKENS = MB, 100


def test_a_rate_is_what_reads_have_moved_and_ages() -> None:
    rates = Rates()
    assert rates.rate(A, 0.0) == 0
    rates.observe(A, 100 * MB, 1.0, 0.0)
    assert rates.rate(A, 1.0) == pytest.approx(100 * MB, rel=0.01)
    assert rates.rate(B, 1.0) == 0
    assert rates.rate(A, cost.FRESH_SECONDS) == 0, "nobody has read from it for long"


def test_what_is_known_of_nodes_is_what_their_memory_gave_lately() -> None:
    rates = Rates()
    rates.observe(A, 100 * MB, 1.0, 0.0)
    rates.observe(("a", "device"), 300 * MB, 1.0, 1.0)
    rates.observe(B, MB, 1.0, 1.0, slow=True)
    rates.observe(("c", DISK), 900 * MB, 1.0, 1.0)
    assert rates.of_nodes(2.0) == {"a": pytest.approx(300 * MB, rel=0.01)}
    assert rates.of_nodes(1.0 + cost.FRESH_SECONDS) == {}


def test_a_link_that_becomes_slow_is_slow_after_one_read() -> None:
    rates = Rates()
    rates.observe(A, 1000 * MB, 1.0, 0.0)
    rates.observe(A, MB, 1.0, 1.0)
    assert rates.rate(A, 1.0) < 1.5 * MB


def test_a_short_read_shows_a_source_to_be_faster_but_not_slower() -> None:
    rates = Rates()
    rates.observe(A, 1000 * MB, 1.0, 0.0)
    rates.observe(A, 1000, 0.005, 1.0)
    assert rates.rate(A, 1.0) == pytest.approx(1000 * MB, rel=0.01)
    rates.observe(B, MB, 1.0, 0.0)
    rates.observe(B, MB, 0.004, 1.0)
    assert rates.rate(B, 1.0) > 3 * MB


def test_a_source_that_was_given_up_is_too_slow_for_a_while_whatever_it_was_before() -> None:
    rates = Rates()
    rates.observe(A, 1000 * MB, 1.0, 0.0)
    rates.observe(A, 0, 0.1, 1.0, slow=True)
    assert rates.rate(A, 1.0) == 1.0
    assert rates.rate(A, 1.0 + cost.FAILED_SECONDS) == 0, "unknown again: worth a try"


def test_reads_without_bytes_say_nothing_and_a_lost_node_is_forgotten() -> None:
    rates = Rates()
    rates.observe(A, 0, 1.0, 0.0)
    assert rates.rate(A, 0.0) == 0
    rates.observe(A, MB, 1.0, 0.0)
    rates.forget("a")
    assert rates.rate(A, 0.0) == 0


def test_rates_of_sources_that_come_and_go_do_not_pile_up() -> None:
    rates = Rates()
    for number in range(cost.SOURCES_MAX + 10):
        rates.observe((f"n{number}", "host"), MB, 1.0, 0.0)
    assert rates.rate(("n0", "host"), 0.0) == 0
    assert rates.rate((f"n{cost.SOURCES_MAX + 9}", "host"), 0.0) > 0


def test_two_reads_at_once_are_measured_together() -> None:
    meter = Meter()
    meter.began(A, 0.0)
    meter.began(A, 0.0)
    assert meter.ended(A, 10 * MB, 0.2) == Measured(A, 10 * MB, 0.2)
    assert meter.ended(A, 10 * MB, 0.2) == Measured(A, 20 * MB, 0.2)
    meter.began(A, 5.0)
    assert meter.ended(A, MB, 5.5) == Measured(A, MB, 0.5)


def test_a_source_that_is_never_idle_is_measured_anew_now_and_then() -> None:
    meter = Meter()
    meter.began(A, 0.0)
    meter.began(A, 0.0)
    meter.ended(A, MB, 2 * cost.BUSY_SECONDS)
    measured = meter.ended(A, 5 * MB, 2 * cost.BUSY_SECONDS + 1.0)
    assert measured == Measured(A, 5 * MB, 1.0)


def test_prefill_is_measured_by_steps_that_compute_much() -> None:
    prefill = Prefill()
    prefill.stepped(8, 1.0)
    assert prefill.seconds(1000) == 0
    prefill.stepped(2000, 1.0)
    assert prefill.seconds(4000) == pytest.approx(2.0)
    for _ in range(20):
        prefill.stepped(2000, 2.0)
    assert prefill.seconds(4000) == pytest.approx(4.0, rel=0.01)


def test_a_step_that_waited_for_the_one_before_took_the_time_since_that_one() -> None:
    """Asynchronous scheduling: a step is sent while another one runs."""
    engine = Cost(BLOCK_BYTES, BLOCK_TOKENS)
    engine.sent(1000, 0.0)
    engine.sent(1000, 0.1)
    engine.returned(1.0)
    engine.returned(2.0)
    engine.returned(3.0)  # of nothing
    assert engine.worth(offer([0] * 100, {A: 200 * MB}), [], 3.0) == 100
    assert engine.worth(offer([0] * 100, {A: 9 * MB}), [], 3.0) == 0


# --- worth ----------------------------------------------------------------------------------------------------------------


def engine_of(tokens_per_second: float = 1000.0) -> Cost:
    """A block takes 0.1 s to compute, and 0.1 s to pull at 10 MB/s."""
    engine = Cost(BLOCK_BYTES, BLOCK_TOKENS)
    engine.sent(1000, 0.0)
    engine.returned(1000 / tokens_per_second)
    return engine


def offer(source: list[int], rates: dict[tuple[str, str], float], own: bool = False) -> Offer:
    return Offer(np.array(source, np.int64), list(rates), list(rates.values()), own)


def loading(blocks: int, source: tuple[str, str] = A) -> LoadPlan:
    region = RegionDescription(source[0], MB, MB, 1000, "elsewhere", "", "", "there:1", source[1])
    numbers = np.arange(blocks)
    read = SourceRead(region, numbers, numbers, numbers.astype(np.uint64))
    return LoadPlan(b"p", [b"%d" % i for i in range(blocks)], [read])


@pytest.mark.parametrize(("rate", "blocks"), [(MB, 0), (10 * MB, 0), (12 * MB, 0), (14 * MB, 40), (1000 * MB, 40)])
def test_blocks_are_pulled_when_that_is_clearly_faster_than_computing(rate: float, blocks: int) -> None:
    assert engine_of().worth(offer([0] * 40, {A: rate}), [], 1.0) == blocks


def test_a_faster_engine_computes_what_a_slower_one_pulls() -> None:
    wanted = offer([0] * 40, {A: 100 * MB})
    assert engine_of(1000).worth(wanted, [], 1.0) == 40
    assert engine_of(20_000).worth(wanted, [], 1.0) == 0


def test_what_is_under_way_comes_first() -> None:
    wanted = offer([0] * 40, {A: 20 * MB})
    assert engine_of().worth(wanted, [loading(20)], 1.0) == 40
    assert engine_of().worth(wanted, [loading(20), loading(20)], 1.0) == 0
    assert engine_of().worth(wanted, [loading(40, B)], 1.0) == 40, "another source's queue does not matter"


def test_an_unmeasured_source_is_not_waited_for() -> None:
    assert engine_of().worth(offer([0] * 40, {A: 0.0}), [], 1.0) == 0
    assert engine_of().worth(offer([0] * 10 + [1] * 30, {A: 100 * MB, B: 0.0}), [], 1.0) == 10


def test_blocks_behind_those_of_a_slow_source_are_computed() -> None:
    wanted = offer([0] * 10 + [1] * 30, {A: 100 * MB, B: MB})
    assert engine_of().worth(wanted, [], 1.0) == 10
    assert engine_of().worth(offer([1] + [0] * 39, {A: 1000 * MB, B: 10 * MB}), [], 1.0) == 40, "one slow block of forty"
    assert engine_of().worth(offer([1] * 35 + [0] * 5, {A: 1000 * MB, B: 10 * MB}), [], 1.0) == 0


def test_a_load_whose_first_block_would_come_too_late_to_tell_is_not_begun() -> None:
    """Two blocks of 0.07 s each instead of 0.1 s: if the link has become slower nobody would know for so long."""
    assert engine_of().worth(offer([0] * 2, {A: 14 * MB}), [], 1.0) == 0
    assert engine_of().worth(offer([0] * 40, {A: 14 * MB}), [], 1.0) == 40
    limited = engine_of().limited(loading(40), offer([0] * 40, {A: 14 * MB}), [], 1.0)
    assert 1 / 14 < limited.grace_seconds < cost.RISK_SHARE * limited.seconds


def test_sources_are_read_at_once() -> None:
    one, two = offer([0] * 40, {A: 10 * MB}), offer([0] * 20 + [1] * 20, {A: 10 * MB, B: 10 * MB})
    assert engine_of().worth(one, [], 1.0) == 0
    assert engine_of().worth(two, [], 1.0) == 40


def test_our_own_node_is_fast_until_it_has_been_measured_and_never_very_slow() -> None:
    fast, slow = engine_of(20_000), engine_of(1000)
    wanted = offer([0] * 40, {OWN: 0.0}, own=True)
    assert fast.worth(wanted, [], 1.0) == slow.worth(wanted, [], 1.0) == 40
    for engine in (fast, slow):
        engine.measured([Measured(OWN, MB, 1.0)], 1.0)
    assert fast.worth(wanted, [], 1.0) == 0 and slow.worth(wanted, [], 1.0) == 40


def test_an_engine_believes_its_own_reads_before_its_node() -> None:
    engine = engine_of()
    engine.measured([Measured(A, MB, 1.0)], 1.0)
    wanted = offer([0] * 40, {A: 1000 * MB})
    assert engine.worth(wanted, [], 1.0) == 0
    assert engine.worth(wanted, [], 2.0 + cost.FRESH_SECONDS) == 40


def test_while_nobody_knows_how_fast_the_engine_computes_measured_sources_are_pulled_from() -> None:
    engine = Cost(BLOCK_BYTES, BLOCK_TOKENS)
    assert engine.worth(offer([0] * 5 + [1] * 5, {A: MB, B: 0.0}), [], 1.0) == 5


def test_a_load_may_cost_a_small_share_of_computing_and_what_is_queued_before_it() -> None:
    engine, wanted = engine_of(), offer([0] * 40, {A: 20 * MB})
    limited = engine.limited(loading(40), wanted, [], 1.0)
    assert limited.seconds == pytest.approx(4.0)
    assert limited.grace_seconds == pytest.approx(cost.WAIT_SHARE * 4.0) == pytest.approx(engine.patience(40))
    queued = engine.limited(loading(40), wanted, [loading(20)], 1.0)
    assert queued.grace_seconds == pytest.approx(limited.grace_seconds + 1.0)


def test_a_load_of_an_engine_that_has_computed_nothing_yet_has_no_limit() -> None:
    engine = Cost(BLOCK_BYTES, BLOCK_TOKENS)
    assert engine.limited(loading(4), offer([0] * 4, {A: MB}), [], 1.0).seconds == 0
    assert engine.patience(4) == cost.WAIT_SECONDS_MIN


# --- choose ---------------------------------------------------------------------------------------------------------------

FAR_A, FAR_B, NEAR_C = Candidate(A, 1, False), Candidate(B, 1, False), Candidate(("c", "host"), 1, True)


def known(**rates: float) -> Rates:
    made = Rates()
    for node, rate in rates.items():
        made.observe((node, "host"), int(rate * MB), 1.0, 0.0)
    return made


def test_the_fastest_source_is_chosen() -> None:
    assert choose([[FAR_A, FAR_B]], known(a=10, b=100), 1.0) == [1]
    assert choose([[FAR_A, FAR_B]], known(a=100, b=10), 1.0) == [0]


def test_among_equals_the_same_host_and_else_the_first() -> None:
    assert choose([[FAR_A, FAR_B, NEAR_C]], Rates(), 1.0) == [2]
    assert choose([[FAR_A, FAR_B]], Rates(), 1.0) == [0]


def test_memory_comes_before_a_disk_that_is_as_fast_and_not_before_one_that_is_faster() -> None:
    disk = Candidate(("d", DISK), 2, True)
    assert choose([[disk, FAR_A], [disk], [disk, FAR_A]], Rates(), 1.0) == [1, 0, 1]
    rates = known(a=10)
    rates.observe(("d", DISK), 100 * MB, 1.0, 0.0)
    assert choose([[FAR_A, disk]], rates, 1.0) == [1]


def test_fetching_may_take_clearly_less_than_computing_and_is_unknown_until_something_was_computed() -> None:
    cost = Cost(BLOCK_BYTES, BLOCK_TOKENS)
    assert cost.fetch_seconds(10) == 0.0
    cost.sent(1000, 0.0)
    cost.returned(1.0)
    assert 0.0 < cost.fetch_seconds(10) < 1.0  # computing them takes a second


def test_a_chain_stays_with_one_source_while_that_is_about_as_fast() -> None:
    rates = known(a=100, b=110)
    assert choose([[FAR_A], [FAR_B, FAR_A], [FAR_B, FAR_A], [FAR_B]], rates, 1.0) == [0, 1, 1, 0]
    rates = known(a=100, b=200)
    assert choose([[FAR_A], [FAR_B, FAR_A], [FAR_B, FAR_A]], rates, 1.0) == [0, 0, 0]


def test_an_unmeasured_source_counts_as_the_average_so_that_it_gets_tried() -> None:
    rates = known(a=10, b=100)
    assert choose([[FAR_A, NEAR_C]], rates, 1.0) == [1]
    assert choose([[FAR_B, NEAR_C], [FAR_A]], rates, 1.0) == [0, 0]


def test_blocks_that_nobody_has_stay_without_a_source() -> None:
    assert choose([[], [FAR_A], []], Rates(), 1.0) == [-1, 0, -1]
