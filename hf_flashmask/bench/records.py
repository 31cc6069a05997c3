"""Measurements as CSV files: one row each, written when it is measured."""

from __future__ import annotations

import contextlib
import csv
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
        Refusal: the file holds other columns, or cannot be read or written.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, tuple(columns)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+", newline="", encoding="utf-8") as file:
                file.seek(0)
                header = tuple(next(csv.reader(file), ()))
        except _UNREADABLE as error:
            raise Refusal(f"rows cannot be appended to {path}: {failure(error)}; give another file") from error
        if not header:
            self._write([dict(zip(columns, columns, strict=True))])
        elif header != self._columns:
            raise Refusal(f"{path} has other columns than this run would write; give another file")

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        self._write(rows)

    def _write(self, rows: Sequence[Mapping[str, object]]) -> None:
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerows(rows)


# What files raise that are folders, not ours to use, or no text.
_UNREADABLE = (OSError, UnicodeDecodeError, csv.Error)


def failure(error: Exception) -> str:
    """An error as the note of a measurement: its type and message, on one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file.

    Raises:
        Refusal: there is no such file, it is no CSV file, or it holds no rows.
    """
    if not path.exists():
        raise Refusal(f"there is no {path}")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: list[Any] = list(csv.DictReader(file))
    except _UNREADABLE as error:
        raise Refusal(f"{path} cannot be read as CSV: {failure(error)}") from error
    if not rows:
        raise Refusal(f"{path} holds no measurements")
    # Cells beyond the header are under None; those that a line lacks are None.
    if uneven := [i for i, row in enumerate(rows) if None in row or None in row.values()]:
        raise Refusal(f"{path} cannot be read as CSV: row {uneven[0] + 1} does not have the cells of the header")
    return rows


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """What the rows of a file lack, or hold instead of what a benchmark writes, is said of the file."""
    try:
        yield
    except Refusal:
        raise
    except KeyError as error:
        raise Refusal(f"{path} comes from no benchmark that this command knows: it lacks {error}") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise Refusal(f"{path} holds what no benchmark writes: {failure(error)}") from error
