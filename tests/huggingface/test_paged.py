"""Continuous batching: every request as if it were alone, through prefill in chunks, shared prefixes and decoding."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api, input_outputs
from transformers.generation.continuous_batching.utils import build_attention_mask

from hf_flashmask.huggingface import serve
from hf_flashmask.huggingface.paged import _MODELS_UPDATE, PagedStep, paged_mask

from .models import tiny

NEW = 6
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=99, pad_token_id=0)
PAGE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"  # 5.17
# Steps of 24 tokens cut the longer prompts into chunks that are mixed with the decoding of others.
CONFIG = {PAGE: 8, "num_blocks": 200, "max_batch_tokens": 24}


def prompts():
    generator = torch.Generator().manual_seed(3)

    def draw(n):
        return torch.randint(5, 95, (n,), generator=generator).tolist()

    begin = draw(17)
    return [*map(draw, (3, 37, 1, 29)), [*begin, 7], [*begin, 9, 8]]


def in_batches(model, **changes):
    config = ContinuousBatchingConfig(**{**CONFIG, **changes})
    outputs = model.generate_batch(
        prompts(), generation_config=GREEDY, continuous_batching_config=config, progress_bar=False
    )
    results = [outputs[f"req_{i}"] for i in range(len(prompts()))]
    assert [result.error for result in results] == [None] * len(results)
    return [result.generated_tokens for result in results]


def alone(model):
    return [
        model.generate(torch.tensor([p], device=model.device), generation_config=GREEDY)[0, len(p) :].tolist()
        for p in prompts()
    ]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"sliding_window": 5}),  # and softcap, full and window layers
        ("gpt_oss", {"sliding_window": 5}),  # sinks
        pytest.param(  # passes nothing but the mask to attention
            "stablelm", {}, marks=pytest.mark.skipif(_MODELS_UPDATE, reason="fails to update the cache, with sdpa too")
        ),
    ],
)
def test_requests_are_answered_as_if_alone(model_type, changes, monkeypatch):
    seen = []
    build = PagedStep.read
    monkeypatch.setattr(PagedStep, "read", lambda self, *args: seen.append(build(self, *args)) or seen[-1])
    model = tiny(model_type, "flashmask", num_hidden_layers=2, **changes)
    assert in_batches(model) == alone(tiny(model_type, "eager", num_hidden_layers=2, **changes))
    assert model.config._attn_implementation == "flashmask"
    masks = [mask for _, _, mask in seen]
    assert any(1 < mask.q_len < mask.kv_len for mask in masks)  # a step of chunks and of decoding
    # One mask a step and kind of layer.
    kinds = 2 if changes else 1
    assert len({id(mask) for mask in masks}) * 2 == len(masks) * kinds


@pytest.mark.skipif(not _MODELS_UPDATE, reason="block tables are followed from Transformers 5.24 on")
@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("gpt_oss", {"layer_types": ["full_attention"] * 2})]
)
def test_block_tables_answer_as_if_alone(model_type, changes, monkeypatch):
    """Steps with tables and without: with prompts in them, or requests longer than the tables hold."""
    seen = []
    attend = PagedStep.attend
    monkeypatch.setattr(
        PagedStep, "attend", lambda self, *args, **given: seen.append(attend(self, *args, **given)) or seen[-1]
    )
    model = tiny(model_type, "flashmask", num_hidden_layers=2, **changes)
    expected = alone(tiny(model_type, "eager", num_hidden_layers=2, **changes))
    assert in_batches(model, max_blocks_per_request=5) == expected
    shapes = [out.shape[1] for out in seen if out is not None]
    assert max(shapes, default=0) > 1
    assert len(shapes) < len(seen)


def test_stays_itself_and_gets_no_dense_mask(monkeypatch):
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(continuous_api, name, lambda **_: True)
    made = []
    init = input_outputs.ContinuousBatchingIOs.__init__
    monkeypatch.setattr(
        input_outputs.ContinuousBatchingIOs,
        "__init__",
        lambda self, *args, **kwargs: made.append(self) or init(self, *args, **kwargs),
    )
    model = tiny("llama", "flashmask", num_hidden_layers=1)
    tokens = in_batches(model, return_logprobs=True)
    assert [len(t) for t in tokens] == [NEW] * len(tokens)
    assert [io.attention_mask for io in made] == [None]


@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_mask_is_the_one_that_sdpa_is_given(window):
    generator = torch.Generator().manual_seed(0)
    for requests in (1, 2, 5, 40):
        new = torch.randint(1, 12, (requests,), generator=generator)
        cached = torch.randint(0, 30, (requests,), generator=generator)
        if window is not None:
            cached = cached.clamp(max=window - 1)  # as a sliding layer's cache keeps them
        cu_q, cu_k = (torch.cat((torch.zeros(1), n.cumsum(0))).to(torch.int32) for n in (new, new + cached))
        q_len, kv_len = int(cu_q[-1]), int(cu_k[-1])
        dense = torch.full((1, 1, q_len, kv_len), torch.finfo(torch.float32).min)
        build_attention_mask(dense, cu_q.tolist(), cu_k.tolist(), 1 if window is None else window)
        expected = dense == 0
        mask = paged_mask(cu_q, cu_k, q_len, kv_len, window)
        assert torch.equal(mask.to_dense(), expected)
        # Behind them padding, of requests without tokens too, which sees and shows nothing.
        padded = paged_mask(*(torch.cat((cu, cu[-1:], cu[-1:])) for cu in (cu_q, cu_k)), q_len + 3, kv_len + 5, window)
        expected = torch.nn.functional.pad(expected, (0, 5, 0, 3))
        assert torch.equal(padded.to_dense(), expected)


def step(**changes):
    cu = torch.tensor([0, 4], dtype=torch.int32)
    names = ("cache", "read_index", "write_index", "block_table")
    group = SimpleNamespace(index=0)  # of layers
    known = {"cache": SimpleNamespace(layer_to_allocator=[group]), "read_index": [torch.zeros(4)]}
    given = {
        **dict.fromkeys(names),
        **known,
        "input_ids": torch.zeros(1, 4),
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": {"a": cu},
    }
    return PagedStep.of({**given, **changes})


def test_what_it_does_not_know_is_refused():
    if not _MODELS_UPDATE:
        with pytest.raises(NotImplementedError, match="set max_blocks_per_request=0"):
            step(block_table=torch.zeros(1, 1, 1))

    layer = tiny("llama", "flashmask", num_hidden_layers=1).model.layers[0].self_attn
    attend = AttentionInterface()["flashmask"]
    q = torch.randn(1, 4, 4, 16)
    with pytest.raises(NotImplementedError, match="fills another cache than the paged one"):
        attend(layer, q, torch.cat((q, q), 2), torch.cat((q, q), 2), step())
    with pytest.raises(NotImplementedError, match="attention argument 'position_bias'"):
        attend(layer, q, q, q, step(), position_bias=q)
    # Continuous batching's arguments without its mask: a model that dropped it.
    for name, argument in (("cache", object()), ("cu_seq_lens_k", {})):
        with pytest.raises(NotImplementedError, match=f"{name}.*use attn_implementation='.*sdpa'"):
            attend(layer, q, q, q, None, **{name: argument})
    if not _MODELS_UPDATE:
        with pytest.raises(NotImplementedError, match="another PagedAttentionCache.update"):
            step(cache=type("Cache", (), {"update": lambda self, key: key})()).read(layer, q, q, None)


def test_the_server_takes_the_name_and_still_refuses_others(tmp_path):
    from transformers.cli.serving.model_manager import ModelManager

    serve.install()
    tiny("llama", "eager", num_hidden_layers=1).save_pretrained(tmp_path)
    manager = ModelManager(attn_implementation="flashmask", device="cpu", dtype="float32")
    model = manager._load_model(f"{tmp_path}@main")
    assert model.config._attn_implementation == manager.attn_implementation == "flashmask"
    with pytest.raises(ValueError, match="Unsupported attention implementation: 'flashmusk'"):
        ModelManager(attn_implementation="flashmusk", device="cpu")
    with pytest.raises(ValueError, match="Unsupported quantization"):
        ModelManager(attn_implementation="flashmask", quantization="bnb-2bit", device="cpu")
