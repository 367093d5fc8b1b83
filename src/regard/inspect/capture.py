"""``with regard.capture(model) as trace:`` shows what each attention layer did, without changing the model's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import OptionError, UnknownNameError
from regard.kernels import expand_groups
from regard.retrofit.handle import open_sites
from regard.retrofit.sites import Selector, Site, discover, select
from regard.retrofit.switch import Call, Weights

__all__ = ["LayerTrace", "Trace", "capture"]

Kind = Literal["weights", "head_outputs", "values", "queries", "keys", "hidden_states"]
_KINDS: tuple[Kind, ...] = get_args(Kind)
_USUAL: tuple[Kind, ...] = ("weights", "head_outputs", "values", "hidden_states")


@dataclass(eq=False)
class LayerTrace:
    """One call of one attention layer; what was not asked for is None.

    ``weights`` ``(batch, num_heads, q_len, k_len)``: attention weights; of a mechanism that is not linear in the values
    there are none. ``head_outputs`` ``(batch, num_heads, q_len, value_dim)``: before the output projection. ``values``
    ``(batch, kv_heads, k_len, value_dim)`` and ``keys``, ``queries``: as attention got them, rotated where the model
    rotates, cached ones included. ``hidden_states`` ``(batch, length, embed_dim)``: what enters the block of the layer
    (the residual stream), in the model's own axes. ``summary``: what ``summarize`` made of the call; ``queries_seen``:
    how many queries it had.
    """

    path: str
    weights: Tensor | None = None
    head_outputs: Tensor | None = None
    values: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    hidden_states: Tensor | None = None
    summary: Any = None
    _sources: dict[str, Tensor] = field(default_factory=dict, repr=False)
    queries_seen: int = 0
    _asking: Weights | None = field(default=None, repr=False)

    def weight_rows(self, rows: int = 256, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """The weights from query ``first`` on, so many queries at a time: ``(the first of them, (batch, num_heads,
        rows, k_len))``, never all of them at once for softmax attention. Only while the layer runs: in the
        ``summarize`` of :class:`capture`."""
        if self._asking is None:
            raise OptionError(
                f"The call of {self.path} is over, and its weights are gone. Read weight_rows() inside "
                "capture(model, summarize=...)."
            )
        for start in range(first, self.queries_seen, rows):
            with torch.no_grad():
                found = self._asking(slice(start, start + rows))
            if found is None:
                return
            yield start, found.detach()

    def gradient(self, name: str) -> Tensor:
        """The gradient of what was run backward with respect to ``name``, in its shape; needs ``gradients=True``.

        That of ``weights`` is ``head_outputs' gradient @ values^T``: how the loss answers to each weight by itself.
        """
        if name not in _KINDS:
            raise UnknownNameError("captured tensor", name, _KINDS)
        if name == "weights":
            values = self._sources.get("values")
            if values is None or self.weights is None:
                raise self._no_gradient(name)
            outputs = self.gradient("head_outputs")
            return outputs @ expand_groups(values.detach(), outputs.shape[1]).transpose(-1, -2)
        source = self._sources.get(name)
        if source is None or source.grad is None:
            raise self._no_gradient(name)
        return source.grad.transpose(1, 2) if name == "head_outputs" else source.grad

    def _no_gradient(self, name: str) -> OptionError:
        return OptionError(
            f"There is no gradient of {name} at {self.path}. It takes capture(model, ({name!r}, ...), gradients=True), "
            "a forward pass with gradients enabled inside the block, and backward() before asking."
        )


class Trace:
    """What :func:`capture` saw: :class:`LayerTrace` by module path, or by position, in the model's order."""

    def __init__(self, paths: list[str]) -> None:
        self._order = paths
        self._calls: dict[str, list[LayerTrace]] = {}

    @property
    def paths(self) -> list[str]:
        """Module paths of the layers that were called."""
        return [path for path in self._order if path in self._calls]

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[LayerTrace]:
        return (self._calls[path][-1] for path in self.paths)

    def __getitem__(self, layer: int | str) -> LayerTrace:
        """The latest call of a layer."""
        return self.calls(layer)[-1]

    def calls(self, layer: int | str) -> list[LayerTrace]:
        """All calls of a layer that were kept (``keep="all"``), the oldest first."""
        paths = self.paths
        if isinstance(layer, int):
            if not -len(paths) <= layer < len(paths):
                raise OptionError(f"Layer {layer} was not seen; the trace holds {len(paths)} layers.")
            layer = paths[layer]
        if layer not in self._calls:
            raise UnknownNameError("captured layer", layer, paths, f"Captured: {', '.join(paths) or 'nothing yet'}.")
        return self._calls[layer]

    def stack(self, name: str) -> Tensor:
        """One kind of tensor of all layers, ``(layers, ...)``; the shapes must agree."""
        if name not in _KINDS:
            raise UnknownNameError("captured tensor", name, _KINDS)
        tensors = [getattr(layer, name) for layer in self]
        shapes = {None if tensor is None else tuple(tensor.shape) for tensor in tensors}
        if len(shapes) != 1 or None in shapes:
            raise OptionError(f"{name} of these layers cannot be stacked: {shapes or 'nothing was captured'}.")
        return torch.stack(tensors)

    def clear(self) -> None:
        """Forget all calls seen so far."""
        self._calls.clear()

    def _add(self, entry: LayerTrace, keep_all: bool) -> None:
        kept = self._calls.setdefault(entry.path, [])
        if not keep_all:
            kept.clear()
        kept.append(entry)


class _Recorder:
    """Watches the switches and fills a trace."""

    def __init__(
        self,
        trace: Trace,
        asked: frozenset[str],
        gradients: bool,
        keep_all: bool,
        summarize: Callable[[LayerTrace], Any] | None,
    ) -> None:
        self.trace, self.asked, self.gradients, self.keep_all = trace, asked, gradients, keep_all
        self.summarize = summarize
        self.entering: dict[int, Tensor] = {}

    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        candidates = [kwargs.get("hidden_states"), *args, *kwargs.values()]
        for tensor in candidates:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() >= 2:
                self.entering[id(block)] = tensor
                return

    def leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.entering.pop(id(block), None)

    def observe(self, site: Site, call: Call, output: Tensor, weights: Weights) -> None:
        seen = {
            "head_outputs": output,
            "values": call.value,
            "queries": call.query,
            "keys": call.key,
            "hidden_states": self.entering.get(id(site.block)),
        }
        entry = LayerTrace(site.path, queries_seen=call.query.shape[2])
        if self.gradients:
            wanted = self.asked | ({"head_outputs", "values"} if "weights" in self.asked else frozenset())
            for name in wanted & seen.keys():
                tensor = seen[name]
                if tensor is not None and tensor.requires_grad:
                    tensor.retain_grad()
                if tensor is not None:
                    entry._sources[name] = tensor
        for name in self.asked & seen.keys():
            tensor = seen[name]
            if tensor is not None:
                tensor = tensor.transpose(1, 2) if name == "head_outputs" else tensor
                setattr(entry, name, tensor if self.gradients else tensor.detach())
        if "weights" in self.asked:
            with torch.no_grad():
                found = weights()
            entry.weights = None if found is None else found.detach()
        if self.summarize is not None:
            entry._asking = weights
            entry.summary = self.summarize(entry)
            # The call's tensors are held no longer than the layer runs.
            entry._asking = None
        self.trace._add(entry, self.keep_all)


class capture:
    """Watch a model's attention: ``with regard.capture(model) as trace: model(**inputs)``.

    Works on what :func:`regard.retrofit` works on, retrofitted or not; the weights of a retrofitted layer are those
    that its mechanism implies. The model computes what it would compute otherwise, and is untouched afterwards.

    record: what to keep (see :class:`LayerTrace`): one or several of "weights", "head_outputs", "values", "queries",
    "keys" and "hidden_states", or "all"; by default all but queries and keys, and nothing beside a ``summarize``.
    Tensors are detached and nothing else is held. gradients: keep them in the graph, so that
    ``trace[path].gradient(name)`` answers after ``backward()``. layers: which, as in :func:`regard.retrofit`. keep: the
    latest call of a layer, or 'all' (each step of ``generate``). summarize: called with each :class:`LayerTrace` while
    its layer runs; what it returns is the trace's ``summary``. It may read weights in rows (``weight_rows``), so that
    maps of long texts never exist whole.

    Weights are the model's own where its attention returns them (eager), and softmax of its own logits otherwise; in
    training those of a retrofitted mechanism are taken in evaluation mode. torch's encoder layers leave their fused
    shortcut while they are watched, which moves their output by rounding errors, and no longer zero padded positions.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Kind | Literal["all"] | Collection[Kind] | None = None,
        *,
        gradients: bool = False,
        layers: Selector = None,
        keep: Literal["last", "all"] = "last",
        summarize: Callable[[LayerTrace], Any] | None = None,
    ) -> None:
        if keep not in ("last", "all"):
            raise OptionError(f"keep is 'last' or 'all', got {keep!r}.")
        self._model = model
        self._sites = discover(model)
        self._chosen = select(self._sites, layers)
        self._asked = _asked(record, summarize is not None)
        self._gradients, self._keep_all, self._summarize = gradients, keep == "all", summarize
        self._closing: ExitStack | None = None

    def __enter__(self) -> Trace:
        if self._closing is not None:
            raise OptionError("This capture is in use already; make another one with regard.capture(model).")
        trace = Trace([site.path for site in self._chosen])
        recorder = _Recorder(trace, self._asked, self._gradients, self._keep_all, self._summarize)
        closing = ExitStack()
        try:
            for switch in open_sites(self._model, self._sites, self._chosen, closing, watching=True):
                switch.observers.append(recorder)
                closing.callback(switch.observers.remove, recorder)
            if "hidden_states" in self._asked:
                blocks = {id(site.block): site.block for site in self._chosen}
                for block in blocks.values():
                    before = block.register_forward_pre_hook(recorder.enter_block, with_kwargs=True)
                    after = block.register_forward_hook(recorder.leave_block, always_call=True)
                    closing.callback(before.remove)
                    closing.callback(after.remove)
        except BaseException:
            closing.close()
            raise
        self._closing = closing
        return trace

    def __exit__(self, *exception: object) -> None:
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.close()


def _asked(record: str | Collection[str] | None, summarized: bool) -> frozenset[str]:
    if record is None:
        return frozenset(() if summarized else _USUAL)
    named = _KINDS if record == "all" else (record,) if isinstance(record, str) else record
    for name in named:
        if name not in _KINDS:
            raise UnknownNameError("captured tensor", name, _KINDS)
    return frozenset(named)
