"""LongHeads in live models with rotary positions: its numbers, generation with the model's own cache, the way back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DynamicCache

import regard
from regard.bench.compare import applicable
from regard.errors import OptionError, RetrofitError, UnsupportedMaskError
from regard.layers.rotary import rotary_angles
from regard.nn import MultiHeadAttention
from regard.retrofit.longheads import apply_longheads
from regard.sparse.longheads import LongHeads
from tests.retrofit.small_models import VOCABULARY, gpt2, llama, mistral


def tokens(length: int = 110, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.paper("longheads")
@torch.no_grad()
def test_nothing_changes_up_to_attn_length_nor_after_restoring() -> None:
    model, ids = llama().eval(), tokens()
    before = model(ids).logits
    with apply_longheads(model, 112, 16) as handle:
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert not handle.active
    with apply_longheads(model, 48, 16):
        changed = model(ids).logits
    torch.testing.assert_close(changed[:, :48], before[:, :48], rtol=1e-5, atol=1e-5)
    assert float((changed - before)[:, 64:].abs().max()) > 0.1
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.paper("longheads")
@torch.no_grad()
def test_a_layer_is_the_mechanism_on_its_own_projections() -> None:
    model, ids = llama().eval().double(), tokens()
    layer = model.model.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.q_proj.register_forward_hook(lambda _, args, out: seen.update(hidden=args[0])),
        layer.o_proj.register_forward_hook(lambda _, args, out: seen.update(heads=args[0])),
    ]
    with apply_longheads(model, 48, 16, layers=[0]):
        model(ids)
    for hook in hooks:
        hook.remove()
    query, key, value = (
        proj(seen["hidden"]).unflatten(-1, (-1, 8)).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    base = float(model.config.rope_parameters["rope_theta"])
    expected = LongHeads(48, 16, rope=base)(query, key, value, causal=True)
    # The model forms its angles in float32.
    torch.testing.assert_close(seen["heads"], expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-4)
    assert rotary_angles(2, 8, base=base)[0].shape == (2, 8)


@pytest.mark.paper("longheads")
@torch.no_grad()
def test_cached_steps_equal_one_pass() -> None:
    model, ids = llama().eval().double(), tokens()
    with apply_longheads(model, 48, 16):
        expected = model(ids).logits
        cache, outs = DynamicCache(), []
        for piece in ids.split([60, 1, 1, 20, 1, 13, 1, 13], 1):
            outs.append(model(piece, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-4)
        made = model.generate(ids[:, :70], max_new_tokens=30, do_sample=False)
        greedy = model(made).logits.argmax(-1)
        assert torch.equal(greedy[:, 69:-1], made[:, 70:])
        # Two texts side by side do not mix.
        caches = DynamicCache(), DynamicCache()
        for cache, start in zip(caches, (0, 5), strict=True):
            model(ids[:, start : start + 70], past_key_values=cache)
        first = model(ids[:, 70:71], past_key_values=caches[0]).logits
        torch.testing.assert_close(first[:, 0], expected[:, 70], rtol=1e-4, atol=1e-4)


@pytest.mark.paper("longheads")
@torch.no_grad()
def test_by_name_it_would_rotate_twice() -> None:
    model = llama()
    for choice in ("longheads", LongHeads(48, 16)):
        with pytest.raises(RetrofitError, match="apply_longheads"):
            regard.retrofit(model, choice)
    assert "applies rotary positions itself" in applicable("longheads")
    with pytest.raises(OptionError, match="leave rotary out"):
        MultiHeadAttention(32, 4, "longheads", rotary=True)


@pytest.mark.paper("longheads")
def test_what_it_cannot_do_is_refused() -> None:
    model, ids = llama().eval(), tokens(80)
    cache = DynamicCache()
    model(ids[:, :60], past_key_values=cache)
    with apply_longheads(model, 48, 16):
        with pytest.raises(RetrofitError, match="has not seen"):
            model(ids[:, 60:], past_key_values=cache)
        with pytest.raises(RetrofitError, match="beam"):
            model.generate(ids[:, :70], max_new_tokens=12, num_beams=3)
        padding = torch.ones_like(ids)
        padding[0, :7] = 0
        with pytest.raises(UnsupportedMaskError, match="padding"):
            model(ids, attention_mask=padding)
    with pytest.raises(RetrofitError):
        apply_longheads(gpt2(), 48, 16)
    windowed = mistral().eval()
    with apply_longheads(windowed, 48, 16), pytest.raises(UnsupportedMaskError, match="sliding window"):
        windowed(ids)
    with pytest.raises(OptionError):
        apply_longheads(model, 50, 16)
    with apply_longheads(model, chunk=16) as handle:
        assert {m.attn_length for m in handle.modules.values()} == {256}  # type: ignore[union-attr]
