"""Which heads a task runs through, by path patching, and how much two tasks share.

What counts is ``LD = logit(correct) - logit(wrong)`` at the last position, mean over prompts. The path from a sender
head to receivers (heads' outputs ``z``, queries, keys or values, or the residual stream before a layer) is patched in
three runs: (1) the clean and the corrupt prompt are run and kept; (2) the clean prompt is run with all heads' outputs
held at their clean values, but for the sender's, which is the corrupt one, and the receivers, which are left free and
whose values are kept; MLPs follow, unless they are held too; (3) the clean prompt is run with the receivers' values
of (2). The effect is ``(LD_patched - LD_clean) / (LD_corrupt - LD_clean)``: 0 for a path that carries nothing, 1 for
one that does all the harm.

Source: "Circuit Component Reuse Across Tasks in Transformer Language Models", 2024, arXiv 2310.08744, sections 3 and 4;
path patching of Wang et al., "Interpretability in the Wild", 2022, arXiv 2211.00593. The released code holds receivers
at their clean values in run (2) after reading them and leaves out senders above the lowest receiver; with receivers in
one layer both are the same.

Shapes: token ids ``(batch, length)``, clean and corrupt alike; answers ``(batch, 2)``, the correct and the wrong token;
effects ``(layers, heads)``. Cost: two forward passes a sender, one where the receiver is the residual stream, because
(2) and (3) are one run there: heads before it are held, heads behind it are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.errors import OptionError, RetrofitError, ShapeError
from regard.inspect import intervene as change
from regard.inspect.capture import capture
from regard.inspect.intervene import Edit, Head, intervene
from regard.inspect.loading import token_logits
from regard.retrofit.sites import Site, discover
from regard.retrofit.switch import Call, Weights

__all__ = [
    "activation_patch_heads",
    "circuit_faithfulness",
    "circuit_overlap",
    "logit_difference",
    "mean_ablate_heads",
    "path_patching",
    "set_attention",
]

Component = Literal["z", "q", "k", "v"]
_INPUTS: dict[str, change.InputName] = {"q": "query", "k": "key", "v": "value"}
_MLPS = ("mlp", "feed_forward", "ffn", "ff")


def logit_difference(logits: Tensor, answers: Tensor) -> Tensor:
    """``(batch,)``: the correct token's logit less the wrong one's, at the last of ``(batch, length, vocabulary)``."""
    if answers.dim() != 2 or answers.shape != (logits.shape[0], 2):
        raise ShapeError(f"answers are (batch, 2), the correct and the wrong token; got {tuple(answers.shape)}.")
    both = logits[:, -1].gather(1, answers.to(logits.device))
    return both[:, 0] - both[:, 1]


@torch.no_grad()
def path_patching(
    model: nn.Module,
    receivers: Sequence[Head] | int,
    clean: Tensor,
    corrupt: Tensor,
    answers: Tensor,
    component: Component = "z",
    position: int | None = -1,
    freeze_mlps: bool = False,
) -> Tensor:
    """Effects of all senders on ``receivers``, ``(layers, heads)``.

    receivers: heads, of which ``component`` receives; or a layer, before which the residual stream receives (as many
    as there are layers: after the last, whose effect is the direct one on the logits). position: of the sender's
    output; None for all.
    """
    if component not in ("z", "q", "k", "v"):
        raise OptionError(f"component is 'z', 'q', 'k' or 'v', got {component!r}.")
    sites = discover(model)
    if isinstance(receivers, int):
        highest = receivers
        if not 0 <= highest <= len(sites):
            raise OptionError(f"There is no layer {highest} to receive: the model has {len(sites)}.")
    else:
        highest = max(layer for layer, _ in _known(sites, receivers))
    runs = _Runs(model, clean, corrupt, answers, position, freeze_mlps)
    effects = runs.no_effects()
    for layer in range(highest):
        for head in range(runs.clean_z[layer].shape[2]):
            if isinstance(receivers, int):
                found = runs.through_residual((layer, head), receivers)
            else:
                found = runs.through_heads((layer, head), list(receivers), component)
            effects[layer, head] = runs.effect(found)
    return effects


@torch.no_grad()
def activation_patch_heads(
    model: nn.Module, clean: Tensor, corrupt: Tensor, answers: Tensor, position: int | None = -1
) -> Tensor:
    """Effects ``(layers, heads)`` of giving each head its corrupt output, everything behind it left free."""
    runs = _Runs(model, clean, corrupt, answers, position, False)
    effects = runs.no_effects()
    for layer, z in enumerate(runs.clean_z):
        for head in range(z.shape[2]):
            with intervene(model, change.patch_heads({(layer, head): runs.swapped((layer, head))})):
                effects[layer, head] = runs.effect(runs.run(clean))
    return effects


def mean_ablate_heads(model: nn.Module, heads: Iterable[Head], prompts: Tensor) -> intervene:
    """``with mean_ablate_heads(model, heads, prompts): ...``: heads give their mean output over ``prompts``, place by
    place, so that nothing of a single prompt passes through them."""
    heads, means = list(heads), {}
    if heads:
        _known(discover(model), heads)
    with torch.no_grad(), capture(model, "head_outputs") as trace:
        model(prompts)
    for layer, head in heads:
        outputs = trace[layer].head_outputs
        assert outputs is not None
        means[layer, head] = outputs[:, head].mean(0)
    return intervene(model, change.ablate_heads(list(means), "mean", means))


@torch.no_grad()
def circuit_faithfulness(
    model: nn.Module, circuit: Iterable[Head], prompts: Tensor, answers: Tensor, reference: Tensor | None = None
) -> float:
    """LD with all heads outside of ``circuit`` at their mean over ``reference`` (by default the prompts), over LD of
    the whole model: 1 for a circuit that does what the model does. Says something where LD of the model is above 0."""
    inside, sites = set(circuit), discover(model)
    if inside:
        _known(sites, inside)
    others = [
        (layer, head)
        for layer, site in enumerate(sites)
        for head in range(site.context["num_heads"])
        if (layer, head) not in inside
    ]
    own = logit_difference(token_logits(model(prompts)), answers).mean()
    if own == 0:
        raise OptionError("The model's own logit difference is 0, so a circuit has no share of it.")
    with mean_ablate_heads(model, others, prompts if reference is None else reference):
        left = logit_difference(token_logits(model(prompts)), answers).mean()
    return float(left / own)


def circuit_overlap(first: Iterable[Head], second: Iterable[Head], how: Literal["share", "jaccard"] = "share") -> float:
    """``"share"``: heads of both over those of the first; ``"jaccard"``: over those of either."""
    one, other = set(first), set(second)
    if how not in ("share", "jaccard"):
        raise OptionError(f"how is 'share' or 'jaccard', got {how!r}.")
    if not one or not other:
        raise OptionError("A circuit has at least one head.")
    return len(one & other) / len(one if how == "share" else one | other)


def set_attention(model: nn.Module, heads: Iterable[Head], position: int | Sequence[int], targets: Tensor) -> intervene:
    """``with set_attention(model, heads, -1, targets): ...``: rows of heads' weights are ``targets`` ``(keys,)`` or
    ``(batch, rows, keys)``, which sum to 1; the repair of a circuit splits the inhibition heads' last row between the
    wrong answers."""
    rows = [position] if isinstance(position, int) else list(position)
    return intervene(model, change.set_attention(heads, rows, targets))


@dataclass
class _Runs:
    """The clean and the corrupt run, and what is held at the former. ``position``: of the sender, None for all."""

    model: nn.Module
    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    position: int | None
    freeze_mlps: bool
    sites: list[Site] = field(init=False)
    clean_z: list[Tensor] = field(init=False)
    corrupt_z: list[Tensor] = field(init=False)
    ends: tuple[float, float] = field(init=False)
    mlps: dict[int, nn.Module] = field(init=False)
    given: dict[nn.Module, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupt.shape or self.clean.dim() != 2:
            raise ShapeError(
                "Clean and corrupt prompts are (batch, length), token by token alike; got "
                f"{tuple(self.clean.shape)} and {tuple(self.corrupt.shape)}."
            )
        length = self.clean.shape[1]
        if self.position is not None and not -length <= self.position < length:
            raise OptionError(f"The prompts have {length} tokens; there is no position {self.position}.")
        if self.model.training:
            raise OptionError("A model in training drops units at random, so runs differ; call model.eval().")
        self.sites = discover(self.model)
        self.mlps = _mlps(self.sites) if self.freeze_mlps else {}
        with ExitStack() as hooks:
            # The clean run is the last, so that what the MLPs gave is the clean run's.
            for module in self.mlps.values():
                hooks.callback(module.register_forward_hook(self._keep).remove)
            other, self.corrupt_z = self._kept(self.corrupt)
            own, self.clean_z = self._kept(self.clean)
        self.ends = (own, other)
        if own == other and not torch.equal(self.clean, self.corrupt):
            raise OptionError("Clean and corrupt prompts have one logit difference; there is nothing to explain.")

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.given[module] = output

    def _kept(self, ids: Tensor) -> tuple[float, list[Tensor]]:
        """LD, and heads' outputs in the model's own axes, ``(batch, length, heads, value_dim)``."""
        with capture(self.model, "head_outputs") as trace:
            difference = self.run(ids)
        return difference, [layer.head_outputs.transpose(1, 2) for layer in trace if layer.head_outputs is not None]

    def run(self, ids: Tensor) -> float:
        return float(logit_difference(token_logits(self.model(ids)), self.answers).mean())

    def no_effects(self) -> Tensor:
        return torch.zeros(len(self.sites), max(z.shape[2] for z in self.clean_z))

    def effect(self, found: float) -> float:
        own, other = self.ends
        return 0.0 if own == other else (found - own) / (other - own)

    def swapped(self, head: Head) -> Tensor:
        """The head's clean output ``(batch, length, value_dim)``, corrupt at the position."""
        layer, at = head
        out = self.clean_z[layer][:, :, at].clone()
        rows = slice(None) if self.position is None else self.position
        out[:, rows] = self.corrupt_z[layer][:, rows, at]
        return out

    @contextmanager
    def held(self, sender: Head, below: int, free: Iterable[Head] = (), *watching: Edit) -> Iterator[None]:
        """Heads (and MLPs) of the layers below one at their clean outputs, but for the sender and those free."""
        swapped, loose = self.swapped(sender), set(free) - {sender}

        def outputs(layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
            out = self.clean_z[layer].clone()
            if layer == sender[0]:
                out[:, :, sender[1]] = swapped
            for at in (head for own, head in loose if own == layer):
                out[:, :, at] = output[:, :, at]
            return out, weights

        with ExitStack() as closing:
            for layer, module in self.mlps.items():
                if layer < below:
                    hook = module.register_forward_hook(lambda *_, kept=self.given[module]: kept)
                    closing.callback(hook.remove)
            closing.enter_context(intervene(self.model, *watching, Edit(frozenset(range(below)), outputs=outputs)))
            yield

    def through_heads(self, sender: Head, receivers: list[Head], component: Component) -> float:
        kept: dict[Head, Tensor] = {}
        with self.held(sender, len(self.sites), receivers, _kept(receivers, component, kept)):
            self.model(self.clean)
        given = change.patch_heads(kept) if component == "z" else change.patch_inputs(_INPUTS[component], kept)
        with intervene(self.model, given):
            return self.run(self.clean)

    def through_residual(self, sender: Head, layer: int) -> float:
        with self.held(sender, layer):
            return self.run(self.clean)


def _kept(receivers: Iterable[Head], component: Component, into: dict[Head, Tensor]) -> Edit:
    """Reads what receivers take or give, and changes nothing."""
    layers = frozenset(layer for layer, _ in receivers)
    heads = list(receivers)

    def inputs(layer: int, call: Call) -> Call:
        tensor = getattr(call, _INPUTS[component])
        groups = call.query.shape[1] // tensor.shape[1]
        into.update({(own, at): tensor[:, at // groups].clone() for own, at in heads if own == layer})
        return call

    def outputs(layer: int, call: Call, output: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
        into.update({(own, at): output[:, :, at].clone() for own, at in heads if own == layer})
        return output, weights

    return Edit(layers, outputs=outputs) if component == "z" else Edit(layers, inputs=inputs)


def _known(sites: Sequence[Site], heads: Iterable[Head]) -> list[Head]:
    """The heads, which the model must have, and at least one."""
    found = list(heads)
    for layer, head in found:
        if not 0 <= layer < len(sites):
            raise OptionError(f"There is no layer {layer} among the model's {len(sites)}, counted from 0.")
        count = sites[layer].context["num_heads"]
        if not 0 <= head < count:
            raise OptionError(f"Layer {layer} has heads 0 to {count - 1}; there is no head {head}.")
    if not found:
        raise OptionError("No heads were given; a receiver or circuit is a (layer, head).")
    return found


def _mlps(sites: Sequence[Site]) -> dict[int, nn.Module]:
    """The MLP of each layer's block."""
    found = {}
    for layer, site in enumerate(sites):
        mlp = next((getattr(site.block, name) for name in _MLPS if hasattr(site.block, name)), None)
        if isinstance(mlp, nn.Module):
            found[layer] = mlp
        elif site.block is not site.home:
            raise RetrofitError(
                f"{site.path}: no MLP named {', '.join(_MLPS)} was found in {type(site.block).__name__}. Patch with "
                "freeze_mlps=False."
            )
    return found
