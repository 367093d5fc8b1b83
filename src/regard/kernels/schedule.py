"""Which tiles a fused attention kernel may have on a GPU, by what fits in its memories.

The rules of AttentionEngine's released scheduler (Chen et al., 2025, arXiv 2502.15349). For queries ``M``, keys ``N``,
score dim ``K``, value dim ``V``, ``b`` bytes a number, and a pipeline of so many stages:

    shared bytes          M K b + N K stages b + N V stages b  [+ 4 M N: scores there too]  [+ 4 M V: outputs there too]
    registers a thread    4 (M N + M V) / (4 threads)

Shared bytes, registers a thread and registers in all stay within the device's; ``M`` and ``N`` are multiples of its
matrix instruction, ``M`` one of 64 rows for each group of threads that issues one; the score dim is taken whole.
If no tile is left, scores and outputs cannot stay on the chip together: attention is not fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from regard.errors import ShapeError

__all__ = ["H100", "Device", "Schedule", "TileConfig", "schedule", "tile_memory"]

_STAGES = 4


@dataclass(frozen=True)
class Device:
    """Limits of one block of threads. mma: rows, columns and depth of a matrix instruction, which ``mma_threads``
    issue together."""

    name: str
    shared_bytes: int
    registers: int
    registers_per_thread: int
    mma: tuple[int, int, int]
    mma_threads: int
    threads: int


H100 = Device("H100", 232448, 65536, 255, (64, 16, 16), 128, 1024)


@dataclass(frozen=True)
class TileConfig:
    """One way: tile sizes, whether scores and outputs lie in shared memory beside the registers, threads, stages, and
    what it takes."""

    block_m: int
    block_n: int
    block_k: int
    shared_scores: bool
    shared_output: bool
    threads: int
    stages: int
    shared_bytes: int
    registers_per_thread: float


@dataclass(frozen=True)
class Schedule:
    """The configurations that fit, in the order of the enumeration."""

    device: Device
    configs: tuple[TileConfig, ...]

    @property
    def fuse(self) -> bool:
        """Whether any is left."""
        return bool(self.configs)


def tile_memory(
    block_m: int,
    block_n: int,
    dim: int,
    value_dim: int,
    itemsize: int,
    *,
    threads: int,
    stages: int,
    shared_scores: bool,
    shared_output: bool,
) -> tuple[int, float]:
    """Shared bytes, and registers of 4 bytes a thread."""
    shared = block_m * dim * itemsize + block_n * (dim + value_dim) * stages * itemsize
    shared += 4 * block_m * block_n * shared_scores + 4 * block_m * value_dim * shared_output
    return shared, 4 * block_m * (block_n + value_dim) / (4 * threads)


def schedule(meta: tuple[Tensor, Tensor, Tensor], device: Device = H100) -> Schedule:
    """The configurations for query, key and value ``(batch, heads, length, dim)``, of which shapes and dtype are read;
    meta tensors will do."""
    query, key, value = meta
    if not query.dim() == key.dim() == value.dim() == 4 or query.shape[3] != key.shape[3]:
        raise ShapeError(
            "schedule takes query, key and value (batch, heads, length, dim); got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    lengths = query.shape[2], key.shape[2]
    return Schedule(device, tuple(_fitting(*lengths, query.shape[3], value.shape[3], query.dtype.itemsize, device)))


def _fitting(q_len: int, k_len: int, dim: int, value_dim: int, itemsize: int, device: Device) -> Iterator[TileConfig]:
    rows, columns, depth = device.mma
    if dim % depth:
        return
    for block_m in range(rows, _up(q_len, rows) + 1, rows):
        for block_n in range(columns, _up(k_len, columns) + 1, columns):
            if block_m * (block_n + value_dim) > device.registers:
                # Larger blocks of keys take more.
                break
            for scores, output in ((False, False), (False, True), (True, False), (True, True)):
                for threads in range(device.mma_threads, device.threads + 1, device.mma_threads):
                    if block_m % (threads // device.mma_threads * rows):
                        continue
                    for stages in range(1, _STAGES + 1):
                        shared, registers = tile_memory(
                            block_m,
                            block_n,
                            dim,
                            value_dim,
                            itemsize,
                            threads=threads,
                            stages=stages,
                            shared_scores=scores,
                            shared_output=output,
                        )
                        if shared <= device.shared_bytes and registers <= device.registers_per_thread:
                            yield TileConfig(block_m, block_n, dim, scores, output, threads, stages, shared, registers)


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
