"""Kernels: one public function per operator, a plain reference and faster backends behind `backend=`."""

from sateen.ops.attention import attention, select_blocks
from sateen.ops.grouped_matmul import grouped_matmul

__all__ = ["attention", "grouped_matmul", "select_blocks"]
