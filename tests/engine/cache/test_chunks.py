"""One forward over a sequence equals any cut of it into cached forwards, across window and page borders."""

from __future__ import annotations

import pytest
import torch

from sateen.engine.cache.kv_cache import KVCache
from sateen.nn.attention import Sequences

TOLERANCE = 1e-5


def cached_hidden(model, sequences, cuts, *, num_draft=0, wrong=0):
    """Trunk states of each sequence through a cache; `cuts[i]` are the chunk lengths of sequence i.

    After every chunk `wrong` junk tokens are appended and truncated again, as rejected drafts are.
    """
    cache = KVCache(
        model.config.kv_layouts()[: model.config.num_hidden_layers],
        num_trunk_layers=model.config.num_hidden_layers,
        num_pages=16, num_slots=4, max_model_len=300, num_draft=num_draft,
    )  # fmt: skip
    for pool in cache.pools.values():
        pool.k_RKH.fill_(torch.nan)
        pool.v_RKV.fill_(torch.nan)
    entries = [cache.open() for _ in sequences]
    outputs = [[] for _ in sequences]
    for step in range(max(map(len, cuts))):
        active = [i for i in range(len(sequences)) if step < len(cuts[i])]
        starts = [entries[i].length for i in active]
        pieces = [sequences[i][s : s + cuts[i][step]] for i, s in zip(active, starts, strict=True)]
        ids = [[*piece, *[1] * wrong] for piece in pieces]
        counts = [len(piece) for piece in ids]
        for i, s, n in zip(active, starts, counts, strict=True):
            assert cache.reserve(entries[i], s + n)
        seq = Sequences.of_lengths(counts)
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        view = cache.forward([entries[i] for i in active], counts)
        hidden = model.trunk(
            torch.tensor([token for piece in ids for token in piece]),
            Sequences(seq.cu_seqlens, positions),
            view,
        )
        for i, s, piece, part in zip(active, starts, pieces, hidden.split(counts), strict=True):
            outputs[i].append(part[: len(piece)])
            cache.truncate(entries[i], s + len(piece))
    return [torch.cat(parts) for parts in outputs]


def chunkings(length):
    yield [length]
    yield [length - 1, 1]
    yield [1] * length
    yield [7] * (length // 7) + ([length % 7] if length % 7 else [])
    yield [40, length - 40]


@pytest.mark.parametrize("length", [63, 64, 65, 129])
@pytest.mark.parametrize("name", ["flash", "mimo", "hysparse", "hysparse2"])
@torch.inference_mode()
def test_any_chunking_equals_one_forward(name, length, request, make_prompts):
    model = request.getfixturevalue(name)
    (tokens,) = make_prompts([length])
    whole = model.trunk(torch.tensor(tokens), Sequences.of_lengths([length]))
    for cut in chunkings(length):
        (got,) = cached_hidden(model, [tokens], [cut])
        assert (got - whole).abs().max() < TOLERANCE * whole.abs().max()
        logits = model.logits(model.head_input(got)) - model.logits(model.head_input(whole))
        assert logits.abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["flash", "mimo", "hysparse", "hysparse2"])
@torch.inference_mode()
def test_rejected_rows_leave_no_trace(name, request, make_prompts):
    model = request.getfixturevalue(name)
    tokens = make_prompts([70, 30])
    (got, other) = cached_hidden(model, tokens, [[33, *[1] * 37], [1] * 30], num_draft=3, wrong=3)
    for mine, ids in ((got, tokens[0]), (other, tokens[1])):
        whole = model.trunk(torch.tensor(ids), Sequences.of_lengths([len(ids)]))
        assert (mine - whole).abs().max() < TOLERANCE * whole.abs().max()


@torch.inference_mode()
def test_sequences_of_a_batch_do_not_see_each_other(flash, make_prompts):
    tokens = make_prompts([5, 90, 17, 64])
    cuts = [[5], [50, 1, 39], [16, 1], [20, 44]]
    for got, ids in zip(cached_hidden(flash, tokens, cuts), tokens, strict=True):
        whole = flash.trunk(torch.tensor(ids), Sequences.of_lengths([len(ids)]))
        assert (got - whole).abs().max() < TOLERANCE * whole.abs().max()
