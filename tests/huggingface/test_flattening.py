"""Hugging Face Trainer with DataCollatorWithFlattening: the loss is that of the documents, each alone."""

import itertools

import pytest
import torch
from transformers import DataCollatorWithFlattening, RobertaConfig, RobertaForMaskedLM, Trainer, TrainingArguments

from tests.huggingface.models import pair

GENERATOR = torch.Generator().manual_seed(0)
DOCUMENTS = [{"input_ids": torch.randint(5, 95, (n,), generator=GENERATOR).tolist()} for n in (5, 9, 1, 7)]
OPTIONS = ("return_position_ids", "return_flash_attn_kwargs", "return_seq_idx")


def loss_of(model, folder, **options):
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, use_cpu=True, report_to=[])
    collator = DataCollatorWithFlattening(**options)
    trainer = Trainer(model, arguments, train_dataset=DOCUMENTS, data_collator=collator)
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape == (1, 22)
    return float(trainer.compute_loss(model, dict(batch)).detach())


def loss_alone(model):
    total = 0
    for document in DOCUMENTS:
        ids = torch.tensor([document["input_ids"]])
        logits = model(ids, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    return float(total) / sum(len(d["input_ids"]) - 1 for d in DOCUMENTS)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "opt"])
def test_every_way_of_telling_documents(model_type, tmp_path):
    eager, ours = pair(model_type)
    expected = loss_alone(eager)
    for chosen in itertools.product((True, False), repeat=3):
        options = dict(zip(OPTIONS, chosen, strict=True))
        if not any(chosen):  # nothing tells where documents begin
            continue
        if model_type == "opt" and not options["return_position_ids"]:
            continue  # learned positions that go on over the row
        assert loss_of(ours, tmp_path, **options) == pytest.approx(expected, abs=1e-5), options
    # What the comparison is worth: eager attention does not keep all of these apart.
    assert abs(loss_of(eager, tmp_path, return_position_ids=False, return_seq_idx=True) - expected) > 1e-3
    # Without the separator, each document's first token is predicted from the end of another.
    assert abs(loss_of(ours, tmp_path, separator_id=7) - expected) > 1e-3


@torch.no_grad()
def test_positions_that_do_not_begin_at_0(tmp_path):
    """RoBERTa's begin at padding_idx + 1."""
    config = RobertaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=1
    )
    model = RobertaForMaskedLM._from_config(config, attn_implementation="flashmask").eval()
    lengths = [len(d["input_ids"]) for d in DOCUMENTS]
    ids = torch.tensor([[token for d in DOCUMENTS for token in d["input_ids"]]])
    positions = torch.cat([torch.arange(2, 2 + n) for n in lengths])[None]
    alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(model(ids, position_ids=positions).logits, alone, rtol=0, atol=1e-5)
