"""Runs of TRL's trainers on tiny models, and what two runs must have in common."""

import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

QUIET = {
    "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}  # fmt: skip


def words_tokenizer():
    """<pad> <bos> <eos> <unk>, then w0 to w89."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{i}" for i in range(90)])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def words(rng, low, high):
    return "".join(f"w{rng.randrange(90)} " for _ in range(rng.randrange(low, high)))


def preferences(n=6, pairs=1):
    """Prompts of 6 to 19 words with ``pairs`` chosen and rejected answers of 2 to 8."""
    rng = random.Random(0)
    prompts = [words(rng, 6, 20) for _ in range(n)]
    return Dataset.from_list(
        [{"prompt": p, "chosen": words(rng, 2, 9), "rejected": words(rng, 2, 9)} for p in prompts for _ in range(pairs)]
    )


def step(trainer, model):
    """Loss, gradients and metrics of the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [loss.detach()], [grads], [{name: values[-1] for name, values in trainer._metrics["train"].items()}]


class _Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def train(trainer, **options):
    """Losses of all micro-batches, gradients of all optimizer steps, metrics of all logs."""
    losses, gradients, compute_loss = [], _Gradients(), trainer.compute_loss

    def recorded(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.append(loss.detach())
        return loss

    trainer.compute_loss = recorded
    trainer.add_callback(gradients)
    trainer.train(**options)
    timings = ("runtime", "per_second", "step_time")
    metrics = [{k: v for k, v in log.items() if not any(t in k for t in timings)} for log in trainer.state.log_history]
    return losses, gradients.steps, metrics


def assert_same(ours, stock, losses=True):
    """Losses within 1e-6, every gradient within 1e-5 of its norm, metrics within 1e-5."""
    assert len(ours[1]) == len(stock[1]) > 0
    assert len(ours[0]) == len(stock[0]) > 0
    if losses:
        for a, b in zip(ours[0], stock[0], strict=True):
            assert abs(float(a - b)) <= 1e-6 * max(1.0, abs(float(b)))
    for got, wanted in zip(ours[1], stock[1], strict=True):
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert float((got[name] - wanted[name]).norm()) <= 1e-5 * max(1e-2, float(wanted[name].norm())), name
    for got, wanted in zip(ours[2], stock[2], strict=True):
        assert got.keys() == wanted.keys()
        # Where policy and reference are still the same, which reward is larger is a matter of rounding.
        undecided = abs(wanted.get("rewards/margins", 1.0)) < 1e-6
        for name in wanted:
            if undecided and name == "rewards/accuracies":
                continue
            assert got[name] == pytest.approx(wanted[name], abs=1e-5, rel=1e-5), name


def assert_shared(handles, most=0.85):
    """All models computed their prompts once."""
    assert handles
    for handle in handles:
        assert 0 < handle.merged_tokens < most * handle.rows_tokens


def same_parameters(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
