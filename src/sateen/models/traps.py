"""What a user may trip over in a model like this one, from its config alone: a line per trap.

Most are places where implementations of a family disagree; docs/parity.md has the tests that pin our choice.
What only files can tell (tokenizers, scales, dtypes) is in `checkpoint.file_notes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sateen.models.base import ModelConfig
from sateen.models.mimo_v2_flash_dialects import misread_by_transformers

KNOWN_ELSEWHERE = ("llama", "mistral", "qwen2", "qwen3", "mimo_v2_flash")  # to transformers 5.23


def traps(config: ModelConfig, context: int) -> list[str]:
    """The lines that apply to `config`, for sequences of `context` tokens."""
    return [line for find in FINDERS for line in find(config)] + [
        f"context {context} is beyond max_position_embeddings {config.max_position_embeddings}"
        for _ in range(context > config.max_position_embeddings)
    ]


def _windows(config: ModelConfig) -> Iterator[str]:
    windows = {spec.window for spec in config.specs if spec.window is not None}
    stated = config.raw.get("sliding_window_size", config.raw.get("sliding_window"))
    if config.model_type == "mimo_v2_flash" and windows:
        seen = max(windows)
        if "hybrid_layer_pattern" in config.raw:
            yield (
                f"the config's window {stated} counts earlier keys only; a query sees {seen} with its own, "
                f"and {seen - 1} in vLLM and mlx-lm"
            )
        else:
            yield f"the config's window {seen} includes the query's own key; the hub would write {seen - 1}"
    elif stated is not None and not windows:
        yield f"sliding_window {stated} is not used: no layer slides"
    if config.raw.get("attention_chunk_size") is not None:
        yield f"attention_chunk_size {config.raw['attention_chunk_size']} is not used"


def _attention(config: ModelConfig) -> Iterator[str]:
    specs = config.specs
    if scales := {spec.value_scale for spec in specs} - {1.0}:
        scale = max(scales)
        yield f"values are multiplied by {scale} before they are cached; old code elsewhere skips this"
    if with_sink := sum(spec.has_sink for spec in specs):
        yield (
            f"{with_sink} of {len(specs)} layers have sinks, a learned score per head that takes weight and "
            "gives no value; a kernel without them gives other outputs"
        )
    if any(spec.head_dim != spec.v_head_dim for spec in specs):
        yield "key and value heads differ in size, which many attention kernels refuse"
    if any(spec.rotary_dim < spec.head_dim for spec in specs):
        first = next(spec for spec in specs if spec.rotary_dim < spec.head_dim)
        yield f"rotations turn the first {first.rotary_dim} of {first.head_dim} channels of a head"
    if len(bases := sorted({spec.rope_theta for spec in specs})) > 1:
        yield f"layers have different rotary bases: {', '.join(f'{base:g}' for base in bases)}"
    if config.model_type in ("mimo", "qwen2") and any(spec.qkv_bias for spec in specs):
        yield "q, k and v have biases and o has none, as in Qwen2; code for Llama drops them"
    if config.norm == "complex_rms":
        entries = f"{config.hidden_size // 2} and {specs[0].head_dim // 2} complex entries"
        yield f"hidden and head sizes count real numbers, re and im of {entries}"


def _experts(config: ModelConfig) -> Iterator[str]:
    if any(spec.is_moe for spec in config.specs):
        yield "routers multiply in float32 whatever the model's dtype; in bfloat16 they pick other experts"
        yield "the routers' e_score_correction_bias selects experts and does not weigh them"


def _heads(config: ModelConfig) -> Iterator[str]:
    mtp = config.mtp
    if config.model_type == "mimo" and (mtp is None or mtp.num_heads < 3):
        found = f"{mtp.num_heads} MTP head{'s' * (mtp.num_heads > 1)}" if mtp else "no MTP head"
        yield f"{found} here; the release keeps its second and third in a repository of their own"
    if mtp is None:
        return
    yield f"MTP heads join their inputs {mtp.order} first; the other order loads and drafts noise"
    if mtp.is_chained:
        yield "the first MTP head reads the state before the final norm, each further one the head before it"
    else:
        yield "every MTP head reads the trunk's state before the final norm; vLLM gives it the one after"
    if config.model_type == "mimo_v2_flash":
        yield "transformers and mlx-lm drop the MTP heads, from what they save too; vLLM uses the first alone"


def _elsewhere(config: ModelConfig) -> Iterator[str]:
    if config.tie_word_embeddings:
        yield "embedding and output matrix are one tensor; training one trains both"
    if config.model_type not in KNOWN_ELSEWHERE and config.model_type != "mimo_audio":
        yield f"transformers has no class for {config.model_type}; `import sateen.transformers` adds ours"
    if config.model_type != "mimo_v2_flash":
        return
    if not config.raw.get("model_type"):
        yield "model_type is empty: transformers cannot tell the family; `sateen convert --dialect` names it"
    if misread := misread_by_transformers(config):
        yield (
            f"transformers would misread {', '.join(misread)} of this config; "
            "`sateen convert --dialect transformers` writes one that it reads, or says why it cannot"
        )


FINDERS: tuple[Callable[[ModelConfig], Iterator[str]], ...] = (
    _windows, _attention, _experts, _heads, _elsewhere,
)  # fmt: skip
