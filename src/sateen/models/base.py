"""`ModelConfig`: a `config.json`, read once into the specs that modules are built from.

The dictionary stays the only model config: it is kept as it came and written back untouched. Families
translate its words into `LayerSpec`s; nothing below a family reads the dictionary.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sateen.errors import ConfigError, unknown_name
from sateen.models.quant_config import KEY as QUANT_KEY
from sateen.models.quant_config import read_quant
from sateen.models.registry import FAMILIES
from sateen.nn.spec import KVLayout, LayerSpec, MTPSpec, QuantSpec

if TYPE_CHECKING:
    from sateen.models.decoder import Decoder

log = logging.getLogger("sateen.models")

# Keys transformers and hubs write into every config.json; they do not change the model we build.
NEUTRAL_KEYS = frozenset(
    "_name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype "
    "eos_token_id id2label initializer_range is_encoder_decoder label2id max_position_embeddings model_type "
    "output_attentions output_hidden_states pad_token_id problem_type pretraining_tp return_dict torch_dtype "
    "transformers_version use_cache vocab_size hidden_size num_hidden_layers tie_word_embeddings "
    "sep_token_id output_router_logits router_aux_loss_coef quantization_config".split()
)


# Sizes and the most that a file may say; the layers are looped over before any tensor is looked for. Some may
# be 0, for parts that a model does without.
MAY_BE_ZERO = ("num_nextn_predict_layers", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")
SIZES = {"num_hidden_layers": 10_000, "num_nextn_predict_layers": 1_000} | dict.fromkeys(
    "hidden_size vocab_size intermediate_size num_attention_heads num_key_value_heads head_dim v_head_dim "
    "moe_intermediate_size n_routed_experts num_experts_per_tok swa_num_attention_heads "
    "swa_num_key_value_heads swa_head_dim swa_v_head_dim max_position_embeddings".split(),
    2**31 - 1,
)


@dataclass(frozen=True)
class Entry:
    """Where a checkpoint's tensor lives in the model: the whole parameter or a part of it.

    Attributes:
        name: the checkpoint's name.
        index: the part is this index of the first axis.
        columns: the part is this range of the last axis.
    """

    name: str
    index: int | None
    columns: tuple[int, int] | None = None

    @property
    def is_whole(self) -> bool:
        return self.index is None and self.columns is None

    def part(self, tensor: Tensor) -> Tensor:
        """The view of the parameter that the checkpoint's tensor holds."""
        if self.columns is not None:
            return tensor[..., slice(*self.columns)]
        return tensor if self.index is None else tensor[self.index]


@dataclass(frozen=True)
class Family:
    """How one `model_type` is read.

    Attributes:
        parse: config dictionary -> ModelConfig, without MTP heads counted from tensors.
        keys: the config keys it understands, beside `NEUTRAL_KEYS`.
        entries: (parameter name, its shape) -> the checkpoint tensors that hold it.
        mtp: MTP heads of a config with their number, or None; asked when only tensor names tell the number.
        build: the module of a config, where it is more than a `Decoder`.
    """

    parse: Callable[[Mapping[str, Any]], ModelConfig]
    keys: frozenset[str]
    entries: Callable[[str, tuple[int, ...]], Iterator[Entry]]
    mtp: Callable[[ModelConfig, int], MTPSpec] | None = None
    build: Callable[[ModelConfig], Decoder] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape.

    Attributes:
        model_type: the family, as `config.json` spells it.
        vocab_size: rows of the embedding, padding included.
        hidden_size: width D of the residual stream.
        rms_norm_eps: epsilon of every norm.
        max_position_embeddings: longest context, in tokens.
        tie_word_embeddings: the output matrix is the embedding.
        initializer_range: standard deviation of fresh weights.
        specs: one per trunk layer.
        mtp: multi-token prediction heads, or None.
        raw: the dictionary itself.
        norm: kind of the norm after the last layer, a key of `nn.norm.NORMS`.
        quant: two-bit weights of the linear layers, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    specs: tuple[LayerSpec, ...]
    mtp: MTPSpec | None
    raw: Mapping[str, Any]
    norm: str = "rms"
    quant: QuantSpec | None = None

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], *, tensor_names: Iterable[str] | None = None, origin: str = "config.json"
    ) -> ModelConfig:
        """The model that `config.json` describes.

        Args:
            raw: the dictionary of `config.json`.
            tensor_names: the checkpoint's tensor names; they tell the number of MTP heads where the config
                does not (`num_nextn_predict_layers` is missing).
            origin: where the dictionary came from, for messages.

        Raises:
            ConfigError: unknown model_type, a missing key, or a key that looks misspelt. Keys that resemble
                none of ours are kept, not used, and named in one log line.
        """
        chosen = family(raw, origin)
        check_keys(raw, chosen.keys | NEUTRAL_KEYS, origin)
        check_sizes(raw, origin)
        try:
            config = chosen.parse(raw)
        except KeyError as error:
            raise ConfigError(f"{origin}: {error.args[0]} is missing for {raw.get('model_type')!r}") from None
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            nulls = ", ".join(key for key in raw if raw[key] is None) or "none"
            raise ConfigError(
                f"{origin}: a value has the wrong type ({error}); keys that are null: {nulls}"
            ) from None
        if QUANT_KEY in raw:
            config = replace(config, quant=read_quant(raw[QUANT_KEY], origin))
        if raw.get("attention_dropout"):
            log.info("%s: attention_dropout %s is not applied", origin, raw["attention_dropout"])
        if config.mtp is None and chosen.mtp is not None and raw.get("num_nextn_predict_layers") is None:
            heads = {
                int(m[1])
                for name in tensor_names or ()
                if (m := re.match(r"model\.mtp[._]layers\.(\d+)\.", name))
            }
            if heads:
                config = replace(config, mtp=chosen.mtp(config, len(heads)))
        return config

    def to_hf(self) -> dict[str, Any]:
        """The dictionary this config was read from."""
        return copy.deepcopy(dict(self.raw))

    @property
    def num_hidden_layers(self) -> int:
        return len(self.specs)

    @property
    def num_mtp_heads(self) -> int:
        return self.mtp.num_heads if self.mtp else 0

    def layers(self) -> tuple[LayerSpec, ...]:
        """One spec per trunk layer."""
        return self.specs

    def kv_layouts(self) -> tuple[tuple[KVLayout, ...], ...]:
        """What an engine allocates for each trunk layer, then for each MTP head."""
        from sateen.nn.attention import Attention

        heads = [self.mtp.layer] * self.num_mtp_heads if self.mtp else []
        return tuple(Attention.kinds[spec.attention].kv_layouts(spec) for spec in (*self.specs, *heads))


def family(raw: Mapping[str, Any], origin: str) -> Family:
    """The family of a config dictionary.

    Raises:
        ConfigError: `model_type` is missing or unknown.
    """
    name = str(raw.get("model_type") or "")
    # The first remote code of MiMo-V2-Flash left model_type empty; its architecture still tells.
    if not name and raw.get("architectures") == ["MiMoV2FlashForCausalLM"]:
        name = "mimo_v2_flash"
    # MiMo-Audio calls itself by the family of its trunk; its audio keys tell.
    if name == "qwen2" and "speech_vocab_size" in raw:
        name = "mimo_audio"
    if name == "mimo_v2":
        raise ConfigError(
            f"{origin}: model_type 'mimo_v2' (MiMo-V2.5, V2.6) fuses q, k and v in shards, which is not "
            "read here; readable: the MiMo-V2-Flash release with q_proj, k_proj and v_proj ('mimo_v2_flash')"
        )
    if name not in FAMILIES:
        raise ConfigError(f"{origin}: {unknown_name('model_type', name, FAMILIES)}")
    chosen: Family = import_module(FAMILIES[name]).FAMILY
    return chosen


def check_keys(raw: Mapping[str, Any], known: Collection[str], origin: str) -> None:
    """Refuses a key that looks like a misspelling of one that is absent; logs the other unknown ones."""
    unknown = [key for key in raw if key not in known]
    for key in unknown:
        # Stricter than other hints: a hub's config may hold keys of its own that merely sound alike.
        close = get_close_matches(key, list(known), n=1, cutoff=0.85)
        if close and close[0] not in raw:
            raise ConfigError(
                f"{origin}: {key} is not a key of {raw.get('model_type')!r}; did you mean {close[0]}?"
            )
    if unknown:
        log.info("%s: kept but not used: %s", origin, ", ".join(sorted(unknown)))


def check_sizes(raw: Mapping[str, Any], origin: str) -> None:
    """Refuses sizes that are no whole number above 0, or so large that only a damaged file can say so."""
    for key, most in SIZES.items():
        value = raw.get(key)
        if value is None:
            continue
        least = 0 if key in MAY_BE_ZERO else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ConfigError(
                f"{origin}: {key} {value!r} is not accepted; accepted: whole numbers {least} to {most}"
            )


def plain_entries(name: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    """A parameter stored under its own name."""
    yield Entry(name, None)


def layer_types(
    raw: Mapping[str, Any],
    count: int,
    key: str = "layer_types",
    accepted: Collection[str] = ("full_attention", "sliding_attention"),
) -> list[str] | None:
    """The kinds that `raw[key]` lists, one per layer, or None where the key is absent; others are refused."""
    if raw.get(key) is None:
        return None
    kinds = [str(kind) for kind in raw[key]]
    for index, kind in enumerate(kinds):
        if kind not in accepted:
            raise ConfigError(
                f"config.json: {key}[{index}] {kind!r} is not supported; accepted: {', '.join(accepted)}"
            )
    if len(kinds) != count:
        raise ConfigError(f"config.json: {key} lists {len(kinds)} layers for num_hidden_layers {count}")
    return kinds


def rope_theta(raw: Mapping[str, Any], default: float, kind: str | None = None) -> float:
    """The rotary base from `rope_theta` or transformers' `rope_parameters`; scaled variants are refused."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if kind is not None and kind in parameters:
        parameters = parameters[kind]
    style = parameters.get("rope_type", parameters.get("type", "default"))
    if style != "default":
        raise ConfigError(f"config.json: rope type {style!r} is not supported; accepted: 'default'")
    return float(parameters.get("rope_theta", raw.get("rope_theta", default)))
