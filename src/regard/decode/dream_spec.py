"""DREAM: speculative decoding of language and vision-language models from the target's own features.

A small draft (:class:`~regard.models.dream_spec.DreamDraft`) proposes a tree of continuations, the target reads the
whole tree in one pass, and the longest path that the target itself would have taken is kept: the output is the
target's, token for token when greedy, in distribution when sampled, whatever the draft.

- Training target of the draft's cross-attention layer: per token, among the first ``L = int(depth_fraction layers)``
  layers without the first and the last of them, the hidden state of the layer with the lowest attention entropy. Loss:
  ``KL(target, draft) + 0.2 SmoothL1(hidden, target hidden) + SmoothL1(fused, selected feature)``, with uniform noise on
  the features read.
- Image tokens are scored by the mean attention that the target's last layer pays them; the draft reads the best
  ``keep`` of them. Text stays.
- Tree: in each of ``depth`` levels the ``top_k`` nodes of largest cumulative log-probability get ``top_k`` children
  each; of all nodes the best ``total - 1`` stay, and the root is the token already decided.

Hu et al., "DREAM: Drafting with Refined Target Features and Entropy-Adaptive Cross-Attention Fusion for Multimodal
Speculative Decoding", 2025, arXiv 2505.19201, section 3; trees as in Li et al., "EAGLE-2", 2024, arXiv 2406.16858. The
release takes the input of the layer of lowest entropy as its feature, here it is the layer's output. One sequence at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.models.dream_spec import DraftCache, DraftOutput, DreamDraft, previous_features

__all__ = [
    "DraftTree",
    "Drafted",
    "attention_entropy",
    "build_draft_tree",
    "dream_generate",
    "dream_loss",
    "noisy_features",
    "prune_visual_tokens",
    "select_features_by_entropy",
    "tree_of",
    "verify",
]

Head = Callable[[Tensor], Tensor]


def attention_entropy(attn: Tensor) -> Tensor:
    """Entropy in nats of attention ``(batch, heads, queries, keys)``, mean over heads: ``(batch, queries)``."""
    return torch.special.entr(attn.float()).sum(-1).mean(1)


def select_features_by_entropy(
    hidden_states: Sequence[Tensor], attentions: Sequence[Tensor], depth_fraction: float = 0.4
) -> Tensor:
    """Per token the hidden state of the layer whose attention has the lowest entropy: ``(batch, length, dim)``.

    hidden_states: embeddings and the output of every layer, ``(batch, length, dim)`` each; attentions: of every layer
    ``(batch, heads, length, length)``. Candidates: the first ``int(depth_fraction layers)`` layers without the first
    and the last of them. Raises OptionError where that leaves none.
    """
    layers = len(attentions)
    if len(hidden_states) != layers + 1:
        raise ShapeError(
            f"{layers} layers have {layers + 1} hidden states, embeddings first; got {len(hidden_states)}."
        )
    candidates = range(1, int(depth_fraction * layers) - 1)
    if not candidates:
        raise OptionError(
            f"The first {depth_fraction:g} of {layers} layers leave none between their first and last; choose a larger "
            "depth_fraction."
        )
    entropy = torch.stack([attention_entropy(attentions[layer]) for layer in candidates])
    features = torch.stack([hidden_states[layer + 1] for layer in candidates])
    best = entropy.argmin(0)[None, ..., None].expand(1, *features.shape[1:])
    return features.gather(0, best)[0]


def prune_visual_tokens(
    ids: Tensor, embeds: Tensor, feats: Tensor, attn: Tensor, keep: float = 0.7, *, image_token: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leave out the image tokens that the target hardly attends to.

    ids ``(batch, length)``, where image tokens are ``image_token``; embeds and feats ``(batch, length, dim)``; attn
    ``(batch, heads, length, length)`` of the target's last layer. Of each row's image tokens, equally many in all rows,
    the share ``keep`` of largest mean attention over heads and queries stays, and all else. Returns ids, embeds, feats
    and the places kept ``(batch, kept)``, in their order.
    """
    if not 0 < keep <= 1:
        raise OptionError(f"keep is a share of the image tokens, above 0 and up to 1; got {keep}.")
    visual = ids == image_token
    counts = visual.sum(-1)
    if bool((counts != counts[0]).any()):
        raise ShapeError(f"Rows hold different numbers of image tokens, {counts.tolist()}; prune them one by one.")
    scores = attn.float().mean((1, 2)).masked_fill(~visual, float("-inf"))
    chosen = scores.topk(math.ceil(keep * int(counts[0]) - 1e-9), -1).indices
    stays = (~visual).scatter(-1, chosen, True)
    place = stays.nonzero()[:, 1].view(len(ids), -1)
    wide = place[..., None].expand(-1, -1, embeds.shape[-1])
    return ids.gather(1, place), embeds.gather(1, wide), feats.gather(1, wide), place


def noisy_features(feats: Tensor, std: float = 0.2, generator: torch.Generator | None = None) -> Tensor:
    """Features with uniform noise of width ``std 512 / length``, the augmentation of training."""
    noise = torch.rand(feats.shape, generator=generator).to(feats) - 0.5
    return feats + noise * (std * 512 / feats.shape[1])


def dream_loss(
    output: DraftOutput, head: Head, target_hidden: Tensor, selected: Tensor, mask: Tensor | None = None
) -> Tensor:
    """``KL(target, draft) + 0.2 SmoothL1(hidden, target hidden) + SmoothL1(fused, selected)``, mean over tokens.

    head: the target's own, frozen: hidden ``(..., dim)`` to logits. target_hidden, selected ``(batch, length, dim)``.
    mask: boolean ``(batch, length)``, tokens that count.
    """
    with torch.no_grad():
        wanted = head(target_hidden).log_softmax(-1)
    divergence = F.kl_div(head(output.hidden).log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
    near = F.smooth_l1_loss(output.hidden, target_hidden.detach(), reduction="none").mean(-1)
    fused = F.smooth_l1_loss(output.fused, selected.detach(), reduction="none").mean(-1)
    loss = divergence + 0.2 * near + fused
    return loss.mean() if mask is None else loss[mask].mean()


@dataclass(frozen=True)
class DraftTree:
    """Continuations that share their beginnings, nodes in an order in which parents come first.

    tokens ``(nodes,)``: the root is the token already decided. parents ``(nodes,)``: -1 for the root. log_probs
    ``(nodes,)``: of the draft, along the path. ``mask`` ``(nodes, nodes)``: row ``i`` marks node ``i`` and its
    ancestors; ``depths`` ``(nodes,)``: 0 for the root; ``paths`` ``(leaves, deepest + 1)``: from the root to each leaf,
    -1 behind it.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor
    mask: Tensor
    depths: Tensor
    paths: Tensor

    def children(self, node: int) -> list[int]:
        """Most likely first."""
        return (self.parents == node).nonzero()[:, 0].tolist()


def tree_of(tokens: Tensor, parents: Tensor, log_probs: Tensor | None = None) -> DraftTree:
    """A tree from its nodes' tokens and parents, parents first and the root with parent -1."""
    count = len(tokens)
    if len(parents) != count or not count or int(parents[0]) != -1:
        raise ShapeError(f"A tree has one parent for each of its {count} tokens, and -1 for the root, which is first.")
    if bool((parents[1:] < 0).any()) or bool((parents >= torch.arange(count, device=parents.device)).any()):
        raise ShapeError(f"Each node but the root comes after its parent; got parents {parents.tolist()}.")
    mask = torch.eye(count, dtype=torch.bool, device=tokens.device)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            mask[node] |= mask[parent]
    depths = mask.sum(-1) - 1
    leaves = [node for node in range(count) if not bool((parents == node).any())]
    paths = torch.full((len(leaves), int(depths.max()) + 1), -1)
    for row, leaf in enumerate(leaves):
        way = mask[leaf].nonzero()[:, 0]
        paths[row, : len(way)] = way[depths[way].argsort()]
    zeros = torch.zeros(count, device=tokens.device)
    return DraftTree(tokens, parents, zeros if log_probs is None else log_probs, mask, depths, paths)


@torch.no_grad()
def build_draft_tree(
    draft: DreamDraft,
    embed: Callable[[Tensor], Tensor],
    head: Head,
    root: int,
    hidden: Tensor,
    cache: DraftCache,
    *,
    depth: int = 5,
    top_k: int = 8,
    total: int = 63,
) -> DraftTree:
    """Draft continuations of the tokens in ``cache``, the last of which is ``root``.

    hidden ``(dim,)``: the draft's at the root. embed: tokens ``(n,)`` to ``(n, dim)``. depth: levels below the root;
    top_k: nodes that grow in a level, and children of each; total: nodes that stay, the root among them. The cache is
    left as it was.
    """
    if depth < 1 or top_k < 1 or total < 2:
        raise OptionError(f"Need depth >= 1, top_k >= 1 and total >= 2; got {depth}, {top_k} and {total}.")
    base, device = cache.seen, hidden.device
    best = head(hidden).log_softmax(-1).topk(top_k)
    tokens, scores = best.indices, best.values
    parents = torch.zeros(top_k, dtype=torch.int64, device=device)
    # Of each node its place in the cache of tree nodes read so far, -1 for none; of each read node who it sees.
    growing = torch.arange(top_k, device=device)
    features = hidden.expand(top_k, -1)
    seen = torch.zeros(top_k, 0, dtype=torch.bool, device=device)
    for level in range(1, depth):
        own = torch.eye(len(growing), dtype=torch.bool, device=device)
        visible = torch.cat((seen, own), 1)
        mask = torch.cat((torch.ones(len(growing), base, dtype=torch.bool, device=device), visible), 1)
        places = torch.full((len(growing),), base + level - 1, device=device)
        out = draft(embed(tokens[growing])[None], features[None], mask, cache, places).hidden[0]
        best = head(out).log_softmax(-1).topk(top_k)
        total_scores = (scores[growing][:, None] + best.values).flatten()
        start = len(tokens)
        tokens = torch.cat((tokens, best.indices.flatten()))
        scores = torch.cat((scores, total_scores))
        # Nodes are counted without the root, which is node 0 of the tree.
        parents = torch.cat((parents, (growing + 1).repeat_interleave(top_k)))
        chosen = total_scores.topk(min(top_k, len(total_scores))).indices
        above = chosen.div(top_k, rounding_mode="floor")
        growing, features, seen = start + chosen, out[above], visible[above]
    cache.crop(base)
    # Stable: of equals the earlier node, so that no node stays without its parent.
    kept = scores.argsort(descending=True, stable=True)[: total - 1].sort().values
    number = torch.full((len(tokens) + 1,), -1, dtype=torch.int64, device=device)
    number[0], number[kept + 1] = 0, torch.arange(1, len(kept) + 1, device=device)
    first = torch.tensor([root], device=device)
    return tree_of(
        torch.cat((first, tokens[kept])),
        torch.cat((torch.full_like(first, -1), number[parents[kept]])),
        torch.cat((torch.zeros_like(scores[:1]), scores[kept])),
    )


def verify(
    logits: Tensor, tree: DraftTree, temperature: float = 0.0, generator: torch.Generator | None = None
) -> tuple[list[int], int]:
    """The path that the target takes through the tree: its nodes below the root, and the token after them.

    logits ``(nodes, vocabulary)`` of the target. temperature 0: the likeliest tokens. Otherwise the children of a node
    are taken in turn, each with the probability that the target gives it once those refused are ruled out; so the
    tokens that come out are distributed as the target's own.
    """
    path: list[int] = []
    node = 0
    while True:
        step = None
        if temperature == 0:
            token = int(logits[node].argmax())
            step = next((child for child in tree.children(node) if int(tree.tokens[child]) == token), None)
        else:
            chances = (logits[node].double() / temperature).softmax(-1).cpu()
            for child in tree.children(node):
                guess = int(tree.tokens[child])
                if float(torch.rand((), generator=generator)) < float(chances[guess]):
                    step = child
                    break
                chances[guess] = 0
                chances /= chances.sum()
            if step is None:
                token = int(torch.multinomial(chances, 1, generator=generator))
        if step is None:
            return path, token
        path.append(step)
        node = step


@dataclass
class Drafted:
    """What :func:`dream_generate` wrote: ``tokens (1, prompt + new)``; ``accepted``: how many drafted tokens each pass
    of the target took over."""

    tokens: Tensor
    accepted: list[int] = field(default_factory=list)

    @property
    def target_calls(self) -> int:
        """Passes of the target over trees, the prompt's not counted."""
        return len(self.accepted)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a pass gave on average, the target's own among them."""
        return 1 + sum(self.accepted) / max(len(self.accepted), 1)


@torch.no_grad()
def dream_generate(
    model: Any,
    draft: DreamDraft,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    *,
    depth: int = 5,
    top_k: int = 8,
    total: int = 63,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    inputs_embeds: Tensor | None = None,
    image_token: int | None = None,
    keep: float = 0.7,
    end: int | None = None,
) -> Drafted:
    """Decode with a causal language model of transformers as target.

    input_ids ``(1, prompt)``; inputs_embeds ``(1, prompt, dim)`` where the prompt holds more than text, such as image
    tokens, which then are ``image_token`` in ``input_ids``; the draft reads the share ``keep`` of them. Trees as in
    :func:`build_draft_tree`. end: the token that ends the text.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1 or input_ids.shape[1] < 1 or max_new_tokens < 1:
        raise ShapeError(
            f"Drafting takes one prompt (1, length) and at least one new token; got {tuple(input_ids.shape)} and "
            f"{max_new_tokens}."
        )
    embed, head, device = model.get_input_embeddings(), model.get_output_embeddings(), input_ids.device
    embeds = embed(input_ids) if inputs_embeds is None else inputs_embeds
    look = image_token is not None and keep < 1
    first = model.base_model(inputs_embeds=embeds, use_cache=True, output_attentions=look)
    feats, cache = first.last_hidden_state, first.past_key_values
    if any(getattr(layer, "is_sliding", False) or not hasattr(layer, "keys") for layer in cache.layers):
        raise OptionError("Drafted trees need a target whose layers keep all keys; this one has others beside them.")
    _, token = verify(head(feats[0, -1:]), _single(device), temperature, generator)
    read, known = embeds, feats
    if look and image_token is not None:
        if not first.attentions or first.attentions[-1] is None:
            raise OptionError(
                "Image tokens are pruned by the target's attention, which this implementation does not give. Load the "
                "model with attn_implementation='eager', or pass keep=1.0."
            )
        _, read, known, _ = prune_visual_tokens(
            input_ids, embeds, feats, first.attentions[-1], keep, image_token=image_token
        )
    notes = DraftCache()
    draft(read, previous_features(known), cache=notes)
    # What the draft has still to read: tokens with the features before them.
    fresh, before = [token], known[0, -1:]
    written, result = [token], Drafted(input_ids)
    while len(written) < max_new_tokens and token != end:
        own = embed(torch.tensor([fresh], device=device))
        hidden = draft(own, before[None], cache=notes).hidden[0, -1]
        tree = build_draft_tree(draft, embed, head, token, hidden, notes, depth=depth, top_k=top_k, total=total)
        past = cache.get_seq_length()
        states = _read_tree(model, tree, cache, past)
        path, token = verify(head(states), tree, temperature, generator)
        _keep(cache, past, [0, *path])
        # The root, and the path behind it, are read by the target; the new token is not.
        before = states[[0, *path]]
        fresh = [*tree.tokens[path].tolist(), token]
        result.accepted.append(len(path))
        for each in fresh:
            written.append(each)
            if each == end or len(written) == max_new_tokens:
                break
        if end is not None and end in fresh:
            break
    result.tokens = torch.cat((input_ids, torch.tensor([written], device=device)), 1)
    return result


def _single(device: torch.device) -> DraftTree:
    """A root alone."""
    return tree_of(torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), -1, device=device))


def _read_tree(model: Any, tree: DraftTree, cache: Any, past: int) -> Tensor:
    """The target's last hidden states of a tree behind ``past`` tokens, ``(nodes, dim)``; its cache takes all in."""
    nodes = len(tree.tokens)
    seen = torch.cat((tree.mask.new_ones(nodes, past), tree.mask), 1)
    # Added to the logits: eager attention does not read booleans.
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
    mask = mask.masked_fill(~seen, torch.finfo(model.dtype).min)
    out = model.base_model(
        input_ids=tree.tokens[None],
        attention_mask=mask[None, None],
        position_ids=(past + tree.depths)[None],
        past_key_values=cache,
        use_cache=True,
    )
    states: Tensor = out.last_hidden_state[0]
    return states


def _keep(cache: Any, past: int, nodes: Sequence[int]) -> None:
    """Of the tree's nodes only these stay in the target's cache."""
    for layer in cache.layers:
        index = torch.cat((torch.arange(past), past + torch.tensor(nodes))).to(layer.keys.device)
        layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
