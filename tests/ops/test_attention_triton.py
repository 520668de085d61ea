"""The Triton backend of `ops.attention` against the float64 oracle, on CUDA or under Triton's interpreter.

The interpreter is chosen by a variable that Triton reads when it is imported, so without CUDA the tests run
in a process of their own: `test_the_kernels_under_the_interpreter` starts pytest on this file again, with the
variable set, and the other tests are skipped here.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from itertools import accumulate

import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable, ConfigError
from sateen.ops.attention import OP
from sateen.ops.attention.triton_tiles import VARIABLE, Tile, tile
from sateen.ops.triton import INTERPRETED, PRIORITY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_here = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs under the interpreter")

# dtype -> relative RMS error of output, log-sum-exp, gradients, and the largest error per unit of the largest
# true value. The interpreter cuts bfloat16 numbers off where a GPU rounds them, which doubles their errors.
TOLERANCES = {
    torch.float32: (2e-6, 2e-6, 2e-6, 5e-6),
    torch.float16: (1e-3, 1e-5, 5e-3, 5e-3),
    torch.bfloat16: (8e-3, 1e-5, 4e-2, 4e-2),
}
SMALL = "forward=16,16,4,1 decode=16,16,4,1 query_gradient=16,32,4,1 key_gradient=32,16,4,1"
# lengths of queries, of keys (None: the same), (N, K, H, V), window, has a sink, parts
GRID = {
    "one token": ([1], None, (2, 1, 16, 16), None, True, 1),
    "a tile less one": ([31], None, (4, 4, 40, 40), None, False, 1),
    "a tile and one": ([65], None, (4, 1, 16, 24), None, True, 1),
    "group of eight": ([17], None, (8, 1, 80, 40), None, True, 1),
    "group of three": ([35], None, (6, 2, 16, 16), 9, True, 1),
    "values wider than keys": ([40], None, (2, 1, 24, 64), None, False, 1),
    "far past the window": ([129], None, (2, 1, 16, 16), 37, True, 1),
    "window of one": ([33, 3], None, (2, 1, 8, 8), 1, True, 1),
    "window of a tile": ([65], None, (1, 1, 8, 8), 16, False, 1),
    "window longer than the sequence": ([33], None, (2, 1, 8, 8), 100, False, 1),
    "empty sequences": ([0, 3, 0, 31, 0], None, (2, 1, 8, 8), None, True, 1),
    "many sequences": ([1, 2, 17, 1, 16, 15, 3], None, (2, 1, 8, 8), 5, True, 1),
    "nothing": ([0, 0], None, (2, 1, 8, 8), None, True, 1),
    "chunked prefill": ([33, 2, 0], [70, 40, 5], (4, 2, 8, 8), 30, False, 1),
    "keys that no query sees": ([2, 1], [65, 33], (2, 1, 8, 8), 3, True, 1),
    "queries without keys": ([4, 3, 20], [2, 0, 5], (2, 1, 8, 8), 2, True, 1),
    "queries without keys or sinks": ([4, 3, 2], [2, 0, 5], (2, 1, 8, 8), None, False, 1),
    "decode in four parts": ([1, 3, 1, 0], [9, 3, 129, 4], (4, 1, 16, 24), None, True, 4),
    "decode in parts and a window": ([1, 3, 1, 2], [9, 65, 100, 33], (4, 1, 8, 8), 40, True, 3),
    "decode in more parts than tiles": ([1, 1], [2, 20], (8, 1, 40, 8), None, False, 7),
    "queries without keys in parts": ([2, 3], [0, 1], (4, 2, 8, 8), None, True, 5),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Sets tiles with borders inside short sequences; call it with the number of parts."""

    def choose(parts=1, sizes=SMALL):
        monkeypatch.setenv(VARIABLE, f"{sizes} parts={parts}")

    choose()
    return choose


def offsets(lengths):
    return [0, *accumulate(lengths)]


def on_device(data):
    return {name: x.to(DEVICE) for name, x in data.items()}


def indices(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def attend(inputs, cu_q, cu_k, **options):
    return ops.attention(
        inputs["q"], inputs["k"], inputs["v"], cu_seqlens_q=indices(cu_q), cu_seqlens_k=indices(cu_k),
        sink_N=inputs.get("sink"), return_lse=True, backend="triton", **options,
    )  # fmt: skip


def check(got, want, dtype, measure):
    """Every tensor of `got` is as close to the truth as its dtype allows."""
    *rms_allowed, largest_allowed = TOLERANCES[dtype]
    for name, tensor in got.items():
        truth = getattr(want, name)
        assert tensor.shape == truth.shape, name
        rms, largest = measure(tensor.cpu(), truth)
        top = abs(truth[abs(truth) < math.inf]).max(initial=1.0)
        allowed = rms_allowed[{"out": 0, "lse": 1, "block_max": 1}.get(name, 2)]
        assert rms <= allowed, f"{name}: relative RMS error {rms:.2e}"
        assert largest <= largest_allowed * top, f"{name}: largest error {largest:.2e} of {top:.2e}"


def compare(case, dtype, attention_truth, measure, make_packed):
    """Forward and gradients of a case of the grid."""
    lengths_q, lengths_k, shape, window, has_sink, _ = case
    lengths_k = lengths_k or lengths_q
    data = make_packed(lengths_q, lengths_k, shape, dtype, seed=1)
    d_out, sink = data.pop("d_out"), data.pop("sink")
    data |= {"sink": sink} if has_sink else {}
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    inputs = {name: x.requires_grad_() for name, x in on_device(data).items()}
    out, lse = attend(inputs, cu_q, cu_k, window=window)
    out.backward(d_out.to(DEVICE))
    want = attention_truth(
        data["q"], data["k"], data["v"],
        cu_q=cu_q, cu_k=cu_k, d_out=d_out, window=window, sink=data.get("sink"),
    )  # fmt: skip
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    got = {"out": out, "lse": lse} | {f"d_{name}": x.grad for name, x in inputs.items()}
    check(got, want, dtype, measure)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="here the tests run themselves")
def test_the_kernels_under_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--durations=5", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    counts = re.search(r"(\d+) passed(?:, (\d+) skipped)?", run.stdout)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert counts is not None
    # All but this test and the two that are about this process.
    assert int(counts[1]) >= len(GRID) + 12
    assert counts[2] == "3"


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="about machines that cannot run the kernels")
def test_without_a_device_the_backend_says_why_and_auto_takes_another(make_packed):
    data = make_packed([5], [5], (2, 1, 16, 16), torch.float32, seed=7)
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot run this call: it runs on CUDA"):
        attend(data, [0, 5], [0, 5])
    call = {"cu_seqlens_q": indices([0, 5]), "cu_seqlens_k": indices([0, 5]), "scale": 1.0}
    assert OP.choose("auto", data["q"], data["k"], data["v"], **call).name != "triton"


@pytest.mark.skipif(INTERPRETED, reason="compiles what is interpreted here")
def test_the_kernels_compile_for_hopper(monkeypatch, tmp_path):
    """The interpreter takes more than the compiler does, and the compiler needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sateen.ops.attention import triton_backward, triton_forward

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(
        "TRITON_DEFAULT_FP_FUSION", "1"
    )  # as it is by default; 3.9 warns that this will change
    indices = ("cu_q_ptr", "cu_k_ptr")
    sixteen = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "d_out_ptr", "d_q_ptr", "d_k_ptr", "d_v_ptr")
    shape = {"G": 4, "H": 40, "V": 32, "HAS_WINDOW": True, "BLOCK_H": 64, "BLOCK_V": 32}
    shape |= {"BLOCK_M": 64, "BLOCK_N": 64, "HAS_SINK": True}
    kernels = {
        triton_forward.forward_kernel: {"N": 8, "PIECES": 2, "IS_PART": False, "STEP": 64},
        triton_forward.merge_kernel: {"N": 8, "BLOCK_P": 8},
        triton_backward.query_gradient_kernel: {"N": 8},
        triton_backward.key_gradient_kernel: {"K": 2},
    }
    for kernel, constants in kernels.items():
        names = kernel.arg_names
        constants |= {name: value for name, value in shape.items() if name in names}
        types = {
            name: "constexpr" if name in constants
            else "fp32" if name == "scale"
            else "i32" if not name.endswith("_ptr")
            else "*i32" if name in indices
            else "*bf16" if name in sixteen
            else "*fp32"
            for name in names
        }  # fmt: skip
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=places)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert built.asm["cubin"]
        assert ("mma" in built.asm["ptx"]) == (kernel is not triton_forward.merge_kernel)  # tensor cores


@runs_here
@pytest.mark.parametrize("case", GRID)
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_gradients_match_the_oracle(case, small_tiles, attention_truth, measure, make_packed):
    small_tiles(GRID[case][-1])
    compare(GRID[case], torch.float32, attention_truth, measure, make_packed)


@runs_here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["group of three", "window of a tile", "decode in four parts"])
@pytest.mark.usefixtures("poisoned_memory")
def test_sixteen_bits(case, dtype, small_tiles, attention_truth, measure, make_packed):
    small_tiles(GRID[case][-1])
    compare(GRID[case], dtype, attention_truth, measure, make_packed)


@runs_here
@pytest.mark.usefixtures("poisoned_memory")
def test_the_tiles_of_the_table(attention_truth, measure, make_packed):
    case = ([150, 20], [150, 31], (2, 1, 64, 32), 100, True, 1)
    compare(case, torch.float32, attention_truth, measure, make_packed)
    compare(case, torch.float16, attention_truth, measure, make_packed)


@runs_here
# A tile, several tiles, less than a tile, no power of two, and blocks of more than one tile.
@pytest.mark.parametrize(("block", "window"), [(16, None), (64, 20), (5, 9), (24, None), (144, None)])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([35, 1, 0, 20], [35, 1, 0, 20]), ([2, 5], [40, 300])])
@pytest.mark.usefixtures("poisoned_memory", "small_tiles")
def test_tile_maxima(lengths_q, lengths_k, block, window, attention_truth, measure, make_packed):
    data = make_packed(lengths_q, lengths_k, (2, 1, 16, 16), torch.float32, seed=6)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    out, lse, maxima = attend(on_device(data), cu_q, cu_k, block_max=block, window=window)
    want = attention_truth(
        data["q"], data["k"], data["v"], cu_q=cu_q, cu_k=cu_k, sink=data["sink"], block=block, window=window
    )
    assert maxima.dtype == torch.float32
    check({"out": out, "lse": lse, "block_max": maxima}, want, torch.float32, measure)


@runs_here
@pytest.mark.usefixtures("small_tiles")
def test_rows_may_be_slices_of_larger_tensors(attention_truth, measure, make_packed):
    data = make_packed([40], [40], (2, 1, 16, 16), torch.float32, seed=8)
    data.pop("sink")
    want = attention_truth(data["q"], data["k"], data["v"], cu_q=[0, 40], cu_k=[0, 40], d_out=data["d_out"])
    fused = torch.cat([data["q"], data["k"], data["v"]], 1).to(DEVICE).requires_grad_()
    q, k, v = fused.split([2, 1, 1], 1)
    out, _ = attend({"q": q, "k": k, "v": v}, [0, 40], [0, 40])
    # A gradient whose channels are not contiguous.
    out.backward(data["d_out"].to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2))
    d_q, d_k, d_v = fused.grad.split([2, 1, 1], 1)
    check({"out": out, "d_q": d_q, "d_k": d_k, "d_v": d_v}, want, torch.float32, measure)


@runs_here
@pytest.mark.parametrize("parts", [1, 3])
def test_sinks_without_bounds(parts, small_tiles, make_packed):
    small_tiles(parts)
    data = on_device(make_packed([9, 4], [20, 4], (2, 1, 16, 16), torch.float32, seed=4))
    cu_q, cu_k, d_out = [0, 9, 13], [0, 20, 24], data.pop("d_out")
    sink = data.pop("sink")
    plain = {name: x.clone().requires_grad_() for name, x in data.items()}
    plain_out, plain_lse = attend(plain, cu_q, cu_k, window=5)
    plain_out.backward(d_out)
    for limit, factor in ((-math.inf, 1.0), (math.inf, 0.0)):
        inputs = {name: x.clone().requires_grad_() for name, x in data.items()}
        inputs["sink"] = torch.full_like(sink, limit).requires_grad_()
        out, lse = attend(inputs, cu_q, cu_k, window=5)
        torch.testing.assert_close(out, plain_out * factor, rtol=1e-6, atol=1e-6)
        assert lse.equal(plain_lse)  # the sink is not part of it
        out.backward(d_out)
        for name, x in plain.items():
            torch.testing.assert_close(inputs[name].grad, x.grad * factor, rtol=1e-5, atol=1e-6)
        assert inputs["sink"].grad.tolist() == [0.0, 0.0]


@runs_here
@pytest.mark.usefixtures("small_tiles")
def test_scale_and_large_scores(make_packed):
    # Scores of +-4000 overflow any exponential that is not taken relative to the row's largest.
    q = torch.tensor([1.0, -1.0]).repeat(8)[:, None, None].expand(16, 1, 16).contiguous().to(DEVICE)
    v = torch.arange(16.0, device=DEVICE)[:, None, None].expand(16, 1, 16).contiguous()
    out, lse = attend({"q": q, "k": q, "v": v}, [0, 16], [0, 16], scale=250.0)
    # Each query agrees with the earlier queries of its own sign alone.
    want = torch.tensor([float(t % 2 + t) / 2 for t in range(16)])
    torch.testing.assert_close(out[:, 0, 0].cpu(), want, rtol=1e-6, atol=1e-6)
    counts = torch.tensor([t // 2 + 1.0 for t in range(16)])
    torch.testing.assert_close(lse[0].cpu(), 4000.0 + counts.log(), rtol=1e-6, atol=0)


@runs_here
@pytest.mark.parametrize("parts", [1, 3])
def test_scores_far_below_zero(parts, small_tiles):
    # Relative to zero each exponential would vanish: absent parts must not count as scores of zero.
    small_tiles(parts)
    q, k = torch.ones(1, 1, 16, device=DEVICE), -torch.ones(40, 1, 16, device=DEVICE)
    v = torch.arange(40.0, device=DEVICE)[:, None, None].expand(40, 1, 16).contiguous()
    out, lse = attend({"q": q, "k": k, "v": v}, [0, 1], [0, 40], scale=20.0)
    torch.testing.assert_close(out.cpu(), torch.full((1, 1, 16), 19.5), rtol=1e-6, atol=0)
    assert lse.item() == pytest.approx(-320.0 + math.log(40), rel=1e-6)


@runs_here
def test_results_repeat_bit_by_bit_and_do_not_depend_on_neighbours(small_tiles, make_packed):
    small_tiles(1)
    data = on_device(make_packed([9, 37, 5], [9, 37, 5], (2, 1, 16, 16), torch.float32, seed=9))
    d_out = data.pop("d_out")

    def run(rows, cu):
        inputs = {name: x if name == "sink" else x[rows] for name, x in data.items()}
        inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out, _ = attend(inputs, cu, cu, window=30)
        out.backward(d_out[rows])
        return [out.detach(), *(x.grad for name, x in inputs.items() if name != "sink")]

    whole, again = run(slice(0, 51), [0, 9, 46, 51]), run(slice(0, 51), [0, 9, 46, 51])
    alone = run(slice(9, 46), [0, 37])
    for x, y, z in zip(whole, again, alone, strict=True):
        assert x.equal(y)
        assert x[9:46].equal(z)


@runs_here
@pytest.mark.parametrize(("has_sink", "window", "block_max"), [(True, 3, 0), (False, 0, 4)])
def test_the_compiler_may_keep_the_call_in_its_graph(has_sink, window, block_max, make_packed):
    from sateen.ops.attention.triton import triton_forward

    data = on_device(make_packed([4, 5], [4, 5], (2, 1, 16, 8), torch.float32, seed=11))
    q, k, v = (data[name].requires_grad_() for name in "qkv")
    sink = data["sink"].requires_grad_() if has_sink else None
    cu = indices([0, 4, 9])
    torch.library.opcheck(
        triton_forward, (q, k, v, cu, cu, sink, 0.25, window, block_max, 2 if block_max else 0)
    )


@runs_here
def test_auto_takes_triton_on_cuda_and_not_under_the_interpreter(make_packed):
    data = on_device(make_packed([5], [5], (2, 1, 16, 16), torch.float32, seed=7))
    call = {"cu_seqlens_q": indices([0, 5]), "cu_seqlens_k": indices([0, 5]), "scale": 1.0}
    chosen = OP.choose("auto", data["q"], data["k"], data["v"], **call).name
    assert (chosen == "triton") == (DEVICE == "cuda")
    assert (PRIORITY < 0) == (DEVICE == "cpu")
    with pytest.raises(BackendUnavailable, match=r"heads of up to 256 channels and these have 300 and 8"):
        attend(make_packed([5], [5], (2, 1, 300, 8), torch.float32, seed=7), [0, 5], [0, 5])
    with pytest.raises(BackendUnavailable, match=r"the tensors are torch\.float64"):
        attend({name: x.double() for name, x in data.items()}, [0, 5], [0, 5])


def test_the_environment_overrides_the_table(monkeypatch):
    def chosen(text, kernel):
        monkeypatch.setenv(VARIABLE, text)
        return tile(kernel, width=64, dtype=torch.bfloat16, capability=(9, 0))

    default = chosen("", "forward")
    assert chosen("decode=32,128,2,4 parts=3", "decode") == Tile(32, 128, 2, 4)
    assert chosen("decode=32,128,2,4 parts=3", "forward") == default
    for wrong in ("forward=24,64,4,2", "forwards=16,64,4,2", "forward=8,64,4,2", "parts=0", "x"):
        with pytest.raises(ConfigError, match=r"SATEEN_ATTENTION_TILES has '.*'; it takes KERNEL="):
            chosen(wrong, "forward")
