"""The executors: the only place where speed is written.

Each has one plain reference form and fast forms behind ``backend="auto"``; all agree in value and gradient.
"""

from regard.kernels.backends import current_backend, use_backend
from regard.kernels.block_sparse import block_sparse_attention
from regard.kernels.delta_rule import delta_rule
from regard.kernels.dense import dense_attention, dense_weights, masked_softmax
from regard.kernels.ema import damped_ema
from regard.kernels.flash_window import flash_window_attention
from regard.kernels.linear import LinearState, linear_attention, linear_step
from regard.kernels.merge import merge_attentions
from regard.kernels.neighbors import Neighbors, neighbor_mix, neighbor_scatter, neighbor_scores
from regard.kernels.scan import linear_scan, selective_scan
from regard.kernels.score_bias import TableBias
from regard.kernels.shapes import accumulation_dtype, expand_groups, score_scale
from regard.kernels.token_sparse import token_sparse_attention

__all__ = [
    "LinearState",
    "Neighbors",
    "TableBias",
    "accumulation_dtype",
    "block_sparse_attention",
    "current_backend",
    "damped_ema",
    "delta_rule",
    "dense_attention",
    "dense_weights",
    "expand_groups",
    "flash_window_attention",
    "linear_attention",
    "linear_scan",
    "linear_step",
    "masked_softmax",
    "merge_attentions",
    "neighbor_mix",
    "neighbor_scatter",
    "neighbor_scores",
    "score_scale",
    "selective_scan",
    "token_sparse_attention",
    "use_backend",
]
