import math
import random

import numpy as np
import pytest

from sateen.data.text import Document
from sateen.data.token_file import write_texts
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError
from sateen.eval.baselines import (
    baselines,
    bigram_bits_per_byte,
    gzip_bits_per_byte,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)

# Token 0 is special; 1, 2 and 3 stand for one, two and one bytes.
BYTES = np.array([0, 1, 2, 1])
TRAIN = np.array([0, 1, 2, 1, 2, 0])
HELDOUT = np.array([0, 1, 2, 3, 0])


def test_unigram_by_hand():
    # Counts plus one: 3, 3, 1 of 7; four bytes.
    expected = -(math.log2(3 / 7) + math.log2(3 / 7) + math.log2(1 / 7)) / 4
    assert unigram_bits_per_byte(TRAIN, HELDOUT, BYTES) == pytest.approx(expected)


def test_bigram_by_hand():
    # Pairs with a text token second: 0-1 once, 1-2 twice, 2-1 once; after 0, 1 and 2 one kind each.
    after_0 = (1 + 1 * 3 / 7) / (1 + 1)
    after_1 = (2 + 1 * 3 / 7) / (2 + 1)
    after_2 = (0 + 1 * 1 / 7) / (1 + 1)
    expected = -(math.log2(after_0) + math.log2(after_1) + math.log2(after_2)) / 4
    assert bigram_bits_per_byte(TRAIN, HELDOUT, BYTES) == pytest.approx(expected)


def test_a_context_never_seen_falls_back_to_the_unigram():
    heldout = np.array([3, 2])
    expected = -math.log2(3 / 7) / 2
    assert bigram_bits_per_byte(TRAIN, heldout, BYTES) == pytest.approx(expected)


def test_bigram_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 6, 200)
    sizes = np.array([0, 1, 1, 1, 1, 1, 1])  # token 6 is never seen
    for previous in range(7):
        each = [2 ** -bigram_bits_per_byte(train, np.array([previous, i]), sizes) for i in range(1, 7)]
        assert sum(each) == pytest.approx(1.0)


def test_compressors_tell_noise_from_repetition():
    noise = random.Random(0).randbytes(20_000).decode("latin-1").encode("ascii", "ignore").decode()
    for measure in (gzip_bits_per_byte, xz_bits_per_byte):
        assert 6.9 < measure([noise]) < 7.6  # seven random bits in each byte
        assert measure(["ab" * 5000, "ab" * 5000]) < 0.1
        with pytest.raises(ConfigError, match="empty"):
            measure([])


def test_all_baselines_of_two_token_files(tmp_path):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "then", "sleeps"]
    rng = random.Random(1)
    documents = [Document(str(i), " ".join(rng.choices(words, k=80))) for i in range(40)]
    tokenizer = Tokenizer.train([d.text for d in documents], 290)
    train = write_texts(tmp_path / "train", documents[:30], tokenizer)
    heldout = write_texts(tmp_path / "heldout", documents[30:], tokenizer)
    texts = [d.text for d in documents[30:]]
    found = baselines(train, heldout, texts, tokenizer.token_bytes)
    assert list(found) == ["gzip -9", "xz", "unigram", "bigram"]
    # Independent words from 11 kinds ("the" twice of 12) carry 3.42 bits each, nothing can do better.
    entropy = -(10 / 12 * math.log2(1 / 12) + 2 / 12 * math.log2(2 / 12))
    floor = entropy * 80 * 10 / sum(map(len, texts))
    assert floor * 0.97 < found["bigram"] < found["unigram"]
    assert found["bigram"] < floor * 1.15
    assert min(found.values()) > floor * 0.97
    with pytest.raises(ConfigError, match="give the same documents"):
        baselines(train, heldout, texts[1:], tokenizer.token_bytes)
    other = write_texts(tmp_path / "o", documents, Tokenizer.train([d.text for d in documents], 280))
    with pytest.raises(ConfigError, match="different tokenizers"):
        baselines(train, other, texts, tokenizer.token_bytes)
