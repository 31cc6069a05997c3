"""Measurements as CSV files: one row each, written when it is measured."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hf_flashmask import __version__

ENVIRONMENT = ("gpu", "torch", "triton", "commit", "command")


class Refusal(ValueError):
    """What was asked for cannot be done; the message says why."""


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """
    Raises:
        Refusal: a name given is not among those known.
    """
    known = list(known)
    if unknown := [name for name in given if name not in known]:
        raise Refusal(f"{what} must be among {', '.join(known)}, got {', '.join(unknown)}")


def check_device(device: str) -> None:
    """
    Raises:
        Refusal: it is a CUDA device, and there is none.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise Refusal("there is no CUDA device; --device cpu takes the CPU")


def environment(device: torch.device | str, command: str = "", commit: str | None = None) -> dict[str, str]:
    """Where a measurement comes from, by the names of ``ENVIRONMENT``. On a CPU "gpu" is the processor."""
    cuda = torch.device(device).type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _commit() if commit is None else commit,
        "command": command,
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _commit() -> str:
    """The commit of the checkout that this file is in; the package's version where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return done.stdout.strip()


class Log:
    """A CSV file that rows are appended to; an interrupted run keeps what it has.

    Raises:
        Refusal: the file exists and holds other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, tuple(columns)
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as file:
                header = tuple(next(csv.reader(file), ()))
            if header != self._columns:
                raise Refusal(f"{path} has other columns than this run would write; give another file")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write([dict(zip(columns, columns, strict=True))])

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        self._write(rows)

    def _write(self, rows: Sequence[Mapping[str, object]]) -> None:
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerows(rows)


def failure(error: Exception) -> str:
    """An error as the note of a measurement: its type and message, on one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file.

    Raises:
        Refusal: there is no such file, or it holds none.
    """
    if not path.exists():
        raise Refusal(f"there is no {path}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise Refusal(f"{path} holds no measurements")
    return rows
