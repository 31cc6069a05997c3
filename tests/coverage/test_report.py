"""What a table says, and what it notices."""

import signal
import sys
import threading
import time

import pytest
import torch

from hf_flashmask import ColumnMask
from hf_flashmask.coverage import build, outcome, report, run
from hf_flashmask.coverage.outcome import Row


def row(**cells):
    made = Row("causal", "llama", **{"plain": "ok", "left": "ok", **cells})
    made.settle()
    return made


def test_status_is_what_the_cases_add_up_to():
    assert row().status == outcome.OK
    assert row(packed="n/a: takes no position_ids", static="leaks as eager: x").status == outcome.OK
    refused = row(plain="refused: it says why")
    assert (refused.status, refused.reason) == (outcome.REFUSED, "it says why")
    for cell in ("mismatch: off by 1", "error: TypeError"):
        assert row(left=cell).status == outcome.MISMATCH
        assert cell in row(left=cell).reason


def test_csv_holds_all_of_it(tmp_path):
    rows = [row(), row(left='mismatch: "quoted", with a comma')]
    report.write_csv(rows, tmp_path / "table.csv")
    assert report.read_csv(tmp_path / "table.csv") == rows


def test_a_lost_ok_is_noticed():
    assert report.lost([row()], [row()]) == []
    assert report.lost([row(left="n/a: x")], [row()]) == []
    assert report.lost([row()], []) == []  # not run this time
    assert "causal llama: was ok, now mismatch" in report.lost([row()], [row(left="mismatch: off by 1")])[0]
    assert report.lost([row()], [row(left="n/a: x")]) == ["causal llama, left: was ok, now n/a: x"]


def test_markdown_counts_and_shows_reasons():
    text = report.markdown([row(), row(plain="refused: it says | why")], "flashmask check --models")
    assert "| causal | 2 | 1 | 1 | 0 |" in text
    assert "it says \\| why" in text


def test_errors_are_told_from_refusals():
    assert outcome.sentence(ValueError("One thing. Another.")) == "One thing"
    with pytest.raises(KeyError) as caught:
        {}["none"]
    assert not outcome.ours(caught.value)
    with pytest.raises(ValueError) as caught:
        ColumnMask.from_dense(torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]]).bool().T.expand(1, 1, 8, 8))
    assert outcome.ours(caught.value)


def test_every_kind_has_types():
    for kind in build.KINDS:
        assert build.model_types(kind)
    assert {"llama", "gpt_oss", "gemma3_text"} <= set(build.model_types("causal"))


def test_a_hang_and_a_crash_cost_one_row(monkeypatch):
    monkeypatch.setattr(run, "COMMAND", (sys.executable, "-c", FAKE_WORKER))
    begin = time.monotonic()
    rows = run.run([("causal", name) for name in ("good", "hang", "crash", "good")], jobs=1, timeout=1.0)
    assert time.monotonic() - begin < 30
    assert [r.status for r in rows] == [outcome.OK, outcome.FAILED, outcome.FAILED, outcome.OK]
    assert "no result in 1 s" in rows[1].reason
    assert "code 3: last words" in rows[2].reason


def test_an_interrupt_begins_nothing_more(monkeypatch):
    monkeypatch.setattr(run, "COMMAND", (sys.executable, "-c", FAKE_WORKER))
    lines = []

    def interrupt(line):
        if not lines:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        lines.append(line)

    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        run.run([("causal", "slow")] * 50, jobs=1, progress=interrupt)
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=5)
    assert 1 <= len(lines) < 25


FAKE_WORKER = """
import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    kind, name = json.loads(line)
    if name == "hang":
        time.sleep(60)
    if name == "slow":
        time.sleep(0.05)
    if name == "crash":
        sys.stderr.write("last words")
        sys.exit(3)
    print(json.dumps({"kind": kind, "type": name, "status": "ok"}), flush=True)
"""
