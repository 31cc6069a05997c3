"""`flashmask bench convergence`, small and on the CPU: the whole path, its rows and masks, and how it judges."""

import csv
import os
from itertools import pairwise

import pytest
import torch

from hf_flashmask import masks
from hf_flashmask.bench import convergence
from hf_flashmask.bench.convergence import Run
from hf_flashmask.cli import main

SMALL = ("bench", "convergence", "--device", "cpu", "--layers", "1", "--hidden", "32", "--heads", "2")
SMALL = (*SMALL, "--intermediate", "64", "--row-len", "192", "--steps", "3", "--lr", "3e-3")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_from_the_command_to_the_picture(tmp_path, capsys, dtype):
    out, picture = tmp_path / "convergence.csv", tmp_path / "convergence.png"
    state = torch.get_rng_state()
    main([*SMALL, "--dtype", dtype, "--out", str(out), "--plot", str(picture), "--commit", "abc"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    captured = capsys.readouterr()
    curves, checksums = {}, {}
    for row in rows_of(out):
        curves.setdefault(row["method"], []).append(float(row["loss"]))
        checksums[row["method"]] = row["checksum"]
        assert (row["commit"], row["hidden"], row["dtype"]) == ("abc", "32", dtype)
        assert row["command"].startswith("flashmask bench convergence --device cpu")
    assert list(curves) == list(convergence.METHODS)
    assert all(len(losses) == 3 and losses[2] < losses[0] for losses in curves.values())
    for losses in curves.values():  # a document that sees its neighbours is farther off than this
        assert losses == pytest.approx(curves["sdpa"], abs={"bfloat16": 2e-4, "float32": 1e-5}[dtype])
    assert curves["flashmask"] == curves["flashmask again"]
    assert checksums["flashmask"] == checksums["flashmask again"]
    assert "flashmask twice: bit-identical: 3 losses and, after the last step, all 12 parameter tensors" in captured.out
    assert f"within {dtype} noise" in captured.out
    assert "[sdpa math, 3/3" in captured.err
    assert picture.stat().st_size > 10_000

    main(["bench", "plot", str(out), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").stat().st_size > 10_000


def test_time_budget_and_refusals(tmp_path, capsys):
    out = ("--out", str(tmp_path / "convergence.csv"))
    main([*SMALL, *out, "--time-budget", "0"])
    assert "flashmask left out: out of time" in capsys.readouterr().out
    for arguments, message in (
        (("--heads", "3"), "hidden must be an even multiple"),
        (("--row-len", "1000000"), "rows of 1000000 are too long"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*SMALL, *out, *arguments])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            main([*SMALL, *out, "--device", "cuda"])


def test_rows_are_documents_end_to_end():
    documents = [list(range(10 * i, 10 * i + n)) for i, n in enumerate((5, 1, 9, 3, 4), 1)]
    rows = convergence.pack(documents, 7)
    assert len(rows) == 3  # and one token that fills no row
    assert torch.cat([row.input_ids[0] for row in rows]).tolist() == [t for d in documents for t in d][:21]
    assert [row.position_ids[0].tolist() for row in rows] == [
        [0, 1, 2, 3, 4, 0, 0],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 0, 1, 2, 0, 1, 2],
    ]
    for row in rows:
        first = row.position_ids == 0
        assert torch.equal(row.labels == -100, first)
        assert torch.equal(row.labels[~first], row.input_ids[~first])
        dense = convergence.dense_mask(row.documents, torch.bfloat16)
        starts = [*first[0].nonzero()[:, 0].tolist(), 7]
        expected = masks.causal_document(lengths=[b - a for a, b in pairwise(starts)]).to_dense()
        assert torch.equal(dense == 0, expected)
        assert (dense[~expected] == torch.finfo(torch.bfloat16).min).all()


def runs(**shifts):
    names = {name.replace(" ", "_"): name for name in convergence.METHODS}
    return {names[key]: Run((7.0, 6.0 + shift), {"a": "0", "b": "1"}, 2) for key, shift in shifts.items()}


def test_verdict():
    def lines(**shifts):
        return "\n".join(convergence.verdict(runs(sdpa=0.0, **shifts), "bfloat16"))

    good = lines(flashmask=0.03, flashmask_again=0.03, eager=0.02)
    assert "flashmask - sdpa: 3.00e-02" in good
    assert "eager - sdpa: 2.00e-02" in good
    assert "flashmask is within bfloat16 noise: 1.50 times" in good
    assert "flashmask twice: bit-identical: 2 losses and, after the last step, all 2 parameter tensors" in good
    # The spread is also that between two references.
    assert "is within bfloat16 noise: 1.50 times" in lines(flashmask=0.06, eager=0.02, sdpa_math=-0.02)
    assert "is NOT within bfloat16 noise: 2.50 times" in lines(flashmask=0.05, eager=0.02)
    assert "is NOT within bfloat16 noise" in lines(flashmask=float("nan"), eager=0.02)
    assert "is NOT within bfloat16 noise" in lines(flashmask=0.01, eager=float("nan"))
    assert "NOT bit-identical: 1 of 2 losses and 0 of 2" in lines(flashmask=0.01, flashmask_again=0.011)
    assert "noise" not in lines(flashmask=0.01)  # nothing to judge by
    twice = runs(flashmask=0.0, flashmask_again=0.0)
    twice["flashmask again"] = Run((7.0, 6.0), {"a": "0", "b": "2"}, 2)
    assert "NOT bit-identical: 0 of 2 losses and 1 of 2 parameter" in convergence.verdict(twice, "bfloat16")[0]


def test_hashes_are_of_all_bytes():
    model = torch.nn.Linear(3, 2).bfloat16()
    before = convergence.hashes(model)
    assert before == convergence.hashes(model)
    with torch.no_grad():
        model.weight[1, 2] *= 1.01
    after = convergence.hashes(model)
    assert [name for name in before if before[name] != after[name]] == ["weight"]


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_deterministic_only_inside(monkeypatch, workspace):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    if workspace is not None:
        monkeypatch.setenv(name, workspace)

    def fail():
        with convergence.reproducible("cpu"):
            assert os.environ[name] == (workspace or ":4096:8")
            assert torch.are_deterministic_algorithms_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.environ.get(name) == workspace
    assert not torch.are_deterministic_algorithms_enabled()
