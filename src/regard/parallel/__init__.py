"""One sequence over many ranks: groups that pass messages, and the attention that is computed across them.

Exact softmax attention is below; linear attention is in :mod:`regard.parallel.zeco` and :mod:`regard.parallel.lasp`.
"""

from regard.parallel.context import ContextParallel, context_parallel, context_parallel_attention
from regard.parallel.group import DistributedGroup, Group, SimulatedGroup, Traffic, simulate
from regard.parallel.mesh import Mesh
from regard.parallel.shards import Sharding
from regard.parallel.traffic import traffic

__all__ = [
    "ContextParallel",
    "DistributedGroup",
    "Group",
    "Mesh",
    "Sharding",
    "SimulatedGroup",
    "Traffic",
    "context_parallel",
    "context_parallel_attention",
    "simulate",
    "traffic",
]
