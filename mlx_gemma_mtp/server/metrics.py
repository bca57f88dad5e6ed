"""What the server counts: for Prometheus, and for the page.

Steps are reported by the engine and counted in the event loop's thread, where they are
also read: nothing here is locked.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ..engine.stats import RoundStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PREFIX = "mlx_gemma_mtp_"
_SPEED_WINDOW_S = 2.0
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 5)
_REQUEST_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


@dataclass
class StepReport:
    """What a step of the engine did, and how things stand after it.

    Attributes:
        at: When it ended, seconds of ``time.perf_counter``.
        num_tokens: Tokens that it emitted.
        num_prompt_tokens: Tokens of the prompts that were taken on.
        num_cached_tokens: Those of them that a kept cache held.
        first_token_s: From the request to its first token, for those that began.
        gaps: Seconds since a row's last tokens, and how many came now.
        finished: How many rows ended, by reason.
        num_live: Rows that decode or read their prompts.
        num_waiting: Choices that wait.
        kv_bytes: Memory of the running rows' caches.
        prompt_cache_bytes: Memory of the kept ones.
        prompt_cache_size: Number of the kept ones.
        memory_bytes: What MLX has in use.
        peak_memory_bytes: The most it had.
        drafting: Totals of all rounds.
    """

    at: float = 0.0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    finished: Counter[str] = field(default_factory=Counter)
    num_live: int = 0
    num_waiting: int = 0
    kv_bytes: int = 0
    prompt_cache_bytes: int = 0
    prompt_cache_size: int = 0
    memory_bytes: int = 0
    peak_memory_bytes: int = 0
    drafting: RoundStats = field(default_factory=RoundStats)


class Metrics:
    """All counts of one server.

    Args:
        facts: What stands in the page's figures beside the numbers: the model, its
            drafter, and whether it has a chat template.
        max_kv_bytes: The budget of the running rows' caches.
    """

    def __init__(self, facts: Mapping[str, Any], *, max_kv_bytes: int) -> None:
        self.registry = CollectorRegistry()
        self.last = StepReport()
        self.num_connections: Callable[[], int] = int
        self._facts = dict(facts)
        self._max_kv_bytes = max_kv_bytes
        self._recent: deque[tuple[float, int]] = deque()
        self._num_draft_tokens = 0
        self._requests = self._counter(
            "requests", "Requests answered", ["endpoint", "status"]
        )
        self._finished = self._counter("finished", "Choices that ended", ["reason"])
        self._tokens = self._counter("generated_tokens", "Tokens emitted")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached_tokens = self._counter(
            "cached_prompt_tokens", "Tokens of prompts that kept caches held"
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Request to first token", _FIRST_TOKEN_S
        )
        self._gap = self._histogram(
            "inter_token_seconds",
            "Time per token between two rounds of a request",
            _TOKEN_S,
        )
        self._request_time = self._histogram(
            "request_seconds", "Request to the end of its text", _REQUEST_S
        )
        self.registry.register(_Standing(self))
        ProcessCollector(registry=self.registry)

    def observe(self, report: StepReport) -> None:
        """Count a step."""
        self._tokens.inc(report.num_tokens)
        self._prompt_tokens.inc(report.num_prompt_tokens)
        self._cached_tokens.inc(report.num_cached_tokens)
        for seconds in report.first_token_s:
            self._first_token.observe(seconds)
        for seconds, count in report.gaps:
            for _ in range(count):
                self._gap.observe(seconds / count)
        for reason, count in report.finished.items():
            self._finished.labels(reason).inc(count)
        if report.num_tokens:
            self._recent.append((report.at, report.num_tokens))
        self._note_draft_tokens(report.drafting)
        self.last = report

    def observe_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(endpoint, str(status)).inc()
        if endpoint.endswith("/completions"):
            self._request_time.observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)

    def page(self) -> dict[str, Any]:
        """The figures of ``/stats``."""
        drafting = self.last.drafting
        rounds = drafting.num_draft_tokens
        return {
            "tokens_per_second": self._tokens_per_second(),
            "live": self.last.num_live,
            "waiting": self.last.num_waiting,
            "acceptance_rate": drafting.acceptance_rate,
            "acceptance_length": drafting.acceptance_length,
            "acceptance_by_position": drafting.acceptance_by_position,
            "rounds_by_num_draft_tokens": {str(k): rounds[k] for k in sorted(rounds)},
            "num_draft_tokens": self._num_draft_tokens,
            **self._facts,
            "kv_bytes": self.last.kv_bytes,
            "memory_bytes": self.last.memory_bytes,
        }

    def standing(self) -> Iterator[Metric]:
        """What is not counted here but stands in the last report."""
        last = self.last
        gauges = {
            "live_requests": ("Choices that decode", last.num_live),
            "waiting_requests": ("Choices that wait", last.num_waiting),
            "connections": ("Open connections", self.num_connections()),
            "kv_bytes": ("Memory of running caches", last.kv_bytes),
            "max_kv_bytes": ("Its budget", self._max_kv_bytes),
            "prompt_cache_bytes": ("Memory of kept caches", last.prompt_cache_bytes),
            "prompt_cache_entries": ("Caches kept", last.prompt_cache_size),
            "memory_bytes": ("Memory that MLX uses", last.memory_bytes),
            "peak_memory_bytes": ("The most it used", last.peak_memory_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=value)
        drafting = last.drafting
        yield CounterMetricFamily(
            _PREFIX + "draft_tokens", "Tokens drafted", value=drafting.drafted
        )
        yield CounterMetricFamily(
            _PREFIX + "accepted_draft_tokens", "Drafts accepted", drafting.accepted
        )
        yield _labelled(
            "rounds",
            "Rounds of a row, by number of drafts",
            "num_draft_tokens",
            drafting.num_draft_tokens,
        )
        positions = {
            "draft_tokens_by_position": ("Tokens drafted", drafting.drafted_at),
            "accepted_draft_tokens_by_position": (
                "Drafts accepted",
                drafting.accepted_at,
            ),
        }
        for name, (text, counts) in positions.items():
            by_number = {i + 1: count for i, count in counts.items()}
            yield _labelled(
                name, f"{text}, by place in the block", "position", by_number
            )
        sources = {
            "draft_tokens_by_source": ("Tokens drafted", drafting.drafted_from),
            "accepted_draft_tokens_by_source": (
                "Drafts accepted",
                drafting.accepted_from,
            ),
        }
        for name, (text, counts_from) in sources.items():
            yield _labelled(
                name, f"{text}, by where they came from", "source", counts_from
            )

    def _note_draft_tokens(self, drafting: RoundStats) -> None:
        """Note the K of the newest round."""
        before = self.last.drafting.num_draft_tokens
        new = [k for k, n in drafting.num_draft_tokens.items() if n > before.get(k, 0)]
        if new:  # rows of a round share its K, but for those that ask for fewer
            self._num_draft_tokens = max(new)

    def _tokens_per_second(self) -> float:
        """Tokens of the last two seconds, per second."""
        start = time.perf_counter() - _SPEED_WINDOW_S
        while self._recent and self._recent[0][0] < start:
            self._recent.popleft()
        return sum(count for _, count in self._recent) / _SPEED_WINDOW_S

    def _counter(
        self, name: str, text: str, labels: tuple[str, ...] | list[str] = ()
    ) -> CounterMetric:
        return CounterMetric(_PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, registry=self.registry, buckets=buckets)


class _Standing:
    """Lets Prometheus's registry ask for what stands in the last report."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """See ``Metrics.standing``."""
        return self._metrics.standing()


def _labelled(
    name: str, text: str, label: str, counts: Mapping[Any, int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(_PREFIX + name, text, labels=[label])
    for key in sorted(counts):
        family.add_metric([str(key)], counts[key])
    return family
