"""Trains small byte-level BPE vocabularies; `Tokenizer.train` is the door to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sateen.errors import ConfigError

# A byte-level vocabulary writes each byte as one visible character: printable Latin-1 as itself, the others
# as the characters from U+0100 on, in order.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE vocabulary of exactly `vocab_size` tokens, in the `tokenizers` library's own type.

    Every byte has a token, so nothing is unknown; every digit stands alone, so numbers are written one way.
    There is no normaliser: decoding gives back each text exactly.

    Args:
        texts: the training text; the result depends on nothing else.
        vocab_size: all tokens, the special ones and the 256 bytes included.
        special_tokens: take the first ids.

    Raises:
        ConfigError: no room for the bytes, or too little text for the vocabulary.
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size {vocab_size} is too small; bytes and specials need {smallest}")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    if raw.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"vocab_size {vocab_size}: the text gives only {raw.get_vocab_size()} tokens; "
            "lower vocab_size or give more text"
        )
    return raw
