"""What the demo measured, as JSON, as a table for people, and as a picture. Pure: no Ray, no vLLM, no clock."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20
BAR_CHARACTERS = 32


@dataclass(frozen=True)
class Served:
    """One request as an engine served it. first_seconds: to the first token; seconds: to the last; cached_tokens: prompt
    tokens that it did not compute."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    first_seconds: float
    seconds: float
    cached_tokens: int


@dataclass(frozen=True)
class Comparison:
    """Outputs against those of engine A. equal: of how many the token ids agree, of ``compared``; logprob_difference: the
    largest between log probabilities of agreeing tokens; own_difference: the same between A's own ways, recompute and prefix
    cache: what rounding does to this model without kvshare; rounding: prompts for which A's ways gave different tokens, so
    that either counts as right."""

    compared: int = 0
    equal: int = 0
    logprob_difference: float = 0.0
    own_difference: float = 0.0
    rounding: int = 0

    @property
    def all_equal(self) -> bool:
        return self.compared > 0 and self.equal == self.compared

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.compared + other.compared,
            self.equal + other.equal,
            max(self.logprob_difference, other.logprob_difference),
            max(self.own_difference, other.own_difference),
            self.rounding + other.rounding,
        )


@dataclass(frozen=True)
class Report:
    """All figures of a run; the fields are the keys of ``demo.json``. Times in seconds, medians over prefixes."""

    model: str
    prompts: int  # served by both engines, new ones included
    prefixes: int
    prefix_tokens: int
    ttft_recompute_s: float  # engine A, a prefix for the first time
    ttft_prefix_hit_s: float  # engine A, from its own prefix cache
    ttft_warm_join_s: float  # engine B, its first request of a prefix
    ttft_peer_s: float | None  # engine B, straight from A's node: what came after B was warm
    tokens_equal: bool
    logprob_max_abs_diff: float
    logprob_max_abs_diff_own: float  # between A's own ways, without kvshare
    outputs_compared: int
    outputs_equal: int
    outputs_rounded: int  # see `Comparison.rounding`
    blocks_wanted: int  # full blocks of the shared prefixes, which B had never computed
    blocks_hit: int  # of these, found by B's first requests
    warm_blocks_wanted: int
    blocks_pulled: int  # by B's node before B was declared ready
    bytes_pulled: int
    donors: dict[str, int]  # "host A" -> blocks pulled from its node
    warm_s: float
    survived_kill: bool
    kill_requests: int  # traffic around the kill, all of it
    kill_before: int  # answered before the kill
    kill_equal: int
    kill_logprob_max_abs_diff: float  # requests are computed side by side then, which rounds otherwise
    kill_longest_first_token_s: float  # of the requests answered after it
    kill_said: list[str]  # engine B's log lines about it
    ttft_from_zero_s: float  # everything stopped and host B came back: its first request of a prefix, from its disk
    zero_first_s: float  # the very first of them
    zero_outputs: int
    zero_equal: int
    zero_logprob_max_abs_diff: float
    zero_blocks_wanted: int  # full blocks of the prefixes
    zero_blocks_hit: int  # of these, not computed: nothing but the disk can have had them
    left_behind: list[str]
    seconds: dict[str, float] = field(default_factory=dict)  # per step
    machine: dict[str, Any] = field(default_factory=dict)
    commit: str = ""

    @property
    def shortfalls(self) -> list[str]:
        """What went wrong, a sentence each; empty when the demo showed what it promises."""
        found = []
        if not self.tokens_equal:
            found.append(f"{self.outputs_compared - self.outputs_equal} of {self.outputs_compared} outputs differ")
        if not self.survived_kill:
            found.append(f"after the kill only {self.kill_equal} of {self.kill_requests} requests were answered right")
        if self.ttft_warm_join_s >= self.ttft_recompute_s:
            found.append("the warm joiner was no faster than recomputing")
        if self.blocks_hit < self.blocks_wanted:
            found.append(f"the joiner found only {self.blocks_hit} of {self.blocks_wanted} blocks")
        if self.zero_equal < self.zero_outputs or not self.zero_outputs:
            found.append(f"after scale to zero only {self.zero_equal} of {self.zero_outputs} requests were answered right")
        if self.zero_blocks_hit < self.zero_blocks_wanted:
            found.append(f"after scale to zero only {self.zero_blocks_hit} of {self.zero_blocks_wanted} blocks came from disk")
        if self.ttft_from_zero_s >= self.ttft_recompute_s:
            found.append("the first token after scale to zero came no sooner than by recomputing")
        found += [f"left behind: {thing}" for thing in self.left_behind]
        return found

    def bars(self) -> list[tuple[str, float]]:
        """Ways to a first token and their seconds, for table and picture."""
        bars = [
            ("recomputed (engine A)", self.ttft_recompute_s),
            ("own prefix cache (engine A)", self.ttft_prefix_hit_s),
            ("warm joiner, from its node (engine B)", self.ttft_warm_join_s),
        ]
        if self.ttft_peer_s is not None:
            bars.append(("not warmed: from the peer over tcp (B)", self.ttft_peer_s))
        bars.append(("back from zero: from its disk (B)", self.ttft_from_zero_s))
        return bars


def compare(references: Mapping[str, Sequence[Served]], served: Mapping[str, Served]) -> Comparison:
    """``served`` against ``references``, both by prompt: A's ways of serving it, recompute first. Prompts without a reference
    are an error of the caller's."""
    total = Comparison()
    for name, output in served.items():
        ways = references[name]
        rounding = any(way.token_ids != ways[0].token_ids for way in ways)
        same = [way for way in ways if way.token_ids == output.token_ids]
        own = max(_difference(ways[0], way) for way in ways)
        total += Comparison(1, int(bool(same)), _difference((same or ways)[0], output), own, int(rounding))
    return total


def median_first(served: Sequence[Served]) -> float:
    """Median time to first token in seconds."""
    return statistics.median(request.first_seconds for request in served)


def table(report: Report) -> str:
    """The whole story in a dozen lines."""
    longest = max(seconds for _, seconds in report.bars())
    width = max(len(name) for name, _ in report.bars())
    lines = [f"Time to first token behind {report.prefix_tokens:,} shared tokens ({report.model}, {_where(report)})", ""]
    for name, seconds in report.bars():
        bar = "█" * max(1, round(seconds / longest * BAR_CHARACTERS))
        lines.append(
            f"  {name.ljust(width)}  {seconds:7.3f} s  {bar.ljust(BAR_CHARACTERS)}  {_times(report, seconds)}".rstrip()
        )
    pulled = f"{report.blocks_pulled} blocks, {report.bytes_pulled / MIB:,.0f} MiB over tcp in {report.warm_s:.2f} s"
    donors = ", ".join(f"{blocks} from {node}" for node, blocks in report.donors.items()) or "from nobody"
    kill_rest = report.kill_requests - report.kill_before
    rows = [
        ("joined warm", f"pulled {pulled} before it was declared ready ({donors})"),
        ("blocks", f"{report.blocks_hit} of {report.blocks_wanted} blocks of shared prefixes were hits at B's first requests"),
        ("outputs", f"{report.outputs_equal} of {report.outputs_compared} equal to engine A's, {_precision(report)}"),
        ("kill -9", f"engine A and its node, with {kill_rest} of {report.kill_requests} requests to B unanswered"),
        ("after it", f"{report.kill_equal} of {report.kill_requests} answered right; {_slowest(report)}"),
        ("from zero", f"engine, node and Ray stopped and came back; {_from_disk(report)}"),
        ("left behind", ", ".join(report.left_behind) or "nothing: no process, socket or shared memory"),
    ]
    lines += ["", *(f"  {name.ljust(12)} {text}" for name, text in rows), ""]
    lines.append("  " + ("It works." if not report.shortfalls else "SHORT: " + "; ".join(report.shortfalls)))
    return "\n".join(lines)


def write_json(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(report) + "\n")


def to_json(report: Report) -> str:
    return json.dumps({**dataclasses.asdict(report), "shortfalls": report.shortfalls}, indent=1)


def draw(report: Report, path: Path) -> None:
    """The bars as a PNG, with what was pulled and proven below. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name, _ in report.bars()]
    seconds = [value for _, value in report.bars()]
    figure = Figure(figsize=(9.6, 4.8), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.34, 0.34, 0.58, 0.47))
    colours = ["#b8b8b8", "#8fb4d9", "#1f77b4", *["#5b9bd0"] * (report.ttft_peer_s is not None), "#2a9d8f"]
    axes.barh(names, seconds, color=colours[: len(names)], height=0.62)
    axes.invert_yaxis()
    axes.set_xlim(0, max(seconds) * 1.16)
    for row, value in enumerate(seconds):
        axes.text(value + max(seconds) * 0.012, row, _label(report, value), va="center", fontsize=10)
    axes.set_xlabel("seconds to first token (median over prefixes)", fontsize=9)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.tick_params(axis="x", labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.text(0.03, 0.925, "A vLLM worker that arrives warm", fontsize=15, fontweight="bold")
    figure.text(
        0.03,
        0.865,
        f"{report.prefix_tokens:,} shared tokens before each prompt · {report.model} · {_where(report)}",
        fontsize=10,
        color="#555555",
    )
    figure.text(0.03, 0.045, _caption(report), fontsize=9.5, color="#333333", linespacing=1.5, va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _caption(report: Report) -> str:
    pulled = f"{report.blocks_pulled} blocks ({report.bytes_pulled / MIB:,.0f} MiB) over tcp in {report.warm_s:.2f} s"
    return "\n".join(
        [
            f"B's node pulled {pulled} before B was declared ready; "
            f"{report.blocks_hit} of {report.blocks_wanted} blocks wanted were hits.",
            f"{report.outputs_equal} of {report.outputs_compared} outputs equal to engine A's, {_precision(report)}.",
            f"Engine A and its node were killed (-9) mid-traffic: {report.kill_equal} of {report.kill_requests} requests to B "
            "answered right.",
            f"Then everything stopped and host B came back: {_from_disk(report)}.",
        ]
    )


def _from_disk(report: Report) -> str:
    return (
        f"{report.zero_blocks_hit} of {report.zero_blocks_wanted} blocks from disk, {report.zero_equal} of "
        f"{report.zero_outputs} answered right"
    )


def _slowest(report: Report) -> str:
    seconds = report.kill_longest_first_token_s
    recomputed = " (recomputed: its blocks died with A)" if seconds > report.ttft_recompute_s / 2 else ""
    return f"slowest first token {seconds:.2f} s{recomputed}"


def _where(report: Report) -> str:
    machine = report.machine
    return f"{machine.get('gpus')} GPUs" if machine.get("device") == "cuda" else f"{machine.get('cores', '?')} CPU cores"


def _label(report: Report, seconds: float) -> str:
    times = _times(report, seconds)
    return f"{seconds:.3f} s" + (f"   ({times})" if times else "")


def _times(report: Report, seconds: float) -> str:
    if seconds >= report.ttft_recompute_s:
        return ""
    return f"{report.ttft_recompute_s / seconds:.0f} x sooner"


def _precision(report: Report) -> str:
    text = (
        f"log probabilities within {report.logprob_max_abs_diff:.1g} "
        f"(A's own prefix cache against its recompute: {report.logprob_max_abs_diff_own:.1g})"
    )
    if report.logprob_max_abs_diff == 0:
        text = "log probabilities identical"
    if report.outputs_rounded:
        text += f"; for {report.outputs_rounded} A's own two ways gave different tokens, either is right"
    return text


def _difference(reference: Served, output: Served) -> float:
    """Largest difference of log probabilities up to where the tokens part: behind that they speak of other texts."""
    largest = 0.0
    pairs = zip(reference.token_ids, output.token_ids, reference.logprobs, output.logprobs, strict=False)
    for expected, got, expected_logprob, got_logprob in pairs:
        if expected != got:
            break
        largest = max(largest, abs(expected_logprob - got_logprob))
    return largest
