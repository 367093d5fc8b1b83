"""Routing Transformer: how much of the loss gap between local and full attention half routing heads close, and their time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from regard.bench.recall import PairedRecall
from regard.bench.training import evaluate, fit
from regard.models.sequence import SequenceModel
from regard.reproduce.finding import Finding
from regard.sparse.routing_transformer import RoutingTransformerAttention, to_sphere

LENGTH, STEPS = 512, 240
ROUTING = {"local_window": 64, "clusters": 16, "window": 64, "decay": 0.99}
RIVALS = {
    "full": ("full", {}),
    "local": ("sliding_window", {"window": 64, "sinks": 0}),
    "routing": ("routing_transformer_layer", {**ROUTING, "local_heads": 2}),
}


def time_over_full(length: int = 8192, repeats: int = 5) -> float:
    """Median ratio of processor times, routing over torch's fused causal attention, measured in turn."""
    query, key, value = torch.randn(3, 1, 2, length, 64, generator=torch.Generator().manual_seed(0))
    mechanism, ratios = RoutingTransformerAttention(2, 64, length=length).eval(), []
    with torch.no_grad():
        for turn in range(repeats + 1):
            began = time.process_time()
            mechanism(query, key, value, causal=True)
            middle = time.process_time()
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
            if turn:
                ratios.append((middle - began) / (time.process_time() - middle))
    return statistics.median(ratios)
