"""The neighbourhood of a node as a prompt: an ego tree of two hops, written out, and ways to break its links.

Guan et al., "Attention Mechanisms Perspective: Exploring LLM Processing of Graph-Structured Data", 2025, arXiv
2505.02130: ``centre that connect [neighbour is connected [child, child] , neighbour is connected [...]], what is the
category of centre?``, each node one token of its own. Child lists leave the centre out; a node that is reached in
several ways stands in the tree several times, and each of these is an *entry* of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from regard.errors import OptionError, ShapeError

__all__ = ["EgoTree", "Perturbation", "PromptTemplate", "linearise_ego_tree", "perturb_tree", "tree_distance"]

Graph = Mapping[int, Sequence[int]] | Sequence[Sequence[int]]
Branches = tuple[tuple[int, tuple[int, ...]], ...]
Perturbation = Literal["swap_children", "exchange_children", "shuffle", "unrelated"]


@dataclass(frozen=True)
class PromptTemplate:
    """Token ids of the text between the nodes; a node ``v`` is token ``first_node + v``.

    The prompt: ``start`` centre ``open``, then for each neighbour its node, ``linked``, its children with ``comma``
    between them, ``close``; at last ``question`` centre ``answer``. With a tokenizer: the ids of each piece of text.
    """

    start: tuple[int, ...] = (1,)
    open: tuple[int, ...] = (2,)
    linked: tuple[int, ...] = (3,)
    comma: tuple[int, ...] = (4,)
    close: tuple[int, ...] = (5,)
    question: tuple[int, ...] = (6,)
    answer: tuple[int, ...] = (7,)
    first_node: int = 8

    def __post_init__(self) -> None:
        pieces = (self.start, self.open, self.linked, self.comma, self.close, self.question, self.answer)
        highest = max((id for piece in pieces for id in piece), default=-1)
        if self.first_node <= highest:
            raise OptionError(f"first_node is {self.first_node}, and must lie above the text's ids, {highest} at most.")


@dataclass(frozen=True)
class EgoTree:
    """A centre and its ``branches``: each a neighbour with its children, as node ids of the graph.

    Entries are numbered as they stand in the prompt: the centre is 0, each neighbour is followed by its children.
    """

    centre: int
    branches: Branches
    template: PromptTemplate = field(default_factory=PromptTemplate)

    @cached_property
    def nodes(self) -> Tensor:
        """``(entries,)`` node ids."""
        return torch.tensor([self.centre, *(node for head, tail in self.branches for node in (head, *tail))])

    @cached_property
    def hop(self) -> Tensor:
        """``(entries,)``: 0 for the centre, 1 for its neighbours, 2 for their children."""
        return torch.tensor([0, *(level for _, tail in self.branches for level in (1, *(2 for _ in tail)))])

    @cached_property
    def edges(self) -> Tensor:
        """``(entries - 1, 2)``: parent and child, as entries."""
        pairs, place = [], 1
        for _, tail in self.branches:
            pairs += [(0, place), *((place, place + 1 + child) for child in range(len(tail)))]
            place += 1 + len(tail)
        return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)

    @cached_property
    def _written(self) -> tuple[list[int], list[int]]:
        """Token ids, and the entry at each place (-1: text)."""
        text, ids, entry, count = self.template, list[int](), list[int](), 0

        def write(*pieces: tuple[int, ...]) -> None:
            for piece in pieces:
                ids.extend(piece)
                entry.extend([-1] * len(piece))

        def put(node: int, number: int) -> None:
            ids.append(text.first_node + node)
            entry.append(number)

        write(text.start)
        put(self.centre, 0)
        write(text.open)
        for head, tail in self.branches:
            count += 1
            put(head, count)
            write(text.linked)
            for at, node in enumerate(tail):
                count += 1
                write(*((text.comma,) if at else ()))
                put(node, count)
            write(text.close)
        write(text.question)
        put(self.centre, 0)
        write(text.answer)
        return ids, entry

    @property
    def tokens(self) -> Tensor:
        """``(length,)`` int64, up to where the answer begins."""
        return torch.tensor(self._written[0])

    @property
    def node_index(self) -> Tensor:
        """``(length,)``: the entry that stands there, -1 for text; the question's centre is entry 0 again."""
        return torch.tensor(self._written[1])

    @cached_property
    def positions(self) -> Tensor:
        """``(entries,)``: where each entry stands in the tree; the question repeats the centre later."""
        entry = self._written[1]
        return torch.tensor([entry.index(number) for number in range(len(self.nodes))])

    @cached_property
    def distance(self) -> Tensor:
        """``(entries, entries)``: steps between entries along the tree, 0 to 4."""
        return tree_distance(self.edges, len(self.nodes))


def tree_distance(edges: Tensor, count: int) -> Tensor:
    """Fewest steps between ``count`` entries along ``edges`` ``(edges, 2)`` in either direction: ``(count, count)``
    int64, ``count`` where there is no way."""
    if edges.dim() != 2 or edges.shape[1] != 2 or edges.is_floating_point():
        raise ShapeError(f"Edges are pairs of entries (edges, 2), integers; got {edges.dtype} of {tuple(edges.shape)}.")
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < count:
        raise OptionError(f"Edges join entries 0 to {count - 1}, got {int(edges.min())} to {int(edges.max())}.")
    step = torch.eye(count)
    if edges.numel():
        step[edges[:, 0], edges[:, 1]] = step[edges[:, 1], edges[:, 0]] = 1
    found, reached = torch.full((count, count), count), torch.eye(count)
    for steps in range(count):
        new = (reached > 0) & (found == count)
        if not bool(new.any()):
            break
        found[new] = steps
        reached = (reached @ step).clamp_max(1)
    return found


def linearise_ego_tree(
    graph: Graph,
    centre: int,
    fanout: tuple[int, int] = (8, 8),
    *,
    generator: torch.Generator | None = None,
    template: PromptTemplate | None = None,
) -> EgoTree:
    """Draw the tree of a node: up to ``fanout[0]`` neighbours and up to ``fanout[1]`` children of each.

    graph: neighbours of every node, by its id; links of a node to itself and repeated ones count for nothing. Which
    are drawn, without repetition, comes from ``generator``.
    """
    if len(fanout) != 2 or min(fanout) < 1:
        raise OptionError(f"fanout is (neighbours, children of each), each at least 1; got {fanout}.")

    def some(node: int, most: int, without: int | None = None) -> list[int]:
        known = node in graph if isinstance(graph, Mapping) else 0 <= node < len(graph)
        if not known:
            raise OptionError(f"The graph lists no neighbours of node {node}: give every node a list.")
        nodes = list(dict.fromkeys(int(other) for other in graph[node] if other not in (node, without)))
        return [nodes[at] for at in torch.randperm(len(nodes), generator=generator)[:most].tolist()]

    branches = tuple((head, tuple(some(head, fanout[1], centre))) for head in some(centre, fanout[0]))
    return EgoTree(int(centre), branches, template or PromptTemplate())


def perturb_tree(
    tree: EgoTree,
    kind: Perturbation,
    *,
    generator: torch.Generator | None = None,
    unrelated: Sequence[int] = (),
    share: float = 0.5,
) -> EgoTree:
    """The same prompt with its links broken; the shape of the tree changes only as the children's lists do.

    - ``swap_children``: two neighbours get each other's children;
    - ``exchange_children``: of two neighbours, single children change places, a ``share`` of the shorter list;
    - ``shuffle``: all nodes but the centre are dealt anew over the tree;
    - ``unrelated``: a ``share`` of the nodes but the centre become nodes of ``unrelated``.

    A tree with fewer than two neighbours keeps its children under the first two. In the released code the last kinds
    differ: the shuffle gives every neighbour as many children as there are neighbours and drops the rest.
    """
    if kind not in get_args(Perturbation):
        raise OptionError(f"A perturbation is one of {', '.join(get_args(Perturbation))}; got {kind!r}.")
    if not 0 < share <= 1:
        raise OptionError(f"share is above 0 and at most 1, got {share}.")

    def draw(count: int, most: int) -> list[int]:
        found: list[int] = torch.randperm(count, generator=generator)[:most].tolist()
        return found

    if kind in ("swap_children", "exchange_children"):
        if len(tree.branches) < 2:
            return tree
        one, other = draw(len(tree.branches), 2)
        branches = [(head, list(tail)) for head, tail in tree.branches]
        first, second = branches[one][1], branches[other][1]
        if kind == "swap_children":
            branches[one], branches[other] = (branches[one][0], second), (branches[other][0], first)
        else:
            count = math.ceil(min(len(first), len(second)) * share)
            pairs = zip(draw(len(first), count), draw(len(second), count), strict=True)
            for a, b in pairs:
                first[a], second[b] = second[b], first[a]
        return replace(tree, branches=tuple((head, tuple(tail)) for head, tail in branches))
    nodes: list[int] = tree.nodes[1:].tolist()
    if kind == "shuffle":
        nodes = [nodes[at] for at in draw(len(nodes), len(nodes))]
    else:
        pool = sorted(set(unrelated) - {*nodes, tree.centre})
        places = draw(len(nodes), max(1, round(share * len(nodes)))) if nodes else []
        if len(pool) < len(places):
            raise OptionError(f"{len(places)} nodes are replaced, and unrelated has {len(pool)} that the tree has not.")
        for place, chosen in zip(places, draw(len(pool), len(places)), strict=True):
            nodes[place] = pool[chosen]
    dealt = iter(nodes)
    return replace(tree, branches=tuple((next(dealt), tuple(next(dealt) for _ in tail)) for _, tail in tree.branches))
