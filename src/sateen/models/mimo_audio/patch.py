"""The two small transformers of MiMo-Audio: one reads the frames of a patch, one writes them.

Both are stacks of the decoder's own layers with a norm behind them. The reader sees all frames of its patch,
the writer is causal over its steps and keeps a cache that lives for one patch. Shape letters: T rows, D
width, N heads, K key/value heads, H head size, P patches.
Source: MiMo-Audio, arXiv 2512.23808 §2.2, and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen.models.decoder import Cache, DecoderLayer
from sateen.nn.attention import LayerCache, LayerLinks, Sequences
from sateen.nn.attention.full import FullAttention
from sateen.nn.norm import RMSNorm
from sateen.nn.spec import LayerSpec


class GroupAttention(FullAttention):
    """Attention of every row to all rows of its sequence, later ones too; sequences are equally long.

    Not among `Attention.kinds`: those are causal, which the engine's caches rely on.
    """

    def forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        assert cache is None, "a patch is read whole"
        groups = seq.cu_seqlens.numel() - 1
        # [P, N, G, H]; heads before rows, as the kernel wants them.
        q, k, v = (x.unflatten(0, (groups, -1)).transpose(1, 2) for x in self.project(x_TD, seq))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        result: Tensor = self.o_proj(out.flatten(1))
        return result


class GroupLayer(DecoderLayer):
    """A decoder layer that sees its whole sequence."""

    def __init__(self, hidden_size: int, spec: LayerSpec, eps: float):
        super().__init__(hidden_size, spec, eps)
        self.self_attn = GroupAttention(hidden_size, spec, eps)


class PatchTransformer(nn.Module):
    """Layers and a final norm over sequences as long as a patch; its inputs are embeddings.

    Args:
        hidden_size: width D.
        specs: one per layer.
        eps: of the norms.
        is_bidirectional: rows see later rows of their sequence.
    """

    def __init__(self, hidden_size: int, specs: Sequence[LayerSpec], eps: float, *, is_bidirectional: bool):
        super().__init__()
        layer = GroupLayer if is_bidirectional else DecoderLayer
        self.layers = nn.ModuleList(layer(hidden_size, spec, eps) for spec in specs)
        self.norm = RMSNorm(hidden_size, eps)

    def forward(self, x_PSD: Tensor, cache: StepCache | None = None) -> Tensor:
        """Normed hidden states [P, S, D] of the next S rows of every patch."""
        P, S, _ = x_PSD.shape
        start = 0 if cache is None else cache.length
        device = x_PSD.device
        seq = Sequences(
            torch.arange(0, P * S + 1, S, dtype=torch.int32, device=device),
            torch.arange(start, start + S, device=device).repeat(P),
        )
        x, links = x_PSD.flatten(0, 1), LayerLinks()
        for index, layer in enumerate(self.layers):
            x = layer(x, seq, cache.layer(index) if cache is not None else None, links)
        if cache is not None:
            cache.length += S
        out: Tensor = self.norm(x).unflatten(0, (P, S))
        return out


class StepCache(Cache):
    """Keys and values of the patches that are being written, one row per patch and step.

    Attributes:
        length: steps that are done.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, _StepRows] = {}

    def layer(self, index: int) -> LayerCache:
        return self._layers.setdefault(index, _StepRows())


class _StepRows(LayerCache):
    """One layer of a `StepCache`."""

    def __init__(self) -> None:
        self._k: list[Tensor] = []
        self._v: list[Tensor] = []

    def extend(self, k_TKH: Tensor, v_TKV: Tensor, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        # One new row per patch, so that the T rows of a step are the P patches.
        self._k.append(k_TKH)
        self._v.append(v_TKV)
        P, t = len(k_TKH), len(self._k)
        offsets = torch.arange(0, P * t + 1, t, dtype=torch.int32, device=k_TKH.device)
        return torch.stack(self._k, 1).flatten(0, 1), torch.stack(self._v, 1).flatten(0, 1), offsets

    def read(self, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("layers of the patch decoder share no rows")
