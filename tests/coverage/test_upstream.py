"""`flashmask check --transformers-tests`, on a checkout of one small file of tests."""

import textwrap

import pytest

from hf_flashmask.cli import main
from hf_flashmask.coverage import upstream
from hf_flashmask.coverage.upstream import Outcome

TESTS = """
    import unittest
    import torch
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    def model(**options):
        sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa", **options))

    class Tests(unittest.TestCase):
        def test_forward(self):
            padded = torch.tensor([[0, 1, 1, 1]])
            assert model().eval()(torch.arange(4)[None], attention_mask=padded).logits.isfinite().all()

        def test_refused_in_a_subtest(self):
            for attention_dropout in (0.0, 0.5):
                with self.subTest(attention_dropout=attention_dropout):
                    model(attention_dropout=attention_dropout).train()(torch.arange(4)[None])

        def test_only_sdpa(self):
            assert "flashmask" not in AttentionInterface()["sdpa"].__name__, "not | sdpa"

        def test_skipped(self):
            self.skipTest("always")
"""
MASKS = """
    import torch
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    def test_masks_are_shown_as_tensors():
        config = LlamaConfig(attn_implementation="sdpa")
        padded = torch.tensor([[0, 1, 1], [1, 1, 1]])
        mask = create_causal_mask(config, torch.zeros(2, 3, 1), padded, None)
        expected = torch.ones(3, 3, dtype=torch.bool).tril() & padded.bool()[:, None, None, :]
        assert torch.equal(mask, expected)
"""


def test_what_comes_of_a_checkouts_tests(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_modeling_common.py").write_text(textwrap.dedent(TESTS))
    (folder / "test_masking_utils.py").write_text(textwrap.dedent(MASKS))
    ours = upstream._pytest(tmp_path, ["tests"], as_sdpa=True)
    of_class = "tests/test_modeling_common.py::Tests::test_"
    mask_test = "tests/test_masking_utils.py::test_masks_are_shown_as_tensors"
    refused = "NotImplementedError: LlamaAttention: flashmask has no attention dropout, got 0.5"
    assert {test: outcome.status for test, outcome in ours.items()} == {
        mask_test: "passed",
        of_class + "forward": "passed",
        of_class + "refused_in_a_subtest": "refused",
        of_class + "only_sdpa": "failed",
        of_class + "skipped": "skipped",
    }
    assert ours[of_class + "refused_in_a_subtest"].reason == refused
    assert {test for test, outcome in ours.items() if outcome.reached} == {
        of_class + "forward",
        of_class + "refused_in_a_subtest",
    }

    stock = dict.fromkeys(ours, Outcome("passed")) | {of_class + "skipped": Outcome("skipped")}
    stock[of_class + "missing"] = Outcome("passed")
    monkeypatch.setattr(upstream, "run", lambda *args: (stock, ours))
    out = tmp_path / "table.md"
    with pytest.raises(SystemExit, match="fail on flashmask:\n.*test_missing\n.*test_only_sdpa$"):
        main(["check", "--transformers-tests", str(tmp_path), "--out", str(out), "--", "tests", "-k", "not x"])
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert "| tests/test_modeling_common.py | 4 | 1 | 1 | 1 | 2 |" in text
    assert "| tests/test_masking_utils.py | 1 | 1 | 0 | 0 | 0 |" in text
    assert "- 1 failed: AssertionError: not \\| sdpa" in text
    assert "- 1 failed: did not run (`test_missing`)" in text
    assert f"- 1 refused: {refused} (`test_refused_in_a_subtest`)" in text


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is no checkout of Transformers"):
        main(["check", "--transformers-tests", str(tmp_path)])
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_modeling_common.py").write_text("")
    with pytest.raises(RuntimeError, match="pytest ended with 5"):
        upstream._pytest(tmp_path, ["tests"], as_sdpa=False)
