"""TensorLens: a whole transformer as one input-dependent affine map between its tokens' states.

"TensorLens: End-to-End Transformer Analysis via High-Order Attention Tensors", 2026, arXiv 2601.17958. For one sequence
every block is rewritten as a linear map whose coefficients depend on the input and are then held fixed::

    attention          T[i, a, j, b] = sum_h A_h[i, j] (W_O^h W_V^h)[a, b]
    LayerNorm, token i diag(gamma) / sigma_i (I - 11^T / D);   RMSNorm: diag(gamma) / rms_i
    activation at u    diag(phi(u) / u), its limit phi'(0) at u = 0;   a gate is a coefficient as it stands
    residual           the identity, added

The product of the blocks' tensors, with the biases as an affine part, is ``out = T x + c`` exactly. ``T`` is not the
Jacobian, which would add derivatives of ``A``, ``sigma`` and ``phi(u) / u``. A pre-norm block is
``(I + FFN o LN2) o (I + Attn o LN1)``; other arrangements follow their own forward.

``T`` ``(tokens, dim_out, tokens, dim)`` is never formed unless asked for: a product with it is a forward pass of the
held map, a row of it one backward pass. ``x`` is what enters the first block (embeddings, after any norm of theirs),
``out`` what leaves the last one, or with ``closed`` what the model gives: logits or its last hidden state. Cost: one
forward pass and the weights of all layers in memory; a token map takes a backward pass for each token that has a
direction, and one for each token and channel by Frobenius norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect.frozen import FrozenBlocks
from regard.inspect.projections import output_projection

__all__ = [
    "AffineMap",
    "LocalMap",
    "TensorLens",
    "attention_norm_rollout",
    "attention_rollout",
    "grad_x_input",
    "mean_attention",
    "rollout",
]

Reduce = Literal["fro", "direction", "io"]

_DENSE = 4096
# Backward passes taken together.
_TOGETHER = 64


class LocalMap:
    """The derivative of ``function`` at ``x`` ``(tokens, dim)``, whose value there is ``(rows, dim_out)``.

    batched: whether ``function`` is made of operations whose backward pass can be taken many times at once.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, batched: bool = True) -> None:
        self.function, self.x, self._batched = function, x.detach(), batched
        self._leaf = self.x.clone().requires_grad_()
        with torch.enable_grad():
            self._value = function(self._leaf)
        self.out = self._value.detach()
        """``function(x)``."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(rows, dim_out, tokens, dim)``."""
        return (self.out.shape[0], self.out.shape[1], self.x.shape[0], self.x.shape[1])

    def row(self, i: int, v: Tensor) -> Tensor:
        """``sum_a v[a] T[i, a]`` ``(tokens, dim)``: one output token along a direction ``v`` ``(dim_out,)``."""
        i = self._index(i)
        return self._rows(torch.tensor([i]), self._directions(v)[i][None])[0]

    def dense(self) -> Tensor:
        """``T`` itself, where neither side has more than 4096 numbers."""
        rows, dim_out, tokens, dim = self.shape
        if max(tokens * dim, rows * dim_out) > _DENSE:
            raise OptionError(
                f"The whole tensor has {rows * dim_out} x {tokens * dim} numbers; it is formed up to {_DENSE} a side. "
                "Use row(i, v), token_map(...) or apply(x), which never form it."
            )
        return torch.cat([self._token(i)[None] for i in range(rows)])

    def token_map(
        self, reduce: Reduce = "fro", direction: Tensor | None = None, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Relevance ``(rows, tokens)`` of each input token for each output token, or for some ``rows`` of them.

        ``"fro"``: the Frobenius norm of ``T[i, :, j, :]``. ``"direction"``: ``<v_i, T[i, :, j, :] x_j>`` along
        ``direction`` ``(dim_out,)`` or ``(rows, dim_out)``. ``"io"``: the same along the output itself, ``v_i = out_i /
        |out_i|``: input and output contracted. The last two have a sign and sum to ``v_i . (out_i - c_i)``, all that
        biases did not bring.
        """
        if reduce not in ("fro", "direction", "io"):
            raise OptionError(f"reduce is 'fro', 'direction' or 'io', got {reduce!r}.")
        if (direction is not None) != (reduce == "direction"):
            raise OptionError("direction=... goes with reduce='direction', and only with it.")
        chosen = [self._index(i) for i in (range(len(self.out)) if rows is None else rows)]
        if reduce == "fro":
            return torch.stack([self._token(i).square().sum((0, 2)).sqrt() for i in chosen])
        v = self._directions(direction) if direction is not None else nn.functional.normalize(self.out, dim=-1)
        return torch.cat([(part * self.x).sum(-1) for part in self._parts(torch.tensor(chosen), v[chosen])])

    def _index(self, i: int) -> int:
        if not -len(self.out) <= i < len(self.out):
            raise OptionError(f"There are {len(self.out)} output tokens; there is no {i}.")
        return i % len(self.out)

    def _directions(self, v: Tensor) -> Tensor:
        if v.shape not in (self.out.shape, self.out.shape[1:]):
            raise ShapeError(
                f"A direction is ({self.out.shape[1]},), or one for each output token {tuple(self.out.shape)}; got "
                f"{tuple(v.shape)}."
            )
        return v.detach().to(self.out).expand_as(self.out)

    def _token(self, i: int) -> Tensor:
        """``T[i]`` ``(dim_out, tokens, dim)``."""
        dim_out = self.out.shape[1]
        every = torch.eye(dim_out, dtype=self.out.dtype, device=self.out.device)
        return torch.cat(list(self._parts(torch.full((dim_out,), i), every)))

    def _parts(self, rows: Tensor, directions: Tensor) -> list[Tensor]:
        pairs = zip(rows.split(_TOGETHER), directions.split(_TOGETHER), strict=True)
        return [self._rows(some, along) for some, along in pairs]

    def _rows(self, rows: Tensor, directions: Tensor) -> Tensor:
        """``(n, tokens, dim)`` of output tokens ``rows`` ``(n,)`` in ``directions`` ``(n, dim_out)``."""
        pulled = self.out.new_zeros(len(rows), *self.out.shape)
        pulled[torch.arange(len(rows)), rows] = directions
        if not self._value.requires_grad:
            return self.x.new_zeros(len(rows), *self.x.shape)
        if self._batched:
            return self._gradient(pulled, True)
        return torch.stack([self._gradient(one, False) for one in pulled])

    def _gradient(self, pulled: Tensor, batched: bool) -> Tensor:
        return torch.autograd.grad(self._value, self._leaf, pulled, retain_graph=True, is_grads_batched=batched)[0]


class AffineMap(LocalMap):
    """``out = T x + c``: some blocks of a network with their coefficients held. ``function`` is affine, so its
    derivative is the same everywhere."""

    @torch.no_grad()
    def apply(self, x: Tensor) -> Tensor:
        """``T x + c`` ``(rows, dim_out)`` of any states ``(tokens, dim)``, by one forward pass."""
        return self.function(x)

    def bias(self) -> Tensor:
        """``c`` ``(rows, dim_out)``: what the biases bring."""
        return self.apply(torch.zeros_like(self.x))


class TensorLens:
    """``with TensorLens(model) as lens: lens(**inputs)`` runs a model on one sequence and shows it as ``T x + c``.

    Works on stacks of blocks that :func:`regard.retrofit.discover` finds: Hugging Face models of text and images, pre-
    or post-norm (GPT-2, Llama, BERT, ViT), torch's and this library's, with any mechanism that is linear in the values.
    The model keeps its numbers. Routers and gates without an activation are refused. closed: the map goes on through
    what follows the blocks, to logits (or the last hidden state, of a model without a head). Everything is asked inside
    the ``with``.
    """

    def __init__(self, model: nn.Module, closed: bool = False) -> None:
        self._frozen, self._closed = FrozenBlocks(model), closed
        self._whole: AffineMap | None = None
        self._runs = 0

    def __enter__(self) -> TensorLens:
        self._frozen.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self._frozen.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch of one; returns what it returns."""
        self._whole, self._runs = None, self._runs + 1
        out = self._frozen.record(*args, **kwargs)
        if self._closed:
            self._frozen.check_close()
        return out

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._frozen.blocks)

    @property
    def whole(self) -> AffineMap:
        """All blocks, and with ``closed`` what follows them."""
        if self._whole is None:
            self._whole = self._map(0, len(self), self._closed)
        return self._whole

    @property
    def x(self) -> Tensor:
        """What entered the first block, ``(tokens, dim)``."""
        return self.whole.x

    @property
    def out(self) -> Tensor:
        """What the map gives for it, ``(rows, dim_out)``; rows are tokens, or one of a pooled answer."""
        return self.whole.out

    def apply(self, x: Tensor) -> Tensor:
        """See :meth:`AffineMap.apply`."""
        return self.whole.apply(x)

    def bias(self) -> Tensor:
        """See :meth:`AffineMap.bias`."""
        return self.whole.bias()

    def row(self, i: int, v: Tensor) -> Tensor:
        """See :meth:`LocalMap.row`."""
        return self.whole.row(i, v)

    def dense(self) -> Tensor:
        """See :meth:`LocalMap.dense`."""
        return self.whole.dense()

    def token_map(
        self, reduce: Reduce = "fro", direction: Tensor | None = None, rows: Sequence[int] | None = None
    ) -> Tensor:
        """See :meth:`LocalMap.token_map`."""
        return self.whole.token_map(reduce, direction, rows)

    def layer(self, index: int) -> AffineMap:
        """One block."""
        index = index + len(self) if index < 0 else index
        return self.range(index, index + 1)

    def range(self, first: int, last: int) -> AffineMap:
        """Blocks ``first`` to ``last - 1``; never what follows the blocks."""
        if not 0 <= first < last <= len(self):
            raise OptionError(f"There are blocks 0 to {len(self) - 1}; got range({first}, {last}).")
        return self._map(first, last, closed=False)

    def _map(self, first: int, last: int, closed: bool) -> AffineMap:
        self._check_run()
        frozen, now = self._frozen, self._runs

        def function(x: Tensor) -> Tensor:
            if self._runs != now:
                raise OptionError("The lens has looked at another input since, so this map's coefficients are gone.")
            return frozen.run(x, first, last, closed)

        return AffineMap(function, frozen.tokens_in(first))

    def jacobian(self) -> LocalMap:
        """The network's own derivative at ``x``, nothing held; as the map, without ``apply`` and ``bias``."""
        frozen, closed, depth = self._frozen, self._closed, len(self)
        x = self.whole.x
        # The backward passes of fused attention take one direction at a time.
        return LocalMap(lambda state: frozen.run_live(state, 0, depth, closed), x, batched=False)

    def attention(self, block: int) -> Tensor:
        """Weights of a block's self-attention, ``(num_heads, tokens, tokens)``."""
        self._check_run()
        return self._frozen.weights[self._frozen.attention(block)[0]][0]

    def contributions(self, block: int) -> Tensor:
        """``sum_h A_h[i, j] W_O^h v_j^h`` ``(tokens, tokens, dim)``: what attention brings token ``i`` from ``j``,
        before any scale or norm of its branch."""
        self._check_run()
        layer, site = self._frozen.attention(block)
        weight, _ = output_projection(site)
        weights, values = self._frozen.weights[layer][0], self._frozen.values[layer][0]
        projected = torch.einsum("hjd,ohd->hjo", values, weight.detach().unflatten(1, (values.shape[0], -1)))
        return torch.einsum("hij,hjo->ijo", weights, projected)

    def head_attribution(self, direction: Tensor, i: int = -1) -> Tensor:
        """What each head writes straight into the answer's row ``i``, ``(blocks, num_heads)``: direct logit attribution
        (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021).

        direction: of the answer, ``(dim_out,)``; one for a token's logit and minus one for another's gives the logit
        difference. A head's output goes through the output projection, residuals, norms (whose scales are held) and
        what follows the blocks, wherever a model has them; what other attention layers and the blocks' activations make
        of it is left out, and so are biases. Raises RetrofitError where blocks differ in their number of heads.
        """
        self._check_run()
        frozen = self._frozen
        frozen.check_close()
        answer, heads = frozen.run_direct()
        if direction.shape != answer.shape[1:] or not -len(answer) <= i < len(answer):
            raise ShapeError(
                f"The answer is {tuple(answer.shape)}: its rows are 0 to {len(answer) - 1} and a direction is "
                f"({answer.shape[1]},). Got row {i} and a direction {tuple(direction.shape)}."
            )
        own = [heads[frozen.attention(block)[0]] for block in range(len(self))]
        if len({z.shape[2] for z in own}) > 1:
            raise RetrofitError(f"These blocks have {[z.shape[2] for z in own]} heads, which make no table.")
        with torch.enable_grad():
            gradients = torch.autograd.grad(answer[i] @ direction.to(answer), own)
        return torch.stack([(z * g).sum((0, 1, 3)) for z, g in zip(own, gradients, strict=True)]).detach()

    def entering(self, block: int) -> Tensor:
        """What enters a block, ``(tokens, dim)``."""
        self._check_run()
        return self._frozen.tokens_in(block)

    def _check_run(self) -> None:
        if self._frozen.answer is None:
            raise OptionError("Run the model first: lens(**inputs), with a batch of one.")


# Baselines: token maps (tokens, tokens) of what a lens saw


def rollout(maps: Tensor) -> Tensor:
    """The product ``maps[-1] ... maps[1] maps[0]`` of token maps ``(layers, tokens, tokens)``, the first layer's
    first."""
    product = maps[0]
    for later in maps[1:]:
        product = later @ product
    return product


def attention_rollout(lens: TensorLens) -> Tensor:
    """``prod_l (mean_h A_h + I) / 2`` ``(tokens, tokens)``, rows sum to 1 (Abnar and Zuidema, "Quantifying Attention
    Flow in Transformers", 2020, arXiv 2005.00928)."""
    maps = torch.stack([lens.attention(block).mean(0) for block in range(len(lens))])
    return rollout((maps + torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)) / 2)


def mean_attention(lens: TensorLens) -> Tensor:
    """The mean of all weights over layers and heads, ``(tokens, tokens)``."""
    return torch.stack([lens.attention(block).mean(0) for block in range(len(lens))]).mean(0)


def attention_norm_rollout(lens: TensorLens) -> Tensor:
    """Rollout of ``|sum_h A_h[i, j] W_O^h v_j^h + [i = j] x_i|``, every row to sum 1: how much each token brings rather
    than how it is weighed (Kobayashi et al., "Incorporating Residual and Normalization Layers into Analysis of Masked
    Language Models", 2021, arXiv 2109.07152, attention with its residual). ``(tokens, tokens)``."""
    maps = []
    for block in range(len(lens)):
        brought, state = lens.contributions(block), lens.entering(block)
        brought = brought + torch.diag_embed(state.mT).movedim(0, -1)
        norms = brought.norm(dim=-1)
        maps.append(norms / norms.sum(-1, keepdim=True))
    return rollout(torch.stack(maps))


def grad_x_input(lens: TensorLens, direction: Tensor | None = None, rows: Sequence[int] | None = None) -> Tensor:
    """``<x_j, d(v . out_i) / d x_j>`` of the true derivative, ``(rows, tokens)``; ``v`` as in
    :meth:`LocalMap.token_map`, by default the output's own direction."""
    return lens.jacobian().token_map("io" if direction is None else "direction", direction, rows)
