"""Time on a device: CUDA events after a flush of the L2 cache, or the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
HEAD_START_CYCLES = 20_000_000  # about 10 ms, more than the host needs to launch the kernels that follow


class Clock:
    """Times functions in ms. On a GPU the host runs ahead, so launching is not in the times.

    Args:
        device: "cuda" or "cpu".
        budget_ms: what the runs of one call of ``samples`` should take together.
    """

    def __init__(self, device: torch.device | str, budget_ms: float = 60.0) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._budget_ms = budget_ms
        self._flush = torch.empty(FLUSH_BYTES if self._cuda else 0, dtype=torch.int8, device=device)

    def samples(
        self, function: Callable[[], Any], before: Callable[[], Any] | None = None, least: int = 3, most: int = 20
    ) -> list[float]:
        """A warm-up, then as many runs as the budget allows; ``before`` runs before each and is not timed."""
        estimate = self._run(function, 1, before)[0]
        return self._run(function, max(least, min(most, int(self._budget_ms / max(estimate, 1e-3)))), before)

    def preparation(self, function: Callable[[], Any], repeats: int = 7) -> tuple[float, float]:
        """Medians of the device's time and of the time that the host is held up, after two warm-ups."""
        for _ in range(2):
            function()
        host = []
        for _ in range(repeats):
            self.synchronize()
            begin = time.perf_counter()
            function()
            host.append((time.perf_counter() - begin) * 1e3)
        device = self._run(function, repeats, self._head_start) if self._cuda else host
        return statistics.median(device), statistics.median(host)

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    @staticmethod
    def _head_start() -> None:
        torch.cuda._sleep(HEAD_START_CYCLES)

    def _run(self, function: Callable[[], Any], runs: int, before: Callable[[], Any] | None = None) -> list[float]:
        if not self._cuda:
            times = []
            for _ in range(runs):
                if before is not None:
                    before()
                begin = time.perf_counter()
                function()
                times.append((time.perf_counter() - begin) * 1e3)
            return times
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin_event, end_event in events:
            if before is not None:
                before()
            self._flush.zero_()
            begin_event.record()
            function()
            end_event.record()
        self.synchronize()
        return [begin_event.elapsed_time(end_event) for begin_event, end_event in events]
