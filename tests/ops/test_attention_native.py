"""The compiled attention kernel against dense float64 attention, at every instruction set of this machine."""

from __future__ import annotations

import sys
from itertools import accumulate, product

import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable, ConfigError
from sateen.ops import native as loader
from sateen.ops.attention import attention_native

needs_kernels = pytest.mark.skipif(
    loader.native_available() is not None, reason="needs the compiled kernels: a C++ compiler at install time"
)
LENGTHS = (1, 31, 63, 64, 65, 127, 129, 200)
WINDOWS = (None, 1, 16, 64, 129)
# (N, K, H, V): groups of 1, 2, 4 and 8 heads, whole and broken vectors, V != H
SHAPES = ((2, 2, 16, 40), (4, 2, 40, 24), (4, 1, 64, 64), (8, 1, 96, 80))
GRID = list(product(LENGTHS, WINDOWS))
# relative to the largest true value, or to 1 where that is smaller (some gradients are exactly zero)
TOLERANCE = 1e-5


def dense(q, k, v, cu_q, cu_k, window, sink):
    """Attention [T, N, V] and log-sum-exp [N, T] from all scores at once; differentiable."""
    group = q.shape[1] // k.shape[1]
    owner_q = torch.repeat_interleave(torch.arange(len(cu_q) - 1), torch.tensor(cu_q).diff())
    owner_k = torch.repeat_interleave(torch.arange(len(cu_k) - 1), torch.tensor(cu_k).diff())
    shift = torch.tensor(cu_k).diff() - torch.tensor(cu_q).diff()
    place_q = torch.arange(len(q)) - torch.tensor(cu_q)[owner_q] + shift[owner_q]
    place_k = torch.arange(len(k)) - torch.tensor(cu_k)[owner_k]
    gap = place_q[:, None] - place_k[None, :]
    seen = (owner_q[:, None] == owner_k[None, :]) & (gap >= 0) & (gap < (window or 10**9))
    scores = (
        torch.einsum("tkgh,skh->kgts", q.unflatten(1, (-1, group)), k).flatten(0, 1) * q.shape[-1] ** -0.5
    )
    weights = scores.exp() * seen
    total = weights.sum(-1) + (0 if sink is None else sink.exp()[:, None])
    probs = weights / torch.where(total > 0, total, torch.ones_like(total)).unsqueeze(-1)
    out = torch.einsum("kgts,skv->tkgv", probs.unflatten(0, (-1, group)), v).flatten(1, 2)
    return out, weights.sum(-1).log()


def case(lengths_q, lengths_k, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N, K, H, V = shape
    sizes = (
        (sum(lengths_q), N, H),
        (sum(lengths_k), K, H),
        (sum(lengths_k), K, V),
        (N,),
        (sum(lengths_q), N, V),
    )
    return [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]


def check(lengths_q, lengths_k, shape, window, has_sink, **views):
    """Compares outputs and every gradient of one call; `view` may change the layout of q, k and v."""
    *inputs, d_out = case(lengths_q, lengths_k, shape)
    cu_q, cu_k = [0, *accumulate(lengths_q)], [0, *accumulate(lengths_k)]
    if not has_sink:
        inputs.pop()
    truth = [x.clone().requires_grad_() for x in inputs]
    want, want_lse = dense(*truth[:3], cu_q, cu_k, window, truth[3] if has_sink else None)
    leaves = [x.float().requires_grad_() for x in inputs]
    used = [views.get("view", lambda x: x)(x) for x in leaves[:3]]
    got, lse = attention_native(
        *used,
        cu_seqlens_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32),
        window=window,
        sink_N=leaves[3] if has_sink else None,
        return_lse=True,
    )
    pairs = {"out": (got, want), "lse": (lse, want_lse)}
    want_grads = torch.autograd.grad(want, truth, d_out)
    got_grads = torch.autograd.grad(got, leaves, d_out.float())
    for i, name in enumerate(["d_q", "d_k", "d_v", "d_sink"][: len(leaves)]):
        pairs[name] = got_grads[i], want_grads[i]
    for name, (ours, theirs) in pairs.items():
        ours, theirs = ours.detach(), theirs.detach()
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite), name
        top = max(1.0, float(theirs[finite].abs().max())) if finite.any() else 1.0
        error = float((ours.double() - theirs)[finite].abs().max()) if finite.any() else 0.0
        assert error <= TOLERANCE * top, f"{name}: {error:.2e} of {top:.2e}"


@needs_kernels
@pytest.mark.parametrize(("length", "window"), GRID)
@pytest.mark.usefixtures("poisoned_memory")
def test_one_sequence(length, window):
    # Every shape meets every length and window; sinks alternate, so each shape has them on half the grid.
    for i, shape in enumerate(SHAPES):
        check([length], [length], shape, window, (GRID.index((length, window)) + i) % 2 == 0)


PACKED = {
    "empty sequences": ([5, 0, 70, 130], [5, 0, 70, 130]),
    "more keys than queries": ([1, 0, 3, 40, 7], [600, 3, 0, 90, 10]),
    "fewer keys than queries": ([40, 9], [7, 0]),
    "decoding": ([1, 1, 1], [1500, 1, 64]),
    "nothing": ([0, 0], [0, 3]),
}


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape, window, has_sink in product(SHAPES[1:3], (None, 16, 129), (False, True)):
            check(*PACKED[name], shape, window, has_sink)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
def test_one_head_split_over_many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        check([700], [700], (2, 1, 32, 48), None, True)
        check([1], [3000], (4, 1, 64, 64), None, True)
        check([700, 20], [900, 20], (2, 1, 32, 48), 300, False)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_strided_rows_and_transposed_channels():
    def sliced(x):
        return torch.cat([x, x * 7, x], dim=1)[:, : x.shape[1]]

    def transposed(x):
        return x.transpose(0, 2).contiguous().transpose(0, 2)

    for view in (sliced, transposed):
        check([33, 90], [33, 90], (4, 2, 40, 24), 16, True, view=view)


@needs_kernels
def test_large_scores_neither_overflow_nor_lose_the_row():
    q, k, v, _, _ = (x.float() for x in case([70], [70], (2, 1, 16, 16)))
    cu = torch.tensor([0, 70], dtype=torch.int32)
    for scale in (1.0, 300.0, -300.0):
        out, lse = attention_native(q, k, v, cu_seqlens_q=cu, scale=scale, return_lse=True)
        scores = torch.einsum("tnh,sh->nts", q.double(), k[:, 0].double()) * scale
        scores = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
        want = torch.einsum("nts,sv->tnv", scores.softmax(-1), v[:, 0].double())
        # Scores of this size are only known to a few units of float32, and so is what is averaged with them.
        top = float(scores[scores.isfinite()].abs().max())
        assert (lse - scores.logsumexp(-1)).abs().max() < 4e-7 * top
        assert (out - want).abs().max() < 4e-7 * max(top, 10.0)


@needs_kernels
def test_infinite_sinks_keep_everything_or_nothing():
    q, k, v, _, d_out = (x.float() for x in case([70], [70], (2, 1, 16, 16)))
    cu = torch.tensor([0, 70], dtype=torch.int32)
    sink = torch.tensor([-torch.inf, torch.inf], requires_grad=True)
    q.requires_grad_()
    out = attention_native(q, k, v, cu_seqlens_q=cu, sink_N=sink)
    assert torch.equal(out[:, 0], attention_native(q, k, v, cu_seqlens_q=cu)[:, 0])
    assert (out[:, 1] == 0).all()
    d_q, d_sink = torch.autograd.grad(out, (q, sink), d_out)
    assert (d_q[:, 1] == 0).all()
    assert d_q[:, 0].abs().max() > 0.01
    assert (d_sink == 0).all()


@needs_kernels
def test_nan_in_one_sequence_stays_there_and_reaches_its_later_rows():
    q, k, v, _, _ = (x.float() for x in case([70, 70], [70, 70], (2, 1, 16, 16)))
    cu = torch.tensor([0, 70, 140], dtype=torch.int32)
    clean = attention_native(q, k, v, cu_seqlens_q=cu)
    k[80] = torch.nan
    out = attention_native(q, k, v, cu_seqlens_q=cu)
    assert torch.equal(out[:80], clean[:80])
    assert out[80:].isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_and_differentiable(dtype):
    inputs = [x.to(dtype) for x in case([65], [65], (4, 2, 40, 24))]
    d_out = inputs.pop()
    truth = [x.double().requires_grad_() for x in inputs]
    want, _ = dense(*truth[:3], [0, 65], [0, 65], 16, truth[3])
    leaves = [x.requires_grad_() for x in inputs]
    cu = torch.tensor([0, 65], dtype=torch.int32)
    out = attention_native(*leaves[:3], cu_seqlens_q=cu, window=16, sink_N=leaves[3])
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    assert (out - want).abs().max() < step * want.abs().max()
    got = torch.autograd.grad(out, leaves, d_out)
    for ours, theirs in zip(got, torch.autograd.grad(want, truth, d_out.double()), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() < 2 * step * theirs.abs().max()


HALF_CASES = [  # queries, keys, shape, window: few rows with whole and broken vectors, tiles, and both
    ([1], [300], (4, 2, 64, 64), None),
    ([3, 1], [270, 1], (8, 1, 32, 48), 100),
    ([1, 2], [66, 130], (4, 2, 40, 24), None),
    ([70, 5], [200, 64], (6, 2, 64, 40), 90),
]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case_number", range(len(HALF_CASES)))
def test_half_precision_caches_are_read_as_they_lie(case_number, dtype, monkeypatch):
    """Rows of a larger tensor, with gaps; the whole is never converted."""
    lengths_q, lengths_k, shape, window = HALF_CASES[case_number]
    q, k, v, sink, _ = (x.to(dtype) for x in case(lengths_q, lengths_k, shape))
    cu_q, cu_k = [0, *accumulate(lengths_q)], [0, *accumulate(lengths_k)]
    want, want_lse = dense(*(x.double() for x in (q, k, v)), cu_q, cu_k, window, sink.double())
    pools = [torch.full((3 * len(x), x.shape[1] + 1, x.shape[2] + 8), torch.nan, dtype=dtype) for x in (k, v)]
    gaps = [pool[1::3, 1:, 8:] for pool in pools]
    for rows, x in zip(gaps, (k, v), strict=True):
        rows.copy_(x)
    widened, widen = [], torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: widened.append(x.shape) or widen(x))
    out, lse = attention_native(
        q, *gaps, cu_seqlens_q=torch.tensor(cu_q), cu_seqlens_k=torch.tensor(cu_k), window=window,
        sink_N=sink, return_lse=True,
    )  # fmt: skip
    assert widened == [sink.shape, q.shape]
    assert out.dtype == dtype
    assert (out - want).abs().max() < torch.finfo(dtype).eps * want.abs().max()
    assert (lse - want_lse).abs().max() < 1e-4
    whole = attention_native(
        q.float(), k.float(), v.float(), cu_seqlens_q=torch.tensor(cu_q), cu_seqlens_k=torch.tensor(cu_k),
        window=window, sink_N=sink,
    )  # fmt: skip
    assert torch.equal(out, whole.to(dtype))


@needs_kernels
def test_the_public_call_chooses_it_and_compiles_without_a_graph_break():
    q, k, v, sink, _ = (x.float().requires_grad_() for x in case([30, 40], [30, 40], (4, 2, 32, 16)))
    cu = torch.tensor([0, 30, 70], dtype=torch.int32)

    def loss(q, k, v, sink, backend):
        return (
            ops.attention(q * 2, k, v, cu_seqlens_q=cu, window=9, sink_N=sink, backend=backend) ** 2
        ).sum()

    eager = torch.autograd.grad(loss(q, k, v, sink, "auto"), (q, k, v, sink))
    named = torch.autograd.grad(loss(q, k, v, sink, "native"), (q, k, v, sink))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(q, k, v, sink, "native"), (q, k, v, sink))
    for one, two, three in zip(eager, named, traced, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@needs_kernels
@pytest.mark.parametrize("has_sink", [False, True])
def test_the_custom_operators_hold_their_contract(has_sink):
    q, k, v, sink, _ = (x.float().requires_grad_() for x in case([9, 11], [9, 11], (4, 2, 16, 8)))
    cu = torch.tensor([0, 9, 20], dtype=torch.int32)
    arguments = (q, k, v, cu, cu, sink if has_sink else None, 0.3, 5)
    torch.library.opcheck(torch.ops.sateen.attention_forward.default, arguments)


@needs_kernels
def test_the_extension_refuses_what_would_read_outside_its_arrays():
    q, k, v, _, _ = (x.float().numpy() for x in case([4], [4], (2, 1, 8, 8)))
    out, lse = torch.empty(4, 2, 8).numpy(), torch.empty(2, 4).numpy()

    def run(cu_q, cu_k):
        offsets = (torch.tensor(cu, dtype=torch.int32).numpy() for cu in (cu_q, cu_k))
        loader.native().attention_forward(q, k, v, *offsets, None, 1.0, 0, 1, out, lse)

    run([0, 4], [0, 4])
    for cu_q, cu_k in (
        ([0, 5], [0, 4]),
        ([0, 4], [0, 3]),
        ([0, 6, 4], [0, 2, 4]),
        ([1, 4], [0, 4]),
        ([0, 4], [0, 2, 4]),
    ):
        with pytest.raises(ValueError, match=r"offsets|number of sequences"):
            run(cu_q, cu_k)


@needs_kernels
def test_every_instruction_set_passes_the_grid(passes_at):
    passes_at(__file__, "one_sequence or packed or half or large")


@needs_kernels
def test_the_named_instruction_set_is_the_one_that_runs(run_at_level):
    ran = run_at_level("generic", "from sateen.ops.native import native; print(native().current_isa())")
    assert ran.stdout.strip() == "generic", ran.stderr[-2000:]


@needs_kernels
def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("SATEEN_CPU_ISA", "avx1024")
    monkeypatch.setattr(loader, "_loaded", None)
    with pytest.raises(ConfigError, match=r"avx1024: .*known: generic, avx2, avx512, avx512_bf16"):
        loader.native_available()
    monkeypatch.setenv("SATEEN_CPU_ISA", "")
    assert loader.native_available() is None


def test_without_the_extension_it_says_so_once_and_auto_goes_on(monkeypatch, caplog):
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "sateen._native", None)
    monkeypatch.setattr(loader, "_loaded", None)
    q, k, v, _, _ = (x.float() for x in case([9], [9], (2, 1, 8, 8)))
    cu = torch.tensor([0, 9], dtype=torch.int32)
    with caplog.at_level("WARNING", logger="sateen.ops"):
        for _ in range(2):
            with pytest.raises(
                BackendUnavailable, match="cannot run this call: the compiled kernels are missing"
            ):
                ops.attention(q, k, v, cu_seqlens_q=cu, backend="native")
            out = ops.attention(q, k, v, cu_seqlens_q=cu)
    with pytest.raises(BackendUnavailable, match=r"install a C\+\+ compiler"):
        loader.native()
    assert torch.allclose(
        out.double(), dense(q.double(), k.double(), v.double(), [0, 9], [0, 9], None, None)[0], atol=1e-5
    )
    assert [r.levelname for r in caplog.records if "CPU kernels are off" in r.message] == ["WARNING"]
