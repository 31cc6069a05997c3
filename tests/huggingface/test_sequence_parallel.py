"""What DeepSpeed's Ulysses leaves of a mask, in one process: nothing but position_ids. Two: tests/distributed."""

import pytest
import torch
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_flashmask import masks, share_prompts
from hf_flashmask.huggingface.attention import flashmask_attention_forward
from hf_flashmask.huggingface.masking import flashmask_mask
from tests.huggingface.models import FAMILIES, pair, tiny, tokens

LENGTHS = [5, 1, 9, 8]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


# Each hands its window to attention in its own code.
WINDOWED = [name for name, (_, options) in FAMILIES.items() if "sliding_window" in options]


@pytest.fixture
def deepspeed():
    """A wrapper as DeepSpeed's, which drops the mask, around the attention function."""

    def wrapper(module, query, key, value, attention_mask, *args, **kwargs):
        return flashmask_attention_forward(module, query, key, value, None, *args, **kwargs)

    wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    ALL_ATTENTION_FUNCTIONS["flashmask"] = wrapper
    yield
    del ALL_ATTENTION_FUNCTIONS["flashmask"]


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*WINDOWED, "llama", "deepseek_v3", "opt"])
def test_the_mask_is_made_again(model_type, deepspeed):
    eager, ours = pair(model_type, num_hidden_layers=2)
    ids = tokens(1, sum(LENGTHS))
    expected = torch.cat([eager(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], 1)
    actual = ours(ids, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_cannot_be_made_again_is_refused(deepspeed):
    ids, model = tokens(2, 11), tiny("llama", "flashmask")
    for mask, what in ((masks.causal(11), "a 4D"), (masks.causal(11).to_dense(), "a 4D")):
        with pytest.raises(NotImplementedError, match=f"Ulysses sequence parallelism drops {what} attention_mask"):
            model(ids, attention_mask=mask, use_cache=False)
    with share_prompts(model), pytest.raises(NotImplementedError, match="drops the mask of share_prompts"):
        model(ids, use_cache=False)
    with pytest.raises(NotImplementedError, match="drops a mask of .*chunked_overlay"):
        tiny("llama4_text", "flashmask")(ids, use_cache=False)
    blocks = masking_utils.blockwise_overlay(torch.zeros(1, 11, dtype=torch.long))
    function = masking_utils.or_masks(masking_utils.causal_mask_function, blocks)
    with pytest.raises(NotImplementedError, match="drops a mask of or_masks"):
        flashmask_mask(batch_size=1, q_length=11, kv_length=11, mask_function=function)
    with pytest.raises(NotImplementedError, match="return_flash_attn_kwargs=False"):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 4, 11]), position_ids=torch.arange(11)[None], use_cache=False)


def test_a_chunked_layer_without_its_mask_is_refused():
    attention = tiny("llama4_text", "flashmask").model.layers[0].self_attn
    assert attention.config.layer_types[attention.layer_idx] == "chunked_attention"
    q = torch.randn(1, 4, 11, 16)
    with pytest.raises(NotImplementedError, match="chunked attention cannot be served without its mask"):
        flashmask_attention_forward(attention, q, q, q, None)
