"""``flashmask check --transformers-tests CHECKOUT``: Transformers' own tests with flashmask in sdpa's place.

The same tests run twice in the checkout, on stock sdpa and with flashmask registered as "sdpa"; what differs is told
apart by why. Tests that need the Hub fail alike in both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PASSED, FAILED, REFUSED, SKIPPED = "passed", "failed", "refused", "skipped"
# A test with several outcomes, of its setup and subtests, has the worst of them.
_WORST_FIRST = (FAILED, REFUSED, PASSED, SKIPPED)
PLUGIN = "hf_flashmask.coverage.upstream_plugin"


@dataclass(frozen=True)
class Outcome:
    status: str  # one of _WORST_FIRST
    reason: str = ""
    reached: bool = False  # whether it called flashmask's attention


Outcomes = Mapping[str, Outcome]  # by the test's node id


def run(checkout: Path, arguments: Sequence[str], progress: Callable[[str], None]) -> tuple[Outcomes, Outcomes]:
    """Outcomes on stock sdpa and on flashmask.

    Args:
        checkout: of Transformers, at the tag of the release to judge; its ``conftest.py`` imports the library from it.
        arguments: for pytest, paths relative to the checkout.

    Raises:
        FileNotFoundError: ``checkout`` is not one.
        RuntimeError: pytest could not run the tests.
    """
    if not (checkout / "tests" / "test_modeling_common.py").exists():
        raise FileNotFoundError(f"{checkout} is no checkout of Transformers: it has no tests/test_modeling_common.py")
    stock = _pytest(checkout, arguments, as_sdpa=False)
    progress(f"stock sdpa: {_counts(stock.values())}")
    ours = _pytest(checkout, arguments, as_sdpa=True)
    progress(f"flashmask: {_counts(ours.values())}")
    return stock, ours


def _pytest(checkout: Path, arguments: Sequence[str], as_sdpa: bool) -> Outcomes:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "outcomes.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider", "-o", "log_cli=false"]
        command += [f"--flashmask-outcomes={log}", *(["--flashmask-as-sdpa"] if as_sdpa else []), *arguments]
        environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        # 1: some tests failed, which is for us to judge.
        if done.returncode not in (0, 1) or not log.exists():
            raise RuntimeError(
                f"pytest ended with {done.returncode} in {checkout}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return read(log)


def read(log: Path) -> Outcomes:
    """Outcomes from the file that the plugin wrote."""
    found: dict[str, Outcome] = {}
    for text in log.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        outcome = Outcome(REFUSED if line["refused"] else line["outcome"], line["reason"], line["reached"])
        known = found.get(line["test"], outcome)
        worst = min(known, outcome, key=lambda o: _WORST_FIRST.index(o.status))
        found[line["test"]] = replace(worst, reached=known.reached or outcome.reached)
    return found


def _counts(outcomes: Iterable[Outcome]) -> str:
    counts = Counter(outcome.status for outcome in outcomes)
    return ", ".join(f"{counts[status]} {status}" for status in (PASSED, REFUSED, FAILED, SKIPPED) if counts[status])


def losses(stock: Outcomes, ours: Outcomes) -> dict[str, Outcome]:
    """Tests that pass on stock sdpa and do not on flashmask; those that did not run count as failed."""
    lost = {}
    for test, outcome in stock.items():
        now = ours.get(test, Outcome(FAILED, "did not run"))
        if outcome.status == PASSED and now.status != PASSED:
            lost[test] = now
    return lost


def markdown(stock: Outcomes, ours: Outcomes, command: str, versions: str) -> str:
    """The table of test files, and what differs with its reasons."""
    lines = [
        "# Transformers' own tests",
        "",
        f"Made by `{command}` with {versions}. The tests ran twice, on stock sdpa and with flashmask",
        'registered under the name "sdpa". **refused**: flashmask raised an error that says why. Tests that do not',
        "call flashmask's attention look at something else, ask for eager attention, or are of models without sdpa.",
        "",
        "| tests | pass on sdpa | pass on flashmask | of these call it | refused | other |",
        "|---|---|---|---|---|---|",
    ]
    lost = losses(stock, ours)
    for name in dict.fromkeys(_file(test) for test in stock):
        passed = [test for test, outcome in stock.items() if _file(test) == name and outcome.status == PASSED]
        kept = [test for test in passed if test not in lost]
        reached = sum(ours[test].reached for test in kept)
        refused = sum(lost[test].status == REFUSED for test in passed if test in lost)
        cells = (len(passed), len(kept), reached, refused, len(passed) - len(kept) - refused)
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for test, outcome in lost.items():
        by_reason[outcome.status, outcome.reason].append(test)
    lines += ["", "## What passes on sdpa alone", ""]
    for (status, reason), tests in sorted(by_reason.items(), key=lambda item: (item[0][0] != FAILED, -len(item[1]))):
        names = sorted({test.rpartition("::")[2].partition("[")[0] for test in tests})
        shown = ", ".join(f"`{name}`" for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"- {len(tests)} {status}: {_escape(reason)} ({shown})")
    gained = [test for test, o in ours.items() if o.status == PASSED and stock.get(test, o).status in (FAILED, REFUSED)]
    if gained:
        lines += ["", "## What passes on flashmask alone", "", *(f"- `{test}`" for test in sorted(gained))]
    both = sorted({o.reason for test, o in stock.items() if o.status == FAILED and ours.get(test, o).status != PASSED})
    if both:
        lines += ["", "## What fails on both", "", *(f"- {_escape(reason)}" for reason in both)]
    return "\n".join(lines) + "\n"


def _file(test: str) -> str:
    return test.partition("::")[0]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
