"""Rows of host pools on their way to the device while layers go on computing.

An oracle knows its blocks before the layers that read them begin: its output projection and its MLP are still
to come. `Lane` uses that time. A thread gathers the rows in host memory and, on CUDA, copies them on a stream
of its own; the first layer that reads them waits. Source: HySparse (arXiv 2602.03560 §6) proposes prefetching
and gives no design; all of it is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Arrival(NamedTuple):
    """Rows on the device, and the CUDA event after which they are there; None where they are already."""

    tensors: list[Tensor]
    event: Any = None


class Coming:
    """Rows that were asked for."""

    def __init__(self, future: Future[Arrival]):
        self._future = future

    def wait(self) -> list[Tensor]:
        """The rows, one tensor per pool. The host waits for the gathering, only the device for the copy."""
        tensors, event = self._future.result()
        if event is not None:
            stream = torch.cuda.current_stream(tensors[0].device)
            stream.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(stream)
        return tensors


class Lane:
    """One thread, and on CUDA one stream, that bring rows to a device in the order they were asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sateen-prefetch")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._newest: Future[Arrival] | None = None

    def fetch(self, pools: Sequence[Tensor], rows_R: Tensor, dtype: torch.dtype) -> Coming:
        """Begins to bring these rows of host pools, in this dtype.

        Args:
            pools: tensors in host memory with a line per row. Nobody may write these rows before `drain`.
            rows_R: int64 row numbers on the host.
            dtype: of the rows on the device.
        """
        self._newest = self._worker.submit(self._bring, list(pools), rows_R, dtype)
        return Coming(self._newest)

    def drain(self) -> None:
        """Waits until the host has read every row that was asked for, so that pools may be written."""
        if self._newest is not None:
            self._newest.exception()  # whoever waits for the rows is told
            self._newest = None

    @torch.inference_mode()
    def _bring(self, pools: list[Tensor], rows_R: Tensor, dtype: torch.dtype) -> Arrival:
        near = [pool.index_select(0, rows_R) for pool in pools]
        if self._stream is None:
            return Arrival([rows.to(self.device, dtype) for rows in near])
        with torch.cuda.stream(self._stream):
            # Pinned memory comes back to its allocator only after the copies that were queued from it.
            there = [rows.pin_memory().to(self.device, non_blocking=True).to(dtype) for rows in near]
            event = torch.cuda.Event()
            event.record(self._stream)
        return Arrival(there, event)
