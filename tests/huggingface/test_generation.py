"""Generation beyond what every family is tried with: compiled decoding, assistants, and what a static cache holds."""

import pytest
import torch
from transformers import CompileConfig, StaticCache

from tests.huggingface.models import tiny, tokens

COMMON = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@torch.no_grad()
# A static cache that slides is another graph once it is full, with sdpa too.
@pytest.mark.parametrize(("name", "graphs"), [("llama", 1), ("mistral", 2)])
def test_compiled_decoding(name, graphs):
    """The mask object goes into a compiled step as it is: no graph break, nothing compiled anew as tokens come."""
    ids = tokens(2, 9)
    keep = torch.ones_like(ids)
    keep[1, :4] = 0
    expected = tiny(name, "sdpa", num_hidden_layers=1).generate(ids, attention_mask=keep, **COMMON)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours = tiny(name, "flashmask", num_hidden_layers=1)
    options = {"cache_implementation": "static", "compile_config": compile_config, **COMMON}
    assert torch.equal(ours.generate(ids, attention_mask=keep, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
@pytest.mark.parametrize("q_len", [1, 3])
def test_a_static_cache_is_not_read_beyond_its_tokens(q_len):
    """A step behind 11 tokens of a cache of 40, whose other entries are NaN."""
    ours, sdpa = tiny("llama", "flashmask"), tiny("llama", "sdpa")
    ids = tokens(1, 11 + q_len)
    cache = StaticCache(config=ours.config, max_cache_len=40)
    ours(ids[:, :11], past_key_values=cache)
    for layer in cache.layers:
        for t in (layer.keys, layer.values):
            t[:, :, 11:] = torch.nan
    positions = torch.arange(11, 11 + q_len)[None]
    logits = ours(ids[:, 11:], past_key_values=cache, position_ids=positions).logits
    torch.testing.assert_close(logits, sdpa(ids).logits[:, 11:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_assisted_decoding():
    """Several drafted tokens are verified at a time; what is generated is what the model alone generates."""
    ids = tokens(1, 9)
    expected = tiny("llama", "sdpa").generate(ids, **{**COMMON, "max_new_tokens": 16})
    assistant = tiny("llama", "flashmask", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 4
    ours = tiny("llama", "flashmask")
    assert torch.equal(ours.generate(ids, assistant_model=assistant, **{**COMMON, "max_new_tokens": 16}), expected)
