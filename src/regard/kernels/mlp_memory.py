"""A memory that is a small network, trained on the sequence while the sequence is read.

Keys come with values, and a network ``M`` (one per sequence and head) takes a gradient step on ``|M(k_t) - v_t|^2`` per
token, with momentum ``S`` and weight decay, for every weight ``W`` of it:

    S_t = eta_t S_{t-1} - theta_t grad_t,    W_t = (1 - alpha_t) W_{t-1} + S_t,    o_t = M_{W_t}(q_t)

(Behrouz et al., "Titans: Learning to Memorize at Test Time", 2024, arXiv 2501.00663, sections 3.1 and 3.2). Gradients
are taken at the weights before the token's chunk, so within a chunk both are linear recurrences, and a chunk of one
token is gradient descent token by token. ``M(x) = W_D' f(... f(W_1' x))``, or ``x + LN(that)`` with a norm.

A gradient of one token is of rank one, ``a_i^T delta_i`` with the layer's input ``a_i`` and the error ``delta_i`` that
came back to its output. So no token's weights are ever formed: with the lower triangular ``A_ts = prod_{s < r <= t}
(1 - alpha_r)`` and ``E_si = prod_{i < r <= s} eta_r``, a layer under the weights after token ``t`` is

    z W_t = A_t0 z W_0 + (A E_0)_t z S_0 - sum_{i <= t} (A E)_ti theta_i (z . a_i) delta_i

which is masked attention over the chunk: the form ``chunked``, that ``"auto"`` takes. ``scan`` forms the gradients and
weights of all tokens of a chunk by two linear scans; ``recurrent`` goes token by token. All are differentiable. A plain
matrix with neither momentum nor decay that learns token by token is the delta rule with ``beta = 2 theta``, and
``"auto"`` takes that kernel for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.backends import resolve
from regard.kernels.delta_rule import delta_rule
from regard.kernels.linear import LinearState
from regard.kernels.scan import linear_scan
from regard.kernels.shapes import accumulation_dtype

__all__ = ["ACTIVATIONS", "READS", "MemoryNetwork", "MemoryState", "mlp_memory"]

FORMS = ("chunked", "scan", "recurrent")
READS = ("after", "before", "chunk")


def _silu_slope(z: Tensor) -> Tensor:
    gate = z.sigmoid()
    return gate * (1 + z * (1 - gate))


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


_Map = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, tuple[_Map, _Map]] = {
    "silu": (F.silu, _silu_slope),
    "gelu": (F.gelu, _gelu_slope),
    "relu": (F.relu, lambda z: (z > 0).to(z.dtype)),
}
"""Activations by name, each with its derivative."""


@dataclass(frozen=True, eq=False)
class MemoryNetwork:
    """What the network is besides its fast weights. norm: gain and shift ``(heads, value_dim)`` of ``M(x) = x +
    LN(...)``, which are not trained on the sequence; None for ``M(x) = ...`` alone."""

    activation: str = "silu"
    norm: tuple[Tensor, Tensor] | None = None
    eps: float = 1e-5

    def to(self, dtype: torch.dtype) -> MemoryNetwork:
        """The same in another dtype."""
        return self if self.norm is None else replace(self, norm=(self.norm[0].to(dtype), self.norm[1].to(dtype)))

    def __call__(self, weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """``M(x)``: x ``(batch, heads, length, dim)``, weights ``(batch, heads, in, out)`` of each layer."""
        return self.run(len(weights), lambda layer, h: h @ weights[layer], x)[0]

    def run(
        self, depth: int, product: Callable[[int, Tensor], Tensor], x: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """``M(x)`` with products ``product(layer, h)``; each layer's input, and what comes out of its product."""
        activation, inputs, outputs, h = ACTIVATIONS[self.activation][0], [], [], x
        for layer in range(depth):
            inputs.append(h)
            outputs.append(product(layer, h))
            h = activation(outputs[-1]) if layer < depth - 1 else outputs[-1]
        if self.norm is not None:
            gain, shift = self.norm
            h = x + self._normed(h)[0] * gain[:, None] + shift[:, None]
        return h, inputs, outputs

    def gradient(self, weights: tuple[Tensor, ...], key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of ``|M(k) - v|^2``, token by token and layer by layer: inputs ``a`` and errors ``delta``, whose outer
        product is the gradient of the layer's weight."""
        out, inputs, outputs = self.run(len(weights), lambda layer, h: h @ weights[layer], key)
        delta = 2 * (out - value)
        if self.norm is not None:
            normed, spread = self._normed(outputs[-1])
            delta = delta * self.norm[0][:, None]
            along = (delta * normed).mean(-1, keepdim=True) * normed
            delta = (delta - delta.mean(-1, keepdim=True) - along) / spread
        slope, deltas = ACTIVATIONS[self.activation][1], [delta]
        for layer in range(len(weights) - 1, 0, -1):
            delta = (delta @ weights[layer].transpose(-1, -2)) * slope(outputs[layer - 1])
            deltas.append(delta)
        return inputs, deltas[::-1]

    def _normed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` without its mean and divided by its deviation, and that deviation."""
        z = z - z.mean(-1, keepdim=True)
        spread = (z.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return z / spread, spread


@dataclass(frozen=True, eq=False)
class MemoryState:
    """Everything that a later call needs, in the accumulation dtype. weights and momentum ``(batch, heads, in, out)``
    of each layer (momentum None where there is none); base: the weights before the present chunk, at which gradients
    are taken; filled: tokens of that chunk so far."""

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None
    base: tuple[Tensor, ...]
    filled: int = 0

    @classmethod
    def start(cls, weights: tuple[Tensor, ...], batch: int, *, momentum: bool) -> MemoryState:
        """The state before the first token, from initial weights ``(heads, in, out)``."""
        first = tuple(w.to(accumulation_dtype(w.dtype)).expand(batch, -1, -1, -1) for w in weights)
        return cls(first, tuple(torch.zeros_like(w) for w in first) if momentum else None, first)

    def detach(self) -> MemoryState:
        """Cut off from what made it, as training on one stretch after another needs it."""
        parts = (self.weights, self.momentum, self.base)
        weights, momentum, base = (None if part is None else tuple(w.detach() for w in part) for part in parts)
        assert weights is not None and base is not None
        return MemoryState(weights, momentum, base, self.filled)


@dataclass(frozen=True)
class _Gates:
    """Of some tokens, each ``(batch, heads, tokens)``: step sizes, log of what is kept, log of what momentum keeps."""

    rate: Tensor
    keep: Tensor | None
    carry: Tensor | None

    def rows(self, start: int, stop: int) -> _Gates:
        keep, carry = (None if gate is None else gate[..., start:stop] for gate in (self.keep, self.carry))
        return _Gates(self.rate[..., start:stop], keep, carry)


def mlp_memory(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    rate: Tensor,
    state: MemoryState,
    *,
    log_keep: Tensor | None = None,
    log_momentum: Tensor | None = None,
    network: MemoryNetwork | None = None,
    chunk_size: int = 64,
    read: str = "after",
    backend: str | None = None,
) -> tuple[Tensor, MemoryState]:
    """What the queries read, ``(batch, heads, length, value_dim)``, and the state after the last token.

    query and key ``(batch, heads, length, dim)``, value ``(batch, heads, length, value_dim)``; query None writes alone
    (what is read is then empty). rate: ``theta >= 0``; log_keep: ``log(1 - alpha)``, None for no decay; log_momentum:
    ``log eta``, None if and only if the state has no momentum; each ``(batch, heads, length)``, logs at most 0
    (``-inf`` allowed). read: with the weights after the token's own write, before it, or before its whole ``"chunk"``.
    A call may end amid a chunk, which the next one fills up.
    """
    network = MemoryNetwork() if network is None else network
    _check(query, key, value, (rate, log_keep, log_momentum), state, chunk_size, read)
    form = resolve("mlp_memory", backend, FORMS)
    work = accumulation_dtype(key.dtype)
    k, v, q = key.to(work), value.to(work), None if query is None else query.to(work)
    keep, carry = (None if gate is None else gate.to(work) for gate in (log_keep, log_momentum))
    gates, network = _Gates(rate.to(work), keep, carry), network.to(work)
    if form == "auto" and chunk_size == 1 and read == "after" and _is_delta_rule(network, state, keep):
        read_out, after = delta_rule(k if q is None else q, k, v, 2 * gates.rate, state=LinearState(state.weights[0]))
        written = MemoryState((after.sum,), None, (after.sum,))
        return value[..., :0, :] if q is None else read_out.to(value.dtype), written
    advance = {"scan": _by_scan, "recurrent": _token_by_token}.get(form, _by_products)
    outs, start, length = [value[..., :0, :]], 0, key.shape[2]
    while start < length:
        stop = min(start + chunk_size - state.filled, length)
        asked = None if q is None else q[:, :, start:stop]
        out, weights, momentum = advance(
            network, asked, k[:, :, start:stop], v[:, :, start:stop], gates.rows(start, stop), state, read
        )
        if out is not None:
            outs.append(out.to(value.dtype))
        filled = (state.filled + stop - start) % chunk_size
        state = MemoryState(weights, momentum, state.base if filled else weights, filled)
        start = stop
    return torch.cat(outs, 2), state


def _is_delta_rule(network: MemoryNetwork, state: MemoryState, keep: Tensor | None) -> bool:
    return len(state.weights) == 1 and network.norm is None and state.momentum is None and keep is None


_Result = tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...] | None]


def _by_products(
    network: MemoryNetwork, q: Tensor | None, k: Tensor, v: Tensor, gates: _Gates, state: MemoryState, read: str
) -> _Result:
    """The form of the module's docstring: no token's weights or gradients, only products with them."""
    inputs, deltas = network.gradient(state.base, k, v)
    steps = [-gates.rate[..., None] * delta for delta in deltas]
    decays = _products(gates.keep, k)
    reach = decays[..., :1] if gates.keep is None else decays[..., :1] * gates.keep[..., :1, None].exp()
    kernel, still, tail = decays, None, None
    if gates.carry is not None:
        momenta = _products(gates.carry, k)
        kernel = decays @ momenta
        still = gates.carry.cumsum(-1).exp()[..., None]
        tail = momenta[..., -1, :, None]
    lift = None if still is None else decays @ still

    out = None
    if q is not None and read == "chunk":
        out = network(state.base, q)
    elif q is not None:
        shift = read == "before"
        now, fade = (_earlier(reach, 1), _earlier(kernel, 0)) if shift else (reach, kernel)
        pull = lift if lift is None or not shift else _earlier(lift, 0)

        def product(layer: int, h: Tensor) -> Tensor:
            z = now * (h @ state.weights[layer]) + (h @ inputs[layer].transpose(-1, -2) * fade) @ steps[layer]
            if pull is not None and state.momentum is not None:
                z = z + pull * (h @ state.momentum[layer])
            return z

        out = network.run(len(steps), product, q)[0]

    weights, momentum = [], []
    for layer, (a, step) in enumerate(zip(inputs, steps, strict=True)):
        weight = reach[..., -1:, :] * state.weights[layer] + (a * kernel[..., -1, :, None]).transpose(-1, -2) @ step
        if state.momentum is not None and still is not None and lift is not None and tail is not None:
            weight = weight + lift[..., -1:, :] * state.momentum[layer]
            momentum.append(still[..., -1:, :] * state.momentum[layer] + (a * tail).transpose(-1, -2) @ step)
        weights.append(weight)
    return out, tuple(weights), tuple(momentum) if state.momentum is not None else None


def _by_scan(
    network: MemoryNetwork, q: Tensor | None, k: Tensor, v: Tensor, gates: _Gates, state: MemoryState, read: str
) -> _Result:
    """The paper's own wording: gradients of all tokens, a scan of them with eta, a scan of that with ``1 - alpha``."""
    inputs, deltas = network.gradient(state.base, k, v)
    nothing = torch.zeros_like(gates.rate)
    carry, keep = (
        (nothing if gate is None else gate).transpose(1, 2)[..., None, None] for gate in (gates.carry, gates.keep)
    )
    weights, momentum, per_token = [], [], []
    for layer, (a, delta) in enumerate(zip(inputs, deltas, strict=True)):
        moved = (-gates.rate[..., None, None] * a[..., :, None] * delta[..., None, :]).transpose(1, 2)
        if state.momentum is not None:
            moved = linear_scan(carry, moved, state.momentum[layer])
            momentum.append(moved[:, -1])
        passed = linear_scan(keep, moved, state.weights[layer])
        weights.append(passed[:, -1])
        if read == "before":
            passed = torch.cat((state.weights[layer][:, None], passed[:, :-1]), 1)
        per_token.append(passed.transpose(1, 2))
    out = None
    if q is not None and read == "chunk":
        out = network(state.base, q)
    elif q is not None:
        out = network.run(len(inputs), lambda layer, h: (h[..., None, :] @ per_token[layer])[..., 0, :], q)[0]
    return out, tuple(weights), tuple(momentum) if state.momentum is not None else None


def _token_by_token(
    network: MemoryNetwork, q: Tensor | None, k: Tensor, v: Tensor, gates: _Gates, state: MemoryState, read: str
) -> _Result:
    weights, momentum, outs = list(state.weights), state.momentum, []
    for t in range(k.shape[2]):
        asked, earlier = None if q is None else q[:, :, t : t + 1], tuple(weights)
        inputs, deltas = network.gradient(state.base, k[:, :, t : t + 1], v[:, :, t : t + 1])
        rate = gates.rate[..., t, None, None]
        moved = [-rate * (a.transpose(-1, -2) @ delta) for a, delta in zip(inputs, deltas, strict=True)]
        if momentum is not None and gates.carry is not None:
            eta = gates.carry[..., t, None, None].exp()
            momentum = tuple(eta * old + new for old, new in zip(momentum, moved, strict=True))
            moved = list(momentum)
        kept = 1.0 if gates.keep is None else gates.keep[..., t, None, None].exp()
        weights = [kept * old + new for old, new in zip(weights, moved, strict=True)]
        if asked is not None:
            used = {"after": tuple(weights), "before": earlier, "chunk": state.base}[read]
            outs.append(network(used, asked))
    return torch.cat(outs, 2) if outs else None, tuple(weights), momentum


def _products(log: Tensor | None, like: Tensor) -> Tensor:
    """``exp(sum_{s < r <= t} log_r)`` for ``s <= t``, else 0: ``(batch, heads, n, n)`` (ones below without a gate).

    Each sum is formed by itself, not as a difference of two, so that closed gates spoil no digits of open ones.
    """
    size = like.shape[2]
    past = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    if log is None:
        return past.to(like.dtype).expand(*like.shape[:2], -1, -1)
    later = log[..., :, None].expand(*log.shape, size).masked_fill(~past.tril(-1), 0)
    return later.cumsum(-2).masked_fill(~past, float("-inf")).exp()


def _earlier(rows: Tensor, first: float) -> Tensor:
    """Rows one place later, behind a first one of ``first``."""
    return torch.cat((torch.full_like(rows[..., :1, :], first), rows[..., :-1, :]), -2)


def _check(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    gates: tuple[Tensor, Tensor | None, Tensor | None],
    state: MemoryState,
    chunk_size: int,
    read: str,
) -> None:
    if chunk_size < 1 or read not in READS:
        raise OptionError(f"Need chunk_size >= 1 and read one of {', '.join(READS)}; got {chunk_size} and {read!r}.")
    if state.filled >= chunk_size:
        raise OptionError(f"This state holds {state.filled} tokens of a chunk; chunk_size {chunk_size} cannot go on.")
    if key.dim() != 4 or value.shape[:3] != key.shape[:3] or (query is not None and query.shape != key.shape):
        raise ShapeError(
            "A memory takes query and key (batch, heads, length, dim) and value (batch, heads, length, value_dim); got "
            f"{None if query is None else tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    for name, gate in zip(("rate", "log_keep", "log_momentum"), gates, strict=True):
        if gate is not None and gate.shape != key.shape[:3]:
            raise ShapeError(f"{name} is (batch, heads, length) = {tuple(key.shape[:3])}, got {tuple(gate.shape)}.")
    if (gates[2] is None) != (state.momentum is None):
        raise OptionError("log_momentum goes with a state that has momentum, and only with such a one.")
    first, last = state.weights[0], state.weights[-1]
    if first.shape[:3] != (*key.shape[:2], key.shape[3]) or last.shape[3] != value.shape[3]:
        raise ShapeError(
            f"Weights from {tuple(first.shape)} to {tuple(last.shape)}, (batch, heads, in, out), do not take keys "
            f"{tuple(key.shape)} to values {tuple(value.shape)}."
        )
