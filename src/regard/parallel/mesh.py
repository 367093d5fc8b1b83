"""A mesh of ranks: Ulysses inside a team, a ring of teams outside.

Ulysses sends little but needs as many heads as ranks; a ring has no such limit, and its messages can hide behind its
computation. Together (Fang and Zhao, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI",
2024, arXiv 2405.07719) the all-to-all stays on the fast links inside a machine, and key/value blocks of whole teams
travel between machines. A plain ring and plain Ulysses are its two borders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.errors import OptionError
from regard.parallel.group import DistributedGroup, Group
from regard.parallel.ring import ring_attention
from regard.parallel.shards import Sharding
from regard.parallel.ulysses import heads_to_tokens, tokens_to_heads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Mesh", "mesh_attention"]


@dataclass(frozen=True, eq=False)
class Mesh:
    """Rank ``ring.rank * ulysses.size + ulysses.rank`` of ``ring.size * ulysses.size``: ranks that follow one another
    are one team. None: a part of size one."""

    ring: Group | None
    ulysses: Group | None

    @classmethod
    def split(cls, group: Group, ulysses_size: int) -> Mesh:
        """From one group, teams of ``ulysses_size`` ranks. Every rank of the group makes this call, once: groups are
        dear to make."""
        if ulysses_size < 1 or group.size % ulysses_size:
            raise OptionError(f"A group of {group.size} ranks has no teams of {ulysses_size}; take a divisor.")
        if ulysses_size == 1:
            return cls(group, None)
        if ulysses_size == group.size:
            return cls(None, group)
        ranks = range(group.size)
        teams = [list(ranks[start : start + ulysses_size]) for start in range(0, group.size, ulysses_size)]
        rings = [list(ranks[place::ulysses_size]) for place in range(ulysses_size)]
        return cls(ring=group.split(rings), ulysses=group.split(teams))

    @classmethod
    def of_device_mesh(cls, mesh: DeviceMesh, *, ring: str, ulysses: str) -> Mesh:
        """From two named dimensions of a ``torch.distributed`` device mesh, of which ``ulysses`` is the inner one."""
        names = mesh.mesh_dim_names or ()
        missing = [name for name in (ring, ulysses) if name not in names]
        if missing or list(names).index(ring) > list(names).index(ulysses):
            raise OptionError(
                f"The device mesh has the dimensions {names}; ring={ring!r} and ulysses={ulysses!r} both have to be "
                "there, ring before ulysses."
            )
        return cls(DistributedGroup(mesh[ring]), DistributedGroup(mesh[ulysses]))

    @property
    def ulysses_size(self) -> int:
        """Ranks of a team."""
        return 1 if self.ulysses is None else self.ulysses.size

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.ulysses_size * (1 if self.ring is None else self.ring.size)

    @property
    def team(self) -> int:
        """Which team this rank is in."""
        return 0 if self.ring is None else self.ring.rank

    @property
    def rank(self) -> int:
        """This rank among all."""
        return self.team * self.ulysses_size + (0 if self.ulysses is None else self.ulysses.rank)


def mesh_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: Mesh,
    sharding: Sharding,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """As :func:`regard.parallel.ring.ring_attention`, over a mesh; ``sharding`` deals to all its ranks."""
    heads, kv_heads = query.shape[1], key.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if mesh.ulysses is not None:
        query, key, value = tokens_to_heads(query, key, value, mesh.ulysses, sharding, mesh.team)
    teams = sharding.merged(mesh.ulysses_size)
    out = ring_attention(query, key, value, mesh.ring, teams, causal=causal, window=window, scale=scale)
    if mesh.ulysses is None:
        return out
    return heads_to_tokens(out, mesh.ulysses, sharding, mesh.team, heads, kv_heads)
