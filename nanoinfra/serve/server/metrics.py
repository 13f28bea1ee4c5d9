"""What the server counts and times, under the names of vLLM's that dashboards and load generators know.

All times are taken on one clock, this process's, as the engine's steps arrive: a request waits until the
first step it is in begins (queue), then until its first token (prefill), then until its last (decode).
"""
from dataclasses import dataclass, field
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nanoinfra.serve.engine.requests import Event, Request
from nanoinfra.serve.processes.engine_loop import Step


def _ladder(least: float, most: float) -> list[float]:
    """1, 2, 5, 10, 20, 50 ... times `least`, up to `most`."""
    steps = [least * digit * 10 ** power for power in range(9) for digit in (1, 2, 5)]
    return [step for step in steps if step <= most]


TOKENS, SECONDS, GAPS = _ladder(1, 100_000), _ladder(0.001, 1000), _ladder(0.001, 100)
TOTALS = {"prompt_tokens": "Tokens of prompts computed.", "generation_tokens": "Tokens generated.",
          "num_preemptions": "Sequences that had to give their blocks back.",
          "prefix_cache_queries": "Tokens of prompts looked up in the prefix cache.",
          "prefix_cache_hits": "Tokens of prompts found in the prefix cache."}
STATS = {"num_preemptions": "preemptions", "prefix_cache_queries": "prefix_queries",
         "prefix_cache_hits": "prefix_hits"}                 # where Engine.stats() has another name
GAUGES = {"num_requests_running": "Sequences in the batch.", "num_requests_waiting": "Sequences that wait.",
          "kv_cache_usage_perc": "Share of the KV memory's blocks that is held, 0 to 1."}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", SECONDS),
    "inter_token_latency_seconds": ("From a token to the next.", GAPS),
    "time_per_output_token_seconds": ("The same, under its old name.", GAPS),
    "e2e_request_latency_seconds": ("From arrival to the last token.", SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step.", SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token.", SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", SECONDS),
    "request_inference_time_seconds": ("From the first step to the last token.", SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", TOKENS),
    "request_max_num_generation_tokens": ("The longest of a request's continuations.", TOKENS),
    "request_params_n": ("Continuations asked for.", _ladder(1, 20)),
    "request_params_max_tokens": ("Tokens asked for.", TOKENS),
    "iteration_tokens_total": ("Tokens computed in a step.", TOKENS)}


@dataclass
class Course:
    """A request on its way: when it came, was first computed, and had its first and its newest tokens."""
    request: Request
    arrived: float
    begun: float | None = None
    first: float | None = None
    newest: dict[int, float] = field(default_factory=dict)               # by continuation
    made: dict[int, int] = field(default_factory=dict)                   # tokens
    ended: int = 0                                                       # continuations


class Counters:
    """The metrics of one server; the worker tells it what happens."""

    def __init__(self, model: str):
        self.registry, self.courses, self.last = CollectorRegistry(), {}, {}
        self.model, label = model, ["model_name"]

        def make(kind, name, says, labels=(), **more):
            return kind(f"vllm:{name}", says, [*label, *labels], registry=self.registry, **more)
        self.totals = {name: make(Counter, name, says).labels(model) for name, says in TOTALS.items()}
        self.gauges = {name: make(Gauge, name, says).labels(model) for name, says in GAUGES.items()}
        self.histograms = {name: make(Histogram, name, says, buckets=buckets).labels(model)
                           for name, (says, buckets) in HISTOGRAMS.items()}
        self.success = make(Counter, "request_success", "Continuations that ended.", ["finished_reason"])
        self.config = make(Gauge, "cache_config_info", "The KV memory.", ["block_size", "num_gpu_blocks"])

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def started(self, info: dict) -> None:
        """An engine is ready; its own counts begin at 0."""
        self.last = {}
        self.config.labels(self.model, info["block_size"], info["blocks"]).set(1)

    def added(self, request: Request) -> None:
        """A request has come."""
        self.courses[request.id] = Course(request, monotonic())

    def dropped(self, request: str, why: str | None = None) -> None:
        """It was not answered: refused, lost, or with a reason to count it by, not wanted any more."""
        if self.courses.pop(request, None) and why:
            self.success.labels(self.model, why).inc()

    def stepped(self, step: Step) -> None:
        """The engine has done a step."""
        now, stats = monotonic(), step.stats
        for name, total in self.totals.items():
            count = stats[STATS.get(name, name)]
            total.inc(count - self.last.get(name, 0))
            self.last[name] = count
        self.gauges["num_requests_running"].set(stats["running"])
        self.gauges["num_requests_waiting"].set(stats["waiting"])
        self.gauges["kv_cache_usage_perc"].set(stats["blocks_used"] / stats["blocks"])
        if stats["batch"]:
            self._observe("iteration_tokens_total", sum(each["new"] for each in stats["batch"]))
        for each in stats["batch"]:
            course = self.courses.get(each["request"])
            if course and course.begun is None:
                course.begun = now - step.seconds
        for event in step.events:
            if course := self.courses.get(event.request):
                self._hear(course, event, now)

    def _hear(self, course, event: Event, now):
        if event.tokens:
            if course.first is None:
                course.first = now
                self._observe("time_to_first_token_seconds", now - course.arrived)
            if (before := course.newest.get(event.index)) is not None:
                self._observe("inter_token_latency_seconds", now - before)
                self._observe("time_per_output_token_seconds", now - before)
            course.newest[event.index] = now
            course.made[event.index] = course.made.get(event.index, 0) + len(event.tokens)
        if event.finish:
            course.ended += 1
            self.success.labels(self.model, event.finish).inc()
            if course.ended == course.request.n:
                self._finish(self.courses.pop(event.request), now)

    def _finish(self, course, now):
        request, made = course.request, list(course.made.values()) or [0]
        begun = course.arrived if course.begun is None else course.begun
        first = now if course.first is None else course.first
        for name, value in {
                "e2e_request_latency_seconds": now - course.arrived,
                "request_queue_time_seconds": begun - course.arrived,
                "request_prefill_time_seconds": first - begun,
                "request_decode_time_seconds": now - first,
                "request_inference_time_seconds": now - begun,
                "request_prompt_tokens": len(request.tokens),
                "request_generation_tokens": sum(made),
                "request_max_num_generation_tokens": max(made),
                "request_params_n": request.n,
                "request_params_max_tokens": request.max_tokens}.items():
            self._observe(name, max(0, value))

    def _observe(self, name, value):
        self.histograms[name].observe(value)
