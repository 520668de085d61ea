import json
import tempfile
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sateen.data.loader import Loader, Source
from sateen.data.packing import IGNORE
from sateen.data.token_file import TokenDocument, write_tokens
from sateen.errors import CheckpointError, ConfigError


def token_file(folder, lengths, first=0, name="f", **options):
    """Documents of these lengths in which every token differs, so that each can be found in a batch."""
    documents, start = [], first
    for length in lengths:
        documents.append(TokenDocument(range(start, start + length), **options))
        start += length
    return write_tokens(f"{folder}/{name}", documents, vocab_size=2**20, tokenizer_sha256="t")


def same(a, b):
    names = ("input_ids", "position_ids", "cu_seqlens", "labels")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def check_batch(batch, ends, size, seq_len, pad=0):
    """The batch's tokens without padding, after checking its promises by `token_file`'s unique tokens."""
    assert batch.input_ids.shape == batch.position_ids.shape == batch.labels.shape == (size,)
    bounds = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert (bounds[0], bounds[-1]) == (0, size)
    used = []
    for a, b in pairwise(bounds):
        assert 0 < b - a <= seq_len
        ids, labels = batch.input_ids[a:b].tolist(), batch.labels[a:b].tolist()
        assert batch.position_ids[a:b].tolist() == list(range(b - a))
        if set(ids) == {pad}:
            assert set(labels) == {IGNORE}
            continue
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert not any(i + 1 in ends for i in ids[:-1]), "a sequence crosses a document"
        assert labels == [IGNORE if i + 1 in ends else i + 1 for i in ids]
        used += ids
    return used


@given(
    lengths=st.lists(st.integers(1, 40), min_size=3, max_size=12),
    seq_len=st.integers(1, 16),
    extra=st.integers(0, 20),
    seed=st.integers(0, 5),
    world_size=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_used_once_per_epoch_over_all_ranks(lengths, seq_len, extra, seed, world_size):
    total, size = sum(lengths), seq_len + extra
    ends, piece_ends, start = set(), set(), 1
    for length in lengths:
        ends.add(start + length)
        piece_ends |= {min(start + i + seq_len, start + length) - 1 for i in range(0, length, seq_len)}
        start += length
    with tempfile.TemporaryDirectory() as folder:
        source = Source(token_file(folder, lengths, first=1))
        counts = Counter()
        for rank in range(world_size):
            loader = Loader(
                [source],
                tokens_per_batch=size,
                seq_len=seq_len,
                seed=seed,
                rank=rank,
                world_size=world_size,
            )
            share = len(range(rank, len(piece_ends), world_size))
            while share:
                for token in check_batch(next(loader), ends, size, seq_len):
                    if share:
                        counts[token] += 1
                        share -= token in piece_ends
        assert counts == Counter(range(1, total + 1))


@given(data=st.data(), cut=st.integers(0, 30), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_resumed_loader_equals_an_unbroken_one(data, cut, seed):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=8))
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            Source(token_file(folder, lengths, name="a"), 2.0),
            Source(token_file(folder, [5, 9, 3], first=1000, name="b"), 1.0, is_whole=True),
        ]

        def fresh():
            return Loader(sources, tokens_per_batch=24, seq_len=10, seed=seed)

        unbroken, first = fresh(), fresh()
        expected = [next(unbroken) for _ in range(cut + 20)]
        for _ in range(cut):
            next(first)
        resumed = fresh()
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(same(next(resumed), batch) for batch in expected[cut:])


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    file = token_file(tmp_path, [10] * 50)

    def epochs(seed):
        loader = Loader([Source(file)], tokens_per_batch=500, seq_len=10, seed=seed)
        return [next(loader).input_ids.tolist() for _ in range(2)]

    one, two = epochs(1)
    assert sorted(one) == sorted(two) == list(range(500))
    assert one != two
    assert one != list(range(500))
    assert epochs(1) == [one, two]
    assert epochs(2)[0] != one


def test_the_order_is_the_one_recorded_when_this_test_was_written(tmp_path):
    loader = Loader([Source(token_file(tmp_path, [1] * 8))], tokens_per_batch=8, seq_len=1, seed=7)
    assert next(loader).input_ids.tolist() == [6, 3, 4, 0, 2, 7, 5, 1]


def test_sources_get_their_shares_of_tokens(tmp_path):
    a = token_file(tmp_path, [7] * 30, name="a")
    b = token_file(tmp_path, [23] * 30, first=1000, name="b")
    loader = Loader([Source(a, 3.0), Source(b, 1.0)], tokens_per_batch=64, seq_len=16, seed=0)
    ids = torch.cat([next(loader).input_ids for _ in range(50)])
    # The deficit rule keeps every prefix within one piece of its share.
    assert abs(int((ids < 1000).sum()) - 0.75 * ids.numel()) <= 16


def test_whole_documents_are_never_cut_and_gaps_are_filled(tmp_path):
    lengths = [9, 7, 9]
    whole = token_file(tmp_path, lengths, first=1, name="whole")
    alone = Loader([Source(whole, is_whole=True)], tokens_per_batch=20, seq_len=9, seed=0)
    ends = {10, 17, 26}
    starts = {1, 10, 17}
    for _ in range(12):
        batch = next(alone)
        used = check_batch(batch, ends, 20, 9)
        assert len(used) < 20
        assert all(i in starts or i - 1 in used for i in used)
    text = token_file(tmp_path, [100], first=1000, name="text")
    mixed = Loader(
        [Source(whole, 9.0, is_whole=True), Source(text, 1.0)], tokens_per_batch=20, seq_len=9, seed=0
    )
    for _ in range(12):
        used = check_batch(next(mixed), ends | {1100}, 20, 9)
        assert len(used) == 20
        assert all(i in starts or i - 1 in used for i in used if i < 1000)


def test_masked_tokens_are_not_labels(tmp_path):
    documents = [TokenDocument([1, 2, 3, 4, 5], [False, False, True, False, True])]
    file = write_tokens(tmp_path / "f", documents, vocab_size=10, tokenizer_sha256="t")
    batch = next(Loader([Source(file)], tokens_per_batch=5, seq_len=5, seed=0))
    assert batch.labels.tolist() == [IGNORE, 3, IGNORE, 5, IGNORE]


def test_a_state_of_other_data_is_refused(tmp_path):
    file = token_file(tmp_path, [30, 5])
    state = Loader([Source(file)], tokens_per_batch=10, seq_len=5, seed=0).state_dict()
    with pytest.raises(CheckpointError, match="seq_len 5, this run has 4"):
        Loader([Source(file)], tokens_per_batch=10, seq_len=4, seed=0).load_state_dict(state)
    other = token_file(tmp_path, [30, 6], name="g")
    with pytest.raises(CheckpointError, match="sources"):
        Loader([Source(other)], tokens_per_batch=10, seq_len=5, seed=0).load_state_dict(state)


def test_unusable_settings_are_refused(tmp_path):
    file = token_file(tmp_path, [30, 5])
    usable = {"tokens_per_batch": 10, "seq_len": 5, "seed": 0}
    cases = [
        ([], {}, "at least one source"),
        ([Source(file, 0.0)], {}, "weights above 0"),
        ([Source(file)], {"seq_len": 11}, "seq_len 11"),
        ([Source(file)], {"rank": 2, "world_size": 2}, "rank 2"),
        ([Source(file)], {"rank": 0, "world_size": 8}, "7 pieces"),
        ([Source(file, is_whole=True)], {}, "document 0 has 30 tokens"),
    ]
    for sources, change, message in cases:
        with pytest.raises(ConfigError, match=message):
            Loader(sources, **{**usable, **change})
    other = write_tokens(tmp_path / "o", [TokenDocument([1])], vocab_size=9, tokenizer_sha256="other")
    with pytest.raises(ConfigError, match="different tokenizers"):
        Loader([Source(file), Source(other)], **usable)
