"""A `Decoder` behind transformers' interface for causal language models.

Directories go through our loader and writer. Words that would change a result and that we do not follow are
refused by `checks.refuse`, in every method alike.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sateen.checkpoint.hf import load_model, write_files
from sateen.checkpoint.shards import INDEX
from sateen.errors import ConfigError, ShapeError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences
from sateen.transformers.cache import GrowingCache
from sateen.transformers.checks import check_positions, one_device, real_counts, real_labels, refuse
from sateen.transformers.config import SateenConfig, check_same_model, config_with

# What `generate` would do with caches that we do not have.
UNSERVED = ("assistant_model", "cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens")


class SateenForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Decoder` behind transformers' interface; parameters carry the same names in both.

    `attn_implementation` may be `eager` or `sdpa` and changes nothing: the kernels are ours.
    """

    config_class = SateenConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True  # transformers asks for it where nobody does

    def __init__(self, config: SateenConfig, decoder: Decoder | None = None):
        super().__init__(config)
        if decoder is None:
            decoder = Decoder.build(ModelConfig.from_hf(config.to_diff_dict()))
            if decoder.device.type != "meta":
                decoder.init_weights(int(torch.randint(2**31, ())))
        # Not a submodule: its parts are, so that names stay those of the checkpoint.
        self.__dict__["_decoder"] = decoder
        self.model, self.lm_head = decoder.model, decoder.lm_head
        if decoder.config.tie_word_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.loss_type = "ForCausalLM"
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def decoder(self) -> Decoder:
        """The model itself, for `sateen.LLM` and the trainers; it shares every parameter."""
        found: Decoder = self.__dict__["_decoder"]
        return found

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `Decoder.init_weights` has run, or the weights were loaded."""

    def initialize_weights(self) -> None:
        """Nothing, see `_init_weights`."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **words: Any) -> SateenForCausalLM:  # type: ignore[override]
        """The model of a local directory, a run folder or a GGUF file, in evaluation mode.

        Args:
            path: see `sateen.load_model`; names on a hub are not resolved.
            words: `dtype` or `torch_dtype` (stored dtypes when None or "auto"), `device_map` (one device),
                `config`.

        Raises:
            ConfigError: any other word, or a config that describes another model than the directory.
            CheckpointError: see `sateen.load_model`.
        """
        config = words.pop("config", None)
        dtype = words.pop("dtype", None) or words.pop("torch_dtype", None)
        device = one_device(words.pop("device_map", None))
        refuse("from_pretrained", {"model_args": args} | words)
        decoder = load_model(Path(path), dtype=None if dtype == "auto" else dtype, device=device)
        if config is None:
            config = cls.config_class.from_dict(decoder.config.to_hf())
        if "quantization_config" not in decoder.config.raw:
            config.__dict__.pop("quantization_config", None)  # FP8 blocks are floats once they are loaded
        check_same_model(config, decoder)
        config.name_or_path = str(path)
        config.dtype = decoder.model.embed_tokens.weight.dtype
        model = cls(config, decoder)
        if decoder.source is not None and (decoder.source / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(decoder.source)
        model.eval()  # type: ignore[no-untyped-call]
        return model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **words: Any,
    ) -> None:
        """Writes config.json, tensors, generation_config.json and the tokenizer files that came along.

        Other files of the directory stay, as callers of transformers expect; tensors of an earlier save go.

        Raises:
            ConfigError: words that we do not follow, or a config that no longer describes the model.
        """
        refuse("save_pretrained", words)
        if not is_main_process:
            return
        self.config.architectures = self.config.architectures or [type(self).__name__]
        decoder = self.decoder
        if state_dict is not None:
            decoder = Decoder.build_empty(decoder.config).adopt(state_dict)
        kept, decoder.config = decoder.config, config_with(self.config, decoder)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".writing") as fresh:
                write_files(decoder, Path(fresh), carry_from=self.decoder.source)
                self.generation_config.save_pretrained(fresh)
                stale = {*folder.glob("*.safetensors"), *folder.glob(INDEX)}
                for file in Path(fresh).iterdir():
                    os.replace(file, folder / file.name)
                    stale.discard(folder / file.name)
                for file in stale:
                    file.unlink()
        finally:
            decoder.config = kept

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GrowingCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **words: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits [B, T, V] and, with labels, their mean cross-entropy.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], nonzero for real tokens, padding on either side; logits there are 0. With
                a cache its columns are those of earlier calls too.
            position_ids: must be the counts of real tokens before each, which is what they are anyway.
            past_key_values: what an earlier call with `use_cache` returned.
            labels: [B, T] tokens, shifted here; -100 is left out and must stand at padded places. So is a
                token after padding, which nothing predicts.
            use_cache: return a cache for the tokens that follow.
            num_items_in_batch: divides the summed loss instead of the number of labels.

        Raises:
            ConfigError: words that we do not follow: embeddings as inputs, hidden states as outputs.
            ShapeError: other shapes, positions or labels than these.
        """
        refuse("forward", words)
        if input_ids is None:
            raise ShapeError("the model takes input_ids [B, T]; got None")
        cache = past_key_values
        if cache is not None and (labels is not None or not isinstance(cache, GrowingCache)):
            raise ConfigError(
                "past_key_values must be a cache that this model returned, and goes without labels"
            )
        if position_ids is not None:
            check_positions(input_ids, attention_mask, position_ids, cache)
        if labels is not None and attention_mask is not None:
            labels = real_labels(labels, attention_mask)
        if cache is None and use_cache:
            cache = GrowingCache(self.decoder.config)
        if cache is None:
            logits = self.decoder(input_ids, attention_mask).logits
        else:
            logits = _continue(self.decoder, input_ids, attention_mask, cache)
        loss = None
        if labels is not None:
            count = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **count)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
        return out if return_dict is not False else out.to_tuple()

    def generate(self, *args: Any, **words: Any) -> Any:
        """transformers' `generate`; drafting and other caches than ours are refused (`sateen.LLM` drafts)."""
        given = [value for value in (*args, *words.values()) if isinstance(value, GenerationConfig)]
        asked = {name: words.get(name) for name in UNSERVED}
        asked |= {
            name: value for config in given for name in UNSERVED if (value := getattr(config, name, None))
        }
        refuse("generate", asked)
        return super().generate(*args, **words)  # type: ignore[misc]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # so that the first forward makes ours

    def resize_token_embeddings(self, *args: Any, **words: Any) -> Any:
        raise ConfigError("resize_token_embeddings is not supported; vocab_size belongs to config.json")


def _continue(decoder: Decoder, ids: Tensor, mask: Tensor | None, cache: GrowingCache) -> Tensor:
    """Logits [B, T, V] of tokens that follow those in the cache, which grows by them."""
    real, counts = real_counts(ids, mask, cache)
    new = real.sum(1).tolist()
    cache.begin(new, ids.shape[1])
    seq = Sequences.of_lengths(new, ids.device)
    seq.position_ids = counts[real]
    packed = decoder.logits(decoder.head_input(decoder.trunk(ids[real], seq, cache)))
    logits = packed.new_zeros(*ids.shape, packed.shape[-1])
    logits[real] = packed
    return logits
