"""The small transformer of the experiments: shapes, positions, pooling, padding and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError, UnsupportedPatternError
from regard.masks import KeyPadding
from regard.models.sequence import SequenceModel
from regard.nn import MultiHeadAttention


def model(**options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(5, **{"vocab_size": 11, "embed_dim": 16, **options}).double()


def words(length: int = 12, batch: int = 3) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mechanism", ["full", "moba", "moh", "gda"])
@pytest.mark.parametrize("positions", ["rotary", "learned", "none"])
def test_causal_by_default(mechanism: str, positions: str) -> None:
    made, x = model(mechanism=mechanism, positions=positions), words()
    out = made(x)
    assert out.shape == (3, 12, 5)
    changed = x.clone()
    changed[:, 7:] = (x[:, 7:] + 1) % 11
    torch.testing.assert_close(made(changed)[:, :7], out[:, :7])
    assert float((made(changed)[:, 7:] - out[:, 7:]).detach().abs().max()) > 1e-3


def test_positions_are_what_tells_orders_apart() -> None:
    x = words()
    order = torch.randperm(12)
    for mechanism in ("full", "gda"):
        for positions, differs in (("none", False), ("rotary", True), ("learned", True)):
            made = model(mechanism=mechanism, positions=positions, causal=False, pool="mean")
            if made.positions is not None:
                torch.nn.init.normal_(made.positions)
            gap = float((made(x[:, order]) - made(x)).detach().abs().max())
            assert (gap > 1e-4) == differs, (mechanism, positions, gap)


def test_pooling() -> None:
    x = words()
    kept = {pool: model(pool=pool) for pool in ("none", "mean", "last")}
    torch.testing.assert_close(kept["last"](x), kept["none"](x)[:, -1])
    # The head is affine, so pooling before it is pooling after it.
    torch.testing.assert_close(kept["mean"](x), kept["none"](x).mean(1))


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(pool: str, causal: bool) -> None:
    made, x = model(pool=pool, causal=causal), words()
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[1, 8:] = False
    out = made(x, mask=KeyPadding(valid))
    torch.testing.assert_close(out[1:2], made(x[1:2, :8]))
    torch.testing.assert_close(out[:1], made(x[:1]))
    assert bool(made(x, mask=KeyPadding(torch.zeros_like(valid))).isfinite().all())


def test_vectors_and_a_grid() -> None:
    made = model(vocab_size=None, input_dim=3, grid=(4, 3), causal=False, pool="mean")
    assert made(torch.randn(2, 12, 3, dtype=torch.float64)).shape == (2, 5)


def test_one_mechanism_per_layer() -> None:
    made = model(mechanism=["full", "gda"], options=[{}, {"num_noise_heads": 2}], num_kv_heads=2)
    first, second = (block.get_submodule("attention") for block in made.blocks)
    assert isinstance(first, MultiHeadAttention) and first.num_kv_heads == 2 and first.rotary
    assert second.num_noise_heads == 2 and second.layer_index == 1
    made(words()).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_layers_that_are_always_or_never_causal() -> None:
    """They name no ``causal``; the model's has to be what they are."""
    gated, x = model(mechanism="tnl_attention", positions="none"), words()
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % 11
    assert torch.equal(gated(x)[:, :-1], gated(changed)[:, :-1])
    whole = model(mechanism="set_attention_block", positions="none", causal=False, grid=(3, 4))
    assert not torch.allclose(whole(x)[:, :-1], whole(changed)[:, :-1])
    with pytest.raises(UnsupportedPatternError, match="set_attention_block is never causal; got causal=True"):
        model(mechanism="set_attention_block", positions="none")
    with pytest.raises(UnsupportedPatternError, match="always causal"):
        model(mechanism="tnl_attention", positions="none", causal=False)


def test_errors() -> None:
    with pytest.raises(OptionError, match="one of the two"):
        SequenceModel(5)
    with pytest.raises(OptionError, match="one of the two"):
        SequenceModel(5, vocab_size=3, input_dim=4)
    for options in ({"positions": "sinus"}, {"pool": "max"}):
        with pytest.raises(OptionError, match="documented"):
            model(**options)
    with pytest.raises(OptionError, match="per layer"):
        model(mechanism=["full"])
    with pytest.raises(ShapeError, match="max_length"):
        model(positions="learned", max_length=8)(words())
