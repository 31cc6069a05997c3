"""A third of the types that the published table calls ok still are, all their cases included."""

from pathlib import Path

import pytest
import transformers

from hf_flashmask.coverage import build, report, run
from hf_flashmask.coverage.outcome import OK

DOCS = Path(__file__).parents[2] / "docs"
TABLES = {"5.24": "coverage.csv", "5.17": "coverage_5_17.csv"}
NEWEST = next(iter(TABLES))
MINOR = ".".join(transformers.__version__.split(".")[:2])

# What a refactoring is likeliest to break is always among them: windows, sinks, softcap, chunks, latent attention,
# image blocks, images in one row, cross-attention, masks of keys only.
ALWAYS = {
    "gpt_oss",
    "gemma2",
    "gemma3_text",
    "llama4_text",
    "deepseek_v3",
    "gemma3",
    "qwen2_vl_vision",
    "bart",
    "layoutlm",
}


@pytest.mark.timeout(900)
@pytest.mark.skipif(MINOR not in TABLES, reason=f"no table of transformers {MINOR}")
def test_no_ok_is_lost():
    table = [row for row in report.read_csv(DOCS / TABLES[MINOR]) if row.status == OK]
    wanted = [row for i, row in enumerate(table) if i % 3 == 0 or row.type in ALWAYS]
    assert {(row.kind, row.type) for row in wanted} <= {(k, t) for k in build.KINDS for t in build.model_types(k)}
    rows = run.run([(row.kind, row.type) for row in wanted], jobs=2)
    assert report.lost(wanted, rows) == []


def test_there_is_a_table_of_the_release_that_ci_installs():
    """Else the tests of it would be skipped without a word."""
    constraints = (DOCS.parent / "constraints.txt").read_text()
    assert f"transformers=={NEWEST}." in constraints


@pytest.mark.skipif(MINOR != NEWEST, reason="the table of the newest release")
def test_the_table_keeps_its_promise():
    rows = report.read_csv(DOCS / TABLES[NEWEST])
    causal = [row for row in rows if row.kind == "causal"]
    assert {row.type for row in causal} == set(build.model_types("causal"))
    assert sum(row.status == OK for row in causal) >= 140
    assert [f"{row.kind} {row.type}: {row.reason}" for row in rows if row.status == "mismatch"] == []
    for row in rows:
        assert row.status == OK or row.reason, row


def test_where_eager_is_not_causal_sdpa_is_the_reference(monkeypatch):
    """Moshi of 5.17 makes no mask where none is given; sdpa has its flag, eager then sees later tokens."""
    from transformers.models.llama import modeling_llama

    from hf_flashmask.coverage.cases import check

    make = modeling_llama.create_causal_mask
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", lambda **k: None if k["attention_mask"] is None else make(**k)
    )
    row = check("causal", "llama")
    assert (row.status, row.reason) == (OK, "")
    assert row.cases().pop("plain") == "as sdpa: eager sees later tokens where no mask is given"
    assert {row.left, row.right, row.mask4d, row.dynamic, row.gradient} == {OK}
