"""Watching logits: the numbers are those of the layers' own queries and keys, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.errors import OptionError, UnknownNameError
from regard.inspect.logits import LogitMonitor, instability_flags
from regard.local.ls_attention import LongShortAttention
from regard.nn import MultiHeadAttention


def logits_of(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5


@pytest.mark.paper("ls_attention")
def test_largest_logit_of_every_head_over_the_pairs_that_it_sees() -> None:
    model = nn.Sequential(LongShortAttention(32, 4, local_heads=1, window=3), LongShortAttention(32, 4, local_heads=4))
    x, big = torch.randn(2, 30, 32), 4 * torch.randn(2, 30, 32)
    expected = model(x)
    with LogitMonitor(model) as monitor:
        assert torch.equal(model(x), expected)
        model(big)
    assert monitor.paths == [
        "0.groups.local.mechanism",
        "0.groups.global.mechanism",
        "1.groups.local.mechanism",
    ]
    gap = torch.arange(30)[:, None] - torch.arange(30)
    for name, seen in (("local", (gap >= 0) & (gap <= 3)), ("global", gap >= 0)):
        group, own = model[0].groups[name], monitor.history(f"0.groups.{name}.mechanism")
        assert own.shape == (2, group.num_heads)
        for call, inputs in enumerate((x, big)):
            query, key, _ = group.project(inputs)
            found = (logits_of(query, key).abs() * seen).amax((0, 2, 3))
            torch.testing.assert_close(own[call], found.detach())
    peak, latest = monitor.peak(), monitor.latest()
    for path in monitor.paths:
        assert torch.equal(peak[path], monitor.history(path).amax(0))
        assert torch.equal(latest[path], monitor.history(path)[-1])
    assert not any("forward" in module.__dict__ for module in model.modules()), "the model is left as it was"


def test_hosts_of_regard_and_retrofitted_layers() -> None:
    model, x = nn.Sequential(MultiHeadAttention(32, 4, num_kv_heads=2)), torch.randn(2, 20, 32)
    query, key, _ = model[0].project(x)
    scores = logits_of(query, key.repeat_interleave(2, 1)).abs()
    with LogitMonitor(model) as monitor:
        model(x)
        with regard.retrofit(model, "sliding_window", window=4, sinks=0):
            model(x)
    (path,) = monitor.paths
    gap = (torch.arange(20)[:, None] - torch.arange(20)).abs()
    torch.testing.assert_close(monitor.history(path)[0], scores.amax((0, 2, 3)).detach())
    torch.testing.assert_close(monitor.history(path)[1], (scores * (gap < 4)).amax((0, 2, 3)).detach())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_hugging_face_models(family: str) -> None:
    small = pytest.importorskip("tests.retrofit.small_models")
    model = small.FAMILIES[family]("eager")
    inputs = small.inputs_of(model)
    with torch.no_grad(), LogitMonitor(model) as monitor, regard.capture(model, "all") as trace:
        small.output_of(model, **inputs)
    assert monitor.paths == trace.paths
    for path, found in monitor.latest().items():
        layer = trace[path]
        # Differences of logits are those of log-weights; a bias or a scale that was left out would show.
        log = layer.weights.double().log()
        logits = log - log.amax(-1, keepdim=True)
        assert found.shape == (layer.weights.shape[1],)
        spread = -logits.masked_fill(layer.weights == 0, 0).amin((0, 2, 3))
        assert bool((spread <= 2 * found + 1e-4).all()), "logits in [-m, m] are at most 2 m apart"
        if family == "llama":
            keys = layer.keys.repeat_interleave(2, 1)
            seen = (logits_of(layer.queries, keys).abs() * (layer.weights > 0)).amax((0, 2, 3))
            torch.testing.assert_close(found, seen)


def test_torch_layers_and_long_sequences() -> None:
    """Rows are taken in pieces; the pieces make the whole."""
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])
    x = torch.randn(1, 1100, 8)
    x[0, 900] *= 10
    with LogitMonitor(model, layers="0") as monitor, torch.no_grad():
        model[0](x, x, x, need_weights=False)
    query, key, _ = (
        t.unflatten(-1, (2, 4)).transpose(1, 2)
        for t in nn.functional.linear(x, model[0].in_proj_weight, model[0].in_proj_bias).chunk(3, -1)
    )
    torch.testing.assert_close(monitor.latest()["0"], logits_of(query, key).abs().amax((0, 2, 3)).detach())


def test_every_so_many_calls() -> None:
    model, x = nn.Sequential(MultiHeadAttention(16, 2)), torch.randn(1, 6, 16)
    with LogitMonitor(model, every=3) as monitor:
        for _ in range(7):
            model(x)
    assert monitor.history(monitor.paths[0]).shape == (3, 2)
    monitor.clear()
    assert monitor.paths == [] and monitor.peak() == {}
    with pytest.raises(UnknownNameError, match="nothing"):
        monitor.history("0.mechanism")
    with pytest.raises(OptionError, match="at least 1"):
        LogitMonitor(model, every=0)
    with monitor, pytest.raises(OptionError, match="in use"):
        monitor.__enter__()


def test_spikes_stand_above_the_running_minimum() -> None:
    losses = [4.0, 2.0, 2.9, 3.1, 1.0, 1.4, 1.6, math.nan, math.inf, 0.9]
    assert instability_flags(losses) == [False, False, False, True, False, False, True, True, True, False]
    assert instability_flags(losses, factor=1.35)[2:6] == [True, True, False, True]
    assert instability_flags([]) == []
    with pytest.raises(OptionError, match="exceed 1"):
        instability_flags([1.0], factor=1.0)
