"""Bits per byte on held-out text, measured while training; `eval` measures finished models more fully."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sateen.data.packing import IGNORE, PackedBatch, pack
from sateen.data.token_file import TokenFile
from sateen.models.decoder import Decoder
from sateen.nn.attention.base import Sequences
from sateen.train.losses import token_logprobs
from sateen.train.precision import matmul_dtype

EVAL_TOKENS = 65_536
"""Tokens read per evaluation, from the start of each held-out file in equal shares (source: ours)."""


@torch.no_grad()
def bits_per_byte(
    model: Decoder,
    files: Sequence[TokenFile],
    token_bytes: Tensor,
    *,
    seq_len: int,
    tokens_per_batch: int,
    dtype: torch.dtype = torch.float32,
    num_tokens: int = EVAL_TOKENS,
) -> float:
    """Cross-entropy of the held-out text over the bytes of its labels, in bits.

    Args:
        model: evaluated in place; its mode is restored.
        files: held-out token files.
        token_bytes: int64 [V], bytes each token stands for; end-of-text has 0 but its cost counts.
        seq_len: longest piece; documents are cut as in training.
        tokens_per_batch: tokens of one forward.
        dtype: of the matmuls.
        num_tokens: tokens read at most, shared equally by the files.
    """
    was_training = model.training
    model.eval()
    nats, num_bytes = 0.0, 0
    for batch in _batches(files, seq_len, tokens_per_batch, num_tokens // len(files)):
        moved = batch.to(model.device)
        with matmul_dtype(model.device.type, dtype):
            hidden_TD = model.trunk(moved.input_ids, Sequences(moved.cu_seqlens, moved.position_ids))
            logprobs_T = token_logprobs(
                model.head_input(hidden_TD), model.head_weight(), moved.labels
            ).logprobs_T
        nats -= float(logprobs_T.double().sum())
        num_bytes += int(token_bytes[batch.labels[batch.labels != IGNORE]].sum())
    model.train(was_training)
    return nats / math.log(2) / max(num_bytes, 1)


def _batches(
    files: Sequence[TokenFile], seq_len: int, tokens_per_batch: int, limit: int
) -> Iterator[PackedBatch]:
    """Pieces in file order; each labels the token that follows it in its document."""
    pieces: list[list[int]] = []
    labels: list[list[int]] = []
    size = 0
    for file in files:
        read = 0
        for index in range(file.num_documents):
            ids = file.document(index).tolist()
            following = [*ids[1:], IGNORE]
            for start in range(0, len(ids), seq_len):
                piece = slice(start, start + seq_len)
                if size + len(ids[piece]) > tokens_per_batch:
                    yield pack(pieces, labels)
                    pieces, labels, size = [], [], 0
                pieces.append(ids[piece])
                labels.append(following[piece])
                size += len(ids[piece])
                read += len(ids[piece])
            if read >= limit:
                break
    if pieces:
        yield pack(pieces, labels)
