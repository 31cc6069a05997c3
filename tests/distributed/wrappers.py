"""Jobs: models inside DDP and FSDP2, and the same batches in one process."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_flashmask import share_prompts
from tests.huggingface.models import tiny, tokens
from tests.prefix_sharing.test_share import groups

LENGTHS = [[5, 1, 9, 8], [10, 12]]


def summed(logits, labels):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def padded(rank):
    ids = tokens(2, 23, seed=rank)
    keep = torch.ones_like(ids)
    keep[1, -4 - rank :] = 0
    return {"input_ids": ids, "attention_mask": keep, "labels": ids.masked_fill(keep == 0, -100)}


def packed(rank):
    lengths = LENGTHS[rank]
    ids = tokens(1, sum(lengths), seed=rank)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": position_ids, "labels": ids.masked_fill(position_ids == 0, -100)}


def prompts(rank):
    ids, keep = groups("right", seed=rank)
    return {"input_ids": ids, "attention_mask": keep, "labels": ids.masked_fill(keep == 0, -100)}


BATCHES = {"padded": padded, "packed": packed, "prompts": prompts}
TOKENS = {kind: sum(int((make(r)["labels"][:, 1:] != -100).sum()) for r in range(2)) for kind, make in BATCHES.items()}


def in_one_process(model, kind):
    """Mean loss over the batches of both ranks, and gradients; documents of packed rows each alone."""
    total = 0
    for rank in range(2):
        batch = BATCHES[kind](rank)
        labels = batch.pop("labels")
        parts = [(batch, labels)]
        if kind == "packed":
            cut = zip(batch["input_ids"].split(LENGTHS[rank], 1), labels.split(LENGTHS[rank], 1), strict=True)
            parts = [({"input_ids": ids}, part) for ids, part in cut]
        total = total + sum(summed(model(**inputs, use_cache=False).logits, part) for inputs, part in parts)
    loss = total / TOKENS[kind]
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def wrapped(rank_of, wrapper, kind, checkpointing, share):
    """The same in two: loss summed over both, gradients as the wrapper leaves them."""
    model = tiny("llama", "flashmask").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    handles = [share_prompts(model)] if share == "inside" else []
    if wrapper == "ddp":
        outer = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        outer = fully_shard(model, mesh=mesh)
    if share == "around":
        handles = [share_prompts(outer)]
    rank = torch.distributed.get_rank()
    batch = BATCHES[kind](rank)
    labels = batch.pop("labels")
    loss = summed(outer(**batch, use_cache=False).logits, labels) / TOKENS[kind]
    # Both wrappers average gradients over processes.
    (loss * 2).backward()
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    grads = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    return float(loss), grads, [(h.merged_tokens, h.rows_tokens) for h in handles]
