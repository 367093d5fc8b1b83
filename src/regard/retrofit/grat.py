"""GRAT into a trained diffusion transformer (mechanism: :mod:`regard.local.grat`).

Source: Ren et al., "Grouping First, Attending Smartly", 2025, arXiv 2505.14687.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from regard.local.grat import GRAT, Kind
from regard.retrofit.fused_calls import answer_fused_calls
from regard.retrofit.handle import Handle, retrofit
from regard.retrofit.sites import Selector, reachable

__all__ = ["apply_grat"]


def apply_grat(
    model: nn.Module,
    shape: Sequence[int],
    group: int | Sequence[int] | None = None,
    kind: Kind = "cross",
    radius: int = 1,
    text: int = 256,
    text_first: bool = False,
    layers: Selector = None,
) -> Handle:
    """Give a joint-attention model :class:`~regard.local.grat.GRAT` on its ``shape`` of image or video tokens, with
    ``text`` more behind them (or, with text_first, before them, as Flux has it); the handle undoes it. Cells are 4 x 8
    x 8 tokens of a video and 16 x 16 of an image where ``group`` does not say otherwise.

    Queries, keys and values are taken as the model hands them to attention, rotary positions applied, and grouped
    there. Padded text is read off the mask that the model passes.

    Reached are models whose attention layers are ``torch.nn.MultiheadAttention`` or hosts of ``regard.nn``
    (``layers`` chooses among them, see :func:`regard.retrofit`), and otherwise those that call torch's
    ``scaled_dot_product_attention`` themselves on all tokens at once, as most diffusion transformers do: there every
    call on that number of queries and keys is answered, whichever its layer, and others (text alone, cross-attention)
    stay torch's. Not reached: attention inside compiled code or by kernels of other libraries.
    """
    mechanism = GRAT(group, kind, radius, text=text, text_first=text_first, shape=shape)
    if layers is not None or reachable(model):
        return retrofit(model, mechanism, layers)
    return answer_fused_calls(model, mechanism, math.prod(shape) + text)
