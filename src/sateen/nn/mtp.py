"""Multi-token prediction heads in the two published forms.

Head k (from 0) joins the hidden state of row t with the embedding of token t+k+1 and predicts token
t+k+2. The heads of MiMo-7B (arXiv 2505.07608 §2.2) put the hidden state first and feed each other; those
of MiMo-V2-Flash (arXiv 2601.02780 §2.3.2) put the embedding first and all read the trunk. Both read it
before the final norm.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from sateen.nn.attention import Attention, LayerCache, LayerLinks, Sequences
from sateen.nn.mlp import SwiGLU
from sateen.nn.norm import RMSNorm
from sateen.nn.recompute import Recompute
from sateen.nn.spec import MTPSpec


class MTPHead(nn.Module):
    """One head: two norms, a joining projection, a decoder block and its own final norm.

    The embedding and output matrices are the trunk's. Tensor names follow the checkpoint (`spec.names`).

    Attributes:
        recompute: keeps the head's inputs alone for the backward pass; None keeps all activations.
    """

    recompute: Recompute | None = None

    def __init__(self, hidden_size: int, eps: float, spec: MTPSpec, index: int):
        super().__init__()
        self.mtp = spec
        layer = replace(spec.layer, index=spec.layer.index + index)
        for word in ("embedding_norm", "hidden_norm", "mlp_norm", "final_norm"):
            setattr(self, spec.names[word], RMSNorm(hidden_size, eps))
        setattr(self, spec.names["join"], nn.Linear(2 * hidden_size, hidden_size, bias=False))
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = Attention.kinds[layer.attention](hidden_size, layer, eps)
        self.mlp = SwiGLU(hidden_size, layer.intermediate_size)

    def _named(self, word: str) -> nn.Module:
        module: nn.Module = getattr(self, self.mtp.names[word])
        return module

    def join(self, hidden_TD: Tensor, embedding_TD: Tensor) -> Tensor:
        """The block's input [T, D]."""
        hidden = self._named("hidden_norm")(hidden_TD)
        embedding = self._named("embedding_norm")(embedding_TD)
        halves = [hidden, embedding] if self.mtp.order == "hidden" else [embedding, hidden]
        out: Tensor = self._named("join")(torch.cat(halves, dim=-1))
        return out

    def forward(
        self,
        hidden_TD: Tensor,
        embedding_TD: Tensor,
        seq: Sequences,
        cache: LayerCache | None,
        links: LayerLinks,
    ) -> Tensor:
        """The normed output [T, D]: input of the output matrix, and of the next head if heads are chained."""
        if self.recompute is not None and cache is None and torch.is_grad_enabled():
            spec = self.self_attn.spec
            return self.recompute(self._forward, spec, (hidden_TD, embedding_TD), seq, links)
        return self._forward(hidden_TD, embedding_TD, seq, cache, links)

    def _forward(
        self,
        hidden_TD: Tensor,
        embedding_TD: Tensor,
        seq: Sequences,
        cache: LayerCache | None,
        links: LayerLinks,
    ) -> Tensor:
        x = self.join(hidden_TD, embedding_TD)
        x = x + self.self_attn(self.input_layernorm(x), seq, cache, links)
        x = x + self.mlp(self._named("mlp_norm")(x))
        out: Tensor = self._named("final_norm")(x)
        return out
