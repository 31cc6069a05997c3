"""Whole models, twenty and more families: flashmask against eager, and packed rows against their documents alone."""

import pytest
import torch
import transformers

import hf_flashmask
from hf_flashmask import ColumnMask, masks
from hf_flashmask.huggingface import closures
from tests.huggingface.models import FAMILIES, pair, tiny, tokens

LENGTHS = [5, 1, 9, 8]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    return (request.param, *pair(request.param))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits(models):
    _, eager, ours = models
    ids = tokens(2, 23)
    close(ours(ids).logits, eager(ids).logits)
    keep = torch.ones_like(ids)
    keep[1, :6] = 0
    close(ours(ids, attention_mask=keep).logits[keep.bool()], eager(ids, attention_mask=keep).logits[keep.bool()])
    close(
        ours(ids, attention_mask=keep.flip(1)).logits[keep.flip(1).bool()],
        eager(ids, attention_mask=keep.flip(1)).logits[keep.flip(1).bool()],
    )


@torch.no_grad()
def test_four_dimensional_masks(models):
    _, eager, ours = models
    ids = tokens(2, 23)
    mask = masks.share_question([[7, 4, 4], [2, 3, 3]])
    positions = torch.arange(23).expand(2, -1)
    visible = mask.to_dense().expand(2, 1, -1, -1)
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    expected = eager(ids, attention_mask=additive, position_ids=positions).logits
    for given in (additive, visible):
        close(ours(ids, attention_mask=given, position_ids=positions).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("how", ["use_cache=True", "use_cache=False", "attention_mask of ones", "default"])
def test_packed_documents_are_as_alone(models, how):
    _, eager, ours = models
    ids = tokens(1, sum(LENGTHS))
    options = {
        "use_cache=True": {"use_cache": True},
        "use_cache=False": {"use_cache": False},
        "attention_mask of ones": {"attention_mask": torch.ones_like(ids)},
        "default": {},
    }[how]
    alone = [eager(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)]
    close(ours(ids, position_ids=POSITIONS, **options).logits, torch.cat(alone, 1))


@torch.no_grad()
def test_packed_batch(models):
    """Two rows packed differently."""
    _, eager, ours = models
    ids = tokens(2, sum(LENGTHS))
    other = [10, 13]
    positions = torch.cat((POSITIONS, torch.cat([torch.arange(n) for n in other])[None]))
    for options in ({}, {"use_cache": False}):
        logits = ours(ids, position_ids=positions, **options).logits
        for row, lengths in enumerate((LENGTHS, other)):
            alone = [eager(part, use_cache=False).logits for part in ids[row : row + 1].split(lengths, 1)]
            close(logits[row : row + 1], torch.cat(alone, 1))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}],
    ids=["dynamic", "static", "beams", "no cache"],
)
def test_generate(models, options):
    name, eager, ours = models
    if options.get("cache_implementation") == "static":
        if not eager._can_compile_fullgraph:
            pytest.skip(f"Transformers has no static cache for {name}")
        if name == "llama4_text" and transformers.__version__.startswith("5.17."):
            pytest.skip(
                "Transformers 5.17 cannot create chunked masks for a static cache (a TypeError with eager, too)"
            )
    ids = tokens(2, 9)
    keep = torch.ones_like(ids)
    keep[1, :4] = 0
    common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "disable_compile": True}
    expected = eager.generate(ids, attention_mask=keep, **common, **options)
    assert torch.equal(ours.generate(ids, attention_mask=keep, **common, **options), expected)


def test_gradients(models):
    _, eager, ours = models
    ids = tokens(2, 23)
    keep = torch.ones_like(ids)
    keep[1, -7:] = 0
    labels = ids.masked_fill(keep == 0, -100)
    for model in (eager, ours):
        model.zero_grad()
        model(ids, attention_mask=keep, labels=labels).loss.backward()
    expected = dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        wanted = expected[name].grad
        if wanted is None:
            assert parameter.grad is None
        else:
            # The gradient of a bias on k is nothing but rounding: softmax does not see a shift.
            error = float((parameter.grad - wanted).norm()) / max(float(wanted.norm()), 1e-3)
            assert error <= 1e-4, name


@pytest.mark.parametrize("model_type", ["falcon", "gpt_neo", "bloom"])
def test_models_that_compute_attention_themselves_are_refused(model_type):
    """Their attention classes never ask Transformers' attention interface, so no registered function can serve them."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    small = {
        "hidden_size": 32,
        "n_embd": 32,
        "num_hidden_layers": 1,
        "n_layer": 1,
        "num_layers": 1,
        "attention_types": [[["global"], 1]],
    }
    config_class = CONFIG_MAPPING[model_type]
    options = {k: v for k, v in small.items() if hasattr(config_class(), k)}
    with pytest.raises(NotImplementedError, match="computes attention itself.*Use attn_implementation='eager'"):
        AutoModelForCausalLM.from_config(config_class(**options), attn_implementation="flashmask")


def test_arguments_that_change_attention_are_refused_when_met():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="flashmask").eval()
    with pytest.raises(NotImplementedError, match="does not know the attention argument 'position_bias'"):
        model(tokens(1, 5) % 50, decoder_input_ids=tokens(1, 3) % 50)


def test_dropout_and_attention_weights_are_refused():
    model = tiny("gpt2", "flashmask").train()
    with pytest.raises(NotImplementedError, match="no attention dropout, got 0.1"):
        model(tokens(1, 5))
    model.eval()
    module = torch.nn.Module()
    from hf_flashmask.huggingface.attention import flashmask_attention_forward as attend

    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        attend(module, q, q, q, None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="'indices'"):
        attend(module, q, q, q, None, indices=torch.zeros(1))
    with pytest.raises(TypeError, match="ColumnMask, a dense 4D mask or None"):
        attend(module, q, q, q, torch.ones(1, 4))
    with pytest.raises(NotImplementedError, match="ambiguous"):
        attend(module, q[:, :, :2], q, q, None)
    attend(module, q, q, q, None, use_cache=True, indices=None, output_attentions=False)


@torch.no_grad()
def test_image_blocks_of_gemma3():
    """Images attend both ways inside themselves, windows hold too, and generation goes on from there."""
    from transformers import Gemma3Config, Gemma3TextConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.gemma3 import modeling_gemma3

    text = Gemma3TextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, sliding_window=4)
    config = Gemma3Config(text_config=text)
    types = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]])
    embeds = torch.zeros(2, 11, 32)
    blocks = modeling_gemma3.get_block_sequence_ids_for_mask(types, "cpu")
    keep = torch.ones(2, 11, dtype=torch.long)
    keep[1, :2] = 0
    for attention_mask in (None, keep):
        masks_of = {}
        for implementation in ("sdpa", "flashmask"):
            config.text_config._attn_implementation = implementation
            arguments = {
                "config": config.text_config,
                "inputs_embeds": embeds,
                "attention_mask": attention_mask,
                "past_key_values": None,
            }
            masks_of[implementation] = (
                create_causal_mask(**arguments, block_sequence_ids=blocks),
                create_sliding_window_causal_mask(**arguments, block_sequence_ids=blocks),
            )
        for dense, ours in zip(masks_of["sdpa"], masks_of["flashmask"], strict=True):
            assert torch.equal(ours.to_dense().expand_as(dense), dense)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "llama4_text", "gemma2"])
def test_a_column_mask_as_attention_mask(model_type):
    eager, ours = pair(model_type)
    ids = tokens(1, 23)
    mask = masks.share_question([[7, 4, 4], [2, 3, 3]])
    # A tree: positions repeat on purpose, so they must not be read as documents.
    positions = torch.cat((torch.arange(11), torch.arange(7, 11), torch.arange(5), torch.arange(2, 5)))[None]
    additive = torch.where(mask.to_dense(), 0.0, torch.finfo(torch.float32).min)
    expected = eager(ids, attention_mask=additive, position_ids=positions).logits
    for use_cache in (True, False):
        close(ours(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits, expected)
    with pytest.raises(ValueError, match="for 9 queries x 9 keys, but this forward has 23 x 23"):
        ours(ids, attention_mask=masks.causal(9))


def test_a_bias_that_is_learned_is_refused_from_its_beginning():
    """While it is zero it looks like a mask; unseen by autograd it would stay zero."""
    ours, ids = tiny("llama", "flashmask"), tokens(1, 12)
    additive = torch.where(masks.causal(12).to_dense(), 0.0, -torch.inf)
    bias = torch.zeros(1, 1, 12, 12, requires_grad=True)
    with pytest.raises(NotImplementedError, match="mask requires grad.*use attn_implementation='sdpa' or 'eager'"):
        ours(ids, attention_mask=additive + bias)
    with torch.no_grad():
        close(ours(ids, attention_mask=additive + bias).logits, ours(ids).logits)
        # As a leaf it requires grad here too; evaluated, it is a mask.
        close(ours(ids, attention_mask=(leaf := additive.requires_grad_())).logits, ours(ids).logits)
    # Met in evaluation first, it is refused all the same.
    with pytest.raises(NotImplementedError, match="mask requires grad"):
        ours(ids, attention_mask=leaf)


@torch.no_grad()
def test_chunks_of_documents_that_begin_above_zero():
    if closures.REMAP is None:
        pytest.skip("transformers 5.17 counts chunks from the row, not from the document")
    eager, ours = pair("llama4_text")
    ids = tokens(1, 20)
    position_ids = torch.cat((torch.arange(3, 14), torch.arange(9)))[None]
    given = {"position_ids": position_ids, "use_cache": False}
    close(ours(ids, **given).logits, eager(ids, **given).logits)


@torch.no_grad()
def test_dense_masks_are_converted_once_a_forward(monkeypatch):
    ours = tiny("llama", "flashmask")
    calls = []
    convert = ColumnMask.from_dense.__func__
    monkeypatch.setattr(ColumnMask, "from_dense", classmethod(lambda cls, m: calls.append(1) or convert(cls, m)))
    ids = tokens(1, 12)
    dense = masks.causal(12).to_dense()
    first = ours(ids, attention_mask=dense).logits
    assert len(calls) == 1
    # Changed in place, the same tensor is another mask.
    dense[:, :, :, 3] = False
    assert not torch.equal(ours(ids, attention_mask=dense).logits, first)
    assert len(calls) == 2
    # In inference mode, where tensors do not tell, too.
    with torch.inference_mode():
        written = masks.causal(12).to_dense()
        ours(ids, attention_mask=written)
        assert len(calls) == 3
        written[:, :, :, 3] = False
        assert torch.equal(ours(ids, attention_mask=written).logits, ours(ids, attention_mask=dense).logits)
        assert len(calls) == 4
    # Met first in inference mode, it serves training all the same.
    with torch.inference_mode():
        ours(ids, attention_mask=(other := dense.clone()))
    with torch.enable_grad():
        ours(ids, attention_mask=other.clone(), labels=ids).loss.backward()


@torch.no_grad()
def test_masks_that_cannot_be_held_are_refused_by_name():
    ours = tiny("llama", "flashmask")
    dense = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    dense[:, :, ::3] = False
    with pytest.raises(ValueError, match="key column 0 hides 4 separate query intervals"):
        ours(tokens(1, 12), attention_mask=dense)


def test_gradient_checkpointing_and_autocast():
    eager, ours = pair("llama")
    ids = tokens(1, 23)
    for model in (eager, ours):
        model.train()
        model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, eager(ids).logits, rtol=0.1, atol=0.1)


def test_public_names():
    assert set(hf_flashmask.__all__) <= set(dir(hf_flashmask))
    for name in hf_flashmask.__all__:
        assert getattr(hf_flashmask, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_flashmask.nothing  # noqa: B018
