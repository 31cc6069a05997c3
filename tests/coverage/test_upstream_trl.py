"""TRL's tests as a judge: a checkout of one file, run with stock attention and with ours."""

import json
import textwrap

import pytest
import torch

pytest.importorskip("trl")
from transformers import AttentionInterface, AutoTokenizer, PreTrainedModel, Trainer
from trl import DPOConfig, DPOTrainer

from hf_flashmask.coverage.upstream_trl import report, standins
from hf_flashmask.coverage.upstream_trl.__main__ import _read, main, pytest_arguments

pytest_plugins = "pytester"

SCRIPT = """
from datasets import Dataset

def main(test_size, push_to_hub, repo_id):
    columns = {"prompt": "Which of the words is", "chosen": " this one", "rejected": " that"}
    rows = [{name: f"{text} {i}" for name, text in columns.items()} for i in range(10)]
    Dataset.from_list(rows).train_test_split(test_size, shuffle=False).push_to_hub(repo_id, config_name="preference")
"""
TESTS = """
import pytest
import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from trl.import_utils import is_lost_available
from trl.trainer.utils import lost

MODEL = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"

class TestDPO:
    @pytest.mark.parametrize("steps", [2])
    def test_train(self, steps, tmp_path):
        data = load_dataset("trl-internal-testing/zen", "preference", split="train", streaming=True)
        args = DPOConfig(str(tmp_path), max_steps=steps, report_to="none", use_cpu=True, per_device_train_batch_size=2,
                         gradient_accumulation_steps=2)
        trainer = DPOTrainer(MODEL, args=args, train_dataset=data)
        before = trainer.model.lm_head.weight.clone()
        trainer.train()
        assert (trainer.model.lm_head.weight != before).any()

def test_attention_by_name():
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"

def test_lost():
    assert not is_lost_available()
    lost(1)

@pytest.mark.parametrize("model", ["trl-internal-testing/tiny-XForConditionalGeneration"])
def test_image(model):
    raise AssertionError
"""


def test_a_checkout(pytester, monkeypatch):
    checkout, folder = pytester.path / "trl", pytester.path / "standins"
    for path, text in {
        "tests/test_dpo_trainer.py": TESTS,
        **dict.fromkeys(map(_script, standins.DATASETS), SCRIPT),
    }.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(textwrap.dedent(text))
    name = "tiny-Qwen2ForCausalLM-2.5"
    monkeypatch.setattr(standins, "MODELS", {name: standins.MODELS[name]})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    standins.build(checkout, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / standins.OWNER / name)
    assert len(tokenizer) > standins.VOCABULARY
    assert max(tokenizer("this one").input_ids) < 2048
    assert tokenizer.decode([standins.VOCABULARY - 1]) == f" #{standins.VOCABULARY - 1}"  # what a model may draw
    monkeypatch.chdir(folder)

    before = _touched()
    records = {}
    for mode in ("stock", "shared"):
        out = pytester.path / f"{mode}.jsonl"
        if records:  # as if interrupted after one test, which is not run again
            (done,) = (record for record in records["stock"] if "test_lost" in record["test"])
            out.write_text(json.dumps(done) + "\n")
        pytester.runpytest_inprocess(*pytest_arguments(checkout / "tests" / "test_dpo_trainer.py", mode, out))
        assert _touched() == before
        records[mode] = _read([out])
    rows = {row.test.split("::")[-1]: row for row in report.compare(records)}
    assert [len(done) for done in records.values()] == [4, 4]
    assert len(rows) == 4
    row = rows["test_train[2]"]
    assert (row.stock, row.ours, row.shared) == ("passed", "passed", True), row
    assert row.calls == 2 * 2 * 2 * 3  # steps; micro-batches; layers; the policy, its recomputation and the reference
    assert 0 <= row.first_difference <= row.largest_difference < 1e-5
    assert [len(record["losses"]) for record in records["stock"] if "test_train" in record["test"]] == [2]
    assert (rows["test_attention_by_name"].stock, rows["test_attention_by_name"].ours) == ("passed", "failed")
    for skipped, why in (("test_lost", "has no trl.trainer.utils.lost"), ("test_image[", "ForConditionalGeneration")):
        (row,) = (row for test, row in rows.items() if test.startswith(skipped))
        assert row.stock == row.ours == "skipped"
        assert why in row.message
    line = report.table(list(rows.values())).splitlines()[-1].split()
    assert line[:9] == ["test_dpo_trainer.py", "shared", "4", "2", "1", "0", "1", "1", "1"]
    assert line[-1] == "1/1"


def _script(name):
    return f"scripts/generate_{name}_dataset.py"


def _touched():
    forward = AttentionInterface._global_mapping["flashmask"]
    functions = PreTrainedModel.get_correct_attn_implementation, Trainer.training_step, DPOTrainer.__init__
    return forward, functions, DPOConfig.__init__


def test_outcomes_are_compared():
    def record(outcome="passed", message="", losses=(), **other):
        return {"test": "f.py::t", "outcome": outcome, "message": message, "losses": losses, "shared": False, **other}

    def row(stock, ours):
        (only,) = report.compare({"stock": [stock], "attention": [ours]})
        return only

    refusal = record("failed", "NotImplementedError: padding_free=True: no")
    assert row(record(), refusal).ours == "refused"
    assert row(record(), record("failed", "padding")).ours == "failed"
    assert row(record(losses=[1.0, 4.0]), record(losses=[1.0, 5.0])).largest_difference == 0.25
    assert row(record(losses=[1.0]), record(losses=[1.0, 1.0])).first_difference == torch.inf
    nan = float("nan")
    assert row(record(losses=[1.0, nan]), record(losses=[1.0, nan])).largest_difference == 0
    assert row(record(losses=[nan]), record(losses=[1.0])).first_difference == torch.inf
    assert "  1.0e+00" in report.table([row(record(losses=[0.0]), record(losses=[1.0]))])
    with pytest.raises(KeyError):
        report.compare({"stock": [], "attention": [record()]})


def test_no_checkout(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "working tree of https://github.com/huggingface/trl" in capsys.readouterr().err
