"""The way into models that call ``torch.nn.functional.scaled_dot_product_attention`` in their own forward.

Such layers are no modules that could be found and switched, so their calls are caught as they happen, while the model
runs. A call does not say which layer it comes from: calls are told apart by their length alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.errors import RetrofitError
from regard.mechanism import Mechanism
from regard.retrofit.handle import Handle
from regard.retrofit.reading import read_mask
from regard.retrofit.switch import name_of

__all__ = ["answer_fused_calls"]


class _FusedCalls(TorchFunctionMode):
    """Calls on ``length`` queries and as many keys go to the mechanism, the others to torch."""

    def __init__(self, mechanism: Mechanism, length: int) -> None:
        super().__init__()
        self.mechanism, self.length, self.answered = mechanism, length, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = kwargs or {}
        return self._attend(*args, **call) if func is F.scaled_dot_product_attention else func(*args, **call)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.dim() != 4 or not query.shape[2] == key.shape[2] == self.length:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if dropout_p:
            raise RetrofitError(
                f"The model drops attention weights (dropout_p={dropout_p}), and {name_of(self.mechanism)} forms none. "
                "Put the model into evaluation mode, or set its attention dropout to 0."
            )
        if torch.is_autocast_enabled(query.device.type):
            # As torch's own kernel would have it: tensors may come in different dtypes then.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (t.to(dtype) for t in (query, key, value))
        mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
        reading = read_mask(mask, self.length, self.length, is_causal)
        self.answered += 1
        rule = reading.argument(self.length, query.dtype)
        out: Tensor = self.mechanism(query, key, value, causal=reading.causal, mask=rule, scale=scale)
        return out


def answer_fused_calls(model: nn.Module, mechanism: Mechanism, length: int) -> Handle:
    """Let ``mechanism`` answer, while ``model`` runs, every call of torch's ``scaled_dot_product_attention`` on
    ``length`` queries and keys; calls of other lengths stay torch's.

    Undone by leaving or restoring the handle. Calls inside compiled code, and those that other functions of torch make
    (``nn.MultiheadAttention``, which :func:`regard.retrofit` reaches), are not seen. A run without a call that could be
    answered is a RetrofitError.
    """
    running: list[tuple[_FusedCalls, ExitStack]] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack, calls = ExitStack(), _FusedCalls(mechanism, length)
        stack.enter_context(calls)
        running.append((calls, stack))

    def check(module: nn.Module, args: Any, output: Any) -> None:
        if running and not running[-1][0].answered:
            raise RetrofitError(
                f"No attention of {length} queries and keys went through scaled_dot_product_attention in this run of "
                f"{type(model).__name__}, so {name_of(mechanism)} changed nothing. Check the number of tokens, and "
                "that the model is not compiled and calls torch's function itself."
            )

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if running:
            running.pop()[1].close()

    closing = ExitStack()
    closing.callback(model.register_forward_hook(leave, always_call=True).remove)
    closing.callback(model.register_forward_hook(check, prepend=True).remove)
    closing.callback(model.register_forward_pre_hook(enter).remove)
    return Handle({"": mechanism}, closing)
