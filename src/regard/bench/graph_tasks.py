"""A task on graphs in prompts: which colour prevails two hops away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.bench.tasks import IGNORED, Classification
from regard.errors import OptionError
from regard.inspect.ego_tree import EgoTree, PromptTemplate, linearise_ego_tree

__all__ = ["MajorityColour"]


class MajorityColour(Classification):
    """Nodes of a random graph have one of two colours; the answer is the colour of most nodes two hops from the centre.

    Inputs ``(batch, length)``: prompts of :func:`~regard.inspect.ego_tree.linearise_ego_tree`, filled up on the left
    with token 0; a colour is no token, but belongs to the node's id, and has to be learned. Targets ``(batch,
    length)``: the colour at the last place, ignored elsewhere. Ties are not drawn. Train and test prompts have
    different centres. links: of each node, about; many, so that the centre alone says little about the answer.
    ``told`` is called with the trees of each batch before it is given out.
    """

    num_classes = 2

    def __init__(
        self,
        nodes: int = 120,
        links: int = 16,
        fanout: tuple[int, int] = (4, 4),
        prompts: int = 8192,
        seed: int = 0,
    ) -> None:
        if nodes < 2 * links + 2:
            raise OptionError(f"{nodes} nodes are too few for {links} links of each: give at least {2 * links + 2}.")
        generator = torch.Generator().manual_seed(seed)
        self.colours = (torch.rand(nodes, generator=generator).argsort() % 2).tolist()
        friends: list[set[int]] = [set() for _ in range(nodes)]
        for node in range(nodes):
            for other in torch.randperm(nodes, generator=generator)[: links // 2].tolist():
                if other != node:
                    friends[node].add(other)
                    friends[other].add(node)
        self.graph = [sorted(each) for each in friends]
        self.template = PromptTemplate()
        self.vocab_size = self.template.first_node + nodes
        self.told: Callable[[list[EgoTree]], None] | None = None
        held_out = nodes // 5
        self.trees = {
            "train": self._draw(range(held_out, nodes), fanout, prompts, generator),
            "test": self._draw(range(held_out), fanout, max(prompts // 8, 64), generator),
        }
        self.length = max(len(tree.node_index) for trees in self.trees.values() for tree in trees)

    def _draw(self, centres: range, fanout: tuple[int, int], count: int, generator: torch.Generator) -> list[EgoTree]:
        trees: list[EgoTree] = []
        while len(trees) < count:
            centre = centres[int(torch.randint(len(centres), (), generator=generator))]
            tree = linearise_ego_tree(self.graph, centre, fanout, generator=generator, template=self.template)
            if self.balance(tree):
                trees.append(tree)
        return trees

    def balance(self, tree: EgoTree) -> int:
        """Nodes two hops away of colour 1, less those of colour 0."""
        return sum(2 * self.colours[node] - 1 for _, tail in tree.branches for node in tail)

    def encode(self, trees: list[EgoTree]) -> Tensor:
        """Prompts ``(count, length)``, filled up on the left."""
        inputs = torch.zeros(len(trees), self.length, dtype=torch.int64)
        for row, tree in zip(inputs, trees, strict=True):
            ids = tree.tokens
            row[self.length - len(ids) :] = ids
        return inputs

    def batch(self, size: int, generator: torch.Generator, split: str = "train") -> tuple[Tensor, Tensor]:
        pool = self.trees[split]
        trees = [pool[at] for at in torch.randint(len(pool), (size,), generator=generator).tolist()]
        if self.told is not None:
            self.told(trees)
        inputs = self.encode(trees)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1] = torch.tensor([int(self.balance(tree) > 0) for tree in trees])
        return inputs, targets
