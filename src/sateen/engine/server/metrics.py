"""What `/metrics` and `/stats` show: counts of the HTTP side, and the engine's own where it keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sateen.engine.engine import LLM

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The counters of one server, in a registry of their own.

    Attributes:
        requests: answers by route and status.
        prompt_tokens: of the accepted requests.
        generated_tokens: emitted.
        first_token_s: from the hand-over to the engine until the first token of each completion.
        inter_token_s: between two steps that brought a completion tokens, divided by the tokens of the later.
    """

    def __init__(self, llm: LLM):
        self._llm = llm
        self._registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "sateen_http_requests",
            "Answers by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "sateen_prompt_tokens", "Prompt tokens of accepted requests.", registry=self._registry
        )
        self.generated_tokens = Counter("sateen_generated_tokens", "Tokens emitted.", registry=self._registry)
        self.first_token_s = Histogram(
            "sateen_time_to_first_token_seconds", "From the queue to the first token.",
            buckets=FIRST_TOKEN_S, registry=self._registry,
        )  # fmt: skip
        self.inter_token_s = Histogram(
            "sateen_inter_token_latency_seconds", "Between a completion's tokens.",
            buckets=INTER_TOKEN_S, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_EngineCollector(llm))

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._registry)

    def live(self) -> dict[str, Any]:
        """What the chat page shows."""
        return live_numbers(self._llm)


class _EngineCollector(Collector):
    """Reads the engine when it is asked; that goes on meanwhile, so the numbers may be a step apart."""

    def __init__(self, llm: LLM):
        self._llm = llm

    def collect(self) -> Iterable[Metric]:
        """The families."""
        live = live_numbers(self._llm)
        yield GaugeMetricFamily("sateen_requests_running", "Completions in work.", live["running"])
        yield GaugeMetricFamily("sateen_requests_waiting", "Completions in the queue.", live["waiting"])
        yield CounterMetricFamily(
            "sateen_preemptions", "Completions that gave back their rows for a while.", live["preemptions"]
        )
        yield GaugeMetricFamily(
            "sateen_acceptance_length", "Tokens per pass that verified drafts, 1 without drafts.",
            live["acceptance_length"],
        )  # fmt: skip
        yield _family("sateen_kv_pages", "Pages of 64 tokens by state.", "state", live["kv_pages"])
        yield _family(
            "sateen_kv_allocated_bytes", "Bytes of the caches by layer kind.", "layer_kind",
            live["kv_allocated_bytes"],
        )  # fmt: skip
        yield _family(
            "sateen_kv_used_bytes", "What requests in work hold of them.", "layer_kind", live["kv_used_bytes"]
        )
        if (int8 := live["int8_attention"]) is not None:
            floats = len(int8["float_layers"])
            yield _family(
                "sateen_int8_attention_layers", "Layers whose attention is in integers or in floating point.",
                "form", {"integers": len(int8["errors"]) - floats, "floats": floats},
            )  # fmt: skip
            yield _family(
                "sateen_int8_attention_error", "Relative L2 error of a layer's integer attention.",
                "layer", int8["errors"],
            )  # fmt: skip
            yield GaugeMetricFamily(
                "sateen_int8_attention_budget", "Errors above compute in floats.", int8["budget"]
            )
        if (prefix := live["prefix"]) is not None:
            yield CounterMetricFamily(
                "sateen_prefix_looked_up_tokens", "Prompt tokens looked up.", prefix["looked_up_tokens"]
            )
            yield CounterMetricFamily(
                "sateen_prefix_hit_tokens", "Prompt tokens not computed again.", prefix["hit_tokens"]
            )


def live_numbers(llm: LLM) -> dict[str, Any]:
    """The engine's state now, as the chat page shows it."""
    stats, layers = llm.stats(), llm.allocated_layers()
    usage = stats["cache"]
    kinds = dict.fromkeys(layer["layer_kind"] for layer in layers)
    allocated, used = (
        {kind: sum(layer[key] for layer in layers if layer["layer_kind"] == kind) for kind in kinds}
        for key in ("bytes", "used_bytes")
    )
    return {
        "running": stats["running"],
        "waiting": stats["waiting"],
        "preemptions": stats["preemptions"],
        "generated_tokens": stats["generated_tokens"],
        "acceptance_length": stats["acceptance_length"],
        "acceptance_by_position": stats["acceptance_by_position"],
        "kv_pages": {state: usage[f"{state}_pages"] for state in ("used", "cached", "free")},
        "kv_allocated_bytes": allocated,
        "kv_used_bytes": used,
        "prefix": stats["prefix"],
        "int8_attention": stats["int8_attention"],
    }


def _family(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
