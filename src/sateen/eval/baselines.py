"""What compressors and count tables reach on the same held-out text, in bits per byte.

A model's bits per byte mean little alone; reports print these beside them. The tables see the same training
tokens as the model and predict the same held-out ones. Shape letters: T tokens, C vocabulary entries.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sateen.data.token_file import TokenFile
from sateen.errors import ConfigError

Ints = NDArray[np.int64]


def gzip_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits per byte of `gzip -9` on the texts laid end to end; it has seen no training text."""
    data = _joined(texts)
    return 8 * len(gzip.compress(data, compresslevel=9, mtime=0)) / len(data)


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits per byte of `xz -9e` on the texts laid end to end; it has seen no training text."""
    data = _joined(texts)
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def unigram_bits_per_byte(train_T: Ints, heldout_T: Ints, token_bytes_C: Ints) -> float:
    """Bits per byte of token frequencies, each counted once more than seen.

    Args:
        train_T: training tokens.
        heldout_T: tokens to predict; those of zero bytes, the special ones, are not counted.
        token_bytes_C: bytes of text per token id.
    """
    scored = heldout_T[token_bytes_C[heldout_T] > 0]
    bits = -np.log2(_unigram(train_T, token_bytes_C)[scored]).sum()
    return float(bits / _num_bytes(scored, token_bytes_C))


def bigram_bits_per_byte(train_T: Ints, heldout_T: Ints, token_bytes_C: Ints) -> float:
    """Bits per byte of a table of token pairs, interpolated with the frequencies of single tokens.

    The pair table's share after token a is n(a) / (n(a) + t(a)), with n(a) pairs seen and t(a) kinds of them.
    Arguments as in `unigram_bits_per_byte`; both token streams carry a special token before each document.

    Source: Witten and Bell 1991, "The zero-frequency problem", method C, in its interpolated form.
    """
    size = token_bytes_C.size
    unigram_C = _unigram(train_T, token_bytes_C)
    is_scored = token_bytes_C[train_T[1:]] > 0
    previous, following = train_T[:-1][is_scored], train_T[1:][is_scored]
    pairs, pair_counts = np.unique(previous * size + following, return_counts=True)
    seen_C = np.bincount(previous, minlength=size)
    kinds_C = np.bincount(pairs // size, minlength=size)

    is_scored = token_bytes_C[heldout_T[1:]] > 0
    previous, following = heldout_T[:-1][is_scored], heldout_T[1:][is_scored]
    wanted = previous * size + following
    at = np.minimum(np.searchsorted(pairs, wanted), max(pairs.size - 1, 0))
    counts = np.where(pairs[at] == wanted, pair_counts[at], 0)
    seen, kinds = seen_C[previous], kinds_C[previous]
    total = np.maximum(seen + kinds, 1)
    backoff = np.where(seen == 0, 1.0, kinds / total)
    probability = counts / total + backoff * unigram_C[following]
    return float(-np.log2(probability).sum() / _num_bytes(following, token_bytes_C))


def baselines(
    train: TokenFile, heldout: TokenFile, texts: Sequence[str], token_bytes_C: Ints
) -> dict[str, float]:
    """All baselines by name: `gzip -9`, `xz`, `unigram` and `bigram`, in bits per byte of the held-out text.

    Args:
        train: training tokens.
        heldout: held-out tokens, every document after a special token.
        texts: the held-out documents as text.
        token_bytes_C: `Tokenizer.token_bytes` of the tokenizer of both files.

    Raises:
        ConfigError: the files are of different tokenizers, or the held-out tokens are not those of the texts.
    """
    if train.tokenizer_sha256 != heldout.tokenizer_sha256:
        raise ConfigError(f"{train.path} and {heldout.path} are of different tokenizers; write them again")
    train_T, heldout_T = train.tokens.astype(np.int64), heldout.tokens.astype(np.int64)
    num_bytes = int(token_bytes_C[heldout_T].sum())
    if num_bytes != len(_joined(texts)):
        raise ConfigError(
            f"{heldout.path} stands for {num_bytes} bytes, the texts have {len(_joined(texts))}; "
            "give the same documents"
        )
    return {
        "gzip -9": gzip_bits_per_byte(texts),
        "xz": xz_bits_per_byte(texts),
        "unigram": unigram_bits_per_byte(train_T, heldout_T, token_bytes_C),
        "bigram": bigram_bits_per_byte(train_T, heldout_T, token_bytes_C),
    }


def _joined(texts: Sequence[str]) -> bytes:
    data = "".join(texts).encode()
    if not data:
        raise ConfigError("bits per byte need held-out text; it is empty")
    return data


def _num_bytes(tokens: Ints, token_bytes_C: Ints) -> int:
    count = int(token_bytes_C[tokens].sum())
    if count == 0:
        raise ConfigError("bits per byte need held-out text; the tokens stand for no bytes")
    return count


def _unigram(train_T: Ints, token_bytes_C: Ints) -> NDArray[np.float64]:
    """Probability of each token that stands for text; 0 for the others."""
    counts = np.bincount(train_T, minlength=token_bytes_C.size) + 1
    probability: NDArray[np.float64] = (
        np.where(token_bytes_C > 0, counts, 0) / counts[token_bytes_C > 0].sum()
    )
    return probability
