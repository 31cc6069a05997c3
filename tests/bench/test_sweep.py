"""``flashmask bench sweep`` on a CPU: rows, masks of every method, resuming, memory that runs out."""

import csv
import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hf_flashmask import masks
from hf_flashmask.bench import records, sweep, sweep_methods, sweep_tasks, train
from hf_flashmask.bench.distributions import Question
from hf_flashmask.cli import main

pytest.importorskip("peft")
SMALL = {"layers": 2, "hidden": 64, "heads": 4, "intermediate": 96, "vocab_size": 512, "device": "cpu", "steps": 1}
ROW = (Question(37, (11, 9)), Question(150, (30, 19)))


def setup(tmp_path, **changes):
    options = {"dtype": "float32", "lengths": (256, 384), "out": tmp_path / "sweep.csv", **SMALL}
    return sweep.Setup(**{**options, **changes})


def test_every_task_and_going_on(tmp_path, capsys):
    first = sweep.run(setup(tmp_path, lengths=(384,), tasks=("sft",), methods=("flash_varlen", "sdpa")))
    table = sweep.run(setup(tmp_path, lengths=(384,)))
    sweep.run(setup(tmp_path, tasks=("lora",)))
    rows = records.read(tmp_path / "sweep.csv")
    measured = {(r["task"], r["tokens"], r["method"]): r for r in rows if r["seconds"]}
    assert measured.keys() == {
        (task, n, method)
        for task, n in [*((task, "384") for task in sweep.TASKS), ("lora", "256")]
        for method in ("sdpa", "flashmask")
    }
    assert len({(r["task"], r["tokens"], r["method"]) for r in rows}) == len(rows)  # nothing twice
    for (task, tokens, method), row in measured.items():
        assert not row["note"]
        assert row["trained"] == ("lora" if task == "lora" else "all")
        assert float(row["tokens_per_s"]) == pytest.approx(int(tokens) / float(row["seconds"]), rel=1e-2)
        if method == "flashmask":
            assert row["reference"] == "sdpa"
            assert max(float(row["loss_error"]), float(row["grad_error"])) <= 1e-5
    refused = [r for r in rows if r["note"].startswith("refused")]
    assert {r["task"] for r in refused if r["method"] == "flash_varlen"} == set(sweep.TASKS)
    assert "share a question" in next(r["note"] for r in refused if r["task"] == "rm" and "varlen" in r["method"])
    assert first.count("sft 384") == 2
    assert table.count("rm 384") == 4  # two of them refused
    assert "about 0 s left" in capsys.readouterr().err
    sweep.run(setup(tmp_path, lengths=(384,)))
    assert records.read(tmp_path / "sweep.csv") == rows
    sweep.run(setup(tmp_path, tasks=("rm",), lengths=(256,), methods=("sdpa",), layers=1))
    assert len(records.read(tmp_path / "sweep.csv")) == len(rows) + 1  # another model is another sweep


def test_losses_by_rows_one_by_one():
    """The packed row's losses are those of every question with one answer as a row of its own."""
    row = sweep_tasks.PackedRow(ROW, 512, "cpu")
    shape = train.Setup(**{k: v for k, v in SMALL.items() if k != "steps"}, dtype="float32")
    model, other = (train.build_llama(shape).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    ids = row.input_ids[0]
    alone, at = [], 0
    for q in ROW:
        start, at = at, at + q.prompt
        for n in q.answers:
            alone.append((torch.cat((ids[start : start + q.prompt], ids[at : at + n])), n))
            at += n

    def log_probs(which, tokens, n):
        logits = which(tokens[None]).logits[0, -n - 1 : -1].log_softmax(-1)
        return logits.gather(1, tokens[-n:, None])

    def hidden(which):
        return which.model(
            input_ids=row.input_ids, position_ids=row.position_ids, **sweep_methods.METHODS["sdpa"].arguments(row)
        ).last_hidden_state

    with torch.no_grad():
        policy, base = ([log_probs(which, *row) for row in alone] for which in (model, other))
        ratio = torch.stack([(p - b).sum() for p, b in zip(policy, base, strict=True)]).view(-1, 2)
        dpo = -torch.nn.functional.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean()
        dpo = dpo - torch.cat(policy[::2]).mean()
        assert float(sweep_tasks.loss("dpo", row, hidden, model, other)) == pytest.approx(float(dpo), rel=1e-5)
        sft = -torch.cat(policy).mean()
        assert float(sweep_tasks.loss("sft", row, hidden, model, None)) == pytest.approx(float(sft), rel=1e-5)

    groups = tuple(Question(30 + i, tuple(range(5, 11))) for i in range(2))
    row = sweep_tasks.PackedRow(groups, 512, "cpu")
    reward = train.build_llama(shape, reward=True).eval()
    with torch.no_grad():
        states = hidden(reward)[0]
        ends = [i for i, n in enumerate(row.position_ids[0, 1:] <= row.position_ids[0, :-1]) if n]
        ends = [e for e in [*ends, row.tokens - 1] if e not in (29, row.tokens // 2 + 29)]
        score = reward.score(states[ends])[:, 0].view(2, 6)
        expected = -torch.nn.functional.logsigmoid(score[:, :1] - score[:, 1:]).mean()
        assert float(sweep_tasks.loss("rm", row, hidden, reward, None)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("size", [512, 640, 601])
def test_block_masks_are_those_of_torch(size):
    lengths = [[size // 4, 70, 61], [150, 3, 9], [size - size // 4 - 293]]
    ends = masks.share_question(lengths).bounds[0, 0, 0]
    ours = sweep_methods.block_mask(ends)
    theirs = create_block_mask(ours.mask_mod, None, None, size, size, device="cpu")
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for mine, other in (
        (ours.kv_num_blocks, theirs.kv_num_blocks),
        (ours.full_kv_num_blocks, theirs.full_kv_num_blocks),
        (ours.q_num_blocks, theirs.q_num_blocks),
        (ours.full_q_num_blocks, theirs.full_q_num_blocks),
    ):
        assert torch.equal(mine, other)


def test_every_method_attends_alike(monkeypatch):
    """What needs a GPU is replaced by the same arithmetic on a CPU; the masks and layouts stay."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert window_size == (-1, 0)
        assert max_q == max_k == int(cu_q.diff().max())
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(t[a:b].transpose(0, 1) for t in (q, k, v)), is_causal=True, scale=scale
            ).transpose(0, 1)
            for a, b in itertools.pairwise(cu_q)
        ]
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(sweep_methods, "_compiled_flex", lambda: flex_attention)
    sweep_methods.register()
    row = sweep_tasks.PackedRow((Question(100, (30,)), Question(110, (16,))), 512, "cpu")
    model = train.build_llama(train.Setup(**{k: v for k, v in SMALL.items() if k != "steps"}, dtype="float32"))
    found = {}
    for name, method in sweep_methods.METHODS.items():
        model.set_attn_implementation(method.implementation)
        with torch.no_grad():
            found[name] = model.model(
                input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, **method.arguments(row)
            ).last_hidden_state
    for name, hidden in found.items():
        assert torch.allclose(hidden, found["sdpa"], atol=1e-5), name
    assert sweep_methods.METHODS["flash_varlen"].refusal("sft", "cuda") is None


def test_rows_are_the_papers():
    for task, kind in sweep_tasks.TASKS.items():
        for tokens in (4096, 8192, 131072):
            row = sweep_tasks.questions(task, tokens)
            assert sum(q.total for q in row) == tokens
            assert 1 <= len(row) <= ({4096: 3, 8192: 4}.get(tokens, 10) if task == "rm" else 10)
            for q in row:
                assert len(q.answers) == kind.answers
                assert q.total >= kind.least_tokens
    dense = masks.share_question([[q.prompt, *q.answers] for q in ROW]).to_dense()
    assert sweep_tasks.visible_pairs(ROW) == int(dense.sum())


def test_memory_that_runs_out_and_wrong_results(tmp_path, monkeypatch):
    real = sweep._Trainee.backward

    def backward(self, row, method):
        if method == "sdpa" and row.tokens == 384:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        loss = real(self, row, method)
        return loss * (1.5 if method == "flashmask" and row.tokens == 512 else 1.0)

    monkeypatch.setattr(sweep._Trainee, "backward", backward)
    lengths, methods = (256, 384, 512, 640), ("sdpa", "flashmask")
    sweep.run(setup(tmp_path, tasks=("lora",), lengths=lengths, methods=methods))
    notes = {(r["tokens"], r["method"]): r["note"] for r in records.read(tmp_path / "sweep.csv")}
    assert notes[("384", "sdpa")] == "out of memory"
    assert notes[("384", "flashmask")] == notes[("512", "flashmask")] == ""  # nothing is left to compare with
    assert {n for n, m in notes if m == "sdpa"} == {"256", "384"}
    assert {n for n, m in notes if m == "flashmask"} == {"256", "384", "512", "640"}

    path = tmp_path / "sweep.csv"
    rows = [r for r in records.read(path) if r["method"] == "sdpa" and r["tokens"] == "256"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sweep.COLUMNS)
        writer.writeheader()
        writer.writerows([rows[0] | {"loss": str(float(rows[0]["loss"]) * 1.1)}])
    sweep.run(setup(tmp_path, tasks=("lora",), lengths=(256, 384), methods=("flashmask",)))
    wrong = records.read(path)[-1]
    assert wrong["note"].startswith("wrong: loss differs by 0.091")
    assert not wrong["seconds"]
    assert wrong["tokens"] == "256"  # and no longer row after it


def test_budget_and_refusals(tmp_path, capsys):
    out = ["--out", str(tmp_path / "sweep.csv")]
    main(["bench", "sweep", "--device", "cpu", "--tasks", "lora", "--lengths", "256", "--time-budget", "0", *out])
    assert "left out: lora 256 sdpa, lora 256 flex" in capsys.readouterr().out
    assert not (tmp_path / "sweep.csv").read_text().splitlines()[1:]
    sweep.run(setup(tmp_path, tasks=("lora",), methods=("sdpa",), step_limit=1e-6))
    assert [r["tokens"] for r in records.read(tmp_path / "sweep.csv")] == ["256"]
    with pytest.raises(records.Refusal, match="tasks must be among sft"):
        setup(tmp_path, tasks=("grpo",))
    with pytest.raises(records.Refusal, match="at least 128 tokens, got 64"):
        setup(tmp_path, lengths=(64, 256))
