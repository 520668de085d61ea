"""Kernels: one public function per operator, a plain reference and faster backends behind `backend=`."""

from sateen.ops.attention import attention, select_blocks
from sateen.ops.attention_and_blocks import attention_and_blocks
from sateen.ops.block_sparse_attention import block_sparse_attention
from sateen.ops.complex_matmul import (
    PackedPhase,
    PhaseWeight,
    complex_matmul,
    pack_phase,
    phase_quantize,
    unpack_phase,
)
from sateen.ops.grouped_matmul import grouped_matmul
from sateen.ops.int8_attention import (
    Int8Rows,
    int8_attention,
    int8_rows_attention,
    int8_sdpa,
    quantize_int8,
    quantize_rows,
)
from sateen.ops.lowbit_matmul import (
    PackedInt4,
    PackedInt8,
    lowbit_matmul,
    pack_int4,
    pack_int8,
    unpack_lowbit,
)

__all__ = [
    "Int8Rows",
    "PackedInt4",
    "PackedInt8",
    "PackedPhase",
    "PhaseWeight",
    "attention",
    "attention_and_blocks",
    "block_sparse_attention",
    "complex_matmul",
    "grouped_matmul",
    "int8_attention",
    "int8_rows_attention",
    "int8_sdpa",
    "lowbit_matmul",
    "pack_int4",
    "pack_int8",
    "pack_phase",
    "phase_quantize",
    "quantize_int8",
    "quantize_rows",
    "select_blocks",
    "unpack_lowbit",
    "unpack_phase",
]
