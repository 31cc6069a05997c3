"""DDP and FSDP2 over two processes: losses and gradients are those of sdpa in one process on both batches."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel

from hf_flashmask import share_prompts
from tests.distributed.processes import own_device
from tests.huggingface.models import tiny, tokens
from tests.prefix_sharing.test_share import groups

pytestmark = pytest.mark.xdist_group("distributed")

# Of the packed row of each process.
LENGTHS = ([5, 1, 9, 8], [10, 12])


def padded(rank):
    ids = tokens(2, 23, seed=rank)
    keep = torch.ones_like(ids)
    keep[1, -4 - rank :] = 0
    return {"input_ids": ids, "attention_mask": keep, "labels": ids.masked_fill(keep == 0, -100)}


def packed(rank):
    ids = tokens(1, sum(LENGTHS[rank]), seed=rank)
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS[rank]])[None]
    return {"input_ids": ids, "position_ids": position_ids, "labels": ids.masked_fill(position_ids == 0, -100)}


def prompts(rank):
    ids, keep = groups("right", seed=rank)
    return {"input_ids": ids, "attention_mask": keep, "labels": ids.masked_fill(keep == 0, -100)}


def trained(labels):
    return int((labels[:, 1:] != -100).sum())


def summed(model, labels, **inputs):
    logits = model(**inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def in_two(batch_of, wrapper, checkpointing, share):
    """Mean loss over the tokens of both processes, gradients as the wrapper leaves them, and tokens merged."""
    device = own_device()
    model = tiny("llama", "flashmask").train().to(device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    handle = share_prompts(model) if share == "inside" else None
    if wrapper == "ddp":
        outer = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(device, (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        outer = fully_shard(model, mesh=mesh)
        assert isinstance(model.lm_head.weight, DTensor)
    if share == "around":
        handle = share_prompts(outer)
    n_tokens = sum(trained(batch_of(rank)["labels"]) for rank in range(2))
    batch = {name: t.to(device) for name, t in batch_of(torch.distributed.get_rank()).items()}
    loss = summed(outer, **batch) / n_tokens
    (loss * 2).backward()  # the wrappers average over processes
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    grads = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    return float(loss), grads, None if handle is None else (handle.merged_tokens, handle.rows_tokens)


def in_one(batch_of):
    model = tiny("llama", "sdpa").train()
    loss, n_tokens = 0, 0
    for rank in range(2):
        batch = batch_of(rank)
        n_tokens += trained(batch["labels"])
        if batch_of is packed:  # documents, each alone
            cut = (batch[name].split(LENGTHS[rank], 1) for name in ("labels", "input_ids"))
            loss += sum(summed(model, labels, input_ids=ids) for labels, ids in zip(*cut, strict=True))
        else:
            loss += summed(model, **batch)
    (loss / n_tokens).backward()
    return float(loss.detach()) / n_tokens, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("batch_of", "checkpointing", "share"),
    [(padded, False, None), (packed, True, None), (prompts, False, "inside"), (prompts, True, "around")],
    ids=["padded", "packed, checkpointed", "shared prompts inside", "shared prompts around, checkpointed"],
)
def test_loss_and_gradients(batch_of, checkpointing, share, wrapper, processes):
    results = processes.run(in_two, batch_of, wrapper, checkpointing, share)
    check(results, batch_of, 1e-5, abs=1e-6)
    for _, _, merged in results:
        assert (merged is None) == (share is None)
        if merged is not None:
            assert merged[0] < 0.6 * merged[1]


def check(results, batch_of, tolerance, **of_loss):
    """What both processes found, against one process on the CPU: gradients by their norms."""
    loss, grads = in_one(batch_of)
    for actual, actual_grads, _ in results:
        assert actual == pytest.approx(loss, **of_loss)
        for name, expected in grads.items():
            assert float((actual_grads[name].cpu() - expected).norm()) <= tolerance * float(expected.norm()), name


def test_data_parallel_is_refused():
    with pytest.raises(NotImplementedError, match="one process a GPU"):
        share_prompts(torch.nn.DataParallel(tiny("llama", "flashmask")))


def under_context_parallel():
    ids = tokens(1, 8)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
        try:
            tiny("llama", "flashmask")(ids, use_cache=False)
        except NotImplementedError as error:
            return str(error)


def test_context_parallelism_is_refused(processes):
    """Else every process would attend to its own part of the row, and nothing would say so."""
    assert all("split rows with Ulysses" in message for message in processes.run(under_context_parallel))
