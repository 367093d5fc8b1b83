"""Graphs in a language model's prompt: attention windows between nodes, and what attention makes of the links.

A prompt holds the tree around a node (:func:`regard.inspect.ego_tree.linearise_ego_tree`). Among its node tokens a
window of ``k`` hops lets entry ``i`` see entry ``j`` iff ``(S^k)_ij > 0``, ``S = E + E^T`` with ``E`` the tree's edges
and self-loops: iff they are at most ``k`` steps apart along the tree. ``bidirectional`` lets a node see later ones
within the window, which breaks causality among the nodes on purpose; otherwise the lower triangle is kept. All pairs in
which one token is text stay causal, and so does the question with the answer. ``k = 1`` is message passing along fixed
links as in a graph network, ``k`` of at least the tree's diameter (4) sees all nodes; in between stands the paper's
"global linkage horizon". One trains with the window and infers without (:class:`WindowSchedule`).

Source: Guan et al., "Attention Mechanisms Perspective: Exploring LLM Processing of Graph-Structured Data", 2025, arXiv
2505.02130; the window, ``-6000`` between hidden nodes and the non-zero mean follow the released code. There the list of
parents shifts by one after a neighbour without children, so that later children hang on the wrong node; here links are
the tree's. The paper shows its "skewed line sink" (a few nodes along a slanted line of the map collect the weight) as a
picture; the statistic of :func:`skewed_line_sink` is this library's. Cost: what full attention costs.

Metrics take weights ``(..., q_len, k_len)`` as :func:`regard.capture` returns them, of any model or mechanism, and
compute in float32 at least.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, ShapeError
from regard.inspect.ego_tree import EgoTree, tree_distance
from regard.inspect.intervene import Edit, intervene
from regard.inspect.saliency import pearson
from regard.inspect.two_samples import Comparison, compare_samples
from regard.kernels.shapes import accumulation_dtype
from regard.masks import Boolean
from regard.retrofit.reading import Reading
from regard.retrofit.sites import discover
from regard.retrofit.switch import Call

__all__ = [
    "Alignment",
    "LineSink",
    "NodeTextShift",
    "WindowSchedule",
    "graph_window_mask",
    "hop_profile",
    "node_text_shift",
    "received_attention",
    "skewed_line_sink",
    "structure_alignment",
    "window_schedule",
]

Hops = int | Literal["full"]


def graph_window_mask(
    node_pos: Tensor,
    tree_edges: Tensor,
    N: int,
    hops: int = 1,
    bidirectional: bool = True,
    blocked: float = -6000.0,
) -> Tensor:
    """The window as an additive mask, ``(N, N)`` float32: 0 for what is seen, ``blocked`` between nodes that are hidden
    from one another, ``finfo.min`` for later tokens elsewhere.

    node_pos: ``(entries,)``, where each entry of the tree stands among ``N`` tokens. tree_edges: ``(edges, 2)``
    entries. hops: steps along the tree, at least 1; 0 lets a node see itself alone. For a boolean mask take
    ``graph_window_mask(...) == 0``.
    """
    distance = tree_distance(tree_edges, len(node_pos))
    pairs, seen = _window(node_pos, distance, N, hops, bidirectional)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    outside = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    return torch.where(pairs, torch.where(seen, 0.0, blocked), outside)


def _window(node_pos: Tensor, distance: Tensor, length: int, hops: int, bidirectional: bool) -> tuple[Tensor, Tensor]:
    """Which pairs are both nodes of the tree, and which of these may see each other; boolean ``(length, length)``."""
    if hops < 0:
        raise OptionError(f"hops is a number of steps along the tree, at least 0; got {hops}.")
    if node_pos.dim() != 1 or node_pos.is_floating_point() or len(node_pos.unique()) != len(node_pos):
        raise ShapeError(
            f"node_pos is one place per entry, an integer each and all different; got {node_pos.dtype} of shape "
            f"{tuple(node_pos.shape)}."
        )
    if len(node_pos) and not 0 <= int(node_pos.min()) <= int(node_pos.max()) < length:
        raise ShapeError(f"Nodes stand at {int(node_pos.min())} to {int(node_pos.max())}; there are {length} tokens.")
    rows, columns = node_pos[:, None], node_pos[None]
    # As far as there are entries means that no way leads there.
    near = (distance <= hops) & (distance < len(distance))
    if not bidirectional:
        near = near & (columns <= rows)
    pairs = torch.zeros(length, length, dtype=torch.bool)
    seen = pairs.clone()
    pairs[rows, columns] = True
    seen[rows, columns] = near
    return pairs, seen


@dataclass(eq=False)
class WindowSchedule:
    """``with schedule.on(model):`` every attention layer of ``model`` sees nodes through a window: of ``train_hops`` in
    training mode, of ``infer`` in evaluation mode; ``"full"`` leaves the model's own attention as it is, bit for bit.

    Tell it the trees of the batch before the model runs, :meth:`look_at`. Between nodes of a tree the window takes the
    place of the model's own mask, of a sliding window too; elsewhere that mask holds, padding and generated tokens
    included, so that ``generate`` works. The model is as it was afterwards. One of other mechanisms, or with one put in
    by :func:`regard.retrofit`, keeps them: they get the narrowed mask, and refuse it if they take none.
    """

    train_hops: Hops
    infer: Hops = "full"
    bidirectional: bool = True
    _trees: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)
    _made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, hops in (("train_hops", self.train_hops), ("infer", self.infer)):
            if hops != "full" and (not isinstance(hops, int) or hops < 0):
                raise OptionError(f"{name} is a number of hops, at least 0, or 'full'; got {hops!r}.")

    def look_at(self, trees: Sequence[EgoTree], length: int | None = None) -> None:
        """The trees of the batch, in its order (or one for all). length: of the batch's prompts, if shorter ones are
        filled up on the left."""
        self._trees, self._made = [], {}
        for tree in trees:
            own = len(tree.node_index)
            if length is not None and length < own:
                raise ShapeError(f"A prompt of {own} tokens does not fit into length {length}.")
            self._trees.append((tree.positions + (0 if length is None else length - own), tree.distance))

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Where the schedule holds. model: one whose attention layers are all of one stack, over the prompt."""
        sites = discover(model)
        stacks = sorted({re.sub(r"\b\d+\b", "*", site.path) for site in sites})
        if len(stacks) > 1:
            raise OptionError(
                f"The model has several stacks of attention layers ({', '.join(stacks)}), and a prompt's nodes stand "
                "in one. Give the part that reads the prompt, such as model.encoder or model.language_model."
            )

        def inputs(layer: int, call: Call) -> Call:
            hops = self._hops(model)
            if hops == "full":
                return call
            narrowed = self._narrowed(call.reading, call.query, hops)
            return replace(call, read=lambda: narrowed)

        with intervene(model, Edit(frozenset(range(len(sites))), inputs=inputs)):
            yield

    def _hops(self, model: nn.Module) -> Hops:
        return self.train_hops if model.training else self.infer

    def _narrowed(self, reading: Reading, query: Tensor, hops: int) -> Reading:
        batch, q_len, keys, device = query.shape[0], query.shape[2], reading.keys, query.device
        if not self._trees:
            raise OptionError("The schedule knows no trees yet: call look_at(trees) before the model runs.")
        if len(self._trees) not in (1, batch):
            raise ShapeError(
                f"The batch has {batch} prompts, and look_at was told {len(self._trees)} trees. Beams are prompts: "
                "name each tree once a beam."
            )
        key = (hops, keys, device)
        if key not in self._made:
            made = [_window(places, far, keys, hops, self.bidirectional) for places, far in self._trees]
            pairs, seen = (torch.stack(each)[:, None].to(device) for each in zip(*made, strict=True))
            self._made = {key: (pairs, seen)}  # generated tokens make a new one each
        pairs, seen = (each[:, :, keys - q_len :] for each in self._made[key])
        own = True if reading.visible is None else reading.visible.dense(q_len, keys, device)
        visible = Boolean(torch.where(pairs, seen, own))
        return Reading(reading.causal and not self.bidirectional, visible, reading.bias, keys)


def window_schedule(train_hops: Hops, infer: Hops = "full", bidirectional: bool = True) -> WindowSchedule:
    """Train through a window, infer through another or none: see :class:`WindowSchedule`."""
    return WindowSchedule(train_hops, infer, bidirectional)


def received_attention(attn: Tensor, causal: bool = True) -> Tensor:
    """What each key gets on average: ``(..., heads, q_len, k_len)`` -> ``(..., k_len)``, 0 to 1.

    Heads are averaged first; then each column over its rows, those from the key on where ``causal``, leaving out
    weights of zero (hidden by a mask). A key that gets nothing has 0.
    """
    if attn.dim() < 3:
        raise ShapeError(f"Weights are (..., heads, q_len, k_len), got {tuple(attn.shape)}; add an axis for one head.")
    mean = attn.to(accumulation_dtype(attn.dtype)).mean(-3)
    counted = mean != 0
    if causal:
        counted = counted & _earlier(mean, inclusive=True)
    return (mean * counted).sum(-2) / counted.sum(-2).clamp_min(1)


def _earlier(attn: Tensor, inclusive: bool) -> Tensor:
    """Boolean ``(q_len, k_len)``: keys before the query (or it as well); the last query stands at the last key."""
    q_len, k_len = attn.shape[-2:]
    full = torch.ones(q_len, k_len, dtype=torch.bool, device=attn.device)
    return full.tril(k_len - q_len - (not inclusive))


@dataclass(frozen=True)
class NodeTextShift:
    """Comparisons of log10 received attention: node and text tokens before and after training; and text with node
    tokens, before it and after it (``t > 0``: the latter of the two get more)."""

    node: Comparison
    text: Comparison
    text_to_node_before: Comparison
    text_to_node_after: Comparison


def node_text_shift(
    before: Tensor,
    after: Tensor,
    is_node: Tensor,
    *,
    equal_variance: bool = False,
    bins: int = 100,
    limits: tuple[float, float] | None = None,
) -> NodeTextShift:
    """How training moved attention between kinds of tokens.

    before, after: :func:`received_attention` of the same prompts, ``(..., k_len)``, any number of layers and prompts.
    is_node: boolean, broadcastable to them. Keys that get nothing are left out. The test of means, and the histograms
    of the divergence, as in :func:`~regard.inspect.two_samples.compare_samples`; the released code has 100 bins in
    ``limits=(-3, -1)``.
    """
    if before.shape != after.shape or is_node.dtype != torch.bool:
        raise ShapeError(
            f"before and after are of one shape and is_node is boolean; got {tuple(before.shape)}, "
            f"{tuple(after.shape)} and {is_node.dtype}."
        )
    _need_finite(before, after)

    try:
        is_node = is_node.to(before.device).expand_as(before)
    except RuntimeError as error:
        raise ShapeError(f"is_node {tuple(is_node.shape)} does not go with scores {tuple(before.shape)}.") from error
    node, text = ([s[kind & (s > 0)].log10() for s in (before, after)] for kind in (is_node, ~is_node))

    def compared(first: Tensor, second: Tensor) -> Comparison:
        return compare_samples(first, second, equal_variance=equal_variance, bins=bins, limits=limits)

    return NodeTextShift(compared(*node), compared(*text), compared(text[0], node[0]), compared(text[1], node[1]))


def hop_profile(attn: Tensor, hop: Tensor, causal: bool = True) -> Tensor:
    """Mean weight of a pair, by hops: ``(..., q_len, k_len)`` -> ``(..., hops)``, NaN where no pair has so many.

    hop: ``(k_len,)``, steps of each key from the centre, or ``(q_len, k_len)``, steps between query and key; negative
    for what is left out, as text. causal: pairs whose key comes after the query are left out as well. Steps along the
    tree go with places: early queries have fewer keys, weigh each more, and are near to one another, so that flat
    causal weights fall with the steps too. Compare with those, or with another time of training.
    """
    if hop.shape not in (attn.shape[-1:], attn.shape[-2:]):
        raise ShapeError(
            f"hop is (k_len,) or (q_len, k_len) of the weights {tuple(attn.shape)}, got {tuple(hop.shape)}."
        )
    if not bool((hop >= 0).any()):
        raise ShapeError("No pair has a number of hops of at least 0, so there is nothing to average.")
    attn = attn.to(accumulation_dtype(attn.dtype))
    steps = hop.to(attn.device).expand(attn.shape[-2:])
    counted = steps >= 0
    if causal:
        counted = counted & _earlier(attn, inclusive=True)
    parts = []
    for hops in range(int(hop.max()) + 1):
        pairs = counted & (steps == hops)
        parts.append((attn * pairs).sum((-2, -1)) / pairs.sum())
    return torch.stack(parts, -1)


@dataclass(frozen=True)
class LineSink:
    """Per map ``(...)``: ``correlation`` of the place that a node attends to most with its own, -1 to 1; the line's
    ``slope`` and ``intercept`` in places; ``concentration``, the share of the weight on earlier nodes that lies within
    one place of the line, 0 to 1, and ``flat``, that share for weights all alike; ``flagged``, whether it is such a
    sink."""

    correlation: Tensor
    slope: Tensor
    intercept: Tensor
    concentration: Tensor
    flat: Tensor
    flagged: Tensor


def skewed_line_sink(
    attn: Tensor, node_positions: Tensor, *, least_correlation: float = 0.8, least_lift: float = 2.0
) -> LineSink:
    """Whether weight between nodes gathers along a slanted line of the map ``(..., length, length)``.

    Nodes are numbered in the order of ``node_positions`` ``(nodes,)``, their places in the text. Each from the third on
    has an earlier node that it weighs most (its own key is left out: the diagonal is no finding); a straight line is
    fitted to these. Flagged: the correlation is at least ``least_correlation`` and the line holds ``least_lift`` times
    what flat weights would put there, or as much as can be. A column (one node for all) has correlation 0.
    """
    count = len(node_positions)
    if count < 4:
        raise ShapeError(f"A line is fitted to four nodes or more, got {count}.")
    length = attn.shape[-1]
    if attn.shape[-2:] != (length, length) or int(node_positions.min()) < 0 or int(node_positions.max()) >= length:
        raise ShapeError(
            f"Nodes at {int(node_positions.min())} to {int(node_positions.max())} are no places of square maps "
            f"{tuple(attn.shape)}."
        )
    if bool((node_positions.diff() <= 0).any()):
        raise ShapeError("node_positions ascend: nodes are numbered in the order of the text.")
    _need_finite(attn)
    block = attn[..., node_positions[:, None], node_positions[None]].detach().double()
    earlier = _earlier(block, inclusive=False)
    block = block.masked_fill(~earlier, 0)[..., 2:, :]
    earlier = earlier[2:]
    query = torch.arange(2, count, device=attn.device, dtype=torch.float64)
    key = torch.arange(count, device=attn.device, dtype=torch.float64)
    most = block.argmax(-1).double()
    correlation = pearson(most, query.expand_as(most))
    centred = query - query.mean()
    slope = (most * centred).sum(-1) / centred.square().sum()
    intercept = most.mean(-1) - slope * query.mean()
    line = slope[..., None] * query + intercept[..., None]
    near = ((key - line[..., None]).abs() <= 1) & earlier
    mass = block.sum(-1)
    rows = (mass > 0).sum(-1).clamp_min(1)
    concentration = ((block * near).sum(-1) / mass.clamp_min(1e-300)).sum(-1) / rows
    flat = (near.sum(-1).double() / earlier.sum(-1)).mean(-1)
    lifted = concentration >= (least_lift * flat).clamp_max(0.999)
    return LineSink(correlation, slope, intercept, concentration, flat, (correlation >= least_correlation) & lifted)


@dataclass(frozen=True)
class Alignment:
    """Per map ``(...)``: ``difference``, mean weight of linked pairs less that of the others; ``auc``, how often a
    linked pair has more weight than another one of the same query, ties half: 1 follows the links, 0.5 ignores them."""

    difference: Tensor
    auc: Tensor


def structure_alignment(attn: Tensor, adjacency: Tensor, causal: bool = True) -> Alignment:
    """How far weights between nodes ``(..., nodes, nodes)`` follow the links ``adjacency``, boolean ``(nodes, nodes)``.

    Pairs are compared within a query, so that queries that see many nodes and weigh each less do not tip the balance,
    and averaged over queries with both kinds; a node's own key is left out. causal: so are later nodes.
    """
    if adjacency.dtype != torch.bool or adjacency.shape != attn.shape[-2:] or adjacency.shape[0] != adjacency.shape[1]:
        raise ShapeError(
            f"adjacency is a boolean for each pair of nodes (nodes, nodes); got {adjacency.dtype} of shape "
            f"{tuple(adjacency.shape)} for weights {tuple(attn.shape)}. Take the rows and columns of the nodes first."
        )
    _need_finite(attn)
    adjacency, attn = adjacency.to(attn.device), attn.to(accumulation_dtype(attn.dtype))
    counted = ~torch.eye(len(adjacency), dtype=torch.bool, device=attn.device)
    if causal:
        counted = counted & _earlier(attn, inclusive=False)
    differences, areas = [], []
    for query in range(len(adjacency)):
        linked = attn[..., query, adjacency[query] & counted[query]]
        others = attn[..., query, ~adjacency[query] & counted[query]]
        if linked.shape[-1] == 0 or others.shape[-1] == 0:
            continue
        differences.append(linked.mean(-1) - others.mean(-1))
        above = (linked[..., None] > others[..., None, :]).double() + 0.5 * (linked[..., None] == others[..., None, :])
        areas.append(above.mean((-2, -1)))
    if not areas:
        raise ShapeError("No node has both a linked and an unlinked one to attend to, so there is nothing to compare.")
    return Alignment(torch.stack(differences).mean(0), torch.stack(areas).mean(0))


def _need_finite(*tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise OptionError("Attention holds NaN or infinity, so nothing can be told from it; look where it comes from.")
