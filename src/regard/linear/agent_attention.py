"""Agent attention: a few agent tokens read all keys, and all queries read the agents.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2023, arXiv 2312.08874,
section 3.

    V_A = softmax(scale A K^T + B1) V        aggregation: n agents read M keys
    out = softmax(scale Q A^T + B2) V_A      broadcast: N queries read n agents

It is linear attention with the features ``softmax(scale Q A^T + B2)`` and ``softmax(scale A K^T + B1)^T`` in
``R^n``: rows of the implied matrix are distributions, its rank is at most ``n``. Agents are the queries,
pooled adaptively on their grid; ``B1`` and ``B2`` are learned, factorised over the grid; the paper's module
also adds a depthwise 3x3 convolution of the values. Time ``O((N + M) n d)``. Pooled agents see the whole
input, so there is no causal form.

In diffusion models the paper swaps it in without training: no bias, ``out + 0.075 V``, and ``d^(-0.15)`` as
the scale of the second softmax, in the first 0.4 of the denoising steps (:func:`swap_agent`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cost import AttentionShape, Cost, linear_cost
from regard.errors import OptionError, RetrofitError, ShapeError
from regard.kernels import dense_attention
from regard.kernels.shapes import expand_groups, score_scale
from regard.layers.depthwise import DepthwiseConv
from regard.layers.pooling import pool_tokens
from regard.masks import Boolean
from regard.mechanism import Feature, Mechanism, Request
from regard.registry import register

__all__ = [
    "AgentAttention",
    "AgentAttention2d",
    "AgentBias",
    "AgentSwap",
    "agent_attention",
    "pool_agents",
    "swap_agent",
]

SOURCES = ("pooled", "strided", "learned")


@overload
def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    bias1: Tensor | None = ...,
    bias2: Tensor | None = ...,
    *,
    scale: float | None = ...,
    broadcast_scale: float | None = ...,
    keys: Tensor | None = ...,
    live: Tensor | None = ...,
    return_maps: Literal[False] = ...,
) -> Tensor: ...
@overload
def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    bias1: Tensor | None = ...,
    bias2: Tensor | None = ...,
    *,
    scale: float | None = ...,
    broadcast_scale: float | None = ...,
    keys: Tensor | None = ...,
    live: Tensor | None = ...,
    return_maps: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    scale: float | None = None,
    broadcast_scale: float | None = None,
    keys: Tensor | None = None,
    live: Tensor | None = None,
    return_maps: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """query ``(batch, heads, N, d)``, key and value ``(batch, kv_heads, M, ...)``, agents ``(batch | 1,
    heads, n, d)`` to ``(batch, heads, N, d_v)``.

    bias1 broadcasts to ``(batch, heads, n, M)``, bias2 to ``(batch, heads, N, n)``. scale: of both softmaxes,
    by default ``1 / sqrt(d)``; broadcast_scale: of the second alone. keys ``(batch | 1, heads | 1, M)`` and
    live ``(batch | 1, heads | 1, n)``: True where a key or an agent counts. return_maps: also the map of each
    softmax, ``(batch, heads, n, M)`` and ``(batch, heads, N, n)``.
    """
    scale = score_scale(query, scale)
    second = scale if broadcast_scale is None else broadcast_scale
    agents = agents.to(query.dtype).expand(query.shape[0], -1, -1, -1)
    seen = None if keys is None else Boolean(keys[..., None, :])
    alive = None if live is None else Boolean(live[..., None, :])

    def read(q: Tensor, k: Tensor, v: Tensor, mask: Boolean | None, bias: Tensor | None, by: float) -> Tensor:
        return dense_attention(q, k, v, mask=mask, bias=bias, scale=by)

    gathered = read(agents, key, value, seen, bias1, scale)
    out = read(query, agents, gathered, alive, bias2, second)
    if not return_maps:
        return out

    def identity(size: int) -> Tensor:
        one = torch.eye(size, dtype=query.dtype, device=query.device)
        return one.expand(query.shape[0], query.shape[1], -1, -1)

    shared = expand_groups(key, query.shape[1])
    first_map = read(agents, shared, identity(key.shape[2]), seen, bias1, scale)
    return out, first_map, read(query, agents, identity(agents.shape[2]), alive, bias2, second)


def pool_agents(query: Tensor, grid: Sequence[int] | None, agent_num: int, class_tokens: int = 0) -> Tensor:
    """Agents ``(batch, heads, agent_num, d)``: adaptive averages of the queries on their ``grid``.

    On a grid of ``a`` axes there are ``s`` agents along each, ``s^a = agent_num``; None is a grid of one
    axis. class_tokens: tokens in front that stand on no grid and are left out.
    """
    tokens = query[:, :, class_tokens:]
    grid = (tokens.shape[2],) if grid is None else tuple(grid)
    return pool_tokens(tokens, grid, _sides(agent_num, len(grid)))


def _sides(agent_num: int, axes: int) -> tuple[int, ...]:
    side = round(agent_num ** (1 / axes))
    if side**axes != agent_num:
        raise OptionError(
            f"On a grid of {axes} axes agent_num is a number to the power {axes}; {agent_num} is none, "
            f"the nearest is {max(side, 1) ** axes}."
        )
    return (side,) * axes


class AgentBias(nn.Module):
    """The paper's factorised biases of both softmaxes, per head and agent: a learned 7x7 map brought to the
    grid bilinearly, a vector over rows, one over columns, and with ``class_token`` one number for it. ``heads
    * n * (2 * 49 + 2 * (h + w) + 2)`` parameters with a class token. On a grid other than ``grid`` the
    vectors are interpolated too."""

    def __init__(self, num_heads: int, agent_num: int, grid: Sequence[int], class_token: bool = False) -> None:
        super().__init__()
        if len(grid) != 2:
            raise OptionError(f"Agent biases stand on grids of two axes, got {tuple(grid)}.")
        self.num_heads, self.agent_num, self.grid = num_heads, agent_num, (int(grid[0]), int(grid[1]))

        def pair(*shape: int) -> nn.ParameterList:
            both = nn.ParameterList(nn.Parameter(torch.empty(num_heads, agent_num, *shape)) for _ in range(2))
            for parameter in both:
                nn.init.trunc_normal_(parameter, std=0.02)
            return both

        self.maps, self.rows, self.columns = pair(7, 7), pair(self.grid[0]), pair(self.grid[1])
        self.class_token = pair(1) if class_token else None

    def forward(self, grid: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """``B1 (heads, n, tokens)`` and ``B2 (heads, tokens, n)``; a class token stands first."""
        size = self.grid if grid is None else (grid[0], grid[1])
        first, second = self._one(0, size), self._one(1, size)
        return first, second.transpose(1, 2)

    def _one(self, which: int, size: tuple[int, int]) -> Tensor:
        near = F.interpolate(self.maps[which], size=size, mode="bilinear", align_corners=False)
        rows, columns = (_stretch(v[which], n) for v, n in zip((self.rows, self.columns), size, strict=True))
        whole = (near + rows[..., :, None] + columns[..., None, :]).flatten(2)
        return whole if self.class_token is None else torch.cat((self.class_token[which], whole), -1)


def _stretch(vector: Tensor, length: int) -> Tensor:
    if vector.shape[-1] == length:
        return vector
    return F.interpolate(vector, size=length, mode="linear", align_corners=False)


@register("agent_attention")
class AgentAttention(Mechanism):
    """Two softmaxes through ``agent_num`` agents.

    agents: ``"pooled"`` (the queries, averaged on their grid; without a grid, along the sequence),
    ``"strided"`` (evenly spaced queries) or ``"learned"`` (parameters; give ``num_heads`` and ``head_dim``).
    bias_grid: a grid ``(height, width)`` for the learned biases (needs ``num_heads``; None: no bias), for
    self-attention on grids of two axes. broadcast_scale: of the second softmax, by default as the first.
    shortcut: this share of the values is added in self-attention (0.075 where it replaces softmax in a
    diffusion model untrained). mask_queries: where a key mask covers as many keys as there are queries it
    speaks of the tokens of self-attention, so that padding makes no agents; False where such a call is
    cross-attention.
    """

    patterns = frozenset({"self", "cross"})
    mask_support = "keys"
    growth = "N n"
    grid_axes = frozenset({1, 2})

    def __init__(
        self,
        agent_num: int = 49,
        agents: str = "pooled",
        bias_grid: Sequence[int] | None = None,
        broadcast_scale: float | None = None,
        shortcut: float = 0.0,
        mask_queries: bool = True,
        num_heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if agent_num < 1 or agents not in SOURCES:
            raise OptionError(f"Need agent_num >= 1 and agents in {SOURCES}; got {agent_num} and {agents!r}.")
        self.agent_num, self.agents, self.mask_queries = agent_num, agents, mask_queries
        self.broadcast_scale, self.shortcut = broadcast_scale, shortcut
        self.learned: nn.Parameter | None = None
        if agents == "learned":
            if num_heads is None or head_dim is None:
                raise OptionError("Learned agents need num_heads and head_dim.")
            self.learned = nn.Parameter(torch.empty(num_heads, agent_num, head_dim))
            nn.init.trunc_normal_(self.learned, std=1.0)
        self.bias: AgentBias | None = None
        if bias_grid is not None:
            if num_heads is None:
                raise OptionError("Biases are per head: give num_heads.")
            self.bias = AgentBias(num_heads, agent_num, bias_grid)
        self.needs_training = self.learned is not None or self.bias is not None  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"agent_num={self.agent_num}, agents={self.agents!r}"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        same = query.shape[2] == key.shape[2]
        shown = request.keys if same and self.mask_queries else None
        agents, live = self._agents(query, shown, request.grid)
        bias1, bias2 = self._biases(query, key, request.grid)
        out = agent_attention(
            query,
            key,
            value,
            agents,
            bias1,
            bias2,
            scale=request.scale,
            broadcast_scale=self.broadcast_scale,
            keys=request.keys,
            live=live,
        )
        if not self.shortcut:
            return out
        if not same:
            raise ShapeError("The shortcut of the values is for self-attention; use shortcut=0 between sequences.")
        values = expand_groups(value, query.shape[1])
        values = values if request.keys is None else values.masked_fill(~request.keys[..., None], 0)
        return out + self.shortcut * values

    def _agents(
        self, query: Tensor, shown: Tensor | None, grid: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Agents, and which of them stand for any real token."""
        if self.learned is not None:
            return self.learned[None], None
        if self.agents == "strided":
            length = query.shape[2]
            places = (torch.arange(self.agent_num, device=query.device) * length) // self.agent_num
            return query[:, :, places], None if shown is None else shown[..., places]
        if shown is None:
            return pool_agents(query, grid, self.agent_num), None
        real = shown.to(query.dtype)[..., None]
        share = pool_agents(real, grid, self.agent_num)
        kept = pool_agents(query.masked_fill(~shown[..., None], 0), grid, self.agent_num)
        live = share > 0
        return kept / torch.where(live, share, 1), live[..., 0]

    def _biases(self, query: Tensor, key: Tensor, grid: tuple[int, ...] | None) -> tuple[Tensor | None, Tensor | None]:
        if self.bias is None:
            return None, None
        size = self.bias.grid if grid is None else grid
        if len(size) != 2 or not math.prod(size) == query.shape[2] == key.shape[2]:
            raise ShapeError(
                f"Agent biases of a grid {size} need {math.prod(size)} queries and as many keys, got {query.shape[2]} "
                f"and {key.shape[2]}; pass grid=(height, width), or build without bias_grid."
            )
        bias1, bias2 = self.bias(size)
        return bias1, bias2

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        return None

    def cost(self, shape: AttentionShape) -> Cost:
        whole = linear_cost(shape, feature_dim=self.agent_num)
        scores = 2 * shape.batch * shape.num_heads * self.agent_num * shape.head_dim * (shape.q_len + shape.k_len)
        return Cost(whole.flops + scores, whole.bytes, 0, None)


@register("agent_attention_2d")
class AgentAttention2d(Feature):
    """The paper's module, in place of self-attention in DeiT, PVT, Swin or CSwin blocks: projections, pooled
    agents, biases, a depthwise 3x3 convolution of the values, output projection. ``(batch, channels, height,
    width)`` in and out; :meth:`tokens` takes ``(batch, [1 +] height * width, channels)``.

    window: side of the grid that the biases are made for (14 in DeiT; Swin variants enlarge theirs, since
    cost is linear). class_token: a token in front that stands on no grid; then only :meth:`tokens` applies.
    bias, depthwise: switches of the two additions. agents: as in :class:`AgentAttention`.
    """

    growth = "N n"

    def __init__(
        self,
        channels: int,
        num_heads: int = 8,
        agent_num: int = 49,
        window: int | tuple[int, int] = 14,
        class_token: bool = False,
        qkv_bias: bool = False,
        bias: bool = True,
        depthwise: bool = True,
        agents: str = "pooled",
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise OptionError(f"channels {channels} is no multiple of num_heads {num_heads}.")
        if agents not in ("pooled", "learned", "fixed"):
            raise OptionError(f"agents is 'pooled', 'learned' or 'fixed' (random, not trained); got {agents!r}.")
        _sides(agent_num, 2)
        self.channels, self.num_heads, self.agent_num = channels, num_heads, agent_num
        self.class_tokens = int(class_token)
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.out = nn.Linear(channels, channels)
        self.depthwise = DepthwiseConv(channels) if depthwise else None
        grid = (window, window) if isinstance(window, int) else window
        self.bias = AgentBias(num_heads, agent_num, grid, class_token) if bias else None
        self.agents: nn.Parameter | None = None
        if agents != "pooled":
            drawn = torch.randn(1, num_heads, agent_num, channels // num_heads)
            self.agents = nn.Parameter(drawn, requires_grad=agents == "learned")

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` in and out."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ShapeError(f"Expected (batch, {self.channels}, height, width), got {tuple(x.shape)}.")
        if self.class_tokens:
            raise ShapeError("A map holds no class token; call tokens(x, grid), or build with class_token=False.")
        grid = (x.shape[2], x.shape[3])
        return self.tokens(x.flatten(2).transpose(1, 2), grid).transpose(1, 2).reshape_as(x)

    def tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(batch, [1 +] height * width, channels)`` in and out."""
        first = self.class_tokens
        if x.shape[1] != first + math.prod(grid):
            raise ShapeError(f"{x.shape[1]} tokens are not {first} class tokens and a grid {tuple(grid)}.")
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        agents = pool_agents(query, grid, self.agent_num, first) if self.agents is None else self.agents
        bias1, bias2 = (None, None) if self.bias is None else self.bias(grid)
        out = agent_attention(query, key, value, agents, bias1, bias2)
        if self.depthwise is not None:
            local = self.depthwise(value[:, :, first:], grid)
            out = out + F.pad(local, (0, 0, first, 0))
        mixed: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return mixed


class AgentSwap:
    """What :func:`swap_agent` did to a model. ``remove()`` undoes it (so does leaving a ``with`` block).

    ``at(step, steps)``: says which denoising step runs; beyond the first ``step_share`` of them softmax
    attention is back.
    """

    def __init__(self, step_share: float) -> None:
        self.step_share, self.active = step_share, True
        self._before: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that were changed."""
        return [module for module, _ in self._before]

    def replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        """Give a module another forward until :meth:`remove`."""
        self._before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def at(self, step: int, steps: int) -> None:
        """Step ``step`` (from 0) of ``steps`` is about to run."""
        self.active = step < self.step_share * steps

    def remove(self) -> None:
        """Give every module its own forward back."""
        for module, before in reversed(self._before):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
        self._before = []

    def __enter__(self) -> AgentSwap:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def swap_agent(
    model: nn.Module,
    agent_num: int = 49,
    *,
    shortcut: float = 0.075,
    second_power: float = 0.15,
    step_share: float = 0.4,
    min_tokens: int | None = None,
    grid: Callable[[int], tuple[int, ...]] | None = None,
) -> AgentSwap:
    """Replace self-attention in a diffusion U-Net by agent attention, without training.

    Modules with ``to_q``, ``to_k``, ``to_v``, ``to_out`` and ``heads`` are changed (latent diffusion and
    diffusers name them so), where they are called without a context or a mask and with at least
    ``min_tokens`` tokens (default: twice ``agent_num``); all other calls run as before. Agents are the
    queries pooled on the grid (``grid(length)``; default: a square where the length is one, else the
    sequence), there is no bias, the second softmax has the scale ``d^(- second_power)``, and ``shortcut``
    times the values is added.
    """
    handle = AgentSwap(step_share)
    least = 2 * agent_num if min_tokens is None else min_tokens
    for module in model.modules():
        if all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads")) and _plain(module):
            forward = _agent_forward(module, handle, agent_num, shortcut, second_power, least, grid or _square)
            handle.replace(module, forward)
    if not handle.modules:
        raise RetrofitError(
            "No self-attention was found: swap_agent looks for modules with to_q, to_k, to_v, to_out and heads. "
            "For other models use regard.retrofit(model, 'agent_attention')."
        )
    return handle


def _plain(module: nn.Module) -> bool:
    """Whether a module is projections around attention and no more (diffusers' class can also norm or add its
    input)."""
    norms = ("group_norm", "spatial_norm", "norm_q", "norm_k")
    return all(getattr(module, name, None) is None for name in norms) and not getattr(
        module, "residual_connection", False
    )


def _square(length: int) -> tuple[int, ...]:
    side = math.isqrt(length)
    return (side, side) if side * side == length else (length,)


def _agent_forward(
    module: nn.Module,
    handle: AgentSwap,
    agent_num: int,
    shortcut: float,
    second_power: float,
    min_tokens: int,
    grid: Callable[[int], tuple[int, ...]],
) -> Callable[..., Tensor]:
    before: Callable[..., Tensor] = module.forward
    to_out = cast(nn.Module, module.to_out)
    projections = cast(tuple[nn.Module, ...], (module.to_q, module.to_k, module.to_v))

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        extra = (*args[1:], *kwargs.values())
        x: Any = args[0] if args else None
        known = isinstance(x, Tensor) and x.dim() == 3 and all(argument is None for argument in extra)
        if not (handle.active and known) or x.shape[1] < min_tokens:
            return before(*args, **kwargs)
        heads = module.heads
        query, key, value = (project(x).unflatten(-1, (heads, -1)).transpose(1, 2) for project in projections)
        space = grid(x.shape[1])
        agents = pool_agents(query, space if _fits(agent_num, len(space)) else None, agent_num)
        second = query.shape[-1] ** -second_power
        scale = getattr(module, "scale", None)
        out = agent_attention(query, key, value, agents, scale=scale, broadcast_scale=second) + shortcut * value
        out = out.transpose(1, 2).flatten(2)
        # latent diffusion has one module here, diffusers a list of a projection and a dropout
        for project in to_out if isinstance(to_out, nn.ModuleList) else (to_out,):
            out = project(out)
        return out

    return forward


def _fits(agent_num: int, axes: int) -> bool:
    return bool(round(agent_num ** (1 / axes)) ** axes == agent_num)
