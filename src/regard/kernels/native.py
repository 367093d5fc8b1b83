"""Kernels in C++ for CPUs, compiled at first use with the compiler that is there; without one, only speed is lost.

Nothing is built when regard is installed. The first problem that is long enough to be worth it compiles
``native_*.cpp`` (a few seconds) into the user's cache, ``REGARD_CACHE`` or ``~/.cache/regard``, keyed by source,
compiler flags and processor; later processes load it from there. ``REGARD_NATIVE=0`` switches native kernels off,
``REGARD_NATIVE=1`` compiles at the first use of any size. :func:`status` says what is the case and why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from regard.errors import BackendError
from regard.kernels.block_plan import Plan, codes_of, plan_of
from regard.kernels.score_bias import TableBias
from regard.layout import BlockLayout

__all__ = ["Status", "available", "backward", "cache_folder", "forward", "status", "worthwhile"]

_SOURCES = tuple(Path(__file__).with_name(f"native_{name}.cpp") for name in ("blocks", "linear", "channel"))
_HEADERS = tuple(Path(__file__).with_name(f"native_{name}.h") for name in ("tiles", "linear"))
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
_TUNED = ("-march=native",)

# Floating-point operations of a call from which a built library is used, and from which it is built for it.
_USE, _BUILD = 1 << 24, 1 << 33
# Bytes of masks inside partial blocks that are handed over at once.
_MASKS = 1 << 26


@dataclass(frozen=True)
class Status:
    """Whether native kernels run here: ``ready``, ``not built`` (they will be when worth it), ``off`` or ``failed``."""

    state: str
    detail: str


_INTEGERS = (
    *("batch", "heads", "kv_heads", "q_len", "k_len", "dim", "value_dim", "block_q", "block_k"),
    *("list_batch", "list_heads", "first_block", "last_block", "threads", "bias_heads", "bias_size"),
)


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in ("starts", "columns", "tiles", "visible", "codes", "bias")),
        ("scale", ctypes.c_float),
    ]


_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_failure: str | None = None


def status() -> Status:
    """What is the case on this machine, without building anything."""
    if os.environ.get("REGARD_NATIVE") == "0":
        return Status("off", "REGARD_NATIVE=0")
    if _failure is not None:
        return Status("failed", _failure)
    if _library is not None or _path().exists():
        return Status("ready", str(_path()))
    compiler = _compiler()
    if compiler is None:
        return Status("failed", "no C++ compiler found (CXX, c++, g++, clang++); the PyTorch forms run")
    return Status("not built", f"{compiler} will build it in {_path().parent} when a problem is large enough")


def available(*, build: bool) -> bool:
    """Whether native kernels can run now; with ``build`` they are compiled if need be."""
    if os.environ.get("REGARD_NATIVE") == "0":
        return False
    if _library is not None:
        return True
    if _failure is not None or not (build or os.environ.get("REGARD_NATIVE") == "1" or _path().exists()):
        return False
    return _load() is not None


def worthwhile(query: Tensor, value: Tensor, layout: BlockLayout, bias: TableBias | None = None) -> bool:
    """Whether this call should run natively: on a CPU, float32 or less, large enough, and with blocks wide enough."""
    if query.device.type != "cpu" or query.dtype == torch.float64 or min(layout.block_q, layout.block_k) < 8:
        return False
    plan = plan_of(layout)
    blocks = len(plan.columns) * (query.shape[0] * query.shape[1] / (plan.batch * plan.heads))
    work = blocks * layout.block_q * layout.block_k * 2 * (query.shape[-1] + value.shape[-1])
    return large_enough(work) and (bias is None or codes_of(layout, bias) is not None)


def large_enough(work: float) -> bool:
    """Whether a call of so many floating-point operations should run natively, and can."""
    return work >= _USE and available(build=work >= _BUILD)


def require() -> ctypes.CDLL:
    """The library, or an error that says why there is none."""
    if not available(build=True) or _library is None:
        raise BackendError(f"Native kernels cannot run here: {status().detail}. Use backend='auto' or 'gather'.")
    return _library


def _load() -> ctypes.CDLL | None:
    global _library, _failure
    with _lock:
        if _library is None and _failure is None:
            try:
                if not _path().exists():
                    _build(_path())
                _library = _declared(ctypes.CDLL(str(_path())))
            except (OSError, subprocess.SubprocessError, RuntimeError) as error:
                _failure = f"{error}".strip()[-600:] or type(error).__name__
    return _library


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.regard_panel.restype = integer
    library.regard_pack.argtypes = [pointer, *[integer] * 6, pointer]
    library.regard_pack.restype = None
    library.regard_block_forward.argtypes = [pointer] * 6
    library.regard_block_forward.restype = None
    library.regard_block_backward.argtypes = [pointer, integer, *[pointer] * 12]
    library.regard_block_backward.restype = None
    for kind in ("linear", "channel"):
        for name, arguments in ((f"regard_{kind}_forward", 10), (f"regard_{kind}_backward", 14)):
            function = getattr(library, name)
            function.argtypes, function.restype = [pointer] * arguments, None
    return library


def _compiler() -> str | None:
    if sys.platform == "win32":
        return None
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where this library keeps what it can make again: ``REGARD_CACHE``, or the user's cache."""
    home = os.environ.get("REGARD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"
    return Path(home)


@cache
def _path() -> Path:
    key = hashlib.sha256(b"".join(file.read_bytes() for file in (*_HEADERS, *_SOURCES)))
    key.update(" ".join((*_FLAGS, *_TUNED, sys.platform, platform.machine(), _processor())).encode())
    return cache_folder() / "native" / key.hexdigest()[:16] / "libregard.so"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build(path: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found (CXX, c++, g++, clang++); the PyTorch forms run")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there whole, so that processes that build at the same time do no harm.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        for extra in (_TUNED, ()):
            command = [compiler, *_FLAGS, *extra, *map(str, _SOURCES), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                os.replace(built, path)
                return
    raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[-400:]}")


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float, bias: TableBias | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of float32 tensors on a CPU, shapes as in :mod:`regard.kernels.block_sparse`."""
    library, plan = require(), plan_of(layout)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3])
    keys, values = _packed(library, key, layout.block_k, True), _packed(library, value, layout.block_k, False)
    for problem, _held in _problems(query, key, value, layout, plan, scale, bias):
        library.regard_block_forward(ctypes.byref(problem), *map(Tensor.data_ptr, (query, keys, values, out, lse)))
    return out, lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    layout: BlockLayout,
    scale: float,
    bias: TableBias | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`forward` by query, key, value and the bias's table."""
    library, plan, block = require(), plan_of(layout), layout.block_k
    query, key, value, out, lse = (t.contiguous() for t in (query, key, value, out, lse))
    grad_out, grad_lse = grad_out.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    keys_across, values_across = _packed(library, key, block, True), _packed(library, value, block, True)
    keys, panel = _packed(library, key, block, False), library.regard_panel()
    lanes, threads = key.shape[0] * key.shape[1], torch.get_num_threads()
    # With fewer key/value heads than threads, each head is shared, and every share has sums of its own.
    shares = -(-threads // lanes) if lanes < threads else 1
    sums = [
        key.new_zeros(shares, lanes, -(-t.shape[2] // block) * block, -(-t.shape[3] // panel) * panel)
        for t in (key, value)
    ]
    grad_query = torch.empty_like(query)
    grad_bias = query.new_zeros(shares, *query.shape[:2], 0 if bias is None else bias.table.shape[1])
    for problem, _held in _problems(query, key, value, layout, plan, scale, bias):
        library.regard_block_backward(
            ctypes.byref(problem),
            shares,
            *map(Tensor.data_ptr, (query, keys_across, values_across, keys, out, lse, grad_out)),
            None if grad_lse is None else grad_lse.data_ptr(),
            *map(Tensor.data_ptr, (grad_query, *sums, grad_bias)),
        )
    grad_key, grad_value = (
        (total[0] if shares == 1 else total.sum(0))[:, : like.shape[2], : like.shape[3]].reshape(like.shape)
        for total, like in zip(sums, (key, value), strict=True)
    )
    grad_table = None if bias is None else grad_bias.sum((0, 1)).sum_to_size(bias.table.shape)
    return grad_query, grad_key.mul_(scale), grad_value, grad_table


def _packed(library: ctypes.CDLL, tensor: Tensor, block: int, transposed: bool) -> Tensor:
    """The blocks of keys or values in the order in which products read them (see ``native_blocks.cpp``)."""
    batch, heads, length, width = tensor.shape
    panel = library.regard_panel()
    if not transposed and width % panel == 0:
        return tensor
    size = -(-block // panel) * panel * width if transposed else -(-width // panel) * panel * block
    packed = tensor.new_empty(batch * heads * -(-length // block) * size)
    library.regard_pack(
        tensor.data_ptr(),
        batch * heads,
        length,
        width,
        block,
        int(transposed),
        torch.get_num_threads(),
        packed.data_ptr(),
    )
    return packed


def _problems(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    plan: Plan,
    scale: float,
    bias: TableBias | None,
) -> Iterator[tuple[_Problem, object]]:
    """The call in stretches of query blocks whose masks fit the bound, each with the tensors that it points to."""
    (batch, heads, q_len, dim), (_, kv_heads, k_len, value_dim) = query.shape, value.shape
    q_blocks = layout.visit.shape[2]
    blocks = (layout.block_q, layout.block_k)
    sizes = (batch, heads, kv_heads, q_len, k_len, dim, value_dim, *blocks, plan.batch, plan.heads)
    if bias is not None:
        codes = codes_of(layout, bias)
        if codes is None:
            raise BackendError(
                "The native form adds biases to layouts that all sequences and heads share, with few distinct blocks; "
                "use backend='gather'."
            )
        table = bias.table.detach().float().contiguous()
        held = (plan.starts, plan.columns, codes.tiles, codes.places, table)
        starts, columns, tiles, places, values = map(Tensor.data_ptr, held)
        integers = (*sizes, 0, q_blocks, torch.get_num_threads(), *table.shape)
        yield _Problem(*integers, starts, columns, tiles, None, places, values, scale), held
        return
    masks = plan.places.shape[1] * layout.block_q * layout.block_k
    step = q_blocks if masks <= _MASKS else max(q_blocks * _MASKS // masks, 1)
    for first in range(0, q_blocks, step):
        yield _problem(sizes, layout, plan, scale, (first, min(first + step, q_blocks)))


def _problem(
    sizes: tuple[int, ...], layout: BlockLayout, plan: Plan, scale: float, blocks: tuple[int, int]
) -> tuple[_Problem, object]:
    tiles, chosen = plan.tiles, None
    q_blocks = layout.visit.shape[2]
    if blocks != (0, q_blocks):
        row = torch.arange(len(plan.starts) - 1).repeat_interleave(plan.starts.diff()) % q_blocks
        here = (row >= blocks[0]) & (row < blocks[1]) & (plan.tiles >= 0)
        chosen = plan.tiles[here].long().unique()
        number = torch.full((plan.places.shape[1] + 1,), -1, dtype=torch.int32)
        number[chosen] = torch.arange(len(chosen), dtype=torch.int32)
        tiles = number[plan.tiles]
    visible = plan.visible(layout, chosen).contiguous()
    held = (plan.starts, plan.columns, tiles, visible)
    problem = _Problem(*sizes, *blocks, torch.get_num_threads(), 0, 0, *map(Tensor.data_ptr, held), None, None, scale)
    return problem, held
