"""``python -m hf_flashmask.coverage.upstream_trl CHECKOUT``: TRL's trainer tests under its attention and under ours.

CHECKOUT is a working tree of https://github.com/huggingface/trl, of which ``tests`` and ``scripts`` are used; the TRL
that is tested is the installed one. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import transformers

from . import report, standins
from .plugin import MODES, SHARED, STOCK

FILES = ("sft", "dpo", "reward", "kto", "grpo", "rloo")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_flashmask.coverage.upstream_trl", description=__doc__)
    parser.add_argument("checkout", type=Path, help="working tree of TRL")
    parser.add_argument("--trainers", nargs="+", choices=FILES, default=list(FILES), help="default all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="beside stock, default all")
    parser.add_argument("-k", dest="keyword", default="", help="pytest's -k, to run some of the tests")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a test (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("trl_tests.csv"), help="CSV to write (%(default)s)")
    parser.add_argument("--records", type=Path, help="folder for a record of every test; those there are not run again")
    given = parser.parse_args(arguments)
    if not (given.checkout / "tests").is_dir():
        parser.error(f"{given.checkout} has no tests: give a working tree of https://github.com/huggingface/trl")
    modes = dict.fromkeys((STOCK, *given.modes))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        records = given.records or folder / "records"
        records.mkdir(parents=True, exist_ok=True)
        wanted = [
            (mode, name, records / f"{mode}_{name}.jsonl")
            for name in given.trainers
            for mode in modes
            if not (mode == SHARED and name == "sft")  # which packs rows itself and has no patch
        ]
        missing = [run for run in wanted if not run[2].exists()]
        if missing:
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
            standins.build(given.checkout.resolve(), folder)
        for mode, name, out in missing:
            print(f"{name}: {mode}", file=sys.stderr, flush=True)
            test_file = given.checkout.resolve() / "tests" / f"test_{name}_trainer.py"
            run(test_file, mode, _part(out), folder, keyword=given.keyword, timeout=given.timeout)
            if not given.keyword:
                _part(out).rename(out)
        rows = report.compare({mode: _read(r for m, _, r in wanted if m == mode) for mode in modes})
    report.write(given.out, rows)
    print(report.table(rows))


def run(test_file: Path, mode: str, out: Path, folder: Path, *, keyword: str = "", timeout: float = 120.0) -> None:
    """One file of tests in a process of its own, whose working directory has the stand-ins.

    Raises:
        RuntimeError: pytest could not run it; failed tests are no error.
    """
    command = [sys.executable, "-m", "pytest", *pytest_arguments(test_file, mode, out.resolve())]
    command += ["-k", keyword, "--timeout", str(timeout)]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 5):  # passed, some failed, none selected
        raise RuntimeError(
            f"pytest of {test_file} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    out.touch()


def pytest_arguments(test_file: Path, mode: str, out: Path) -> list[str]:
    """Without the checkout's pytest configuration, which asks for plugins of its own."""
    return [
        "-q", "-p", "hf_flashmask.coverage.upstream_trl.plugin", "-p", "no:cacheprovider", "-p", "no:xdist",
        "-c", os.devnull, "--rootdir", str(test_file.parents[1]), "--tb", "short",
        "--judge", mode, "--judge-out", str(out), str(test_file),
    ]  # fmt: skip


def _part(records: Path) -> Path:
    """Where the records of a file are until all of its tests have one."""
    return records.with_suffix(".part")


def _read(files: Iterable[Path]) -> list[dict[str, Any]]:
    there = (file if file.exists() else _part(file) for file in files)
    return [json.loads(line) for file in there for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
