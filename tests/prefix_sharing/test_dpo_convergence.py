"""A whole DPO training on real preference pairs: with shared prompts it follows the stock curves."""

import pytest
import torch

from hf_flashmask.bench import demo
from tests.huggingface.models import tiny

pytest.importorskip("trl")
from datasets import Dataset

from tests.prefix_sharing.trainers import dpo_trainer

STEPS = 60
MAX_LENGTH = 192  # cuts a quarter of the rows


@pytest.fixture
def one_thread():
    """Operations this small lose more to waiting for each other's threads than they gain, most on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_60_steps_on_gsm8k_follow_the_stock_curves(tmp_path):
    tokenizer = demo.train_tokenizer(demo.texts(), vocab_size=1024)
    rows = Dataset.from_list(demo.preferences())

    def train(implementation, share):
        """The log entry of every step, and what was shared."""
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH}
        policy, reference = (tiny("llama", implementation, **sizes) for _ in range(2))
        trainer, handles = dpo_trainer(
            policy, reference, rows, tokenizer, tmp_path, share=share, max_length=MAX_LENGTH, max_steps=STEPS,
            learning_rate=3e-4, logging_steps=1, save_strategy="no", seed=0,
        )  # fmt: skip
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry], handles

    stock, _ = train("sdpa", share=False)
    ours, handles = train("flashmask", share=True)
    assert len(ours) == len(stock) == STEPS
    for name in ("loss", "rewards/margins"):
        curves = [[entry[name] for entry in log] for log in (ours, stock)]
        gaps = [abs(a - b) for a, b in zip(*curves, strict=True)]
        assert max(gaps) <= 1e-4, (name, gaps)
    losses = [entry["loss"] for entry in ours]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    for handle in handles:
        assert 0 < handle.merged_tokens < 0.75 * handle.rows_tokens
