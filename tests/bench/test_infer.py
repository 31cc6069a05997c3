"""``flashmask bench infer`` on a CPU: every case but FlexAttention's, which compiles for a minute there."""

import pytest

from hf_flashmask.bench import infer, infer_attention, records
from hf_flashmask.cli import main

SMALL = (
    "bench", "infer", "--device", "cpu", "--backend", "torch", "--dtype", "float32", "--batches", "2", "--lengths",
    "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--layers", "1", "--hidden", "32", "--intermediate",
    "48", "--vocab-size", "100", "--prompt", "20", "--new-tokens", "3", "--prefill", "64", "--window", "16", "--steps",
    "1",
)  # fmt: skip


def test_every_case(tmp_path, capsys):
    out = tmp_path / "infer.csv"
    cases = [case for case in infer.CASES if case != "tree"]
    main([*SMALL, "--cases", *cases, "--out", str(out)])
    rows = records.read(out)
    assert {row["case"] for row in rows} == set(cases)
    printed = capsys.readouterr().out
    for row in rows:
        assert row["note"] == ""
        assert float(row["ms"]) > 0
        whole = row["case"] not in infer.ATTENTION
        assert float(row["error"]) < (1e-4 if whole else infer.TOLERANCE)
        assert bool(row["tokens_per_s"]) == whole
        assert bool(row["gb_per_s"]) != whole
        assert row["case"] in printed


def test_a_tree_sees_its_ancestors_and_bytes_are_of_what_is_seen():
    shape = (2, 40, 4, 2, 16, "cpu")
    tree = infer_attention.problem("tree", *shape)
    visible = tree.mask.to_dense()[0, 0]
    assert visible[:, :32].all()
    parents = [None, 0, 1, 1, 1, 0, 5, 5]
    for i, parent in enumerate(parents):
        ancestors = {i}
        while parent is not None:
            ancestors.add(parent)
            parent = parents[parent]
        assert set(visible[i, 32:].nonzero()[:, 0].tolist()) == ancestors
    padded = infer_attention.problem("decode_padded", *shape)
    assert padded.mask.visible_rows().sum((1, 2)).tolist() == [40, 20]
    assert padded.nbytes == 2 * 60 * 2 * 16 * 2
    assert infer_attention.problem("decode_static", *shape).nbytes == 2 * 40 * 2 * 16 * 2


def test_wrong_results_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "TOLERANCE", -1.0)
    main([*SMALL, "--cases", "decode", "--out", str(tmp_path / "infer.csv")])
    for row in records.read(tmp_path / "infer.csv"):
        assert row["note"].startswith("ArithmeticError: wrong: relative error")
        assert not row["ms"]


def test_refusals(tmp_path):
    out = ("--out", str(tmp_path / "infer.csv"))
    for arguments, message in ((("--cases", "encode"), "cases must be among decode"), (("--heads", "3"), "multiple")):
        with pytest.raises(SystemExit, match=message):
            main([*SMALL, *arguments, *out])
