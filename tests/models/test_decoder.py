"""The small language model with nano's parts."""

from __future__ import annotations

import pytest
import torch

from regard.models.decoder import Decoder, positions_of

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 3, "hidden": 40, "max_length": 16}


def test_with_full_it_is_nano() -> None:
    pytest.importorskip("transformers")
    from regard.models.nano.train import Shape, new_model

    torch.manual_seed(0)
    theirs = new_model(Shape(256, hidden=24, intermediate=40, layers=2, heads=3, key_value_heads=3, context=16)).eval()
    mine = Decoder(**SIZES).eval()  # type: ignore[arg-type]
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
    names |= {
        f"attention.{ours}": f"self_attn.{its}_proj"
        for ours, its in zip(("query", "key", "value", "out"), "qkvo", strict=True)
    }
    weights = {name: torch.randn_like(p) * 0.2 for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(weights[name])
        own = dict(mine.named_parameters())
        own.pop("embed.weight").copy_(weights["model.embed_tokens.weight"])
        own.pop("norm.weight").copy_(weights["model.norm.weight"])
        for name, p in own.items():
            _, index, part = name.removesuffix(".weight").split(".", 2)
            p.copy_(weights[f"model.layers.{index}.{names[part]}.weight"])
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
    tokens = torch.randint(256, (2, 16))
    torch.testing.assert_close(mine(tokens), theirs(input_ids=tokens).logits, atol=1e-4, rtol=1e-4)


def test_it_begins_as_nano_begins() -> None:
    mine = Decoder(**{**SIZES, "embed_dim": 96})  # type: ignore[arg-type]
    assert mine.head.weight is mine.embed.weight
    assert mine.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for block in mine.blocks:
        assert not block.mlp.down.weight.any() and block.mlp.gate.weight.std().item() == pytest.approx(
            96**-0.5 / 2, rel=0.1
        )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name, kind", [("full", "rotary"), ("gda", "rotary"), ("afa", "none"), ("better_attention_efficient", "learned")]
)
def test_attention_without_rotary_positions_gets_learned_ones(name: str, kind: str) -> None:
    assert positions_of(name) == kind
    torch.manual_seed(0)
    model = Decoder(**{**SIZES, "num_heads": 4}, mechanism=name).eval()  # type: ignore[arg-type]
    assert (model.positions is None) == (kind != "learned")
    tokens = torch.tensor([[5, 7, 9, 5]])
    swapped = tokens[:, [1, 0, 2, 3]]
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=1e-6), "order matters"
