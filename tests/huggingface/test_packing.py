"""Where documents are found, where they must not be looked for, and how often they are computed."""

import copy
import pickle

import pytest
import torch
from transformers import StaticCache, masking_utils

from hf_flashmask import masks
from hf_flashmask.huggingface import packing
from hf_flashmask.huggingface.attention import flashmask_attention_forward as attend
from hf_flashmask.huggingface.masking import flashmask_mask
from hf_flashmask.huggingface.packing import BuiltMask, split_documents
from tests.huggingface.models import pair, tiny, tokens

LENGTHS = [4, 1, 6]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
CU = torch.tensor([0, 4, 5, 11], dtype=torch.int32)


def built(n=11):
    return flashmask_mask(batch_size=1, q_length=n, kv_length=n)


def test_from_positions_and_cu_seqlens():
    expected = masks.causal_document(lengths=LENGTHS).to_dense()
    assert torch.equal(split_documents(built(), POSITIONS, None, None).to_dense(), expected)
    assert torch.equal(split_documents(built(), None, CU, CU.clone()).to_dense(), expected)
    assert torch.equal(split_documents(built(), None, CU, None).to_dense(), expected)
    # Tokens after the last sequence are a sequence of their own.
    expected = masks.causal_document(lengths=[4, 1, 6]).to_dense()
    assert torch.equal(split_documents(built(), None, CU[:3], CU[:3]).to_dense(), expected)


def test_positions_that_are_no_packing_change_nothing():
    causal = masks.causal(11).to_dense()
    unpacked = [
        torch.arange(11)[None],
        torch.arange(40, 51)[None],  # a continued row
        torch.cat((torch.arange(5), torch.arange(100, 106)))[None],  # skipped positions
        torch.tensor([[0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7]]),  # image tokens that share one
        torch.zeros(3, 1, 11, dtype=torch.long),  # mRoPE
        torch.arange(5)[None],  # of another length
    ]
    for position_ids in unpacked:
        assert torch.equal(split_documents(built(), position_ids, None, None).to_dense(), causal)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"attention_mask": torch.ones(1, 20, dtype=torch.long)}])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_documents_begin_where_positions_fall(model_type, options):
    """One begins above the lowest position of the row."""
    eager, ours = pair(model_type)
    ids, position_ids = tokens(1, 20), torch.tensor([[*range(7), *range(3, 10), *range(6)]])
    parts = [
        (x, {"position_ids": p}) for x, p in zip(*(t.split((7, 7, 6), 1) for t in (ids, position_ids)), strict=True)
    ]
    alone = torch.cat([eager(x, **given).logits for x, given in parts], 1)
    torch.testing.assert_close(ours(ids, position_ids=position_ids, **options).logits, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "llama4_text"])
def test_packed_rows_in_static_caches(model_type):
    """As long as the row and longer; and chunks that go on in a cache are not taken for documents."""
    eager, ours = pair(model_type)
    ids, position_ids = tokens(1, 20), torch.cat((torch.arange(8), torch.arange(12)))[None]
    alone = torch.cat([eager(part).logits for part in ids.split((8, 12), 1)], 1)
    for length in (20, 21, 40):
        cache = StaticCache(config=ours.config, max_cache_len=length)
        out = ours(ids, position_ids=position_ids, past_key_values=cache).logits
        torch.testing.assert_close(out, alone, atol=1e-4, rtol=1e-4)
    whole = eager(ids).logits
    cache = StaticCache(config=ours.config, max_cache_len=40)
    for part, positions in ((ids[:, :8], torch.arange(8)), (ids[:, 8:], torch.arange(8, 20))):
        out = ours(part, position_ids=positions[None], past_key_values=cache).logits
        torch.testing.assert_close(out, whole[:, positions], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_document_whose_first_tokens_are_padding():
    eager, ours = pair("llama")
    ids, keep = tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    keep[0, 8:10] = 0
    position_ids = torch.cat((torch.arange(8), torch.arange(12)))[None]
    out = ours(ids, position_ids=position_ids, attention_mask=keep).logits
    torch.testing.assert_close(out[:, :8], eager(ids[:, :8]).logits, atol=1e-4, rtol=1e-4)
    alone = eager(ids[:, 10:], position_ids=position_ids[:, 10:]).logits
    torch.testing.assert_close(out[:, 10:], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("filler", [0, 1])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_padding_between_a_soft_prompt_and_its_text(model_type, filler):
    """Prompt tuning puts its tokens before the left padding; positions of padding are fillers, not documents."""
    eager, ours = pair(model_type)
    ids = tokens(2, 12)
    keep = torch.tensor([[1] * 12, [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    position_ids = (keep.cumsum(1) - 1).masked_fill(keep == 0, filler)
    for use_cache in (True, False):
        given = {"attention_mask": keep, "position_ids": position_ids, "use_cache": use_cache}
        expected = eager(ids, **given).logits[keep.bool()]
        torch.testing.assert_close(ours(ids, **given).logits[keep.bool()], expected, rtol=0, atol=1e-5)


def test_masks_of_the_user_are_final():
    mask = masks.prefix_tree(torch.tensor([0, 1, 2, 3, 2, 3, 4, 0, 1, 1, 2]))
    position_ids = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 0, 1, 1, 2]])
    assert split_documents(mask, position_ids, None, None) is mask


def test_cross_attention_is_not_cut_by_the_positions_of_its_queries():
    q, k, v = (torch.randn(1, 2, 11, 8) for _ in range(3))
    encoder_decoder = torch.nn.Module()
    encoder_decoder.is_causal = False
    encoder_decoder.config = type("Config", (), {"is_encoder_decoder": True})()
    marked = torch.nn.Module()
    marked.is_cross_attention = True
    whole = flashmask_mask(
        batch_size=1, q_length=11, kv_length=11, mask_function=masking_utils.bidirectional_mask_function
    )
    for module in (encoder_decoder, marked):
        out, _ = attend(module, q, k, v, whole, position_ids=POSITIONS)
        assert torch.equal(out, attend(module, q, k, v, whole)[0])
    encoder = torch.nn.Module()
    encoder.is_causal = False
    out, _ = attend(encoder, q, k, v, whole, position_ids=POSITIONS)
    torch.testing.assert_close(out, attend(encoder, q, k, v, masks.document(lengths=LENGTHS))[0])


def test_computed_once_for_all_layers(monkeypatch):
    mask, found = built(), []
    real = packing.documents_from_position_ids
    monkeypatch.setattr(packing, "documents_from_position_ids", lambda *a: found.append(1) or real(*a))
    first = split_documents(mask, POSITIONS, None, None)
    assert split_documents(mask, POSITIONS, None, None) is first
    assert len(found) == 1
    assert split_documents(mask, POSITIONS.clone(), None, None) is not first


def test_a_moved_or_copied_mask_still_learns_its_documents():
    expected = masks.causal_document(lengths=LENGTHS).to_dense()
    mask = built()
    for other in (
        mask.clone(),
        copy.deepcopy(mask),
        pickle.loads(pickle.dumps(mask)),
        mask.to("cpu"),
        mask.contiguous(),
    ):
        assert isinstance(other, BuiltMask)
        assert torch.equal(split_documents(other, POSITIONS, None, None).to_dense(), expected)


def test_attention_kwargs_of_padding_free_collators():
    q, k, v = (torch.randn(1, 2, 11, 8) for _ in range(3))
    module = torch.nn.Module()
    out, _ = attend(module, q, k, v, built(), cu_seq_lens_q=CU, cu_seq_lens_k=CU, max_length_q=6, max_length_k=6)
    alone = [attend(module, *part, None)[0] for part in zip(*(t.split(LENGTHS, 2) for t in (q, k, v)), strict=True)]
    torch.testing.assert_close(out, torch.cat(alone, 1))
    # Without a mask, as vision towers call: images do not see each other, and attend both ways.
    out, _ = attend(module, q, k, v, None, is_causal=False, cu_seq_lens_q=CU, cu_seq_lens_k=CU)
    alone = [
        attend(module, *part, None, is_causal=False)[0]
        for part in zip(*(t.split(LENGTHS, 2) for t in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(alone, 1))
    with pytest.raises(NotImplementedError, match="one packed row, but the batch has 2"):
        attend(module, *(t.expand(2, -1, -1, -1) for t in (q, k, v)), None, cu_seq_lens_q=CU)


def test_a_text_s_cu_seqlens_are_not_those_of_other_parts_of_its_model():
    """A vision tower of another length, and cross-attention of any, whether its class or its attribute says so."""

    class SomeCrossAttention(torch.nn.Module):
        pass

    told = torch.nn.Module()
    told.is_cross_attention = True
    images = [torch.randn(2, 2, 9, 8) for _ in range(3)]
    tower, texts = torch.nn.Module(), {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU}
    expected, _ = attend(tower, *images, None, is_causal=False)
    assert torch.equal(attend(tower, *images, None, is_causal=False, **texts)[0], expected)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (11, 11, 11))
    dense = torch.ones(1, 1, 11, 11, dtype=torch.bool)
    expected, _ = attend(told, q, k, v, dense, is_causal=False)
    for module in (told, SomeCrossAttention()):
        for mask in (dense, built()):
            out, _ = attend(module, q, k, v, mask, is_causal=False, position_ids=POSITIONS, **texts)
            assert torch.equal(out, expected if mask is dense else attend(told, q, k, v, built())[0])


def test_cu_seqlens_that_are_written_to(monkeypatch):
    """Beside a mask of the user's, which lives on: in inference mode too, where tensors do not tell."""
    mask, cu = masks.causal(11), CU.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            cu = CU.clone()
            for lengths in (LENGTHS, [2, 5, 4]):
                cu[1:] = torch.tensor(lengths).cumsum(0)
                expected = masks.causal_document(lengths=lengths).to_dense()
                assert torch.equal(split_documents(mask, None, cu, cu).to_dense(), expected)


def test_masks_made_in_inference_mode_serve_training():
    model, ids = tiny("llama", "flashmask"), tokens(1, 11)
    mask = masks.causal(11)
    with torch.inference_mode():
        model(ids, attention_mask=mask, cu_seq_lens_q=CU, cu_seq_lens_k=CU)
        made = masks.causal(11)
    model(ids, attention_mask=mask, cu_seq_lens_q=CU, cu_seq_lens_k=CU, labels=ids).loss.backward()
    model(ids, attention_mask=made, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_window_given_to_a_module_without_a_mask():
    q, k, v = (torch.randn(1, 2, 11, 8) for _ in range(3))
    module = torch.nn.Module()
    out, _ = attend(module, q, k, v, None, position_ids=POSITIONS)
    torch.testing.assert_close(out, attend(module, q, k, v, masks.causal_document(lengths=LENGTHS))[0])
    out, _ = attend(module, q, k, v, None, sliding_window=3)
    expected, _ = attend(module, q, k, v, masks.sliding_window(11, 3))
    assert torch.equal(out, expected)
    # Beside a mask, the window is in the mask already: a cropped cache would apply it twice.
    one, _ = attend(module, q[:, :, -1:], k, v, masks.full(11, q_len=1), sliding_window=3)
    assert torch.equal(one, attend(module, q[:, :, -1:], k, v, None)[0])
    with pytest.raises(NotImplementedError, match="sliding_window=3"):
        attend(module, q, k, v, None, is_causal=False, sliding_window=3)


@torch.no_grad()
def test_chunks_count_from_the_document_when_a_cache_is_in_use():
    """Llama 4: attention is not told of positions at all; only mask creation is, and drops them beside a cache."""
    eager, ours = pair("llama4_text")
    ids = tokens(1, 24)
    lengths = [9, 15]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([eager(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(ours(ids, position_ids=position_ids, use_cache=True).logits, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_prefix_tuning_and_continued_caches_are_not_cut():
    """position_ids begin at 0 beside a filled cache: the past stays visible."""
    eager, ours = pair("llama")
    ids = tokens(1, 12)
    for model in (eager, ours):
        cache = model(ids[:, :6], use_cache=True).past_key_values
        model.last = model(ids[:, 6:], past_key_values=cache, position_ids=torch.arange(6)[None]).logits
    torch.testing.assert_close(ours.last, eager.last, rtol=0, atol=1e-5)


def test_position_ids_never_reach_a_later_mask():
    ours = tiny("llama", "flashmask")
    ours(tokens(1, 11), position_ids=POSITIONS)
    assert packing.take_position_ids() is None


@torch.no_grad()
def test_trainer_collators_do_not_leak():
    """Hugging Face Trainer's DataCollatorWithFlattening: stock sdpa leaks with it."""
    from transformers import DataCollatorWithFlattening

    eager, ours = pair("llama")
    documents = [{"input_ids": part[0].tolist()} for part in tokens(1, 24).split([9, 4, 11], 1)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(documents)
    plain = DataCollatorWithFlattening()(documents)
    alone = [eager(torch.tensor([d["input_ids"]])).logits for d in documents]
    for given in (batch, plain):
        given = {k: v for k, v in given.items() if k != "labels"}
        torch.testing.assert_close(ours(**given).logits, torch.cat(alone, 1), rtol=0, atol=1e-5)


def test_one_row_of_positions_for_a_padded_batch():
    keep = torch.tensor([[1] * 11, [0, 0, *[1] * 9]], dtype=torch.bool)
    found = packing.documents_from_position_ids(torch.arange(11)[None], 11, keep)
    assert torch.equal(found.start, torch.tensor([[0] * 11, [0, 0, *[2] * 9]]))
