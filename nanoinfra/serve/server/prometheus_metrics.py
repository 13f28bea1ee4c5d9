"""Prometheus metrics under vLLM's names, which dashboards and load generators know.

All times are measured by the clock of this process, when the results of an engine step arrive. The time of
a request has three parts: queue (until its first step starts), prefill (until its first token: TTFT), and
decode (until its last token).
"""
from dataclasses import dataclass, field
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nanoinfra.serve.engine.request_and_output import Request, RequestOutput
from nanoinfra.serve.processes.engine_loop import EngineStepResult


def _build_1_2_5_buckets(smallest: float, largest: float) -> list[float]:
    """Histogram buckets: `smallest` times 1, 2, 5, 10, 20, 50 ..., up to `largest`."""
    steps = [smallest * digit * 10 ** power for power in range(9) for digit in (1, 2, 5)]
    return [step for step in steps if step <= largest]


_TOKEN_BUCKETS = _build_1_2_5_buckets(1, 100_000)
_LATENCY_BUCKETS = _build_1_2_5_buckets(0.001, 1000)         # seconds
_INTER_TOKEN_BUCKETS = _build_1_2_5_buckets(0.001, 100)      # seconds
_COUNTERS = {"prompt_tokens": "Tokens of prompts computed.", "generation_tokens": "Tokens generated.",
             "num_preemptions": "Sequences that had to give their blocks back.",
             "prefix_cache_queries": "Tokens of prompts looked up in the prefix cache.",
             "prefix_cache_hits": "Tokens of prompts found in the prefix cache."}
_ENGINE_STAT_NAMES = {"num_preemptions": "preemptions", "prefix_cache_queries": "prefix_queries",
                      "prefix_cache_hits": "prefix_hits"}    # names in Engine.stats() that differ
_GAUGES = {"num_requests_running": "Sequences in the batch.", "num_requests_waiting": "Sequences that wait.",
           "kv_cache_usage_perc": "Share of the KV memory's blocks that is held, 0 to 1."}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _LATENCY_BUCKETS),
    "inter_token_latency_seconds": ("From a token to the next.", _INTER_TOKEN_BUCKETS),
    "time_per_output_token_seconds": ("The same, under its old name.", _INTER_TOKEN_BUCKETS),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _LATENCY_BUCKETS),
    "request_queue_time_seconds": ("From arrival to the first step.", _LATENCY_BUCKETS),
    "request_prefill_time_seconds": ("From the first step to the first token.", _LATENCY_BUCKETS),
    "request_decode_time_seconds": ("From the first token to the last.", _LATENCY_BUCKETS),
    "request_inference_time_seconds": ("From the first step to the last token.", _LATENCY_BUCKETS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKEN_BUCKETS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKEN_BUCKETS),
    "request_max_num_generation_tokens": ("The longest of a request's continuations.", _TOKEN_BUCKETS),
    "request_params_n": ("Continuations asked for.", _build_1_2_5_buckets(1, 20)),
    "request_params_max_tokens": ("Tokens asked for.", _TOKEN_BUCKETS),
    "iteration_tokens_total": ("Tokens computed in a step.", _TOKEN_BUCKETS)}


@dataclass
class _RequestTimes:
    """Times of one unfinished request, in seconds of time.monotonic(), and its tokens so far."""
    request: Request
    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_times: dict[int, float] = field(default_factory=dict)     # by choice index
    num_generated_tokens: dict[int, int] = field(default_factory=dict)   # by choice index
    num_finished: int = 0                    # choices


class ServerMetrics:
    """The metrics of one server. The engine client calls the `record` methods."""

    def __init__(self, model_name: str):
        self.model_name, self.registry = model_name, CollectorRegistry()
        self.requests_in_flight = {}         # {request id: _RequestTimes}
        self.engine_totals = {}              # the engine's own counters at its last step

        def make(metric, name, description, labels=(), **more):
            labels = ["model_name", *labels]
            return metric(f"vllm:{name}", description, labels, registry=self.registry, **more)
        self.counters = {name: make(Counter, name, description).labels(model_name)
                         for name, description in _COUNTERS.items()}
        self.gauges = {name: make(Gauge, name, description).labels(model_name)
                       for name, description in _GAUGES.items()}
        self.histograms = {name: make(Histogram, name, description, buckets=buckets).labels(model_name)
                           for name, (description, buckets) in _HISTOGRAMS.items()}
        self.request_success = make(Counter, "request_success", "Continuations that ended.",
                                    ["finished_reason"])
        self.cache_config_info = make(Gauge, "cache_config_info", "The KV memory.",
                                      ["block_size", "num_gpu_blocks"])

    def prometheus_text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def record_engine_start(self, engine_info: dict) -> None:
        """A new engine is ready; its own counters begin at 0."""
        self.engine_totals = {}
        block_size, num_blocks = engine_info["block_size"], engine_info["blocks"]
        self.cache_config_info.labels(self.model_name, block_size, num_blocks).set(1)

    def record_request_arrival(self, request: Request) -> None:
        """A request has arrived."""
        self.requests_in_flight[request.request_id] = _RequestTimes(request, monotonic())

    def record_request_drop(self, request_id: str, finished_reason: str | None = None) -> None:
        """A request ends without an answer: refused, lost, or aborted (counted under `finished_reason`)."""
        if self.requests_in_flight.pop(request_id, None) and finished_reason:
            self.request_success.labels(self.model_name, finished_reason).inc()

    def record_engine_step(self, step: EngineStepResult) -> None:
        """The engine has finished a step."""
        now, stats = monotonic(), step.stats
        for name, total in self.counters.items():
            count = stats[_ENGINE_STAT_NAMES.get(name, name)]
            total.inc(count - self.engine_totals.get(name, 0))
            self.engine_totals[name] = count
        self.gauges["num_requests_running"].set(stats["running"])
        self.gauges["num_requests_waiting"].set(stats["waiting"])
        self.gauges["kv_cache_usage_perc"].set(stats["blocks_used"] / stats["blocks"])
        if stats["batch"]:
            self._observe("iteration_tokens_total", sum(each["new"] for each in stats["batch"]))
        for each in stats["batch"]:
            times = self.requests_in_flight.get(each["request"])
            if times and times.first_scheduled_time is None:
                times.first_scheduled_time = now - step.step_seconds
        for output in step.outputs:
            if times := self.requests_in_flight.get(output.request_id):
                self._record_output(times, output, now)

    def _record_output(self, times, output: RequestOutput, now):
        if output.token_ids:
            if times.first_token_time is None:
                times.first_token_time = now
                self._observe("time_to_first_token_seconds", now - times.arrival_time)
            if (before := times.last_token_times.get(output.index)) is not None:
                self._observe("inter_token_latency_seconds", now - before)
                self._observe("time_per_output_token_seconds", now - before)
            times.last_token_times[output.index] = now
            so_far = times.num_generated_tokens.get(output.index, 0)
            times.num_generated_tokens[output.index] = so_far + len(output.token_ids)
        if output.finish_reason:
            times.num_finished += 1
            self.request_success.labels(self.model_name, output.finish_reason).inc()
            if times.num_finished == times.request.n:
                self._record_request_end(self.requests_in_flight.pop(output.request_id), now)

    def _record_request_end(self, times, now):
        request, num_generated_tokens = times.request, list(times.num_generated_tokens.values()) or [0]
        scheduled, first_token = times.first_scheduled_time, times.first_token_time
        scheduled = times.arrival_time if scheduled is None else scheduled
        first_token = now if first_token is None else first_token
        for name, value in {
                "e2e_request_latency_seconds": now - times.arrival_time,
                "request_queue_time_seconds": scheduled - times.arrival_time,
                "request_prefill_time_seconds": first_token - scheduled,
                "request_decode_time_seconds": now - first_token,
                "request_inference_time_seconds": now - scheduled,
                "request_prompt_tokens": len(request.prompt_token_ids),
                "request_generation_tokens": sum(num_generated_tokens),
                "request_max_num_generation_tokens": max(num_generated_tokens),
                "request_params_n": request.n,
                "request_params_max_tokens": request.max_tokens}.items():
            self._observe(name, max(0, value))

    def _observe(self, name, value):
        self.histograms[name].observe(value)
