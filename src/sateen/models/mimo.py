"""MiMo-7B: Qwen2's trunk plus MTP heads that read the hidden state first and feed each other.

Source: arXiv 2505.07608 §2.2 and the released modeling_mimo.py. How heads two and three of the separate MTP
release are fed is not published; we chain them (source: ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from sateen.models import llama
from sateen.models.base import Family, ModelConfig, plain_entries
from sateen.nn.spec import MTPSpec

NAMES = MappingProxyType(
    {
        "embedding_norm": "token_layernorm",
        "hidden_norm": "hidden_layernorm",
        "join": "input_proj",
        "mlp_norm": "post_attention_layernorm",
        "final_norm": "final_layernorm",
    }
)


def mtp(config: ModelConfig, num_heads: int) -> MTPSpec:
    """`num_heads` heads, each a layer shaped like the trunk's."""
    layer = replace(config.specs[-1], index=config.num_hidden_layers)
    return MTPSpec(num_heads, layer, order="hidden", is_chained=True, path="mtp_layers", names=NAMES)


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    config = llama.parse(raw)
    heads = int(raw.get("num_nextn_predict_layers") or 0)
    return replace(config, mtp=mtp(config, heads)) if heads else config


FAMILY = Family(parse=parse, keys=llama.KEYS | {"num_nextn_predict_layers"}, entries=plain_entries, mtp=mtp)
