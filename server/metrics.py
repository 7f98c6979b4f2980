"""Prometheus metrics, with vLLM's suffixes, and what no other server has: the banks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic, time

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pacellm import errors
from pacellm.config import PRESETS
from pacellm.engine.histogram import Histogram
from pacellm.engine.stats import per_layer
from pacellm.engine.thread import EngineThread
from pacellm.faults import PLACES
from pacellm.memory.reads import OUTCOMES
from pacellm.modes import MODES
from pacellm.recall.hits import Attention
from pacellm.types import Delta, Event, Failed, Finished

_STATUSES = (200, *sorted({error.status for error in vars(errors).values() if hasattr(error, "status")}))
_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3840.0, 7680.0),
)
_TOKENS = tuple(float(step * 10**power) for power in range(7) for step in (1, 2, 5))


class Metrics:
    """A registry of its own, filled from the engine's counters at each scrape and from events as they pass."""

    def __init__(self, thread: EngineThread, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(thread, model_name))
        ProcessCollector(registry=self.registry)
        self._last_token: dict[str, float] = {}
        self._model = model_name
        self._responses = Total(
            "pacellm_http_responses", "HTTP answers by status.", ["model_name", "status"], registry=self.registry
        )
        for status in _STATUSES:  # there from the start, so that the first of a kind is seen as a step
            self._responses.labels(model_name, str(status))

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _REQUEST) -> Histogram:
            made = Histogram(buckets)
            self.registry.register(_Told(name, text, model_name, made))
            return made

        self._first = histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._between = histogram("inter_token_latency_seconds", "Time between tokens of a request.", _TOKEN)
        self._queue = histogram("request_queue_time_seconds", "Time before admission.")
        self._prefill = histogram("request_prefill_time_seconds", "Admission to first token.")
        self._decode = histogram("request_decode_time_seconds", "First to last token.")
        self._whole = histogram("e2e_request_latency_seconds", "Arrival to end.")
        self._prompt = histogram(
            "request_prompt_tokens", "Prompt tokens of a request, with those not computed again.", _TOKENS
        )
        self._answer = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)

    def count_response(self, status: int) -> None:
        """Called when an answer has ended. Statuses come from this server alone, so they are few."""
        self._responses.labels(self._model, str(status)).inc()

    def observe(self, request_id: str, event: Event) -> None:
        """Called with every event, on the event loop."""
        if isinstance(event, Delta):
            if event.token_ids:
                now = monotonic()
                last = self._last_token.get(request_id)
                if last is not None:
                    self._between.observe(now - last)
                self._last_token[request_id] = now
        elif isinstance(event, Failed):
            self._last_token.pop(request_id, None)
        elif isinstance(event, Finished):
            self._last_token.pop(request_id, None)
            queue, prefill, decode = event.queue_seconds, event.prefill_seconds, event.decode_seconds
            self._queue.observe(queue)
            self._prefill.observe(prefill)
            self._decode.observe(decode)
            self._whole.observe(queue + prefill + decode)
            self._prompt.observe(event.usage.prompt_tokens)
            self._answer.observe(event.usage.completion_tokens)
            if event.usage.completion_tokens:
                self._first.observe(queue + prefill)

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)


class _Told(Collector):
    """A histogram of all requests, told as prometheus_client's own: which takes a lock and a walk for every value, and
    one of these is added to with every token."""

    def __init__(self, name: str, text: str, model_name: str, values: Histogram) -> None:
        self._name, self._text, self._model = name, text, model_name
        self._values, self._created = values, time()

    def collect(self) -> Iterator[Metric]:
        """The one family."""
        metric = _family(self._name, self._text, ["model_name"], {(self._model,): self._values})
        metric.add_sample(f"{metric.name}_created", {"model_name": self._model}, self._created)
        yield metric


def _family(
    name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], Histogram]
) -> HistogramMetricFamily:
    """Histograms by the values of their labels."""
    metric = HistogramMetricFamily(f"pacellm_{name}", text, labels=labels)
    for given, one in values.items():
        buckets = [(floatToGoString(end), float(count)) for end, count in zip(one.bounds, one.up_to(), strict=True)]
        metric.add_metric(given, buckets, one.sum)
    return metric


class _EngineCollector(Collector):
    """The engine's own counters, read when scraped."""

    def __init__(self, thread: EngineThread, model_name: str) -> None:
        self._thread, self._model = thread, model_name

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        engine, stats = self._thread.engine, self._thread.engine.stats
        used = engine.num_blocks - engine.allocator.num_free
        yield self._gauge("num_requests_running", "Requests in execution.", self._thread.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", self._thread.num_queued)
        age = monotonic() - self._thread.heartbeat
        yield self._gauge("engine_heartbeat_age_seconds", "Seconds since the engine loop last went round.", age)
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used / engine.num_blocks)
        yield self._gauge("sessions", "Sessions known.", len(engine.sessions))
        yield self._gauge(
            "sessions_resident", "Sessions whose KV and banks are on the device.", engine.sessions.num_resident
        )
        yield from self._tiers()
        yield self._gauge("session_log_bytes", "Bytes of session logs.", engine.sessions.log_bytes)
        yield self._counter("session_evictions", "Idle sessions dropped from the device.", engine.eviction.evictions)
        yield self._counter("sessions_lost", "Sessions whose log was dropped.", engine.sessions.losses)
        yield self._counter(
            "session_dropped_tokens", "Tokens of histories that the next prompt did not begin with.",
            stats.dropped_tokens,
        )  # fmt: skip
        yield self._counter(
            "session_dropped_histories", "Prompts that left most of their session's history out.",
            stats.dropped_histories,
        )  # fmt: skip
        yield self._counter("prompt_tokens", "Prompt tokens computed, replays included.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("cached_prompt_tokens", "Prompt tokens not computed again.", stats.cached_tokens)
        yield self._counter("recalls", "Requests that had a part of their history called back.", stats.recalls)
        yield self._counter("recalled_tokens", "Tokens of histories that were called back.", stats.recalled_tokens)
        yield from self._attention()
        yield self._counter("num_preemptions", "Requests that had to start again.", engine.scheduler.preemptions)
        yield self._counter("steps", "Forward passes.", stats.steps)
        yield self._counter(
            "steps_ahead", "Decode steps launched before the last one's tokens were read.", stats.steps_ahead
        )
        failures = CounterMetricFamily(
            "pacellm_engine_faults", "Failures outside the forward pass that the engine survived, by place.",
            labels=["model_name", "place"],
        )  # fmt: skip
        for place in PLACES:
            failures.add_metric([self._model, place], engine.faults.counts[place])
        yield failures
        yield self._counter("request_failure", "Requests that failed.", stats.failed)
        yield self._counter("request_aborted", "Requests that were cancelled.", stats.aborted)
        success = CounterMetricFamily(
            "pacellm_request_success", "Requests that finished.", labels=["model_name", "finished_reason"]
        )
        for reason in ("stop", "length"):
            success.add_metric([self._model, reason], stats.finished[reason])
        yield success
        yield from self._banks()
        yield self._experts()

    def _attention(self) -> Iterator[Metric]:
        """Whether what was called back is used."""
        recaller = self._thread.engine.parts.scheduling.recaller
        total = Attention() if recaller is None else recaller.hits.total
        yield self._counter("attended_tokens", "Decoded tokens whose attention was measured.", total.tokens)
        yield self._counter(
            "attention_called_back", "Of their attention, in layers that retrieve, what went to called-back blocks.",
            total.called_back,
        )  # fmt: skip
        yield self._counter(
            "attention_by_lot", "What would go to as many other blocks of the history, by lot, beside them.",
            total.by_lot,
        )  # fmt: skip

    def _tiers(self) -> Iterator[Metric]:
        engine = self._thread.engine
        store, moves, prefixes = engine.sessions, engine.mover.stats, engine.prefix_cache
        refused = moves.refused + engine.mover.claims.num_refused
        sessions = GaugeMetricFamily("pacellm_sessions_by_tier", "Sessions by tier.", labels=["model_name", "tier"])
        for tier in ("device", "host", "disk", "log"):
            sessions.add_metric([self._model, tier], store.usage.tiers[tier])
        yield sessions
        held = GaugeMetricFamily(
            "pacellm_session_bytes", "Bytes that sessions hold.", labels=["model_name", "tier", "kind"]
        )
        held.add_metric([self._model, "device", "kv"], store.kv_bytes)
        held.add_metric([self._model, "device", "bank"], store.bank_bytes)
        usage = store.usage
        held.add_metric([self._model, "host", "kv"], usage.host_bytes - usage.host_bank_bytes)
        held.add_metric([self._model, "host", "bank"], usage.host_bank_bytes)
        held.add_metric([self._model, "host", "history"], engine.mover.host.history.bytes)
        row_bytes = engine.pool.bytes_per_row if engine.pool is not None else 0
        held.add_metric([self._model, "disk", "kv"], usage.stored_tokens * engine.model.bytes_per_token)
        held.add_metric([self._model, "disk", "bank"], usage.stored * row_bytes)
        files = engine.mover.files
        if files is not None:
            held.add_metric([self._model, "disk", "history"], files.usage.history_bytes)
            held.add_metric([self._model, "disk", "log"], files.usage.log_bytes)
        yield held
        yield self._gauge(
            "session_disk_size_bytes",
            "Bytes that session files may take; +Inf without a limit, 0 without a directory.",
            0 if files is None else math.inf if files.budget.limit is None else files.budget.limit,
        )
        dropped = CounterMetricFamily(
            "pacellm_session_files_dropped",
            "Session files removed to keep within it, by what.",
            labels=["model_name", "kind"],
        )
        dropped.add_metric([self._model, "state"], files.budget.states_dropped if files is not None else 0)
        dropped.add_metric([self._model, "log"], files.budget.logs_dropped if files is not None else 0)
        yield dropped
        yield self._counter("session_spills", "Sessions moved off the device.", moves.spills)
        yield self._counter("session_spilled_bytes", "Bytes moved off the device.", moves.spilled_bytes)
        yield self._counter("session_spill_seconds", "Seconds spent moving them.", moves.spill_seconds)
        yield self._counter("session_restores", "Sessions brought back from host memory or disk.", moves.restores)
        yield self._counter("session_restored_bytes", "Bytes brought back.", moves.restored_bytes)
        yield self._counter("session_restore_seconds", "Seconds spent bringing them back.", moves.restore_seconds)
        yield self._counter("session_move_failures", "Moves, writes and deletions that failed.", moves.failures)
        yield self._counter("session_files_refused", "Session files refused as damaged or foreign.", refused)
        yield self._gauge("progress_entries", "Kept prefill states, idle cache.", len(prefixes))
        yield self._counter("progress_hits", "Requests that went on from one.", prefixes.hits)
        yield self._counter("progress_hit_tokens", "Tokens that this saved.", prefixes.hit_tokens)

    def _banks(self) -> Iterator[Metric]:
        stats, config = self._thread.engine.stats, self._thread.engine.config
        modes = CounterMetricFamily(
            "pacellm_requests_by_pa", "Requests that finished, by how banks took part.", labels=["model_name", "pa"]
        )
        for mode in MODES:
            modes.add_metric([self._model, mode], stats.modes[mode])
        yield modes
        reads = CounterMetricFamily(
            "pacellm_bank_reads",
            "Tokens that read a bank, by outcome.",
            labels=["model_name", "layer", "preset", "outcome"],
        )
        writes = CounterMetricFamily(
            "pacellm_bank_writes", "Bank slots changed, by how.", labels=["model_name", "layer", "preset", "kind"]
        )
        for layer, preset in itertools.product((config.pa_layers or ()) if config.pa else (), PRESETS):
            counts = stats.bank.get((layer, preset), Counter())
            for name, outcome in OUTCOMES.items():
                reads.add_metric([self._model, str(layer), preset, outcome], counts[name])
            for name, kind in (("merges", "merge"), ("replacements", "replace")):
                writes.add_metric([self._model, str(layer), preset, kind], counts[name])
        yield reads
        yield writes
        for name, text, values in (
            (
                "bank_effective_rank",
                "Effective rank of the keys of a bank as a request has left it.",
                stats.effective_rank,
            ),
            ("bank_slot_age", "Mean writes since a slot of it was changed.", stats.slot_age),
            ("bank_slots_filled", "Slots of it in use.", stats.filled),
        ):
            told: dict[tuple[str, ...], Histogram] = {
                (self._model, str(layer)): one for layer, one in dict(values).items()
            }
            yield _family(name, text, ["model_name", "layer"], told)

    def _experts(self) -> Metric:
        activity = CounterMetricFamily(
            "pacellm_expert_activity", "Prompt tokens, shared among a layer's experts by what they did.",
            labels=["model_name", "layer", "expert"],
        )  # fmt: skip
        for layer, shares in per_layer(self._thread.engine.stats.experts).items():
            for expert, tokens in enumerate(shares):
                activity.add_metric([self._model, str(layer), str(expert)], tokens)
        return activity

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"pacellm_{name}", text, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric

    def _counter(self, name: str, text: str, value: float) -> Metric:
        metric = CounterMetricFamily(f"pacellm_{name}", text, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric
