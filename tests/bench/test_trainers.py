"""`flashmask bench trainers`, small: all tasks, the CSV and the picture."""

import csv

import pytest

from hf_flashmask.bench import trainers
from hf_flashmask.cli import main

pytest.importorskip("trl")

SMALL = ("bench", "trainers", "--layers", "1", "--hidden", "32", "--heads", "2", "--steps", "3", "--batch-size", "2")


@pytest.fixture(autouse=True)
def _little_data(monkeypatch):
    few = trainers.texts()[:40], trainers.preferences()[:6]
    monkeypatch.setattr(trainers, "texts", lambda: few[0])
    monkeypatch.setattr(trainers, "preferences", lambda: few[1])


def test_from_the_command_to_the_picture(tmp_path, capsys):
    out, picture = tmp_path / "trainers.csv", tmp_path / "trainers.png"
    main([*SMALL, "--out", str(out), "--plot", str(picture), "--commit", "abc"])
    printed = capsys.readouterr().out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["commit"], row["steps"], row["hidden"]) for row in rows} == {("abc", "3", "32")}
    for task in ("sft", "lora", "dpo", "reward"):
        losses, checksums = {}, {}
        for row in rows:
            if row["task"] == task:
                losses.setdefault(row["method"], []).append(float(row["loss"]))
                checksums[row["method"]] = row["checksum"]
        assert [len(values) for values in losses.values()] == [3, 3, 3]
        assert len(set(losses["sdpa"])) >= 2
        assert losses["flashmask"] == pytest.approx(losses["sdpa"], abs=1e-5)
        assert losses["flashmask"] == losses["flashmask again"]
        assert checksums["flashmask"] == checksums["flashmask again"]
        # Rounding differs, so these are other runs.
        assert checksums["flashmask"] != checksums["sdpa"]
        (line,) = [line for line in printed.splitlines() if line.startswith(task + " ")]
        assert line.endswith("bit-identical")
    assert picture.stat().st_size > 20_000


def test_refusals(tmp_path, capsys):
    out = ("--out", str(tmp_path / "x.csv"))
    with pytest.raises(SystemExit, match="tasks must be among sft, lora, dpo, reward, got ppo"):
        main([*SMALL, *out, "--tasks", "ppo"])
    main([*SMALL, *out, "--time-budget", "0"])
    assert "left out: sft, lora, dpo, reward" in capsys.readouterr().out
