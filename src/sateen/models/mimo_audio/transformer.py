"""The transformer layers of the audio tokenizer: encoder, decoder and vocoder use the same ones.

Attention here is full, causal or a two-sided window, over padded batches of clips; the language models'
`ops.attention` is causal only. Legend: B clips, T frames, N heads, H channels of a head, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen.nn.rotary import apply_rotary, rotary_tables

BLOCK = 128  # queries of one block of windowed attention
EPS = 1e-5  # of every LayerNorm


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions over the whole head; the key projection has no bias.

    Source: the published modules; biases as in Whisper.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x_BTD: Tensor, tables: tuple[Tensor, Tensor], window: tuple[int, int], keys_BT: Tensor | None
    ) -> Tensor:
        q, k, v = (
            p(x_BTD).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BTNH = attend(apply_rotary(q, tables), apply_rotary(k, tables), v, window, keys_BT)
        out_BTD: Tensor = self.out_proj(out_BTNH.flatten(-2))
        return out_BTD


class Layer(nn.Module):
    """Pre-norm attention and a GELU feed-forward (exact form); names as published."""

    def __init__(self, width: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.self_attn = SelfAttention(width, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=EPS)

    def forward(
        self,
        x_BTD: Tensor,
        tables: tuple[Tensor, Tensor],
        window: tuple[int, int],
        keys_BT: Tensor | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.self_attn_layer_norm(x_BTD), tables, window, keys_BT)
        x_BTD = x_BTD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_BTD))))
        return x_BTD


def positions(num_frames: int, theta: float, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary tables of frames 0 to T - 1; every clip starts at 0."""
    return rotary_tables(torch.arange(num_frames, device=device), theta, head_dim)


def attend(
    q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, window: tuple[int, int], keys_BT: Tensor | None = None
) -> Tensor:
    """Softmax attention in which frame t sees frames t - left to t + right of its clip.

    Args:
        window: (left, right); -1 is unlimited, (-1, 0) causal.
        keys_BT: True where a frame is real; None when all are. Outputs of padding are without meaning.

    Returns:
        [B, T, N, H]. Two-sided windows run in blocks of queries, so that memory grows with T x window.
    """
    left, right = window
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTNH, v_BTNH))
    if left < 0 and right < 0:
        mask = None if keys_BT is None else keys_BT[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    elif left < 0 and right == 0:
        # Padding comes last, so no real frame sees it.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        T = q.shape[2]
        left, right = (T if side < 0 else min(side, T) for side in (left, right))
        out = _windowed(q, k, v, left, right, keys_BT)
    return out.transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, keys_BT: Tensor | None) -> Tensor:
    """Attention [B, N, T, H] in blocks of `BLOCK` queries, each over the keys that its block may see."""
    B, N, T, H = q.shape
    blocks = -(-T // BLOCK)
    behind = blocks * BLOCK - T
    width = BLOCK + left + right

    def cut(x: Tensor) -> Tensor:
        windows = F.pad(x, (0, 0, left, right + behind)).unfold(2, width, BLOCK)  # [B, N, blocks, H, width]
        return windows.permute(0, 2, 1, 4, 3).reshape(B * blocks, N, width, H)

    q = F.pad(q, (0, 0, 0, behind)).reshape(B, N, blocks, BLOCK, H).transpose(1, 2).reshape(-1, N, BLOCK, H)
    device = q.device
    offsets = torch.arange(width, device=device)[None, :] - torch.arange(BLOCK, device=device)[:, None]
    in_window = (offsets >= 0) & (offsets <= left + right)
    is_real = torch.ones(B, T, dtype=torch.bool, device=device) if keys_BT is None else keys_BT
    keys = F.pad(is_real, (left, right + behind)).unfold(1, width, BLOCK)  # [B, blocks, width]
    queries = F.pad(is_real, (0, behind)).reshape(B, blocks, BLOCK)
    # A padded query sees padding instead of nothing, since a softmax over nothing is NaN in its gradient.
    seen = in_window & (keys[:, :, None, :] | ~queries[:, :, :, None])
    out = F.scaled_dot_product_attention(q, cut(k), cut(v), attn_mask=seen.flatten(0, 1)[:, None])
    return out.reshape(B, blocks, N, BLOCK, H).transpose(1, 2).reshape(B, N, blocks * BLOCK, H)[:, :, :T]
