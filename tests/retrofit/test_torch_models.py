"""``regard.retrofit`` on plain torch: nn.MultiheadAttention, torch's Transformer layers, and the hosts of regard.nn."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import RetrofitError, UnsupportedMaskError
from regard.masks import Causal, SlidingWindow
from tests.retrofit.probes import Gated, KeysOnly, SquareOnly, Unmasked, Watching

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def attention(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def both(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    before = module(*args, **kwargs)
    with regard.retrofit(module, "full"):
        return before, module(*args, **kwargs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("grad", [True, False])
def test_multihead_attention(batch_first: bool, options: dict[str, Any], grad: bool) -> None:
    module = attention(batch_first=batch_first, **options)
    query = torch.randn(3, 7, 16)
    key, value = torch.randn(3, 9, options.get("kdim", 16)), torch.randn(3, 9, options.get("vdim", 16))
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    with torch.set_grad_enabled(grad):
        for extra in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            before, within = both(module, query, key, value, **extra)
            torch.testing.assert_close(within, before, **CLOSE)
    unbatched = both(module, *(t[:, 0] if not batch_first else t[0] for t in (query, key, value)))
    torch.testing.assert_close(unbatched[1], unbatched[0], **CLOSE)


@pytest.mark.parametrize("float_masks", [False, True])
def test_masks_of_torch_mean_the_opposite(float_masks: bool) -> None:
    module, x = attention(), torch.randn(3, 7, 16)
    hidden = torch.rand(3, 7) < 0.3
    hidden[:, 0] = False
    triangle = torch.ones(7, 7, dtype=torch.bool).triu(1)
    per_head = torch.rand(12, 7, 7) < 0.3
    per_head[..., 0] = False

    def form(mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_fill(mask, float("-inf")) if float_masks else mask

    cases: list[dict[str, Any]] = [
        {"key_padding_mask": form(hidden)},
        {"attn_mask": form(triangle)},
        {"attn_mask": form(triangle), "is_causal": True},
        {"attn_mask": form(triangle), "key_padding_mask": form(hidden)},
        {"attn_mask": form(per_head), "key_padding_mask": form(hidden)},
    ]
    for case in cases:
        case["need_weights"] = False
        before, within = both(module, x, x, x, **case)
        torch.testing.assert_close(within[0], before[0], **CLOSE)
    watching = Watching()
    with regard.retrofit(module, watching):
        for case in cases:
            module(x, x, x, **case)
    assert [request.causal for request, *_ in watching.seen] == [False, True, True, True, False]
    assert [request.keys is not None for request, *_ in watching.seen] == [True, False, False, True, False]
    with regard.retrofit(module, Unmasked()):
        module(x, x, x, attn_mask=form(triangle))
        with pytest.raises(UnsupportedMaskError):
            module(x, x, x, key_padding_mask=form(hidden))
    with regard.retrofit(module, KeysOnly()), pytest.raises(UnsupportedMaskError):
        module(x, x, x, attn_mask=form(per_head))


def test_an_additive_mask_is_a_bias() -> None:
    module, x, bias = attention(), torch.randn(3, 7, 16), torch.randn(7, 7)
    before, within = both(module, x, x, x, attn_mask=bias, need_weights=False)
    torch.testing.assert_close(within[0], before[0], **CLOSE)
    with regard.retrofit(module, "sliding_window"), pytest.raises(UnsupportedMaskError, match="bias"):
        module(x, x, x, attn_mask=bias)


def test_another_mechanism() -> None:
    module, x = attention(), torch.randn(3, 7, 16)
    rule = SlidingWindow(3).dense(7, 7)[0, 0]
    by_hand = module(x, x, x, attn_mask=~rule, average_attn_weights=False)
    with regard.retrofit(module, "sliding_window", window=3, sinks=0, block_size=2):
        within = module(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(within, by_hand, **CLOSE)


def encoder(batch_first: bool = True, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=options.pop("dropout", 0.0), batch_first=batch_first, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_shortcut_of_torchs_encoder_does_not_go_around_it(grad: bool, padded: bool, causal: bool) -> None:
    model, x = encoder(), torch.randn(3, 7, 16)
    inputs: dict[str, Any] = {}
    if padded:
        inputs["src_key_padding_mask"] = torch.arange(7) >= torch.tensor([7, 5, 4])[:, None]
    if causal:
        inputs["mask"] = nn.Transformer.generate_square_subsequent_mask(7)
    real = ~inputs["src_key_padding_mask"] if padded else torch.ones(3, 7, dtype=torch.bool)
    watching = Watching()
    with torch.set_grad_enabled(grad):
        before = model(x, **inputs)
        with regard.retrofit(model, watching) as handle:
            within = model(x, **inputs)
        after = model(x, **inputs)
    assert list(handle.modules) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert [request.causal for request, *_ in watching.seen] == [causal] * 2
    torch.testing.assert_close(within[real], before[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(after, before)
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert model.use_nested_tensor == encoder().use_nested_tensor


def test_a_whole_transformer_with_cross_attention() -> None:
    model = nn.Transformer(16, 4, 2, 2, 24, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
    causal: dict[str, Any] = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(5), "tgt_is_causal": True}
    before = model(source, target, **causal)
    with regard.retrofit(model, "full") as handle:
        torch.testing.assert_close(model(source, target, **causal), before, atol=1e-5, rtol=1e-5)
        assert len(handle.modules) == 6
    with regard.retrofit(model, SquareOnly(), layers="re:self_attn"):
        torch.testing.assert_close(model(source, target, **causal), before, atol=1e-5, rtol=1e-5)


def test_gradients_and_dropout_in_training() -> None:
    module, x = attention(dropout=0.4), torch.randn(3, 7, 16)
    module.train()

    def run(need_weights: bool = True) -> list[Tensor]:
        module.zero_grad()
        torch.manual_seed(3)
        output, _ = module(x, x, x, need_weights=need_weights)
        output.square().sum().backward()
        return [output, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    before = run()
    with regard.retrofit(module, "full"):
        within = run()
    for ours, theirs in zip(within, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_is_not_supported_is_told() -> None:
    for option in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(RetrofitError, match="add_bias_kv"):
            regard.retrofit(nn.MultiheadAttention(16, 4, **option), "full")
    module, x = attention(), torch.randn(1, 7, 16)
    with regard.retrofit(module, Gated()):
        module(x, x, x, need_weights=False)
        with pytest.raises(RetrofitError, match="need_weights=False"):
            module(x, x, x)
        nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)])
        with pytest.raises(RetrofitError, match="nested"):
            module(nested, nested, nested)


def test_hosts_of_this_library() -> None:
    from regard.nn import MultiHeadAttention

    model = nn.Sequential(
        MultiHeadAttention(16, 4, "full", num_kv_heads=2), MultiHeadAttention(16, 4, "full", rotary=True)
    )
    x = torch.randn(2, 9, 16)
    before, names = model(x), list(model.state_dict())
    rule = Causal() & SlidingWindow(3)
    by_hand = model[0](x, mask=rule)
    with regard.retrofit(model, "sliding_window", window=3, sinks=0) as handle:
        assert list(handle.modules) == ["0.mechanism", "1.mechanism"]
        torch.testing.assert_close(model[0](x, causal=True), by_hand, **CLOSE)
        assert list(model.state_dict()) == names
        with regard.capture(model) as trace:
            model(x)
    assert torch.equal(trace[0].weights > 0, SlidingWindow(3).dense(9, 9).expand(2, 4, 9, 9))
    with regard.retrofit(model, "test_tempered"), regard.capture(model) as trace:
        torch.testing.assert_close(model(x), before, **CLOSE)
    with regard.capture(model) as own:
        assert torch.equal(model(x), before)
    torch.testing.assert_close(own.stack("weights"), trace.stack("weights"), **CLOSE)
    assert torch.equal(model(x), before)
