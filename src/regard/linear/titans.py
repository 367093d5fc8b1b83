"""Titans' neural memory: a small network per head that is trained, by gradient descent, on the sequence it reads.

Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time", 2024, arXiv 2501.00663 (and NeurIPS 2025),
section 3. Keys, values and queries are ``SiLU(conv(x W))`` with a causal depthwise convolution of width 4, keys and
queries of norm one. With the surprise ``grad |M(k_t) - v_t|^2``, its momentum ``S`` and weight decay:

    S_t = eta_t S_{t-1} - theta_t grad l(M_{t-1}; x_t),    M_t = (1 - alpha_t) M_{t-1} + S_t,    y_t = M_t(q_t)

``theta, alpha, eta`` in (0, 1) are sigmoids of the token, one each per head. Training runs over chunks of ``b`` tokens:
gradients of a chunk are those at the weights before it, so that everything inside is products of matrices
(:mod:`regard.kernels.mlp_memory`); ``b = 1`` is the recurrence above. ``M`` is a matrix (``depth=1``: then with ``eta =
0`` it is the gated delta rule with ``beta = 2 theta``) or a perceptron, by default of two layers, a hidden layer four
times as wide, and ``M(x) = x + LayerNorm(MLP(x))``. Outside, ``y`` is normed, gated by the token and projected.

Time ``O(N (b d + d h depth))`` per head of width ``d`` and hidden width ``h``; the state is the weights, their momentum
and the weights before the chunk, whatever the length. The paper's layers with attention are in
:mod:`regard.linear.titans_layers`, its models in :mod:`regard.models.titans`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.kernels.mlp_memory import ACTIVATIONS, READS, MemoryNetwork, MemoryState, mlp_memory
from regard.kernels.shapes import accumulation_dtype
from regard.layers.causal_conv import CausalConv
from regard.layers.padding import layer_keys
from regard.masks import Mask
from regard.mechanism import Layer
from regard.registry import register

__all__ = ["NeuralMemory", "NeuralMemoryState", "linear_memory_update"]


def linear_memory_update(
    key: Tensor,
    value: Tensor,
    theta: Tensor | float,
    alpha: Tensor | float = 0.0,
    eta: Tensor | float = 0.0,
    memory: Tensor | None = None,
    chunk_size: int = 64,
    *,
    momentum: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear memory ``o = k M`` after the sequence, and its momentum, each ``(batch, heads, dim, value_dim)``.

    key ``(batch, heads, length, dim)``, value ``(batch, heads, length, value_dim)``, the gates ``(batch, heads,
    length)`` or numbers (theta >= 0, alpha and eta in [0, 1]), memory and momentum of before (default: zeros). Per
    chunk, from ``M_0`` and ``S_0``, in closed form: with ``G_i = k_i^T (k_i M_0 - v_i)``, ``S_t = eta S_{t-1} - 2 theta
    G_t`` and ``M_t = (1 - alpha) M_{t-1} + S_t`` come as sums over ``G`` with products of gates as factors.
    """
    work = accumulation_dtype(key.dtype)
    gates = [torch.as_tensor(gate, dtype=work, device=key.device) for gate in (theta, alpha, eta)]
    for name, gate, most in zip(("theta", "alpha", "eta"), gates, (math.inf, 1.0, 1.0), strict=True):
        if bool(((gate < 0) | (gate > most)).any()):
            raise OptionError(f"{name} is at least 0{'' if name == 'theta' else ' and at most 1'}.")
    shape = (*key.shape[:2], key.shape[-1], value.shape[-1])
    start = tuple(
        torch.zeros(shape, dtype=work, device=key.device) if given is None else given.to(work)
        for given in (memory, momentum)
    )
    if any(given.shape != shape for given in start):
        raise ShapeError(f"memory and momentum are (batch, heads, dim, value_dim) = {shape}.")
    rate, forget, carry = (gate.expand(key.shape[:3]) for gate in gates)
    # The logarithm of a closed gate is large and negative instead of infinite: its derivative stays a number.
    tiny = torch.finfo(work).tiny
    state = MemoryState((start[0],), (start[1],), (start[0],))
    _, state = mlp_memory(
        None,
        key,
        value,
        rate,
        state,
        log_keep=(1 - forget).clamp_min(tiny).log(),
        log_momentum=carry.clamp_min(tiny).log(),
        chunk_size=chunk_size,
        backend=backend,
    )
    assert state.momentum is not None
    return state.weights[0], state.momentum[0]


@dataclass(frozen=True, eq=False)
class NeuralMemoryState:
    """memory: the weights and their momentum; tails: the last inputs of the convolutions of queries, keys, values."""

    memory: MemoryState
    tails: tuple[Tensor, Tensor, Tensor]

    def detach(self) -> NeuralMemoryState:
        """Cut off from what made it, as training on one stretch after another needs it."""
        query, key, value = (tail.detach() for tail in self.tails)
        return NeuralMemoryState(self.memory.detach(), (query, key, value))


@register("titans")
class NeuralMemory(Layer):
    """The memory as a layer of its own, ``(batch, length, embed_dim)`` in and out, always causal.

    depth: layers of the memory network (1: a matrix). chunk_size: tokens whose gradients are taken at the same weights:
    part of the definition, not of speed alone. hidden_mult: width of hidden layers over the head's. momentum, decay:
    False leaves out ``eta`` or ``alpha``. activation: ``"silu"``, ``"gelu"`` (the authors' in the proceedings) or
    ``"relu"``. residual: ``M(x) = x + LayerNorm(MLP(x))`` (default from depth 2 on), or ``MLP(x)``. read: a token reads
    ``"after"`` its own write, ``"before"`` it, or with the weights before its ``"chunk"``, the cheapest. conv_size:
    width of the convolutions, 1 for none. max_rate: theta is a sigmoid times this, by default ``1 / chunk_size``: with
    unit keys and without momentum a matrix cannot diverge then, whatever is read (and takes up to ``2 / chunk_size`` of
    a value at once: to store it whole, tokens have to learn not to write, and ``max_rate`` has to be 0.5).

    At first the sigmoid of theta is 0.27, eta 0.5 and alpha 0.0025, the maps of queries are those of keys, and without
    the residual form the memory is zero. Hidden tokens (``mask``) write and forget nothing; momentum ends there.
    """

    patterns = frozenset({"causal-self"})
    needs_training = True
    growth = "N"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        depth: int = 2,
        chunk_size: int = 64,
        hidden_mult: float = 4.0,
        momentum: bool = True,
        decay: bool = True,
        activation: str = "silu",
        residual: bool | None = None,
        read: str = "after",
        conv_size: int = 4,
        max_rate: float | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise OptionError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}.")
        if depth < 1 or chunk_size < 1 or conv_size < 1 or (max_rate is not None and max_rate <= 0):
            raise OptionError(
                f"Need depth, chunk_size and conv_size of at least 1 and max_rate > 0; got {depth}, {chunk_size}, "
                f"{conv_size} and {max_rate}."
            )
        if activation not in ACTIVATIONS or read not in READS:
            raise OptionError(
                f"activation is one of {', '.join(ACTIVATIONS)} and read one of {', '.join(READS)}; got "
                f"{activation!r} and {read!r}."
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.chunk_size, self.activation, self.read = chunk_size, activation, read
        self.max_rate = 1 / chunk_size if max_rate is None else max_rate
        self.momentum, self.decay = momentum, decay
        self.query = nn.Linear(embed_dim, embed_dim, bias=False)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)
        self.value = nn.Linear(embed_dim, embed_dim, bias=False)
        self.query_conv = CausalConv(embed_dim, conv_size)
        self.key_conv = CausalConv(embed_dim, conv_size)
        self.value_conv = CausalConv(embed_dim, conv_size)
        with torch.no_grad():
            # Queries begin as keys, so that the memory answers what it was told before any training.
            self.query.weight.copy_(self.key.weight)
            self.query_conv.load_state_dict(self.key_conv.state_dict())
        hidden = max(int(hidden_mult * self.head_dim), 1)
        widths = [self.head_dim, *[hidden] * (depth - 1), self.head_dim]
        self.initial = nn.ParameterList(
            torch.randn(num_heads, before, after) * before**-0.5 for before, after in pairwise(widths)
        )
        self.gain: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        if depth > 1 if residual is None else residual:
            self.gain = nn.Parameter(torch.ones(num_heads, self.head_dim))
            self.shift = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        else:
            # Nothing known at first: what few steps write would drown in a random answer (a norm would scale it up).
            nn.init.zeros_(self.initial[-1])
        first = [-1.0, *[-6.0] * decay, *[0.0] * momentum]
        self.gates = nn.Linear(embed_dim, num_heads * len(first))
        with torch.no_grad():
            self.gates.bias.copy_(torch.tensor(first).repeat_interleave(num_heads))
        self.norm = nn.RMSNorm(embed_dim, eps=1e-6)
        self.gate = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False)

    def extra_repr(self) -> str:
        return f"depth={len(self.initial)}, chunk_size={self.chunk_size}, read={self.read!r}"

    @property
    def network(self) -> MemoryNetwork:
        """The memory network besides its weights."""
        norm = None if self.gain is None or self.shift is None else (self.gain, self.shift)
        return MemoryNetwork(self.activation, norm)

    def init_state(self, batch: int, *, like: Tensor) -> NeuralMemoryState:
        """The learned initial weights, and nothing read yet."""
        memory = MemoryState.start(tuple(self.initial), batch, momentum=self.momentum)
        tail = like.new_zeros(batch, self.query_conv.kernel_size - 1, self.embed_dim)
        return NeuralMemoryState(memory, (tail, tail, tail))

    def forward(self, x: Tensor, *, mask: Mask | None = None, state: NeuralMemoryState | None = None) -> Tensor:
        """Each token writes and reads. mask: of keys alone (``KeyPadding``). state: of what was read before."""
        keys = layer_keys(mask, x.shape[1], x.device, "NeuralMemory")
        return self._run(x, self._start(x, state), keys)[0]

    def step(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        """The next tokens ``(batch, tokens, embed_dim)`` write and read; gives the numbers of :meth:`forward`."""
        return self._run(x, self._start(x, state), None)

    def store(self, x: Tensor, state: NeuralMemoryState | None = None) -> NeuralMemoryState:
        """The next tokens write, and none reads."""
        state = self._start(x, state)
        reach = self.query_conv.kernel_size - 1
        seen = torch.cat((state.tails[0], self.query(x[:, max(x.shape[1] - reach, 0) :])), 1)
        tail = seen[:, seen.shape[1] - reach :]
        return self._write(x, None, replace(state, tails=(tail, *state.tails[1:])), None)[1]

    def retrieve(self, x: Tensor, state: NeuralMemoryState) -> Tensor:
        """What ``x``, a sequence of its own, reads with the weights as they are; nothing is written."""
        x = self._checked(x)
        query = self._split(F.silu(self.query_conv(self.query(x))[0]), unit=True)
        weights = state.memory.weights
        return self._deliver(self.network.to(weights[0].dtype)(weights, query.to(weights[0].dtype)), x)

    def _run(self, x: Tensor, state: NeuralMemoryState, keys: Tensor | None) -> tuple[Tensor, NeuralMemoryState]:
        query, tail = self.query_conv(self._hide(self.query(x), keys), state.tails[0])
        query = self._split(F.silu(query), unit=True)
        out, state = self._write(x, query, replace(state, tails=(tail, *state.tails[1:])), keys)
        return self._deliver(out, x), state

    def _write(
        self, x: Tensor, query: Tensor | None, state: NeuralMemoryState, keys: Tensor | None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """What the queries read, ``(batch, heads, length, head_dim)``, while the tokens write."""
        key, key_tail = self.key_conv(self._hide(self.key(x), keys), state.tails[1])
        value, value_tail = self.value_conv(self._hide(self.value(x), keys), state.tails[2])
        logits = self.gates(x).to(accumulation_dtype(x.dtype)).unflatten(-1, (-1, self.num_heads)).permute(2, 0, 3, 1)
        rate, rest = self.max_rate * logits[0].sigmoid(), list(logits[1:])
        log_keep = F.logsigmoid(-rest.pop(0)) if self.decay else None
        log_momentum = F.logsigmoid(rest.pop(0)) if self.momentum else None
        if keys is not None:
            rate = rate.masked_fill(~keys, 0)
            log_keep = None if log_keep is None else log_keep.masked_fill(~keys, 0)
            log_momentum = None if log_momentum is None else log_momentum.masked_fill(~keys, float("-inf"))
        out, memory = mlp_memory(
            query,
            self._split(F.silu(key), unit=True),
            self._split(F.silu(value)),
            rate,
            state.memory,
            log_keep=log_keep,
            log_momentum=log_momentum,
            network=self.network,
            chunk_size=self.chunk_size,
            read=self.read,
        )
        return out, NeuralMemoryState(memory, (state.tails[0], key_tail, value_tail))

    def _deliver(self, out: Tensor, x: Tensor) -> Tensor:
        mixed: Tensor = self.out(self.norm(out.transpose(1, 2).flatten(2).to(x.dtype)) * F.silu(self.gate(x)))
        return mixed

    def _split(self, x: Tensor, unit: bool = False) -> Tensor:
        """Heads to the front; with ``unit`` vectors of norm one."""
        x = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return F.normalize(x, dim=-1, eps=1e-6) if unit else x

    def _hide(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Zeros in place of hidden tokens, for the convolutions."""
        if keys is None:
            return x
        return x.unflatten(-1, (self.num_heads, -1)).masked_fill(~keys.transpose(1, 2)[..., None], 0).flatten(2)

    def _start(self, x: Tensor, state: NeuralMemoryState | None) -> NeuralMemoryState:
        x = self._checked(x)
        return self.init_state(len(x), like=x) if state is None else state

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ShapeError(f"NeuralMemory takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
        return x
