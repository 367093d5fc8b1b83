"""Context parallelism: exact attention over a sequence of which each rank holds a shard, and its ways into a model.

:func:`context_parallel_attention` is one call, :class:`ContextParallel` the same as a
:class:`~regard.mechanism.Mechanism`, and :func:`context_parallel` puts it into a live model, positions included.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from regard.dense.full import FullAttention
from regard.errors import OptionError, RetrofitError, ShapeError, UnsupportedMaskError, UnsupportedPatternError
from regard.masks import Boolean, Causal, Mask, SlidingWindow
from regard.mechanism import Mechanism, Pattern, Request
from regard.parallel.group import Group
from regard.parallel.mesh import Mesh, mesh_attention
from regard.parallel.shards import Sharding
from regard.parallel.traffic import Strategy
from regard.retrofit import Site, discover, retrofit
from regard.retrofit.switch import DropoutPolicy

__all__ = ["ContextParallel", "context_parallel", "context_parallel_attention"]


class ContextParallel(Mechanism):
    """Exact softmax attention of this rank's queries to the keys of all ranks, over their shards of one sequence.

    group: the ranks, each of which makes every call, backward passes included: a :class:`~regard.parallel.group.Group`,
    or a :class:`~regard.parallel.mesh.Mesh` for ``strategy="mesh"``. sharding: how the sequence is dealt to them; to be
    replaced when the next sequence has another length. strategy: ``"ring"`` (keys and values travel: any number of
    heads, best with few key/value heads), ``"ulysses"`` (one all-to-all before and one after: at most as many ranks as
    heads) or ``"mesh"``; by default what fits the group.

    A call takes local shards ``(batch, heads, local_len, head_dim)``. Who sees whom follows from ``causal``, ``window``
    (keys nearer than so many positions; None: all) and the sharding's documents; no mask is taken but the local one
    that means just that. Time per rank is that of ``sharding.work(rank, causal, window)`` pairs; memory
    that of the local shards and, but for Ulysses, of one key/value block that is used and one that arrives.
    """

    exact = True
    mask_support = "none"
    patterns: ClassVar[frozenset[Pattern]] = frozenset(("self", "causal-self"))
    value_linear = False

    def __init__(
        self,
        group: Group | Mesh,
        sharding: Sharding,
        strategy: Strategy | None = None,
        *,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(group, Group | Mesh):
            raise OptionError(
                "A group is a regard.parallel DistributedGroup (of the default process group, or of the one passed to "
                f"it), a SimulatedGroup or a Mesh; got {type(group).__name__}."
            )
        if strategy is not None and strategy not in get_args(Strategy):
            raise OptionError(f"The strategies are {', '.join(get_args(Strategy))}; got {strategy!r}.")
        if strategy is not None and isinstance(group, Mesh) != (strategy == "mesh"):
            raise OptionError(
                "strategy='mesh' goes with a Mesh, made once by Mesh.split(group, ulysses_size) or "
                f"Mesh.of_device_mesh; got strategy={strategy!r} and a {type(group).__name__}."
            )
        if isinstance(group, Mesh):
            self.mesh = group
        else:
            self.mesh = Mesh(None, group) if strategy == "ulysses" else Mesh(group, None)
        self.window = window
        self._shared: list[Sharding] = []  # one list for all layers of a model, whose windows may differ
        self.sharding = sharding

    @property
    def sharding(self) -> Sharding:
        """How the sequence is dealt."""
        return self._shared[0]

    @sharding.setter
    def sharding(self, sharding: Sharding) -> None:
        if sharding.ranks != self.mesh.size:
            raise OptionError(f"A sharding for {sharding.ranks} ranks does not fit a group of {self.mesh.size}.")
        self._shared[:] = [sharding]

    def windowed(self, window: int | None) -> ContextParallel:
        """The same with another window; the sharding of one is always that of the other."""
        other = copy.copy(self)
        other.window = window
        return other

    def token_positions(self, length: int) -> Tensor | None:
        return self.sharding.positions(self.mesh.rank)

    def request(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        grid: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Request:
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = Boolean(mask)
        if mask is not None and self.window is not None and isinstance(mask, Mask):
            # What a model with windows of its own says of a shard's tokens, as if they followed one another.
            local = (Causal() & SlidingWindow(self.window)).dense(query.shape[2], key.shape[2], query.device)
            said = (mask & Causal() if causal else mask).dense(query.shape[2], key.shape[2], query.device)
            if bool((said == local).all()):
                mask, causal = None, True
        if mask is not None:
            raise UnsupportedMaskError(
                "Context parallelism takes who sees whom from causal=... and from its sharding, which knows the whole "
                "sequence; a mask of the local shard is refused. Give packed documents, or padding as a document of "
                "its own, to the sharding: Sharding.of(..., documents=ids)."
            )
        own, batch = self.sharding.lengths[self.mesh.rank], self.sharding.batch
        if query.dim() == key.dim() == 4 and not query.shape[2] == key.shape[2] == own:
            raise ShapeError(
                f"Rank {self.mesh.rank} holds {own} of {self.sharding.length} tokens, but the call has "
                f"{query.shape[2]} queries and {key.shape[2]} keys. Pass local shards, sharding.shard(x, rank, dim); "
                "another length needs a sharding of its own, and decoding with a cache is not supported."
            )
        if batch not in (1, len(query)):
            raise ShapeError(f"The sharding has documents for {batch} sequences, but the batch has {len(query)}.")
        return super().request(query, key, value, causal, None, grid, scale)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        causal, scale = request.causal, request.scale
        return mesh_attention(
            query, key, value, self.mesh, self.sharding, causal=causal, window=self.window, scale=scale
        )

    def implied(self, query: Tensor, key: Tensor, value: Tensor | None, request: Request) -> Tensor:
        raise UnsupportedPatternError(
            "No rank holds a row's whole attention weights. Look at weights in a single process, with 'full'."
        )

    def computed_pairs(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> float | None:
        """Of this rank's queries and the whole sequence's keys."""
        pairs = self.sharding.work(self.mesh.rank, request.causal, self.window)
        return pairs / (query.shape[2] * self.sharding.length * self.sharding.batch)


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group | Mesh,
    sharding: Sharding,
    strategy: Strategy | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Exact attention over a sequence of which each rank of ``group`` holds a shard; every rank makes this call.

    query ``(batch, num_heads, local_len, head_dim)``; key and value ``(batch, kv_heads, local_len, ...)``, ``kv_heads``
    dividing ``num_heads``: this rank's tokens in ascending order, as ``sharding.shard(x, rank, dim)`` gives them.
    strategy: ``"ring"``, ``"ulysses"`` or ``"mesh"`` (see :class:`ContextParallel`). window: keys nearer than so many
    positions, before and, unless causal, after the query. Returns this rank's rows of the
    output ``(batch, num_heads, local_len, value_dim)``, equal to those of one process' attention over the whole
    sequence, with gradients for all three, whose backward pass communicates in the same order on every rank.

    Raises ShapeError, PlacementError, OptionError; CommunicationError when another rank fails or is late.
    """
    attention = ContextParallel(group, sharding, strategy, window=window)
    out: Tensor = attention(query, key, value, causal=causal, scale=scale)
    return out


@contextmanager
def context_parallel(
    model: nn.Module,
    group: Group | Mesh,
    sharding: Sharding,
    strategy: Strategy | None = None,
    *,
    attention_dropout: DropoutPolicy = "auto",
) -> Iterator[ContextParallel]:
    """Let a model work on this rank's shard of its input: ``with context_parallel(model, group, sharding): ...``.

    All its attention layers answer through :class:`ContextParallel`, with their sliding windows if they have some, and
    its rotary or learned positions are the tokens' places in the whole sequence: models of ``regard.nn`` ask for them,
    and to a transformers model ``position_ids`` are passed unless the call has its own. Everything else in a model
    works token by token and needs nothing. attention_dropout: ``"off"`` leaves out a model's dropout of attention
    weights in training, which is an error otherwise. The backward pass has to run inside as well where it recomputes
    (checkpointing).

    The block's target is the :class:`ContextParallel` that answers; for a sequence of another length give it another
    ``sharding``. Parameters are the same on every rank, and their gradients are those of this shard's tokens: sum them
    over the ranks.

    Raises RetrofitError for models whose attention is another, or whose positions cannot be told.
    """
    attention = ContextParallel(group, sharding, strategy)
    sites = discover(model)
    answering = {site.path: attention.windowed(_window(site)) for site in sites}
    fed = any(site.host == "transformers" for site in sites)
    if fed and "position_ids" not in inspect.signature(model.forward).parameters:
        raise RetrofitError(
            f"{type(model).__name__} takes no position_ids, so a shard's tokens cannot be told where they stand. Call "
            "this on the model that takes token ids, or shard a model with positions of that kind."
        )

    def place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if tokens is not None and given.get("position_ids") is None:
            own = attention.sharding.positions(attention.mesh.rank, device=tokens.device)
            kwargs = {**kwargs, "position_ids": own[None]}
        if tokens is not None and given.get("attention_mask") is None:
            # Else transformers takes positions that do not follow one another for packed documents.
            kwargs = {**kwargs, "attention_mask": tokens.new_ones(tokens.shape[:2], dtype=torch.int64)}
        return args, kwargs

    hook = model.register_forward_pre_hook(place, with_kwargs=True) if fed else None
    try:
        with retrofit(model, answering, attention_dropout=attention_dropout):
            yield attention
    finally:
        if hook is not None:
            hook.remove()


def _window(site: Site) -> int | None:
    """The sliding window of a layer; RetrofitError where its attention is of another kind than that or full."""
    module, config = site.module, getattr(site.module, "config", None)
    if site.host == "regard" and not isinstance(module, FullAttention | ContextParallel):
        raise RetrofitError(
            f"{site.path}: {type(module).__name__} would become full attention over all ranks. Context parallelism "
            "takes the place of 'full' alone."
        )
    if site.host != "transformers":
        return None
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = kinds[index] if kinds and index is not None and index < len(kinds) else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise RetrofitError(f"{site.path}: attention of the kind {kind!r} cannot be computed across ranks.")
    if kind == "full_attention":
        return None
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    if window is not None and not getattr(module, "is_causal", True):
        raise RetrofitError(f"{site.path}: a sliding window to both sides cannot be computed across ranks.")
    return window if window is None else int(window)
