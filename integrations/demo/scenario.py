"""The story, step by step: engine A computes, engine B arrives warm and serves, A and its node are killed, B serves on; then
all stops, and host B comes back and serves from its disk.

Prompts are a prefix (of whole blocks, shared) and a tail (shorter than a block, so that nothing of it is ever a hit):

    p2/t0   third prefix, first tail: A recomputes it, B's first request of this prefix
    p2/t1   A finds the prefix in its own cache
    p2/n0   a prompt that is new to both engines
    x1/t0   a prefix that A computes after B was warm: only A's node holds it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvshare.integrations.demo import facts
from kvshare.integrations.demo.cluster import Machine
from kvshare.integrations.demo.engine import Ready
from kvshare.integrations.demo.report import Report, Served, compare, median_first
from kvshare.integrations.testing import engine_arguments, engine_environment, tiny_model
from kvshare.session import WarmState

TAILS = 3  # of one prefix
TAIL_TOKENS = 32
OUTPUT_TOKENS = 8
PEER_PREFIXES = 2  # pulled by B straight from A's node
KILL_PREFIXES = 3  # wanted by B when A's node dies
AT_ONCE = 2  # requests in flight around the kill
KILL_AFTER = 2  # answers: the next two are being pulled then
PUBLISH_SECONDS = 10.0
WARM_SECONDS = 60.0
SERVE_SECONDS = 600.0
Prompts = dict[str, list[int]]


@dataclass(frozen=True)
class Options:
    """model: name or path, empty: the built-in small one; prompts: that A serves at first; output: folder."""

    model: str = ""
    prompts: int = 12
    prefix_tokens: int = 3968
    output: Path = Path("build")
    verbose: bool = False

    @property
    def prefixes(self) -> int:
        return max(2, -(-self.prompts // TAILS))


@dataclass
class Results:
    """What the steps found out. References: A's ways of serving a prompt, its first one first."""

    ready: Ready
    prefix_tokens: int
    references: dict[str, list[Served]] = field(default_factory=dict)
    recomputed: list[Served] = field(default_factory=list)
    hits: list[Served] = field(default_factory=list)
    warm: WarmState = field(default_factory=lambda: WarmState(False))
    joined: dict[str, Served] = field(default_factory=dict)
    firsts: list[Served] = field(default_factory=list)
    peers: list[Served] = field(default_factory=list)
    traffic: dict[str, Served] = field(default_factory=dict)
    traffic_asked: int = 0
    after_kill: list[Served] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    from_zero: dict[str, Served] = field(default_factory=dict)
    left_at_zero: list[str] = field(default_factory=list)
    hosts: dict[str, str] = field(default_factory=dict)  # node -> "host A"


class Scenario:
    """Runs the steps on a `Machine`; ``say`` prints a line of progress."""

    def __init__(self, options: Options, machine: Machine, say: Callable[[str], None]) -> None:
        self._options = options
        self._machine = machine
        self._say = say
        self._seconds: dict[str, float] = {}
        self._step_name, self._step_began = "", 0.0
        self._results: Results

    @property
    def seconds(self) -> dict[str, float]:
        """Time that each step took."""
        return self._seconds

    def run(self) -> Results:
        """All steps but the last stopping. Raises whatever keeps one from being done."""
        self._begin("cluster", "two raylets of one Ray cluster, host A and host B; kvshare on both")
        self._machine.start()
        model = self._options.model
        if not model:
            self._begin("model", "a small Llama of random weights (8 layers, 512 wide) is written")
            model = tiny_model(self._machine.folder / "tiny-llama", dtype="float32", weights=True)
        self._begin("engine A", "vLLM starts on host A")
        a, ready = self._start_engine("a", model)
        self._results = Results(ready, self._options.prefix_tokens // ready.block_size * ready.block_size)
        self._compute_on_a(a)
        self._begin("engine B", "vLLM starts on host B; its node asks the directory what is hot and fetches it")
        b, _ = self._start_engine("b", model)
        self._join(b)
        self._serve_on_b(a, b)
        self._pull_from_peer(a, b)
        self._kill_mid_traffic(b)
        self._scale_to_zero_and_back(model)
        self._end_step()
        return self._results

    def _begin(self, name: str, text: str) -> None:
        self._end_step()
        self._step_name, self._step_began = name, time.monotonic()
        self._say(f"{name}: {text}")

    def _end_step(self) -> None:
        if self._step_name:
            self._seconds[self._step_name] = round(time.monotonic() - self._step_began, 3)
        self._step_name = ""

    def _start_engine(self, host: str, model: str) -> tuple[Any, Ready]:
        arguments = {"output_tokens": OUTPUT_TOKENS, **engine_settings(host, model, not self._options.model, self._options)}
        return self._machine.start_engine(host, **arguments)

    def _compute_on_a(self, a: Any) -> None:
        results = self._results
        self._begin("A serves", f"{self._options.prefixes} prefixes of {results.prefix_tokens} tokens, {TAILS} prompts each")
        warm_up(a)
        for i in range(self._options.prefixes):
            prompts = self._prompts(a, [f"p{i}/t{j}" for j in range(TAILS)])
            served = self._serve_as_reference(a, prompts)
            first, *others = served.values()
            results.recomputed.append(first)
            results.hits += others
            # A's second way to the first prompt: out of its own cache.
            self._serve_as_reference(a, {f"p{i}/t0": prompts[f"p{i}/t0"]})
            self._say(f"  prefix {i}: recomputed {first.first_seconds:.2f} s, own cache {median_first(others):.3f} s")
        blocks = self._options.prefixes * (results.prefix_tokens // results.ready.block_size)
        found = self._machine.wait_published(blocks, PUBLISH_SECONDS)
        self._say(f"  the directory can find {found} blocks")
        results.hosts = {node.node: f"host {host.upper()}" for host, node in self._machine.nodes().items()}

    def _join(self, b: Any) -> None:
        import ray

        self._begin("B warm", "is engine B warm? (its readiness gate)")
        results = self._results
        results.warm = warm = ray.get(b.wait_warm.remote(WARM_SECONDS), timeout=WARM_SECONDS + 30.0)
        donors = ", ".join(f"{blocks} from {results.hosts.get(node, node)}" for node, blocks in warm.donors.items())
        state = "yes" if warm.done else "no"
        self._say(
            f"  {state}: {warm.pulled} of {warm.wanted} hot blocks pulled ({warm.bytes_pulled / 2**20:.0f} MiB over tcp; "
            f"{donors or 'from nobody'}) in {warm.seconds:.2f} s"
        )
        warm_up(b)

    def _serve_on_b(self, a: Any, b: Any) -> None:
        results = self._results
        self._begin("B serves", "the same prompts, and new ones on the same prefixes")
        for i in range(self._options.prefixes):
            served = self._serve(b, self._prompts(a, [*(f"p{i}/t{j}" for j in range(TAILS)), f"p{i}/n0"]))
            results.joined |= served
            results.firsts.append(served[f"p{i}/t0"])
        self._serve_as_reference(a, self._prompts(a, [f"p{i}/n0" for i in range(self._options.prefixes)]))
        outputs = compare(results.references, results.joined)
        self._say(
            f"  first token of a prefix after {median_first(results.firsts):.3f} s; "
            f"{outputs.equal} of {outputs.compared} outputs equal to A's"
        )

    def _pull_from_peer(self, a: Any, b: Any) -> None:
        """What A computes now, B was not warmed with: its requests pull it from A's node, one at a time."""
        results = self._results
        self._begin("A goes on", "new prefixes on A, which B's node does not hold")
        late = [f"x{i}/t0" for i in range(PEER_PREFIXES + KILL_PREFIXES)]
        prompts = self._prompts(a, late)
        self._serve_as_reference(a, prompts)
        self._serve_as_reference(a, prompts)  # and out of its own cache
        blocks = (self._options.prefixes + len(late)) * (results.prefix_tokens // results.ready.block_size)
        self._machine.wait_published(blocks, PUBLISH_SECONDS)
        peers = self._serve(b, {name: prompts[name] for name in late[:PEER_PREFIXES]})
        results.joined |= peers
        results.peers = list(peers.values())
        self._say(f"  B pulls some of them when asked: first token after {median_first(results.peers):.3f} s")

    def _kill_mid_traffic(self, b: Any) -> None:
        import ray

        results = self._results
        self._begin("the kill", "engine A and its node are killed (-9) while B serves")
        wanted = [f"x{i}/t0" for i in range(PEER_PREFIXES, PEER_PREFIXES + KILL_PREFIXES)]
        known = [f"p{i}/t1" for i in range(self._options.prefixes)]
        traffic = self._prompts(b, [*known[:KILL_AFTER], *wanted, *known[KILL_AFTER:]])
        results.traffic_asked = len(traffic)
        pids = [results.ready.pid, self._machine.nodes()["a"].pid]
        ray.get(b.heard.remote(), timeout=SERVE_SECONDS)
        stream = b.stream.options(num_returns="streaming").remote(traffic, AT_ONCE)
        killed = False
        for reference in stream:
            name, served = ray.get(reference, timeout=SERVE_SECONDS)
            results.traffic[name] = served
            if killed:
                results.after_kill.append(served)
            elif len(results.traffic) == KILL_AFTER:
                self._machine.kill("a", pids)
                killed = True
                self._say(f"  host A is gone; {len(traffic) - KILL_AFTER} requests of B are unanswered")
        results.said = ray.get(b.heard.remote(), timeout=SERVE_SECONDS)
        outputs = compare(results.references, results.traffic)
        self._say(f"  B has answered all {len(results.traffic)}; {outputs.equal} outputs equal to A's")

    def _scale_to_zero_and_back(self, model: str) -> None:
        """Nothing runs, nothing is in memory; then a first request of each prefix, and of one that B served once, when A was
        dead: only the hand-over can have brought that to the disk."""
        results = self._results
        self._begin("to zero", "engine B, the node and Ray stop; what only they hold goes to host B's disk")
        results.left_at_zero = self._machine.stop()
        self._begin("from zero", "Ray, kvshare and a vLLM engine start again on host B")
        self._machine.start(["b"])
        b, _ = self._start_engine("b", model)
        warm_up(b)
        self._begin("B is back", "the prefixes of before, and one that nobody but B had, each asked for once")
        wanted = [*(f"p{i}/t0" for i in range(self._options.prefixes)), f"x{PEER_PREFIXES + KILL_PREFIXES - 1}/t0"]
        results.from_zero = self._serve(b, self._prompts(b, wanted))
        first, cached = next(iter(results.from_zero.values())), sum(one.cached_tokens for one in results.from_zero.values())
        outputs = compare(results.references, results.from_zero)
        self._say(
            f"  first token after {first.first_seconds:.3f} s; {cached} prompt tokens came from disk; {outputs.equal} of "
            f"{outputs.compared} outputs equal to A's"
        )

    def _prompts(self, engine: Any, names: list[str]) -> Prompts:
        """Token ids of prompts by name; equal names, equal prompts."""
        import ray

        pieces: dict[str, Any] = {}
        for name in names:
            prefix = name.split("/")[0]
            pieces[prefix] = engine.sample.remote(seed(prefix), self._results.prefix_tokens)
            pieces[name] = engine.sample.remote(seed(name), TAIL_TOKENS)
        found = dict(zip(pieces, ray.get(list(pieces.values()), timeout=SERVE_SECONDS), strict=True))
        return {name: found[name.split("/")[0]] + found[name] for name in names}

    def _serve(self, engine: Any, prompts: Prompts) -> dict[str, Served]:
        import ray

        served: dict[str, Served] = ray.get(engine.serve.remote(prompts), timeout=SERVE_SECONDS)
        return served

    def _serve_as_reference(self, a: Any, prompts: Prompts) -> dict[str, Served]:
        served = self._serve(a, prompts)
        for name, output in served.items():
            self._results.references.setdefault(name, []).append(output)
        return served


def seed(name: str) -> int:
    """A number for a prompt's name, the same in every run."""
    return int.from_bytes(name.encode(), "big")


def warm_up(engine: Any) -> None:
    """Two requests too short to leave a block behind: first steps of an engine are slow."""
    import ray

    for i in range(2):
        token_ids = ray.get(engine.sample.remote(seed("warm-up") + i, TAIL_TOKENS // 2), timeout=SERVE_SECONDS)
        ray.get(engine.serve.remote({"warm-up": token_ids}), timeout=SERVE_SECONDS)


def engine_settings(host: str, model: str, tiny: bool, options: Options) -> dict[str, Any]:
    """Environment, vLLM's arguments and cores of the engine on ``host``."""
    second = int(host == "b")
    length = options.prefix_tokens + TAIL_TOKENS + OUTPUT_TOKENS
    if gpus := facts.gpus():
        share = 0.85 if gpus > 1 else 0.4  # one GPU holds both engines
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "CUDA_VISIBLE_DEVICES": str(second if gpus > 1 else 0)}
        extra: dict[str, Any] = {"gpu_memory_utilization": share}
        cores: list[int] = []
    else:
        # An engine each on its own cores, or their times would depend on each other: one core for the small model.
        ours = facts.cores()
        halves = (ours[: -(-len(ours) // 2)], ours[len(ours) // 2 :])
        cores = halves[second][:1] if tiny else halves[second]
        environment = engine_environment(cores[0], kv_cache_gib=1 if tiny else 4, in_process=True)
        environment["OMP_NUM_THREADS"] = str(len(cores))
        extra = {}
    if tiny:
        arguments = engine_arguments(model, **extra)
    else:
        environment.pop("HF_HUB_OFFLINE", None)
        arguments = {"model": model, "max_model_len": length, "enforce_eager": True, **extra}
    return {"environment": environment, "arguments": arguments, "cores": cores}


def report(options: Options, results: Results, left_behind: list[str], seconds: Mapping[str, float]) -> Report:
    """The figures of a finished run."""
    outputs = compare(results.references, results.joined)
    kill = compare(results.references, results.traffic)
    zero = compare(results.references, results.from_zero)
    from_zero = list(results.from_zero.values())
    block_size = results.ready.block_size
    return Report(
        model=Path(options.model).name or "tiny Llama, 8 layers, 512 wide",
        prompts=len(results.joined),
        prefixes=options.prefixes,
        prefix_tokens=results.prefix_tokens,
        ttft_recompute_s=median_first(results.recomputed),
        ttft_prefix_hit_s=median_first(results.hits),
        ttft_warm_join_s=median_first(results.firsts),
        ttft_peer_s=median_first(results.peers) if results.peers else None,
        tokens_equal=outputs.all_equal,
        logprob_max_abs_diff=outputs.logprob_difference,
        logprob_max_abs_diff_own=(outputs + kill + zero).own_difference,
        outputs_compared=outputs.compared,
        outputs_equal=outputs.equal,
        outputs_rounded=(outputs + kill + zero).rounding,
        blocks_wanted=len(results.firsts) * (results.prefix_tokens // block_size),
        blocks_hit=sum(served.cached_tokens for served in results.firsts) // block_size,
        warm_blocks_wanted=results.warm.wanted,
        blocks_pulled=results.warm.pulled,
        bytes_pulled=results.warm.bytes_pulled,
        donors={results.hosts.get(node, node): blocks for node, blocks in results.warm.donors.items()},
        warm_s=results.warm.seconds,
        survived_kill=kill.all_equal and kill.compared == results.traffic_asked,
        kill_requests=results.traffic_asked,
        kill_before=results.traffic_asked - len(results.after_kill),
        kill_equal=kill.equal,
        kill_logprob_max_abs_diff=kill.logprob_difference,
        kill_longest_first_token_s=max((served.first_seconds for served in results.after_kill), default=0.0),
        kill_said=results.said,
        ttft_from_zero_s=median_first(from_zero),
        zero_first_s=from_zero[0].first_seconds,
        zero_outputs=zero.compared,
        zero_equal=zero.equal,
        zero_logprob_max_abs_diff=zero.logprob_difference,
        zero_blocks_wanted=len(from_zero) * (results.prefix_tokens // block_size),
        zero_blocks_hit=sum(served.cached_tokens for served in from_zero) // block_size,
        left_behind=[f"{thing}, at zero" for thing in results.left_at_zero] + left_behind,
        seconds=dict(seconds),
        machine=facts.machine(results.ready.device, results.ready.versions),
        commit=facts.commit(),
    )
