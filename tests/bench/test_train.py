"""``flashmask bench train`` on a CPU: every case and method computes the same, and what it shares is counted."""

import pytest

from hf_flashmask.bench import records, train, train_cases

pytest.importorskip("peft")
# FlexAttention has no backward on a CPU.
METHODS = ("sdpa", "flashmask", train.SHARED)


def setup(tmp_path, **changes):
    small = {"layers": 2, "hidden": 64, "heads": 4, "intermediate": 96, "vocab_size": 8192, "scale": 128, "steps": 1}
    options = {"methods": METHODS, "device": "cpu", "dtype": "float32", "out": tmp_path / "train.csv", **small}
    return train.Setup(**{**options, **changes})


def test_every_case_and_method(tmp_path):
    table = train.run(setup(tmp_path))
    rows = records.read(tmp_path / "train.csv")
    assert {(r["case"], r["method"]) for r in rows} == {
        (name, method)
        for name, case in train_cases.CASES.items()
        for method in METHODS
        if case.shares or method != train.SHARED
    }
    by_case = {}
    for row in rows:
        assert not row["note"]
        assert float(row["seconds"]) > 0
        assert float(row["grad_error"]) <= 1e-4
        by_case.setdefault(row["case"], []).append(float(row["loss"]))
        assert row["case"] in table
    for losses in by_case.values():
        assert max(losses) - min(losses) <= 1e-5
    # Rows of 32 + 4 tokens: (2 x 36) / (32 + 8), (6 x 36) / (32 + 24), (8 x 36) / (32 + 32).
    ratios = {r["case"]: float(r["token_ratio"]) for r in rows if r["method"] == train.SHARED}
    assert ratios["dpo_4k"] == pytest.approx(1.8)
    assert ratios["reward_4k"] == pytest.approx(27 / 7, abs=1e-3)
    assert ratios["grpo_4k"] == pytest.approx(4.5)


def test_wrong_gradients_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TOLERANCE", -1.0)
    train.run(setup(tmp_path, cases=("dpo_2k",)))
    for row in records.read(tmp_path / "train.csv"):
        assert row["note"].startswith("wrong: gradients differ")
        assert not row["seconds"]


def test_refusals_and_time_budget(tmp_path):
    with pytest.raises(records.Refusal, match="cases must be among dpo_2k"):
        setup(tmp_path, cases=("dpo",))
    with pytest.raises(records.Refusal, match="methods must be among sdpa"):
        setup(tmp_path, methods=("eager",))
    assert "left out: dpo_2k, sft_8k" in train.run(setup(tmp_path, cases=("dpo_2k", "sft_8k"), time_budget=0.0))
