"""What an engine counts, and where its cache's bytes are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sateen.engine.cache.kv_cache import KVCache
from sateen.engine.drafts.stats import DraftStats
from sateen.models.base import ModelConfig


@dataclass
class EngineStats:
    """Counts since the engine was made.

    Attributes:
        steps: forwards of the trunk.
        prompt_tokens: of all requests that were added.
        generated_tokens: emitted.
        seconds: spent in steps.
        preemptions: requests that gave back their rows and computed them again.
        aborted: requests that were dropped or ran out of time.
        draft: sums over finished requests.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    preemptions: int = 0
    aborted: int = 0
    draft: DraftStats = field(default_factory=DraftStats)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of steps; 0 before the first."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The counts, and what they come to."""
        return asdict(self) | {
            "tokens_per_s": self.tokens_per_s,
            "acceptance_length": self.draft.acceptance_length,
            "acceptance_by_position": self.draft.acceptance_by_position,
        }


def allocated_layers(config: ModelConfig, cache: KVCache) -> list[dict[str, Any]]:
    """See `LLM.allocated_layers`."""
    kinds = [spec.attention for spec in config.specs]
    kinds += [config.mtp.layer.attention] * cache.num_draft if config.mtp else []
    sizes = zip(
        cache.allocated_bytes_by_layer(),
        cache.bytes_in_use_by_layer(),
        cache.bytes_in_use_by_layer(at_peak=True),
        strict=True,
    )
    return [
        {
            "layer": i, "layer_kind": kind, "layouts": [layout.kind for layout in group],
            "bytes": allocated, "used_bytes": used, "peak_bytes": peak,
        }
        for i, (kind, group, (allocated, used, peak)) in enumerate(
            zip(kinds, cache.layouts, sizes, strict=True)
        )
    ]  # fmt: skip
