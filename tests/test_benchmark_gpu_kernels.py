"""`benchmarks/gpu_kernels.py` where there is no GPU, and what it needs to be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
def test_without_cuda_it_says_so_and_succeeds():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu_kernels.py")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "gpu_kernels needs a CUDA device and torch sees none: nothing was measured\n"
    assert done.stderr == ""


def test_a_bare_torch_is_enough_to_import_it():
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import gpu_kernels; "
        "print([m for m in ('pydantic', 'rich', 'safetensors', 'tokenizers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
