"""The data of ``/metrics``: server and board in the text format of Prometheus.

A reading that is unknown is left out.  It is never 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from .models import Models
    from .worker import Result, Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CLIENT_GONE = "499"  # the status of nginx for a client that left before it got one


class Metrics:
    """The metrics of one server.

    Args:
        models: the models; those in use give budgets and readings.
        worker: gives counts of requests and tokens.
        paths: paths that become labels; other paths are counted as "other".
    """

    def __init__(self, models: Models, worker: Worker, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(models, worker))
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "mbq_requests",
            "Requests that were answered, refused or abandoned.",
            ("path", "status"),
            registry=self.registry,
        )
        self.ttft = Histogram(
            "mbq_time_to_first_token_seconds", "From the start of a reply to its first token.",
            registry=self.registry, buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
        )  # fmt: skip

    def reply(self, result: Result) -> None:
        """Count a finished reply.  It can be called from any thread.

        Args:
            result: figures of the reply.
        """
        if result.ttft_s:  # a reply that ended during its prompt has no first token
            self.ttft.observe(result.ttft_s)

    def counted(self, app: ASGIApp) -> ASGIApp:
        """The application with a count of its requests.

        Args:
            app: the application.
        """

        async def counting(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status = _CLIENT_GONE

            async def noting(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            try:
                await app(scope, receive, noting)
            finally:
                path = scope["path"] if scope["path"] in self._paths else "other"
                self.requests.labels(path, status).inc()

        return counting

    def text(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, models: Models, worker: Worker) -> None:
        self._models, self._worker = models, worker

    def collect(self) -> Iterable[Metric]:
        status, worker, bounded = self._models.governor.status(), self._worker, self._models.bounded
        readings = status.readings
        gauges = (
            ("avg_bits", "Budget in force, average bits per weight.", bounded.avg_bits),
            (
                "ceiling_bits",
                "Most bits per weight of a token; fewer while a bundle comes.",
                bounded.ceiling_bits,
            ),
            ("threads", "Processor threads in use.", bounded.threads),
            ("avg_bits_used", "Average bits per weight of the last tokens.", status.avg_bits_used),
            ("tokens_per_second", "Decoding speed of the last tokens.", status.tokens_per_s),
            (
                "energy_joules_per_token",
                "Energy per token, measured by the board's own sensor.",
                status.energy_j_per_token,
            ),
            ("temperature_celsius", "Temperature of the thermal zone nearest to its limit.", readings.temp_c),
            (
                "throttle_temperature_celsius",
                "Temperature from which the board slows itself.",
                readings.throttle_temp_c,
            ),
            ("heat_throttled", "1 while heat slows the board.", readings.heat_throttled),
            ("undervoltage", "1 while the supply is too weak.", readings.undervoltage),
            ("power_watts", "Power of the part that the board's sensor measures.", readings.power_w),
            ("battery_ratio", "Charge of the battery, 0 to 1.", readings.battery_fraction),
            ("discharging", "1 while the board runs on its battery.", readings.discharging),
            ("replies_running", "Replies in progress: 0 or 1.", worker.running),
            ("requests_waiting", "Requests in the queue.", worker.waiting),
            ("contexts_kept", "Conversations whose context is kept.", len(worker.contexts)),
            ("cache_bytes", "Bytes of the contexts that are kept.", worker.contexts.kept_bytes),
            ("cache_limit_bytes", "Bytes that kept contexts may have.", worker.contexts.most_bytes),
            ("asleep", "1 while no model is in memory.", worker.asleep),
            ("models_in_memory", "Models that are in memory.", self._models.in_memory),
            ("queue_limit", "Requests that can wait.", worker.limit),
        )
        for name, text, value in gauges:
            if value is not None:
                yield GaugeMetricFamily(f"mbq_{name}", text, value=float(value))
        yield CounterMetricFamily("mbq_prompt_tokens", "Tokens of prompts.", value=worker.prompt_tokens)
        yield CounterMetricFamily(
            "mbq_cached_prompt_tokens", "Tokens of prompts that were kept from an earlier reply.",
            value=worker.cached_tokens,
        )  # fmt: skip
        yield CounterMetricFamily("mbq_guessed_tokens", "Tokens that were guessed.", value=worker.guessed)
        yield CounterMetricFamily("mbq_kept_guesses", "Guessed tokens that were right.", value=worker.kept_guesses)
        yield CounterMetricFamily("mbq_generated_tokens", "Tokens of replies.", value=worker.tokens)
