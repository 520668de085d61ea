"""The decoder that every text model is: embedding, layers, final norm, output matrix, MTP heads.

One packed forward serves training, prefill and decode. Module names are the checkpoint's names. Shape
letters: T packed tokens, B sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sateen.errors import ShapeError
from sateen.models.base import ModelConfig, family
from sateen.models.early_exit import EarlyExit
from sateen.nn.attention import Attention, LayerCache, LayerLinks, Sequences
from sateen.nn.mlp import MLPS
from sateen.nn.moe import MoE, Router
from sateen.nn.mtp import MTPHead
from sateen.nn.norm import NORMS
from sateen.nn.quant import PackedLinear, QuantLinear, quantize_linears
from sateen.nn.recompute import Recompute
from sateen.nn.spec import LayerSpec


class Cache(Protocol):
    """The engine's cache for one forward: a view per layer, MTP heads counted after the trunk."""

    def layer(self, index: int) -> LayerCache: ...


class NoInit(TorchFunctionMode):
    """Leaves out torch's initialisers, which on the meta device do nothing but import a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@dataclass
class CausalLMOutput:
    """What a call of the model returns: float logits [B, T, V]."""

    logits: Tensor


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    Attributes:
        recompute: keeps the layer's inputs alone for the backward pass; None keeps all activations.
    """

    recompute: Recompute | None = None

    def __init__(self, hidden_size: int, spec: LayerSpec, eps: float):
        super().__init__()
        self.self_attn = Attention.kinds[spec.attention](hidden_size, spec, eps)
        self.mlp = (
            MoE(hidden_size, spec.moe, spec.index)
            if spec.moe
            else MLPS[spec.mlp](hidden_size, spec.intermediate_size, eps)
        )
        self.input_layernorm = NORMS[spec.norm](hidden_size, eps)
        self.post_attention_layernorm = NORMS[spec.norm](hidden_size, eps)

    def forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        if self.recompute is not None and cache is None and torch.is_grad_enabled():
            return self.recompute(self._forward, self.self_attn.spec, (x_TD,), seq, links)
        return self._forward(x_TD, seq, cache, links)

    def _forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), seq, cache, links)
        normed = self.post_attention_layernorm(x_TD)
        out: Tensor = x_TD + (self.mlp(normed, seq, links) if isinstance(self.mlp, MoE) else self.mlp(normed))
        return out


class Trunk(nn.Module):
    """What checkpoints call `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(DecoderLayer(D, spec, eps) for spec in config.specs)
        self.norm = NORMS[config.norm](D, eps)
        if config.mtp is not None:
            heads = nn.ModuleList(MTPHead(D, eps, config.mtp, k) for k in range(config.mtp.num_heads))
            *outer, last = config.mtp.path.split(".")
            owner: nn.Module = self
            for name in outer:
                owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.add_module(last, heads)


class Decoder(nn.Module):
    """A causal language model built from a `ModelConfig`.

    Attributes:
        config: its config; `config.raw` is the `config.json` that `save` writes.
    """

    saver: ClassVar[Callable[[Decoder, Path], None] | None] = None  # set by sateen.checkpoint.hf
    source: Path | None = None  # the directory or GGUF file it was loaded from

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if config.quant is not None:
            quantize_linears(self, config.quant)

    @staticmethod
    def build(config: ModelConfig) -> Decoder:
        """The model of a config: a `Decoder`, or what its family builds around one."""
        make = family({"model_type": config.model_type}, "config.json").build or Decoder
        return make(config)

    @staticmethod
    def build_empty(config: ModelConfig) -> Decoder:
        """`build` on the meta device, for weights that come from elsewhere."""
        with torch.device("meta"), NoInit():
            return Decoder.build(config)

    def adopt(self, tensors: Mapping[str, Tensor]) -> Decoder:
        """Takes tensors by name as its own, without a copy; a tied output matrix stays the embedding."""
        is_tied = self.config.tie_word_embeddings
        own = {name: x for name, x in tensors.items() if not (is_tied and name == "lm_head.weight")}
        self.load_state_dict(own, assign=True, strict=not is_tied)
        if is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def num_mtp_heads(self) -> int:
        return self.config.num_mtp_heads

    def mtp_heads(self) -> list[MTPHead]:
        """The MTP heads in drafting order."""
        if self.config.mtp is None:
            return []
        return list(self.model.get_submodule(self.config.mtp.path).children())  # type: ignore[arg-type]

    def moe_layers(self) -> dict[int, MoE]:
        """Layer index -> its mixture of experts."""
        return {m.layer_index: m for m in self.modules() if isinstance(m, MoE)}

    def trunk(
        self,
        input_ids_T: Tensor,
        seq: Sequences,
        cache: Cache | None = None,
        links: LayerLinks | None = None,
        *,
        embeddings_TD: Tensor | None = None,
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states [T, D] before the final norm; `embeddings_TD` stands in for the token embeddings.

        `wanted` says how many of each sequence's newest rows are read; the others may then be zeros, where
        the model has an `EarlyExit`.
        """
        links = LayerLinks() if links is None else links
        x = self.model.embed_tokens(input_ids_T) if embeddings_TD is None else embeddings_TD
        if wanted is not None and (early := EarlyExit.of(self.config)) is not None:
            return early.trunk(self, x, seq, cache, links, wanted)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, seq, cache.layer(index) if cache is not None else None, links)
        return x

    def head_input(self, hidden_TD: Tensor) -> Tensor:
        """The final norm: what the output matrix multiplies."""
        out: Tensor = self.model.norm(hidden_TD)
        return out

    def head_weight(self) -> Tensor:
        """The output matrix [V, D]."""
        head = self.lm_head
        return head.quantized_weight() if isinstance(head, QuantLinear) else head.weight

    def logits(self, head_input_TD: Tensor) -> Tensor:
        """Logits [T, V] of normed hidden states (the trunk's or an MTP head's)."""
        out: Tensor = self.lm_head(head_input_TD)
        return out

    def mtp(
        self,
        k: int,
        hidden_TD: Tensor,
        token_ids_T: Tensor,
        seq: Sequences,
        cache: Cache | None = None,
        links: LayerLinks | None = None,
        *,
        embeddings_TD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of head k, from 0; `embeddings_TD` stands in for the embeddings of `token_ids_T`.

        Args:
            k: the head.
            hidden_TD: what `mtp` returned first for head k - 1, or the trunk's hidden state for head 0.
            token_ids_T: for row t the token at t + k + 1.

        Returns:
            The hidden state for head k + 1 and the normed state whose logits predict the token at t + k + 2.
        """
        assert self.config.mtp is not None
        head = self.mtp_heads()[k]
        view = cache.layer(self.config.num_hidden_layers + k) if cache is not None else None
        embedding = self.model.embed_tokens(token_ids_T) if embeddings_TD is None else embeddings_TD
        out = head(hidden_TD, embedding, seq, view, LayerLinks() if links is None else links)
        return (out if self.config.mtp.is_chained else hidden_TD), out

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Logits for a rectangular batch.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], nonzero for real tokens; padding may stand on either side.

        Returns:
            Logits [B, T, V]; zeros at padded places.
        """
        if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            got = tuple(input_ids.shape), None if attention_mask is None else tuple(attention_mask.shape)
            raise ShapeError(f"the model takes input_ids [B, T] and attention_mask of that shape; got {got}")
        real = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        lengths = real.sum(1)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        seq = Sequences(offsets, (real.cumsum(1) - 1)[real])
        packed = self.logits(self.head_input(self.trunk(input_ids[real], seq)))
        if attention_mask is None:
            return CausalLMOutput(packed.view(*input_ids.shape, -1))
        logits = packed.new_zeros(*input_ids.shape, packed.shape[-1])
        logits[real] = packed
        return CausalLMOutput(logits)

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face directory: config.json, safetensors, and the tokenizer files it came with."""
        assert Decoder.saver is not None, "import sateen.checkpoint.hf first"
        Decoder.saver(self, Path(folder))

    @torch.no_grad()
    def init_weights(self, seed: int, *, zero_outputs: bool = False) -> Decoder:
        """Fresh weights: normal with `initializer_range`, norms one, biases and sinks zero.

        Args:
            seed: of the generator that every tensor is drawn from, in the order of `named_parameters`.
            zero_outputs: start `o_proj` and `down_proj` at zero, so that every block begins as the identity.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            owner, _, leaf = name.rpartition(".")
            is_complex = leaf in ("weight_real", "weight_imag")
            if zero_outputs and (owner.endswith(("o_proj", "down_proj")) or leaf == "down_proj"):
                parameter.zero_()
            elif parameter.ndim >= 2:
                # A complex entry has the variance of a real one, half of it in each part.
                std = self.config.initializer_range * (0.5**0.5 if is_complex else 1.0)
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()
        for module in self.modules():
            if isinstance(module, Router):
                module.e_score_correction_bias.zero_()
        return self


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `total` (trunk and matrices), `mtp`, and `active` per token of the trunk."""
    mtp = total = active = 0
    experts: dict[str, Any] = {f"{name}.": m.spec for name, m in model.named_modules() if isinstance(m, MoE)}
    sizes = [(name, p.numel()) for name, p in model.named_parameters()]
    sizes += [(f"{name}.", m.num_weights) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    for name, size in sizes:
        if ".mtp." in name or ".mtp_layers." in name:
            mtp += size
            continue
        total += size
        spec = next((s for prefix, s in experts.items() if name.startswith(prefix + "experts.")), None)
        active += size * spec.experts_per_token // spec.num_experts if spec else size
    return {"total": total, "mtp": mtp, "active": active}
