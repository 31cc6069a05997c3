"""All types, in processes of their own: a crash or a hang costs one row, never the run."""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import IO, Any

from .outcome import FAILED, Row

COMMAND = (sys.executable, "-m", "hf_flashmask.coverage.worker")
START_SECONDS = 300.0


class _Worker:
    """A worker process, started when it is needed and after each failure."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def check(self, kind: str, model_type: str) -> Row:
        try:
            if self._process is None:
                self._start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            process.stdin.write(json.dumps([kind, model_type]) + "\n")
            process.stdin.flush()
            return Row(**json.loads(self._line(self._timeout)))
        except _Lost as lost:
            reason = f"{lost}: {self._last_words()}".rstrip(": ")
            self.stop()
            return Row(kind, model_type, FAILED, reason)

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        self._line(START_SECONDS)

    def _line(self, timeout: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise _Lost(f"no result in {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise _Lost(f"the process ended with code {self._process.wait()}")
        return line

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1][:200] if lines else ""

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None


class _Lost(Exception):
    """The worker ended or did not answer in time."""


def run(
    wanted: Iterable[tuple[str, str]],
    *,
    jobs: int = 1,
    timeout: float = 120.0,
    progress: Callable[[str], Any] | None = None,
) -> list[Row]:
    """Rows in the order of ``wanted``, (kind, model type) each.

    Args:
        timeout: seconds for one type.
        progress: called with a line after every type.
    """
    todo = list(wanted)
    rows: list[Row | None] = [None] * len(todo)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(len(todo)):
        waiting.put(i)
    done = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal done
        worker = _Worker(timeout)
        try:
            while True:
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    return
                begin = time.monotonic()
                rows[i] = row = worker.check(*todo[i])
                with lock:
                    done += 1
                    if progress is not None:
                        seconds = time.monotonic() - begin
                        note = f"{row.status}: {row.reason}".rstrip(": ")
                        progress(f"{done}/{len(todo)} {row.kind} {row.type} ({seconds:.1f} s) {note}")
        finally:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(min(jobs, len(todo)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        # Python waits for the threads, so they are to begin nothing more.
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        raise
    return [row if row is not None else Row(*todo[i], FAILED, "its worker failed") for i, row in enumerate(rows)]
