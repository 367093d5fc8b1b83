"""``with regard.retrofit(model, "moba", top_k=4):`` puts a mechanism into a live model, and takes it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn

from regard.cache import KeyValueCache
from regard.errors import OptionError, RetrofitError
from regard.mechanism import Mechanism
from regard.registry import build
from regard.retrofit import huggingface, torch_modules
from regard.retrofit.sites import Selector, Site, discover, select
from regard.retrofit.switch import DropoutPolicy, Replacement, Switch, name_of, switches

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Handle", "open_sites", "retrofit"]


class Handle:
    """A retrofit in force: a context manager, ended by leaving it or by :meth:`restore`.

    ``modules``: the mechanism of each layer by module path; ``decoders``: those that decode in its place, if any.
    They are no part of the model's own state dict; give ``parameters()`` to an optimizer, keep ``state_dict()``, or
    pass ``modules`` itself to :func:`retrofit` again.
    """

    def __init__(
        self,
        modules: Mapping[str, Mechanism],
        closing: ExitStack,
        answering: Sequence[tuple[Switch, Replacement]] = (),
    ) -> None:
        self.modules = dict(modules)
        self.decoders = {switch.site.path: chosen.decode for switch, chosen in answering if chosen.decode is not None}
        self._closing: ExitStack | None = closing
        self._answering = list(answering)

    @property
    def active(self) -> bool:
        """Whether the model is still retrofitted by this handle."""
        return self._closing is not None

    def cache(self, storage: Callable[[], KeyValueCache] | None = None) -> Cache:
        """A cache for ``model.generate(..., past_key_values=handle.cache())`` of a transformers decoder, in which each
        layer keeps its mechanism's own decoding state instead of all keys and values.

        storage: makes where keys and values of one layer are kept, such as ``lambda: QuantizedCache(bits=4)`` (see
        :mod:`regard.cache`), for mechanisms that keep them. Layers left to the model keep their usual cache. Texts of a
        batch have one length (no padding). A cache serves one generation within this retrofit.

        Raises RetrofitError for mechanisms that do not decode, OptionError for a storage that one cannot read.
        """
        if not self.active:
            raise RetrofitError("This retrofit was restored; call regard.retrofit again.")
        if not any(switch.site.host == "transformers" for switch, _ in self._answering):
            raise RetrofitError("Only retrofitted decoders of transformers take a cache.")
        from regard.retrofit.caches import decoding_cache

        return decoding_cache(self, self._answering, storage)

    def restore(self) -> None:
        """Take the mechanisms out. Other retrofits of the same model stay; a second call does nothing."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing.close()

    def __enter__(self) -> Handle:
        if not self.active:
            raise RetrofitError("This retrofit was restored; call regard.retrofit again.")
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The mechanisms' parameters, by ``<module path>.<name>``, each once."""
        seen: set[int] = set()
        for path, module in self._all().items():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}", parameter

    def _all(self) -> dict[str, Mechanism]:
        return self.modules | {f"{path}.decode": module for path, module in self.decoders.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The mechanisms' parameters, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of the mechanisms, by ``<module path>.<name>``."""
        return {f"{p}.{name}": tensor for p, m in self._all().items() for name, tensor in m.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` gave."""
        expected = self.state_dict().keys()
        if state.keys() != expected:
            wrong = sorted(state.keys() ^ expected)
            raise OptionError(f"This state is of another retrofit; it differs in {', '.join(wrong[:4])}.")
        for path, module in self._all().items():
            prefix = f"{path}."
            names = module.state_dict().keys()
            module.load_state_dict({name: state[prefix + name] for name in names})


Choice = str | Mechanism | tuple[str, Mapping[str, Any]]


def retrofit(
    model: nn.Module,
    mechanism: Choice | Mapping[Any, Choice],
    layers: Selector = None,
    *,
    decode: Choice | None = None,
    attention_dropout: DropoutPolicy = "auto",
    **options: Any,
) -> Handle:
    """Let ``mechanism`` answer a model's attention, from this call until the handle is left or restored.

    model: a transformers model, a torch model with ``nn.MultiheadAttention`` inside, or one built of ``regard.nn``.
    mechanism: a name (``options`` are its options), a built mechanism (shared by all layers chosen), or a mapping from
    layer selectors to a name, a pair ``(name, options)`` or a built mechanism; the first selector that fits counts.
    layers: which layers, by default all; the others keep the model's own attention. An index (of each stack), a module
    path or the start of one, ``"re:..."`` searched for in the path, a callable on the path, or a list of these.
    decode: another mechanism for decoding, that is for calls of one query with earlier keys; ``mechanism`` is then left
    with the prompt.
    attention_dropout: in training, a model's dropout of attention weights is applied by forming the implied weights.
    'auto' does so for mechanisms of quadratic cost and is an error for others, 'weights' does so always, 'off' never.

    Projections, positions, KV cache and ``generate`` stay the model's own business: the mechanism gets queries, keys
    and values as the model made them. A mask that it cannot honour is an error. ``output_attentions=True`` gives
    implied weights. A nested retrofit of the same layer wins until it is restored; retrofits may be restored in any
    order. A handle that is dropped without being restored leaves the model retrofitted.

    Raises RetrofitError, MissingExtraError, UnknownNameError, OptionError; nothing is changed then.
    """
    if attention_dropout not in get_args(DropoutPolicy):
        raise OptionError(f"attention_dropout is one of {get_args(DropoutPolicy)}, got {attention_dropout!r}.")
    sites = discover(model)
    plan = _plan(sites, mechanism, layers, options)
    modules = {site.path: _built(site, choice) for site, choice in plan}
    later = {site.path: None if decode is None else _built(site, decode) for site, _ in plan}
    answering = []
    closing = ExitStack()
    try:
        chosen = [site for site, _ in plan]
        for switch in open_sites(model, sites, chosen, closing):
            path = switch.site.path
            replacement = Replacement(modules[path], attention_dropout, later[path])
            answering.append((switch, replacement))
            switch.replacements.append(replacement)
            closing.callback(switch.replacements.remove, replacement)
    except BaseException:
        closing.close()
        raise
    return Handle(modules, closing, answering)


def _plan(
    sites: Sequence[Site], mechanism: Any, layers: Selector, options: Mapping[str, Any]
) -> list[tuple[Site, Any]]:
    if not isinstance(mechanism, Mapping):
        if isinstance(mechanism, str):
            mechanism = (mechanism, options)
        elif options:
            raise OptionError(f"Options {sorted(options)} belong to a name; the mechanism passed already has its own.")
        return [(site, mechanism) for site in select(sites, layers)]
    if layers is not None or options:
        raise OptionError(
            "With a mapping, its keys choose the layers and each value carries its own options: "
            "{'re:layers.[01]': 'full', 2: ('moba', {'top_k': 4})}."
        )
    chosen: dict[str, Any] = {}
    for selector, choice in mechanism.items():
        for site in select(sites, selector):
            chosen.setdefault(site.path, choice)
    return [(site, chosen[site.path]) for site in sites if site.path in chosen]


def _built(site: Site, choice: Any) -> Mechanism:
    if isinstance(choice, str):
        choice = (choice, {})
    if isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[0], str):
        name, options = choice
        module = build(name, options, **site.context)
        if not isinstance(module, Mechanism):
            raise OptionError(
                f"{name!r} is a {type(module).__name__} with its own projections, not a mechanism on (query, key, "
                "value): it cannot take the place of a trained model's attention. `regard list` shows the kinds."
            )
        near = (parameter for home in (site.home, site.block) for parameter in home.parameters())
        like = next((parameter for parameter in near if parameter.is_floating_point()), None)
        if like is not None:
            module.to(device=like.device, dtype=like.dtype)
        module.train(site.module.training)
        choice = module
    if not isinstance(choice, Mechanism):
        raise OptionError(f"A mechanism is a name, (name, options) or a built Mechanism; got {type(choice).__name__}.")
    if choice.applies_rotary:
        raise RetrofitError(
            f"{site.path}: {name_of(choice)} applies rotary positions itself, and a model's attention hands over "
            "queries and keys that have theirs already. It has a way of its own into a model, such as "
            "regard.retrofit.longheads.apply_longheads."
        )
    if choice.needs_grid and 1 not in choice.grid_axes:
        raise RetrofitError(
            f"{site.path}: {name_of(choice)} needs a grid of {' or '.join(map(str, sorted(choice.grid_axes)))} axes, "
            "and a model's attention does not say what space lies behind its tokens."
        )
    return choice


def open_sites(
    model: nn.Module, sites: Sequence[Site], chosen: Sequence[Site], closing: ExitStack, watching: bool = False
) -> list[Switch]:
    """The switches of ``chosen``, with the ways to them open until ``closing`` closes.

    sites: all of the model. watching: the chosen are only looked at and keep whoever answers them.
    """
    paths = {site.path for site in chosen}
    reached = [site for site in sites if site.host == "transformers"]
    if any(site.path in paths for site in reached):
        # All of a model's layers: those not chosen are then known to keep the model's own attention.
        for site in reached:
            _take_switch(site, closing)
        left = [site for site in reached if watching or site.path not in paths]
        huggingface.open_model(model, reached, left, closing)
    for site in chosen:
        if site.host == "transformers":
            continue
        _take_switch(site, closing)
        if site.host == "torch":
            torch_modules.open_multihead(site, model, closing)
        else:
            torch_modules.open_mechanism(site, closing)
    return [switches[id(site.module)] for site in chosen]


def _take_switch(site: Site, closing: ExitStack) -> None:
    switch = switches.setdefault(id(site.module), Switch(site))
    switch.users += 1
    closing.callback(_leave_switch, switch)


def _leave_switch(switch: Switch) -> None:
    switch.users -= 1
    if not switch.users:
        del switches[id(switch.site.module)]
