"""The compiled block-sparse kernels at every instruction set here, against dense float64 attention."""

from __future__ import annotations

import os
from itertools import accumulate

import pytest
import torch

from sateen import ops
from sateen.ops import native as loader
from sateen.ops.block_sparse_attention import block_sparse_attention_native

pytestmark = pytest.mark.skipif(
    loader.native_available() is not None, reason="needs the compiled kernels: a C++ compiler at install time"
)
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
# relative to the largest true value, or to 1 where that is smaller
TOLERANCE = 1e-5


@pytest.fixture(params=LEVELS)
def level(request):
    """Kernels of this level run, whatever the environment asks for."""
    try:
        loader.native().select_isa(request.param)
    except ValueError:
        pytest.skip(f"needs a processor with {request.param}")
    yield request.param
    loader.native().select_isa(os.environ.get("SATEEN_CPU_ISA", ""))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def offsets(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def case(lengths_q, lengths_k, shape, block_size, n, seed=0):
    """q, k, v, sink, d_out in float64 and lists of distinct blocks in any order, some ahead of the query."""
    generator = torch.Generator().manual_seed(seed)
    N, K, H, V = shape
    T, S = sum(lengths_q), sum(lengths_k)
    sizes = ((T, N, H), (S, K, H), (S, K, V), (N,), (T, N, V))
    tensors = [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
    lists = [torch.full((K, 0, n), -1)]
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        blocks = max(1, -(-length_k // block_size))
        order = torch.rand(K, length_q, blocks, generator=generator).argsort(-1)[..., :n]
        order = order.masked_fill(torch.rand(order.shape, generator=generator) < 0.2, -1)
        lists.append(torch.nn.functional.pad(order, (0, n - order.shape[-1]), value=-1))
    return tensors, torch.cat(lists, 1).int()


def dense(q, k, v, idx, cu_q, cu_k, block_size, sink):
    """Output [T, N, V] and log-sum-exp [N, T] from all scores at once; differentiable."""
    group = q.shape[1] // k.shape[1]
    owner_q = torch.repeat_interleave(torch.arange(len(cu_q) - 1), cu_q.diff())
    owner_k = torch.repeat_interleave(torch.arange(len(cu_k) - 1), cu_k.diff())
    shift = cu_k.diff() - cu_q.diff()
    place_q = torch.arange(len(q)) - cu_q[owner_q] + shift[owner_q]
    place_k = torch.arange(len(k)) - cu_k[owner_k]
    seen = (owner_q[:, None] == owner_k[None, :]) & (place_k[None, :] <= place_q[:, None])
    blocks = int(place_k.max()) // block_size + 2 if len(k) else 1
    slots = torch.where((idx < 0) | (idx >= blocks), blocks, idx).long()
    listed = torch.zeros(*idx.shape[:2], blocks + 1, dtype=torch.bool).scatter_(2, slots, True)
    seen = (seen & listed[..., place_k // block_size]).repeat_interleave(group, 0)
    scores = (
        torch.einsum("tkgh,skh->kgts", q.unflatten(1, (-1, group)), k).flatten(0, 1) * q.shape[-1] ** -0.5
    )
    weights = scores.exp() * seen
    total = weights.sum(-1) + (0 if sink is None else sink.exp()[:, None])
    probs = weights / torch.where(total > 0, total, torch.ones_like(total)).unsqueeze(-1)
    out = torch.einsum("kgts,skv->tkgv", probs.unflatten(0, (-1, group)), v).flatten(1, 2)
    return out, weights.sum(-1).log()


def check(lengths_q, lengths_k, shape, block_size, n, has_sink, *, view=lambda x: x):
    """Compares outputs and every gradient of one call."""
    (*inputs, d_out), idx = case(lengths_q, lengths_k, shape, block_size, n)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    if not has_sink:
        inputs.pop()
    truth = [x.clone().requires_grad_() for x in inputs]
    want, want_lse = dense(*truth[:3], idx, cu_q, cu_k, block_size, truth[3] if has_sink else None)
    leaves = [x.float().requires_grad_() for x in inputs]
    got, lse = block_sparse_attention_native(
        *(view(x) for x in leaves[:3]), idx, block_size=block_size, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        scale=shape[2] ** -0.5, sink_N=leaves[3] if has_sink else None, return_lse=True,
    )  # fmt: skip
    pairs = {"out": (got, want), "lse": (lse, want_lse)}
    ours, theirs = torch.autograd.grad(got, leaves, d_out.float()), torch.autograd.grad(want, truth, d_out)
    pairs |= {
        f"d_{name}": (ours[i], theirs[i]) for i, name in enumerate(["q", "k", "v", "sink"][: len(ours)])
    }
    for name, (ours, theirs) in pairs.items():
        ours, theirs = ours.detach(), theirs.detach()
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite), name
        top = max(1.0, float(theirs[finite].abs().max())) if finite.any() else 1.0
        error = float((ours.double() - theirs)[finite].abs().max()) if finite.any() else 0.0
        assert error <= TOLERANCE * top, f"{name}: {error:.2e} of {top:.2e}"


# (N, K, H, V): groups of 1, 4, 8 and 80 heads, whole and broken vectors, V != H
SHAPES = {
    "group 1": (2, 2, 16, 40), "group 4": (8, 2, 40, 24), "group 8": (8, 1, 64, 32), "group 80": (80, 1, 8, 5)
}  # fmt: skip
# block size, blocks per query: by blocks and gathered, single keys, broken vectors, more than a tile of keys
BLOCKS = ((16, 3), (1, 9), (7, 2), (64, 2), (100, 1))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129])
@pytest.mark.usefixtures("poisoned_memory", "level")
def test_one_sequence(length):
    for i, shape in enumerate(SHAPES.values()):
        for j, (block_size, n) in enumerate(BLOCKS):
            if shape[0] < 80 or length in (1, 65):
                check([length], [length], shape, block_size, n, (length + i + j) % 2 == 0)


@pytest.mark.parametrize(
    ("length", "choices"), [(1000, ((64, 4), (1, 33))), (1025, ((16, 8), (300, 2)))], ids=["1000", "1025"]
)
@pytest.mark.usefixtures("poisoned_memory")
def test_long_sequences(length, choices):
    for block_size, n in choices:
        check([length], [length], (4, 1, 16, 8), block_size, n, True)


PACKED = {
    "empty sequences": ([5, 0, 70, 130], [5, 0, 70, 130]),
    "more keys than queries": ([1, 0, 3, 40, 7], [600, 3, 0, 90, 10]),
    "fewer keys than queries": ([40, 9], [7, 0]),
    "decoding": ([1, 1], [1500, 64]),
    "nothing": ([0, 0], [0, 3]),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences_on_one_thread_and_several(name, count, threads):
    threads(count)
    for block_size, n in ((16, 5), (1, 300), (64, 12)):
        check(*PACKED[name], (8, 2, 16, 24), block_size, n, block_size == 16)


def test_one_list_and_one_head_split_over_many_threads(threads):
    threads(5)
    check([1], [3000], (8, 1, 64, 64), 64, 16, True)
    check([700], [700], (2, 1, 32, 48), 32, 6, True)


def test_strided_rows_and_transposed_channels():
    def sliced(x):
        return torch.cat([x, x * 7, x], dim=1)[:, : x.shape[1]]

    def transposed(x):
        return x.transpose(0, 2).contiguous().transpose(0, 2)

    for view in (sliced, transposed):
        check([33, 90], [33, 90], (4, 2, 40, 24), 16, 2, True, view=view)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("level")
def test_half_precision_rows_are_read_as_they_are(dtype):
    (*inputs, d_out), idx = case([65], [80], (4, 2, 40, 24), 16, 3)
    inputs, cu_q, cu_k = [x.to(dtype) for x in inputs], offsets([65]), offsets([80])
    truth = [x.double().requires_grad_() for x in inputs]
    want, _ = dense(*truth[:3], idx, cu_q, cu_k, 16, truth[3])
    leaves = [x.requires_grad_() for x in inputs]
    out = ops.block_sparse_attention(
        *leaves[:3],
        idx,
        block_size=16,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        sink_N=leaves[3],
        backend="native",
    )
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    assert (out - want).abs().max() < step * want.abs().max()
    got = torch.autograd.grad(out, leaves, d_out.to(dtype))
    for ours, theirs in zip(got, torch.autograd.grad(want, truth, d_out.to(dtype).double()), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() < 2 * step * theirs.abs().max()


def test_infinite_sinks_keep_everything_or_nothing():
    (q, k, v, _, d_out), idx = case([70], [70], (2, 1, 16, 16), 16, 5)
    q, k, v, d_out = (x.float() for x in (q, k, v, d_out))
    sink = torch.tensor([-torch.inf, torch.inf], requires_grad=True)
    q.requires_grad_()
    call = {"block_size": 16, "cu_seqlens_q": offsets([70]), "backend": "native"}
    out = ops.block_sparse_attention(q, k, v, idx, sink_N=sink, **call)
    assert torch.equal(out[:, 0], ops.block_sparse_attention(q, k, v, idx, **call)[:, 0])
    assert (out[:, 1] == 0).all()
    d_q, d_sink = torch.autograd.grad(out, (q, sink), d_out)
    assert (d_q[:, 1] == 0).all()
    assert d_q[:, 0].abs().max() > 0.01
    assert (d_sink == 0).all()


def test_a_nan_key_reaches_the_queries_after_it_alone():
    (q, k, v, _, _), _ = case([64], [64], (2, 1, 16, 16), 16, 1)
    q, k, v = (x.float() for x in (q, k, v))
    k[40:] = torch.nan
    idx = torch.arange(4, dtype=torch.int32).expand(1, 64, 4).contiguous()
    for block_size, lists in ((16, idx), (64, idx[..., :1].contiguous())):
        out = ops.block_sparse_attention(
            q, k, v, lists, block_size=block_size, cu_seqlens_q=offsets([64]), backend="native"
        )
        assert out[:40].isfinite().all()
        assert out[40:].isnan().all()


def test_results_do_not_depend_on_where_a_query_stands(threads):
    """A list means the same in a prompt, in a cut of it and alone."""
    (q, k, v, _, _), idx = case([200], [200], (8, 2, 16, 16), 16, 3)
    q, k, v = (x.float() for x in (q, k, v))
    whole = ops.block_sparse_attention(
        q, k, v, idx, block_size=16, cu_seqlens_q=offsets([200]), backend="native"
    )
    threads(2)
    for first in (199, 150, 0):
        part = ops.block_sparse_attention(
            q[first:], k, v, idx[:, first:], block_size=16, cu_seqlens_q=offsets([200 - first]),
            cu_seqlens_k=offsets([200]), backend="native",
        )  # fmt: skip
        torch.testing.assert_close(part, whole[first:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_sink", [False, True])
def test_the_custom_operators_hold_their_contract(has_sink):
    (q, k, v, sink, _), idx = case([9, 11], [9, 11], (4, 2, 16, 8), 4, 2)
    q, k, v, sink = (x.float().requires_grad_() for x in (q, k, v, sink))
    cu = offsets([9, 11])
    arguments = (q, k, v, idx, cu, cu, sink if has_sink else None, 4, 0.3)
    torch.library.opcheck(torch.ops.sateen.sparse_forward.default, arguments)


def test_the_public_call_chooses_it_and_compiles_without_a_graph_break():
    (q, k, v, sink, _), idx = case([30, 40], [30, 40], (4, 2, 32, 16), 16, 2)
    q, k, v, sink = (x.float().requires_grad_() for x in (q, k, v, sink))
    cu = offsets([30, 40])

    def loss(q, k, v, sink, backend):
        out = ops.block_sparse_attention(
            q * 2, k, v, idx, block_size=16, cu_seqlens_q=cu, sink_N=sink, backend=backend
        )
        return (out**2).sum()

    eager = torch.autograd.grad(loss(q, k, v, sink, "auto"), (q, k, v, sink))
    named = torch.autograd.grad(loss(q, k, v, sink, "native"), (q, k, v, sink))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(q, k, v, sink, "native"), (q, k, v, sink))
    for one, two, three in zip(eager, named, traced, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_the_extension_refuses_what_would_read_outside_its_arrays():
    q, k, v = torch.zeros(4, 2, 8).numpy(), torch.zeros(4, 1, 8).numpy(), torch.zeros(4, 1, 8).numpy()
    out, lse = torch.empty(4, 2, 8).numpy(), torch.empty(2, 4).numpy()
    lists = torch.zeros(1, 4, 1, dtype=torch.int32).numpy()

    def run(cu_q=(0, 4), cu_k=(0, 4), lists=lists, data_format=0, block_size=2):
        cu = (torch.tensor(x, dtype=torch.int32).numpy() for x in (cu_q, cu_k))
        loader.native().sparse_forward(q, k, v, data_format, lists, *cu, None, block_size, 1.0, 1, out, lse)

    run()
    for changes, words in (
        ({"cu_q": (0, 5)}, "offsets"),
        ({"cu_k": (0, 3)}, "offsets"),
        ({"lists": lists[:, :3]}, r"lists are \[K, T, n\]"),
        ({"data_format": 1}, "size of their format"),
        ({"block_size": 0}, "at least one key"),
    ):
        with pytest.raises(ValueError, match=words):
            run(**changes)
    # Numbers past the last block, and very large ones, name no key.
    far = torch.tensor([[[2**31 - 1]] * 2 + [[2]] * 2], dtype=torch.int32).numpy()
    run(lists=far)
    assert (out == 0).all()
