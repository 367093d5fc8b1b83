"""More of transformers, with what makes its families differ: value widths, shared layers, several configs, windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import RetrofitError
from tests.retrofit.small_models import VOCABULARY, padding, tokens, wide

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = BASE | {"num_key_value_heads": 2, "head_dim": 8}
TOWER = {k: BASE[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
PICTURES = TOWER | {"image_size": 16, "patch_size": 8}

# What stands out in each, then its layers.
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "partly rotary": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BASE, 2),
    "queries scaled before": ("OPTForCausalLM", "OPTConfig", BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, 2),
    "norms on queries and keys": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, 2),
    "windows and full layers in turn, own scale": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | {"sliding_window": 5, "query_pre_attn_scalar": 16},
        2,
    ),
    "chunks and full layers in turn": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        GROUPED | {"num_local_experts": 2, "attention_chunk_size": 6, "intermediate_size_mlp": 48},
        2,
    ),
    "values narrower than keys": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        BASE
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "first_k_dense_replace": 2,
        },
        2,
    ),
    "windows to both sides": (
        "ModernBertModel",
        "ModernBertConfig",
        BASE | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        2,
    ),
    "one layer used twice": ("AlbertModel", "AlbertConfig", BASE | {"embedding_size": 16}, 1),
    "two towers with a config each": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TOWER | {"vocab_size": VOCABULARY}, "vision_config": PICTURES, "projection_dim": 16},
        4,
    ),
    "a torch layer on top": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": TOWER | {"vocab_size": VOCABULARY}, "vision_config": PICTURES},
        5,
    ),
    "shifted windows with a bias as mask": (
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4},
        3,
    ),
}


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    if "logits_per_image" in result:
        return torch.cat((result.text_embeds, result.image_embeds))
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_full_gives_the_models_own_numbers(name: str) -> None:
    import transformers

    model_class, config_class, options, layers = MODELS[name]
    model = wide(getattr(transformers, model_class)(getattr(transformers, config_class)(**options)))
    inputs: dict[str, Tensor] = {}
    if "Swin" not in model_class:
        inputs["input_ids"] = tokens(2, 15)
    if model_class in ("CLIPModel", "SiglipModel", "SwinModel"):
        size = 32 if model_class == "SwinModel" else 16
        inputs["pixel_values"] = torch.randn(2, 3, size, size)
    cases = [inputs]
    if not inputs.keys() & {"pixel_values"}:
        cases.append(inputs | {"attention_mask": padding(2, 15, left=4)})
    for case in cases:
        before = outputs(model, case)
        with regard.retrofit(model, "full") as handle:
            within = outputs(model, case)
        with regard.capture(model) as trace:
            watched = outputs(model, case)
        assert len(handle.modules) == len(trace) == layers
        real = case["attention_mask"].bool() if "attention_mask" in case else ...
        torch.testing.assert_close(within[real], before[real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(watched[real], before[real], atol=1e-6, rtol=1e-6)
        assert torch.equal(outputs(model, case), before)


def test_a_mechanism_sees_narrow_values_and_each_towers_own_sizes() -> None:
    import transformers

    model_class, config_class, options, _ = MODELS["values narrower than keys"]
    model = wide(getattr(transformers, model_class)(getattr(transformers, config_class)(**options)))
    with regard.retrofit(model, "sliding_window", window=4), regard.capture(model) as trace:
        outputs(model, {"input_ids": tokens(2, 15)})
    assert trace.stack("values").shape == (2, 2, 4, 15, 6) and trace.stack("weights").shape == (2, 2, 4, 15, 15)


def test_models_that_write_attention_out_themselves_are_told() -> None:
    from transformers import BloomConfig, BloomModel

    with pytest.raises(RetrofitError, match="No attention layer that can be reached"):
        regard.retrofit(BloomModel(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)), "full")
