"""Context parallelism of real processes over gloo: the cases of the simulated ranks, and a rank that dies."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel.cases import HEADS, OTHERS, PACKED, SHARED, UNEVEN, Case, check, run
from tests.parallel.processes import run_ranks

from regard.errors import CommunicationError
from regard.parallel.group import DistributedGroup, Group
from regard.parallel.mesh import Mesh
from regard.parallel.shards import Sharding

MESHES = [
    Case(strategy="mesh", ulysses_size=2, deal="zigzag", length=37, heads=(4, 1)),
    Case(strategy="mesh", ulysses_size=2, deal="striped", length=41, heads=(6, 3), documents=(5, 1, 20, 15)),
]
CASES = SHARED + UNEVEN + PACKED + HEADS + OTHERS


def everything(group: Group) -> dict[str, Any]:
    """All that real ranks are asked for, so that they are started once."""
    found: dict[str, Any] = {"4": [run(group, case) for case in CASES + MESHES]}
    pair = group.split([[0, 1], [2, 3]])
    found["2"] = [run(pair, case) for case in CASES]
    alone = group.split([[rank] for rank in range(4)])
    found["1"] = [run(alone, case) for case in SHARED]
    found["mesh"] = of_device_mesh(group)
    group.barrier()
    if group.rank != 3:  # it ends here, like a worker that was killed
        began = time.monotonic()
        try:
            run(group, Case())
        except CommunicationError as error:
            found["error"] = str(error)
        found["seconds"] = time.monotonic() - began
    return found


def of_device_mesh(group: Group) -> tuple[int, int, int, torch.Tensor]:
    """A mesh by the names of a device mesh's dimensions gives what the split gives."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = Mesh.of_device_mesh(
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "inside")), ring="between", ulysses="inside"
    )
    sharding = Sharding.zigzag(12, 4)
    from regard.parallel.context import context_parallel_attention

    x = torch.randn(1, 4, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = sharding.shard(x, mesh.rank, 2)
    return mesh.rank, mesh.size, mesh.team, context_parallel_attention(own, own, own, group=mesh, sharding=sharding)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", range(len(CASES + MESHES)), ids=[str(case) for case in CASES + MESHES])
def test_four_processes(found: list[dict[str, Any]], number: int) -> None:
    check((CASES + MESHES)[number], 4, [rank["4"][number] for rank in found])


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_processes(found: list[dict[str, Any]], number: int) -> None:
    check(CASES[number], 2, [rank["2"][number] for rank in found[:2]])
    check(CASES[number], 2, [rank["2"][number] for rank in found[2:]])


@pytest.mark.parametrize("number", range(len(SHARED)), ids=[str(case) for case in SHARED])
def test_one_process(found: list[dict[str, Any]], number: int) -> None:
    check(SHARED[number], 1, [found[0]["1"][number]])


def test_a_device_mesh(found: list[dict[str, Any]]) -> None:
    assert [rank["mesh"][:3] for rank in found] == [(0, 4, 0), (1, 4, 0), (2, 4, 1), (3, 4, 1)]
    x = torch.randn(1, 4, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = Sharding.zigzag(12, 4).gather([rank["mesh"][3] for rank in found], 2)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(x, x, x))


def test_a_worker_that_dies_gives_a_clear_error_in_time(found: list[dict[str, Any]]) -> None:
    for rank in found[:3]:
        assert rank["seconds"] < 25
        if "error" in rank:
            assert "of 4 could not" in rank["error"] and "other rank's own output" in rank["error"]
    assert any("ring" in rank.get("error", "") for rank in found[:3])


def test_a_group_needs_a_process_group() -> None:
    assert not dist.is_initialized()
    with pytest.raises(CommunicationError, match="init_process_group"):
        DistributedGroup()
