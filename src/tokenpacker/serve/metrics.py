"""What a server counts, for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenpacker.serve.questions import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Requests, times and tokens, and what the engine reports of itself."""

    def __init__(self, engine: Engine):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "tokenpacker_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "tokenpacker_request_seconds", "Time of a request.", ["route"], buckets=SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "tokenpacker_first_token_seconds", "Time to the first token.", buckets=SECONDS, registry=registry
        )
        self.tokens = Counter(
            "tokenpacker_tokens", "Tokens of prompts, of their images, and of answers.", ["kind"], registry=registry
        )
        registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        counts = self.engine.counts()
        yield GaugeMetricFamily("tokenpacker_waiting", "Questions in the queue.", counts.waiting)
        yield GaugeMetricFamily("tokenpacker_running", "Questions that are being answered.", counts.running)
        yield CounterMetricFamily("tokenpacker_cache_hits", "Tiles that were in the cache.", counts.cache_hits)
        yield CounterMetricFamily("tokenpacker_cache_misses", "Tiles that were not.", counts.cache_misses)
