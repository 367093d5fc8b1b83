"""Which form of a kernel runs."""

from __future__ import annotations

import pytest
import torch

from regard.errors import BackendError
from regard.kernels import current_backend, dense_attention, linear_attention, use_backend
from regard.kernels.backends import resolve


def test_the_call_beats_the_context() -> None:
    forms = ("reference", "gather")
    assert resolve("k", None, forms) == "auto"
    with use_backend("reference"):
        assert current_backend() == "reference"
        assert resolve("k", None, forms) == "reference"
        assert resolve("k", "gather", forms) == "gather"
        assert resolve("k", "auto", forms) == "auto"
        with use_backend("gather"):
            assert resolve("k", None, forms) == "gather"
        assert resolve("k", None, forms) == "reference"
    assert current_backend() == "auto"


def test_a_context_speaks_to_many_kernels_and_a_call_to_one() -> None:
    """A form that this kernel lacks: ignored from the context, an error from the call."""
    with use_backend("flex"):
        assert resolve("k", None, ("reference",)) == "auto"
    with pytest.raises(BackendError, match=r"k has no backend 'flex'. It has: auto, reference"):
        resolve("k", "flex", ("reference",))


def test_a_failing_block_restores_the_form() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert current_backend() == "auto"


def test_attention_runs_the_asked_form(monkeypatch: pytest.MonkeyPatch) -> None:
    import regard
    from regard.kernels import dense

    x, calls = torch.randn(1, 2, 3, 4), []
    monkeypatch.setattr(dense, "_reference", lambda *a: calls.append("reference") or x)
    monkeypatch.setattr(dense, "_sdpa", lambda *a: calls.append("sdpa") or x)
    regard.attention(x, x, x)
    with regard.use_backend("reference"):
        regard.attention(x, x, x)
    assert calls == ["sdpa", "reference"]


def test_one_graph_and_a_new_one_when_the_form_changes() -> None:
    """torch.compile sees the choice of form: no graph break, and no stale choice."""
    x, graphs = torch.randn(1, 2, 5, 4, dtype=torch.float64), []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: dense_attention(t, t, t, causal=True), backend=keep, fullgraph=True, dynamic=False
    )
    first = compiled(x)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(x), first)
    assert ["scaled_dot_product_attention" in code for code in graphs] == [True, False]
    compiled = torch.compile(
        lambda t: linear_attention(t, t, t, causal=True)[0], backend=keep, fullgraph=True, dynamic=False
    )
    torch.testing.assert_close(compiled(x), linear_attention(x, x, x, causal=True)[0])
