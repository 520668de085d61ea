"""Peak memory of `ops.attention`, forward and backward, beyond its inputs: linear in the number of tokens."""

import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable

T = 512  # the smaller of two lengths; the other is four times as long


def peak_bytes(backend: str, length: int, window: int | None) -> int:
    """Most bytes that torch held at once, above what it held before the call."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, heads, 16, generator=generator) for heads in (4, 2, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    sink = torch.zeros(4, requires_grad=True)
    cu = torch.tensor([0, length], dtype=torch.int32)
    d_out = torch.randn(length, 4, 16, generator=generator)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        out = ops.attention(*inputs, cu_seqlens_q=cu, window=window, sink_N=sink, backend=backend)
        out.backward(d_out)
    results = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_fast_backends_need_memory_linear_in_tokens(backend, window):
    try:
        short = peak_bytes(backend, T, window)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert short > T * 4 * 16 * 4  # the output at least: something was measured
    assert peak_bytes(backend, 4 * T, window) < 4.5 * short


def test_the_reference_needs_the_square():
    """The measure sees what grows with the square of the length."""
    assert peak_bytes("reference", 4 * T, None) > 12 * peak_bytes("reference", T, None)
