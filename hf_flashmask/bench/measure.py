"""Peak memory, fresh processes and tables."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


class PeakMemory:
    """Growth of peak memory inside a ``with`` block, in bytes: GPU memory with CUDA, resident memory on Linux.

    ``growth`` is None where neither can be read (resident peaks need Linux's /proc).
    """

    def __init__(self) -> None:
        self.growth: int | None = None

    def __enter__(self) -> PeakMemory:
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            reset = Path("/proc/self/clear_refs")
            if reset.exists():
                reset.write_text("5")  # resets VmHWM to the present
            self._before = _proc_status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            peak: int | None = torch.cuda.max_memory_allocated()
        else:
            peak = _proc_status("VmHWM")
        if peak is not None and self._before is not None:
            self.growth = peak - self._before


def _proc_status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """Run in a new Python process, so that one method's leftovers are not another's baseline."""
    context = multiprocessing.get_context("spawn")
    # SIG_DFL: an interrupt ends it without a traceback, as it ends the command.
    with ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        return pool.submit(function, *args).result()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def mib(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:,.0f} MiB"
