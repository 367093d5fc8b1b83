"""The damped exponential moving average in several dimensions: a recurrence, and the long convolution that it is.

Ma et al., "Mega: Moving Average Equipped Gated Attention", 2022, arXiv 2209.10655, section 3.1. Every channel
is spread over ``h`` averages, each with a weight ``p`` of its own and a damping ``r``:

    s_t = p beta x_t + (1 - p r) s_{t-1},    y_t = gamma . s_t / sqrt(h),    p = sigmoid(alpha), r = sigmoid(delta)

so ``y`` is ``x`` convolved with ``K[t] = sum_h gamma p beta (1 - p r)^t / sqrt(h)``. Forms: ``fft`` (a circular
convolution of twice the length, ``O(L log L)``) and the recurrence by :func:`regard.kernels.scan.linear_scan`
(``recurrent``, ``parallel``, ``chunked``). The state ``(batch, dim, h)`` is the same in all of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import OptionError, ShapeError
from regard.kernels.backends import resolve
from regard.kernels.scan import linear_scan
from regard.kernels.shapes import accumulation_dtype

__all__ = ["damped_ema"]

FORMS = ("fft", "parallel", "chunked", "recurrent")


def damped_ema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    gamma: Tensor,
    omega: Tensor | None = None,
    bidirectional: bool = False,
    state: Tensor | None = None,
    *,
    official: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``y + omega * x`` ``(batch, length, dim)`` and the state ``(batch, dim, h)`` after the last token.

    x ``(batch, length, dim)``; alpha and delta (before their sigmoid), beta and gamma ``(dim, h)``; omega ``(dim,)``.
    ``state`` continues an earlier stretch; it is kept in the accumulation dtype, as are decays in logarithms.

    bidirectional: parameters are ``(2 dim, h)``, and a second average, that of the later half, runs from the end to the
    start; there is no state then (None). A token is in both averages, of which its own place takes the mean ``(K1[0] +
    K2[0]) / 2``, so that it counts once and turning the sequence round and swapping the halves turns the output round.
    official: it counts twice, ``K1[0] + K2[0]``, as in the authors' code (``omega`` can make up for either).
    """
    _check(x, alpha, delta, beta, gamma, omega, bidirectional, state)
    form = resolve("damped_ema", backend, FORMS)
    work = accumulation_dtype(x.dtype)
    source = x.to(work)
    enter, log_keep, leave = _coefficients(*(t.to(work) for t in (alpha, delta, beta, gamma)))
    if form == "auto":
        form = "recurrent" if x.shape[1] == 1 and not bidirectional else "fft"
    last = None
    if bidirectional:
        out = _both_ways(source, enter, log_keep, leave, official, form)
    elif form == "fft":
        out, last = _convolved(source, enter, log_keep, leave, state)
    else:
        out, last = _scanned(source, enter, log_keep, leave, state, form)
    if omega is not None:
        out = out + omega.to(work) * source
    return out.to(x.dtype), last


def _coefficients(alpha: Tensor, delta: Tensor, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``p beta``, ``log(1 - p r)`` and ``gamma / sqrt(h)``."""
    # 1 - p r = (1 - p) + p (1 - r), summed as logarithms: finite even where both sigmoids round to one.
    log_keep = torch.logaddexp(F.logsigmoid(-alpha), F.logsigmoid(alpha) + F.logsigmoid(-delta))
    return alpha.sigmoid() * beta, log_keep, gamma * max(gamma.shape[-1], 1) ** -0.5


def _powers(log_keep: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """``(1 - p r)^t`` for ``t < length`` in two factors, of which only about ``2 sqrt(length)`` powers are formed:
    ``far (dim, outer, h)`` of whole strides and ``near (dim, h, stride)`` within one."""
    stride = math.isqrt(length - 1) + 1 if length > 1 else 1
    steps = torch.arange(stride, device=log_keep.device, dtype=log_keep.dtype)
    far = (log_keep[:, None] * (stride * steps[: -(-length // stride), None])).exp()
    return far, (log_keep[..., None] * steps).exp()


def _kernel(weight: Tensor, far: Tensor, near: Tensor, length: int) -> Tensor:
    """``sum_h weight (1 - p r)^t`` for ``t < length``: ``(..., dim, length)`` of ``weight (..., dim, h)``."""
    return ((weight[..., None, :] * far) @ near).flatten(-2)[..., :length]


def _convolved(
    x: Tensor, enter: Tensor, log_keep: Tensor, leave: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    far, near = _powers(log_keep, length)
    kernel = _kernel(enter * leave, far, near, length)
    out = _circular(x, F.pad(kernel, (0, _size(length) - length)))
    outer, stride = far.shape[1], near.shape[2]
    blocks = F.pad(x, (0, 0, outer * stride - length, 0)).unflatten(1, (outer, stride))
    inside = torch.einsum("bijd,dhj->bidh", blocks, near.flip(2))
    last = torch.einsum("bidh,dih->bdh", inside, far.flip(1)) * enter
    if state is not None:
        out = out + _kernel(state * log_keep.exp() * leave, far, near, length).transpose(1, 2)
        last = last + state * (length * log_keep).exp()
    return out, last


def _size(length: int) -> int:
    """Places of a circular convolution in which nothing meets itself: at least twice the length, and 5, 6, 7 or 8 times
    a power of two, since a Fourier transform of a large prime is slow."""
    step = max((1 << (2 * length - 1).bit_length()) // 8, 1)
    return -(-2 * length // step) * step


def _circular(x: Tensor, kernel: Tensor) -> Tensor:
    """``x (batch, length, dim)`` convolved with ``kernel (dim, size)``, which holds negative lags at its end."""
    size = kernel.shape[-1]
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., : x.shape[1]].transpose(1, 2)


def _scanned(
    x: Tensor, enter: Tensor, log_keep: Tensor, leave: Tensor, state: Tensor | None, form: str
) -> tuple[Tensor, Tensor]:
    states = linear_scan(log_keep[None, None], enter * x[..., None], state, backend=form)
    # A state of its own: a view would keep the states of all tokens.
    return torch.einsum("bldh,dh->bld", states, leave), states[:, -1].clone()


def _both_ways(x: Tensor, enter: Tensor, log_keep: Tensor, leave: Tensor, official: bool, form: str) -> Tensor:
    length = x.shape[1]
    own = (enter * leave).sum(-1)
    first, second = own.chunk(2)
    if form == "fft":
        far, near = _powers(log_keep, length)
        ahead, behind = _kernel(enter * leave, far, near, length).chunk(2)
        both = first + second if official else (first + second) / 2
        between = ahead.new_zeros(len(ahead), _size(length) - 2 * length + 1)
        return _circular(x, torch.cat((both[:, None], ahead[:, 1:], between, behind[:, 1:].flip(1)), 1))
    halves = zip(enter.chunk(2), log_keep.chunk(2), leave.chunk(2), strict=True)
    (there, _), (back, _) = (
        _scanned(source, *half, None, form) for source, half in zip((x, x.flip(1)), halves, strict=True)
    )
    out = there + back.flip(1)
    return out if official else out - (first + second) / 2 * x


def _check(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    bidirectional: bool,
    state: Tensor | None,
) -> None:
    if x.dim() != 3 or not x.shape[1]:
        raise ShapeError(f"x is (batch, length, dim) with at least one token, got {tuple(x.shape)}.")
    batch, _, dim = x.shape
    rows = 2 * dim if bidirectional else dim
    shapes = [tuple(t.shape) for t in (alpha, delta, beta, gamma)]
    if alpha.dim() != 2 or alpha.shape[0] != rows or any(shape != shapes[0] for shape in shapes):
        size = "(2 dim, h), since it runs both ways," if bidirectional else "(dim, h)"
        raise ShapeError(f"alpha, delta, beta and gamma are all {size} for dim {dim}; got {shapes}.")
    if omega is not None and omega.shape != (dim,):
        raise ShapeError(f"omega has one number per channel ({dim},), got {tuple(omega.shape)}.")
    if state is not None:
        if bidirectional:
            raise OptionError("A moving average from both ends cannot be continued; leave out state or bidirectional.")
        expected = (batch, dim, alpha.shape[1])
        if tuple(state.shape) != expected:
            raise ShapeError(f"The state is (batch, dim, h) = {expected}, got {tuple(state.shape)}.")
