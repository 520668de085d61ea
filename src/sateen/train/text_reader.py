"""Reads the transcript out of an audio tokenizer's quantised vectors: what keeps words in the codes.

A small causal transformer sees the vectors of a crop, then the transcript's bytes one by one. It is trained
with the tokenizer and thrown away afterwards. Legend: B crops, L tokens of the tokenizer, D width, T rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences
from sateen.train.losses import soft_cross_entropy

BEGIN, END = 256, 257
NUM_IDS = 258


class TextReader(nn.Module):
    """A linear map into a causal transformer over bytes (the report leaves size and connector open; ours).

    Args:
        width: D of the vectors, and of the transformer.
        num_layers: of the transformer.
    """

    def __init__(self, width: int, num_layers: int):
        super().__init__()
        config = ModelConfig.from_hf({
            "model_type": "llama", "vocab_size": NUM_IDS, "hidden_size": width,
            "intermediate_size": 4 * width, "num_hidden_layers": num_layers, "num_attention_heads": 4,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
            "max_position_embeddings": 4096, "tie_word_embeddings": False, "initializer_range": width**-0.5,
        })  # fmt: skip
        self.connector = nn.Linear(width, width)
        self.decoder = Decoder(config)

    def init_weights(self, seed: int) -> TextReader:
        """Fresh weights."""
        generator = torch.Generator(device=self.connector.weight.device).manual_seed(seed)
        with torch.no_grad():
            self.connector.weight.normal_(0, self.connector.in_features**-0.5, generator=generator)
            self.connector.bias.zero_()
        self.decoder.init_weights(seed)
        return self

    def loss(self, vectors_BLD: Tensor, texts: Sequence[str | None]) -> Tensor:
        """Mean cross-entropy of the texts' bytes and their end, in nats; 0 where no crop has a text.

        Args:
            vectors_BLD: quantised vectors; the gradient reaches them.
            texts: one per crop, None where there is nothing to read.
        """
        read = [(b, list(text.encode())) for b, text in enumerate(texts) if text is not None]
        if not read:
            return vectors_BLD.new_zeros(())
        L, device = vectors_BLD.shape[1], vectors_BLD.device
        prefix_BLD = self.connector(vectors_BLD)
        rows, positions, offsets, predicting = [], [], [0], []
        for b, text in read:
            inputs = torch.tensor([BEGIN, *text], device=device)
            rows += [prefix_BLD[b], self.decoder.model.embed_tokens(inputs)]
            predicting.append(torch.arange(len(inputs), device=device) + offsets[-1] + L)
            offsets.append(offsets[-1] + L + len(inputs))
            positions.append(torch.arange(L + len(inputs), device=device))
        seq = Sequences(torch.tensor(offsets, dtype=torch.int32, device=device), torch.cat(positions))
        x_TD = torch.cat(rows)
        ids = torch.zeros(len(x_TD), dtype=torch.int64, device=device)
        hidden_TD = self.decoder.trunk(ids, seq, embeddings_TD=x_TD)[torch.cat(predicting)]
        labels_T = torch.cat([torch.tensor([*text, END], device=device) for _, text in read])
        weights_T = torch.full_like(labels_T, 1, dtype=torch.float32) / len(labels_T)
        h_TD, w_VD = self.decoder.head_input(hidden_TD), self.decoder.head_weight()
        return soft_cross_entropy(h_TD, w_VD, labels_T[:, None], weights_T[:, None])
