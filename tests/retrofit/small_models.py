"""Small models with random weights, built from their configs; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

VOCABULARY = 61


def llama(implementation: str = "sdpa", **changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation=implementation,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **changes,
    )
    return wide(LlamaForCausalLM(config))


def mistral(implementation: str = "sdpa") -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=6,
        attn_implementation=implementation,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return wide(MistralForCausalLM(config))


def gpt2(implementation: str = "sdpa", **changes: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=False,
        attn_implementation=implementation,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **changes,
    )
    return wide(GPT2LMHeadModel(config))


def bert(implementation: str = "sdpa", **changes: Any) -> BertModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        attn_implementation=implementation,
        **changes,
    )
    return wide(BertModel(config))


def vit(implementation: str = "sdpa") -> ViTModel:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=24,
        patch_size=8,
        attn_implementation=implementation,
    )
    return wide(ViTModel(config))


def t5(implementation: str = "sdpa") -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        attn_implementation=implementation,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    return wide(T5ForConditionalGeneration(config))


def whisper(implementation: str = "sdpa") -> WhisperModel:
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=20,
        max_target_positions=40,
        attn_implementation=implementation,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return wide(WhisperModel(config))


def wide(model: Any) -> Any:
    """Larger weights than a fresh model's, so that attention is far from uniform and mistakes show."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.weight.normal_(std=0.25)
    return model.eval()


def tokens(batch: int = 2, length: int = 17) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def padding(batch: int, length: int, left: int = 0, right: int = 0) -> Tensor:
    """1 for tokens, 0 for padding; the first sequence has none."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, :left] = 0
    if right:
        mask[1:, -right:] = 0
    return mask


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Some input of the right kind."""
    name = type(model).__name__
    if name == "ViTModel":
        return {"pixel_values": torch.randn(2, 3, 24, 24)}
    if name == "WhisperModel":
        return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens(2, 9)}
    if name == "T5ForConditionalGeneration":
        return {"input_ids": tokens(2, 13), "decoder_input_ids": tokens(2, 9)}
    return {"input_ids": tokens()}


def output_of(model: Any, **inputs: Any) -> Tensor:
    """Logits, or the last hidden state."""
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "mistral": mistral,
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "t5": t5,
    "whisper": whisper,
}
