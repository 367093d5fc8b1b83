"""Slot attention: a few slots compete for a set of tokens and each becomes a summary of those it won.

Locatello et al., "Object-Centric Learning with Slot Attention", 2020, arXiv 2006.15055, Algorithm 1, without its
trailing MLP. With ``LN`` layer norms and ``W`` maps without bias, each iteration is

    A[n, k] = softmax_k((W_k LN(x_n)) . (W_q LN(s_k)) / sqrt(d))     a softmax over SLOTS: they compete for each token
    w[n, k] = (A[n, k] + eps) / sum_m (A[m, k] + eps)                per slot, weights over its tokens
    s_k <- GRU(sum_n w[n, k] W_v LN(x_n), s_k)

Variants: ``sa`` draws the first slots, ``mu + exp(log_sigma) noise``, with one mu and sigma for all, and learns through
all iterations. ``isa`` (Chang et al., "Object Representations as Fixed Points", 2022, arXiv 2207.00787) starts from
slots of its own, iterates without a graph, and makes one more step from there, the only one that gradients see.
``qsa`` (Jia et al., "Improving Object-centric Learning with Query Optimization", 2022, arXiv 2210.08990) starts from
learned slots too; its last iteration begins at ``sg(s) + s_0 - sg(s_0)``, so gradients reach them straight through.

O(N K d) for N tokens and K slots, each iteration.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError

__all__ = ["SlotAttention", "SlotVariant"]

SlotVariant = Literal["sa", "isa", "qsa"]


class SlotAttention(nn.Module):
    """Tokens ``(batch, N, dim)`` to slots ``(batch, slots, dim)`` and their assignment ``(batch, N, slots)`` (of the
    last iteration), whose rows sum to 1 over slots.

    iters: iterations (``isa`` makes one more). The first slots of ``isa`` are parameters but get no gradient: at a
    fixed point they do not matter.
    """

    _EPS = 1e-8

    def __init__(self, slots: int, dim: int, iters: int = 1, variant: SlotVariant = "sa") -> None:
        super().__init__()
        if variant not in get_args(SlotVariant):
            raise OptionError(f"variant is one of {', '.join(get_args(SlotVariant))}; got {variant!r}.")
        if slots < 1 or dim < 1 or iters < 1:
            raise OptionError(f"Slot attention needs a slot, a channel and an iteration; got {slots}, {dim}, {iters}.")
        self.slots, self.dim, self.iters, self.variant = slots, dim, iters, variant
        if variant == "sa":
            self.mean = nn.Parameter(torch.empty(1, dim))
            self.log_deviation = nn.Parameter(torch.empty(1, dim))
            nn.init.xavier_uniform_(self.mean)
            nn.init.xavier_uniform_(self.log_deviation)
        else:
            self.first = nn.Parameter(torch.empty(slots, dim))
            nn.init.xavier_uniform_(self.first)
        self.token_norm, self.slot_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        if variant != "sa":  # as the two are released; plain slot attention keeps PyTorch's defaults
            for linear in (self.query, self.key, self.value):
                nn.init.xavier_uniform_(linear.weight)
            nn.init.xavier_uniform_(self.gru.weight_ih)
            nn.init.orthogonal_(self.gru.weight_hh)
            nn.init.zeros_(self.gru.bias_ih)
            nn.init.zeros_(self.gru.bias_hh)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"slots={self.slots}, dim={self.dim}, iters={self.iters}, variant={self.variant!r}"

    def initial(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """The first slots ``(batch, slots, dim)``; ``sa`` draws them anew, in evaluation too (``generator``)."""
        if self.variant != "sa":
            return self.first.expand(batch, -1, -1)
        size, like = (batch, self.slots, self.dim), self.mean
        noise = torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)
        return self.mean + self.log_deviation.exp() * noise

    def forward(
        self,
        x: Tensor,
        *,
        slots: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Slots and assignment. ``slots``: the first slots, instead of the module's own. ``mask (batch, N)``: True for
        real tokens; slots read nothing from the others."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"Slot attention reads tokens (batch, N, {self.dim}); got {tuple(x.shape)}.")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ShapeError(f"mask is boolean of shape {tuple(x.shape[:2])}; got {mask.dtype}, {tuple(mask.shape)}.")
        first = self.initial(len(x), generator) if slots is None else slots
        if first.dim() != 3 or len(first) != len(x) or first.shape[-1] != self.dim:
            raise ShapeError(f"First slots are ({len(x)}, slots, {self.dim}); got {tuple(first.shape)}.")
        tokens = self.token_norm(x)
        key, value = self.key(tokens) * self.dim**-0.5, self.value(tokens)
        state = first
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.variant == "sa"):
            for _ in range(self.iters - (self.variant != "isa")):
                state, _ = self._step(state, key, value, mask)
        if self.variant == "qsa":
            # Forward this adds an exact zero.
            state = state.detach() + (first - first.detach())
        elif self.variant == "isa":
            state = state.detach()
        return self._step(state, key, value, mask)

    def token_weights(self, assignment: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each slot reads: an assignment scaled to sum 1 over (real) tokens, same shape."""
        share = assignment + self._EPS
        if mask is not None:
            share = share * mask[..., None]
        return share / share.sum(1, keepdim=True).clamp_min(self._EPS)

    def _step(self, slots: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        query = self.query(self.slot_norm(slots))
        assignment = (key @ query.transpose(1, 2)).softmax(-1)
        update = self.token_weights(assignment, mask).transpose(1, 2) @ value
        new: Tensor = self.gru(update.flatten(0, 1), slots.flatten(0, 1))
        return new.unflatten(0, slots.shape[:2]), assignment
