"""Who shares a model, for how long, and what verify="first" has seen."""

import io

import pytest
import torch

from hf_flashmask import share_prompts
from hf_flashmask.prefix_sharing import MergedRows
from tests.huggingface.models import tiny
from tests.prefix_sharing.test_share import groups


def test_the_end_of_a_block_leaves_what_was_there():
    ours = tiny("llama", "flashmask")
    with share_prompts(ours) as outer:
        with share_prompts(ours) as inner:
            assert inner is outer
        assert "forward" in vars(ours.model)
    assert "forward" not in vars(ours.model)
    handle = share_prompts(ours)
    with share_prompts(ours):
        pass
    assert "forward" in vars(ours.model)
    share_prompts(ours)
    handle.undo()
    assert "forward" not in vars(ours.model)
    handle.release()
    with share_prompts(ours) as other:
        handle.release()  # of one that has ended
        assert "forward" in vars(ours.model)
        assert other is not handle


def test_a_loaded_model_is_not_shared():
    ours = tiny("llama", "flashmask")
    ids, mask = groups("right")
    share_prompts(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    wanted = loaded(ids, attention_mask=mask, use_cache=False).logits
    with share_prompts(loaded, verify="first") as shared:
        got = loaded(ids, attention_mask=mask, use_cache=False).logits
        assert 0 < shared.merged_tokens < shared.rows_tokens
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


def test_verify_is_not_spent_by_calls_that_fail(monkeypatch):
    ids, mask = groups("right")
    restore = MergedRows.restore
    monkeypatch.setattr(MergedRows, "restore", lambda rows, hidden: restore(rows, hidden.roll(1, 1)))
    ours = tiny("llama", "flashmask")
    with share_prompts(ours, verify="first"):
        with pytest.raises(NotImplementedError, match="attention_mask must be"):
            ours(ids, attention_mask=torch.ones(6, 1, 17, 17), use_cache=False)
        for _ in range(2):  # a difference does not go away by trying again
            with pytest.raises(RuntimeError, match="sharing prompts changes"):
                ours(ids, attention_mask=mask, use_cache=False)


def test_verify_of_a_model_that_is_shared_already(monkeypatch):
    ids, mask = groups("right")
    ours = tiny("llama", "flashmask")
    handle = share_prompts(ours)
    ours(ids, attention_mask=mask, use_cache=False)
    restore = MergedRows.restore
    monkeypatch.setattr(MergedRows, "restore", lambda rows, hidden: restore(rows, hidden.roll(1, 1)))
    assert share_prompts(ours, verify="first") is handle
    with pytest.raises(RuntimeError, match="sharing prompts changes"):
        ours(ids, attention_mask=mask, use_cache=False)
