"""A small language model, untrained, with a byte tokenizer: enough for every path of a comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.bench.subjects import Subject


class ByteTokenizer:
    """One token a byte."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("utf-8"))}

    def decode(self, ids: Any, **_: Any) -> str:
        return bytes(torch.as_tensor(ids).tolist()).decode("utf-8", errors="replace")


@pytest.fixture(scope="session")
def subject() -> Subject:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Subject("tiny", transformers.LlamaForCausalLM(config).eval(), ByteTokenizer())
