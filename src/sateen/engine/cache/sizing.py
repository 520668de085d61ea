"""How much memory the caches get: what was asked for, or what the machine can spare."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sateen.checkpoint.hf import free_bytes
from sateen.engine.cache.kv_cache import PAGE, KVCache, page_bytes
from sateen.errors import ConfigError, unknown_name
from sateen.models.decoder import Decoder
from sateen.nn.spec import KVLayout

log = logging.getLogger("sateen.engine")

KV_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
SHARE = 4  # pages chosen by `auto` take at most this fraction, 1/SHARE, of the free memory


def kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of cached rows; `auto` is the model's.

    Raises:
        ConfigError: an unknown name.
    """
    if name == "auto":
        return model_dtype
    if name not in KV_DTYPES:
        raise ConfigError(unknown_name("kv_cache_dtype", name, ["auto", *KV_DTYPES]))
    return KV_DTYPES[name]


class CacheSize(NamedTuple):
    """Pages in each paged layer, and the longest sequence they allow."""

    num_pages: int
    max_model_len: int


def cache_size(
    layouts: Sequence[tuple[KVLayout, ...]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    context: int,
    max_num_seqs: int,
    max_model_len: int | None,
    kv_memory_bytes: int | None,
    num_pages: int | None,
) -> CacheSize:
    """The size of the paged pools; `kv_memory_bytes` bounds them, rings and key means come on top.

    Raises:
        ConfigError: `max_model_len` is beyond the model's context, or does not fit the pages.
    """
    if max_model_len is not None and not 2 <= max_model_len <= context:
        raise ConfigError(
            f"max_model_len {max_model_len} is not accepted; the model's context is {context} tokens"
        )
    if kv_memory_bytes is not None and num_pages is not None:
        raise ConfigError("kv_memory_bytes and num_pages both set the size of the cache; give one")
    wanted = max_model_len or context
    per_page = page_bytes(layouts, dtype)
    if per_page == 0:
        return CacheSize(0, wanted)
    if num_pages is None:
        num_pages = max_num_seqs * -(-wanted // PAGE)
        limit = kv_memory_bytes if kv_memory_bytes is not None else free_bytes(device) // SHARE
        num_pages = min(num_pages, limit // per_page)
    if num_pages * PAGE >= wanted:
        return CacheSize(num_pages, wanted)
    held = f"the key/value cache holds {num_pages} pages of {PAGE} tokens ({num_pages * per_page} bytes)"
    if max_model_len is not None or num_pages < 1:
        raise ConfigError(
            f"{held}, too few for one sequence of {wanted}; lower max_model_len or raise kv_memory_bytes"
        )
    log.info("%s, so max_model_len is %d and not the model's %d", held, num_pages * PAGE, context)
    return CacheSize(num_pages, num_pages * PAGE)


def sized_cache(
    model: Decoder,
    *,
    kv_cache_dtype: str,
    max_num_seqs: int,
    max_model_len: int | None,
    kv_memory_bytes: int | None,
    num_draft: int = 0,
    num_pages: int | None = None,
    attention: str = "float",
    offloads: bool = False,
    prefetches: bool = False,
) -> KVCache:
    """The caches of an engine: of the model's layers and its first `num_draft` heads; settings as of `LLM`.

    Raises:
        ConfigError: see `kv_dtype` and `cache_size`.
    """
    config = model.config
    num_layers = config.num_hidden_layers
    layouts = config.kv_layouts()[: num_layers + num_draft]
    dtype = kv_dtype(kv_cache_dtype, model.model.embed_tokens.weight.dtype)
    if offloads and dtype == torch.int8:
        raise ConfigError(
            "kv_offload keeps rows as floats, and kv_cache_dtype is int8; use another dtype, or no offloading"
        )
    size = cache_size(
        layouts, dtype, torch.device("cpu") if offloads else model.device,
        context=config.max_position_embeddings, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
        kv_memory_bytes=kv_memory_bytes, num_pages=num_pages,
    )  # fmt: skip
    return KVCache(
        layouts, num_trunk_layers=num_layers, num_pages=size.num_pages, num_slots=max_num_seqs,
        max_model_len=size.max_model_len, num_draft=num_draft, dtype=dtype, device=model.device,
        attention=attention, offloads=offloads, prefetches=prefetches,
    )  # fmt: skip
