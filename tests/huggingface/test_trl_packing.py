"""TRL's packing strategies: what a row's loss is, is what its documents' losses are, each alone."""

import pytest
import torch

from tests.huggingface.models import FAMILIES, pair

pytest.importorskip("trl")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.trl_runs import QUIET, words_tokenizer

LENGTHS = (9, 14, 5, 21, 7, 12)
MAX_LENGTH = 24


def documents(completion_only):
    """Tokenised documents; with ``completion_only``, the first third of each is not trained on."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in LENGTHS:
        row = {"input_ids": torch.randint(5, 90, (n,), generator=generator).tolist()}
        if completion_only:
            row["completion_mask"] = [0] * (n // 3) + [1] * (n - n // 3)
        rows.append(row)
    return Dataset.from_list(rows)


def batches(model, folder, completion_only, **options):
    arguments = SFTConfig(str(folder), per_device_train_batch_size=2, **{"max_length": MAX_LENGTH, **QUIET, **options})
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=documents(completion_only), processing_class=words_tokenizer()
    )
    return trainer, list(trainer.get_train_dataloader())


def token_losses(model, **inputs):
    """Sum over trained tokens, and how many there are."""
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.sum(), int((labels[:, 1:] != -100).sum())


def alone(model, batch):
    """The same of every document of packed rows, run by itself."""
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    total, count = 0.0, 0
    for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
        ids, labels = batch["input_ids"][:, start:end], batch["labels"][:, start:end]
        loss, tokens = token_losses(model, input_ids=ids, labels=labels)
        total, count = total + loss, count + tokens
    return total, count


@pytest.mark.parametrize("completion_only", [False, True], ids=["all tokens", "completions"])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "padding_free"])
def test_documents_do_not_leak(strategy, completion_only, tmp_path):
    """The collator's own batches, through every family."""
    # TRL cuts nothing without packing, and refuses to be told to.
    packing = (
        {"padding_free": True, "max_length": None}
        if strategy == "padding_free"
        else {"packing_strategy": strategy, "packing": True}
    )
    _, made = batches(pair("llama")[1], tmp_path, completion_only, **packing)
    packed = 0
    for batch in made:
        packed += int((batch["position_ids"] == 0).sum()) > 1
        assert "attention_mask" not in batch
    assert packed
    families = FAMILIES if strategy == "bfd" and not completion_only else ("llama", "gemma2", "gpt_oss")
    for family in families:
        eager, ours = pair(family)
        for batch in made:
            with torch.no_grad():
                inputs = {name: value for name, value in batch.items() if name != "num_items_in_batch"}
                loss, tokens = token_losses(ours, **inputs)
                expected, count = alone(eager, batch)
            # Between two documents, the first token of the second is never predicted from the first's end.
            assert tokens == count, family
            assert float(loss) == pytest.approx(float(expected), rel=1e-5), family


def test_wrapped_rows_are_plain_causal_text(tmp_path):
    """ "wrapped" cuts one stream of text into rows and asks for no separation: as eager has it."""
    eager, ours = pair("llama")
    _, made = batches(ours, tmp_path, False, packing=True, packing_strategy="wrapped")
    for batch in made:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            (loss, tokens), (expected, count) = (token_losses(m, **dict(inputs)) for m in (ours, eager))
        assert tokens == count > 0
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_the_trainer_computes_the_same_loss(strategy, tmp_path):
    eager, ours = pair("llama")
    trainer, made = batches(ours, tmp_path, True, packing=True, packing_strategy=strategy)
    for batch in made:
        loss = trainer.compute_loss(ours, dict(batch))
        expected, count = alone(eager, batch)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()) / count, rel=1e-5)
