"""What arguments of all commands have in common: their types, and what is checked of them before anything runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def need(packages: Sequence[str], extra: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        sys.exit(
            f"flashmask: this command needs {', '.join(missing)}: pip install -c constraints.txt '.[{extra}]' "
            "in the clone of hf-flashmask"
        )


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What a command refuses to do ends it with the message."""
    from .records import Refusal

    try:
        yield
    except Refusal as error:
        sys.exit(f"flashmask: {error}")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not value > 0:  # as NaN is not
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text}")
    return value


def writable(path: Path, option: str = "--out") -> None:
    """End the command where a file that it will write, with the folders to it, could not be written."""
    folder = next(above for above in path.absolute().parents if above.exists())
    if path.is_dir():
        obstacle = "is a directory; give a file in it"
    elif not folder.is_dir():
        obstacle = f"cannot be written, as {folder} is a file"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        obstacle = "may not be written; give another file"
    else:
        return
    sys.exit(f"flashmask: {option} {path} {obstacle}")


def picture(path: Path, option: str = "--out") -> None:
    """The same of a picture, whose name's ending says of which kind it is."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        sys.exit(f"flashmask: {option} must end in what pictures end in, .png, .pdf or .svg say, got {path}")
    writable(path, option)


def mode(args: argparse.Namespace, modes: Mapping[str, Sequence[str]]) -> str:
    """Which of several things a command is asked to do.

    ``modes`` has what an argument that asks for one goes with; "" is what is done where none is given. Arguments that
    would be ignored are an error of usage.
    """
    chosen = next((name for name in modes if name and getattr(args, name) is not None), "")
    allowed = {chosen, *modes.get(chosen, ())}
    for owner, names in modes.items():
        for name in filter(None, (owner, *names)):
            if name not in allowed and getattr(args, name) is not None:
                how = f"does not go with {_option(chosen)}" if chosen else f"goes with {_option(owner)}"
                args.error(f"{_option(name)} {how}")
    return chosen


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
