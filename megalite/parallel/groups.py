"""The managers of all axes of one rank, created together in one fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megalite.config import Config
from megalite.parallel.activity import Activity, CallTrace
from megalite.parallel.data import DataGroup
from megalite.parallel.group import AxisGroup
from megalite.parallel.pipeline import PipelineGroup
from megalite.parallel.tensor import TensorGroup
from megalite.parallel.topology import AXES, Topology


@dataclass(frozen=True)
class ParallelGroups:
    """One rank's managers.

    Attributes:
        topology: the grid.
        world_rank: this rank.
        tp, pp, dp: the manager of each axis.
        activity: what this rank is doing, for whoever explains a hang.
    """

    topology: Topology
    world_rank: int
    tp: TensorGroup
    pp: PipelineGroup
    dp: DataGroup
    activity: Activity = field(default_factory=Activity)

    @classmethod
    def solo(cls, activity: Activity | None = None) -> ParallelGroups:
        """The groups of a run of one rank; needs no process group."""
        alone = (TensorGroup(), PipelineGroup(), DataGroup())
        return cls(Topology(), 0, *alone, activity or Activity())

    @classmethod
    def create(
        cls, config: Config, device: torch.device, activity: Activity | None = None
    ) -> ParallelGroups:
        """Create every group of the layout. All ranks call it, after `init_process_group`.

        The order is fixed: the mesh with its axes, then the pipelines' two ways of messages, then
        embedding pairs, then key/value copies, then shard groups and their replicas.
        """
        parallel = config.parallel
        topology = Topology(tp=parallel.tp, pp=parallel.pp, dp=parallel.dp)
        if topology.world_size == 1:
            return cls.solo(activity)
        world_rank = dist.get_rank()
        sizes = tuple(getattr(topology, axis) for axis in AXES)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        place = topology.coordinates(world_rank)
        axis_group = {
            axis: mesh.get_group(axis) if getattr(topology, axis) > 1 else None for axis in AXES
        }
        timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
        for group in filter(None, axis_group.values()):
            # A mesh gives its groups the library's own limit, whatever the default group's is.
            _set_pg_timeout(timeout, group)
        pipelines = topology.groups("pp") if topology.pp > 1 else ()
        later, earlier = (
            _own_group(f"pipeline {way}", pipelines, world_rank, timeout, of_messages=True)
            for way in ("later", "earlier")
        )
        # Unused where both ends lie on one rank; which schedule it is may not be chosen yet.
        pairs = topology.embedding_pairs() if config.model.tie_embeddings else ()
        embedding_group = _own_group("embedding", pairs, world_rank, timeout)
        copies = topology.kv_replica_groups(config.model.num_kv_heads)
        kv_group = _own_group("kv copies", copies, world_rank, timeout)
        data: dict[str, AxisGroup | None] = {}
        size = parallel.shard_size
        if 1 < size < topology.dp:
            data = {
                "shards": _own_group("shards", topology.shard_groups(size), world_rank, timeout),
                "replicas": _own_group(
                    "shard replicas", topology.shard_replica_groups(size), world_rank, timeout
                ),
            }
        elif size > 1:
            data["shards"] = AxisGroup(place.dp, topology.dp, axis_group["dp"])
        groups = cls(
            topology,
            world_rank,
            tp=TensorGroup(
                place.tp,
                topology.tp,
                axis_group["tp"],
                sequence_parallel=bool(parallel.sequence_parallel),
                kv_group=kv_group,
            ),
            pp=PipelineGroup(
                place.pp,
                topology.pp,
                axis_group["pp"],
                later_group=later.process_group if later else None,
                earlier_group=earlier.process_group if earlier else None,
                embedding_group=embedding_group,
            ),
            dp=DataGroup(place.dp, topology.dp, axis_group["dp"], **data),
            activity=activity or Activity(),
        )
        groups._connect(device)
        return groups

    def calls(self) -> dict[str, tuple[tuple[int, ...], CallTrace]]:
        """World ranks and collectives of each group of more than one rank."""
        groups = {
            "tensor": self.tp,
            "pipeline": self.pp,
            "data": self.dp,
            "embedding": self.pp.embedding_group,
            "key/value": self.tp.kv_group or AxisGroup(),
        }
        if self.dp.shards.size > 1:
            groups["shards"] = self.dp.shards
            groups["shard replicas"] = self.dp.replicas
        return {n: (g.world_ranks, g.trace) for n, g in groups.items() if g.size > 1}

    def wait_for_all(self, device: torch.device) -> None:
        """Return when every rank has called this."""
        for group in (self.tp, self.dp, self.pp):
            group.all_reduce(torch.ones(1, device=device)).item()

    def _connect(self, device: torch.device) -> None:
        """One collective on each axis, and messages between all neighbours: NCCL connects at the
        first use, which is no moment to wait for each other in the middle of a schedule."""
        data = (self.dp, self.dp.shards, self.dp.replicas)
        for group in dict.fromkeys((self.tp, *data, self.pp, self.pp.embedding_group)):
            group.all_reduce(torch.ones(1, device=device))
        self.pp.connect(device)


def _own_group(
    name: str,
    members: Iterable[tuple[int, ...]],
    world_rank: int,
    timeout: timedelta,
    *,
    of_messages: bool = False,
) -> AxisGroup | None:
    """Create all groups, as every rank must, and return the one that holds this rank."""
    options = _message_options(timeout) if of_messages and dist.get_backend() == "nccl" else None
    own = None
    for ranks in members:
        process_group = dist.new_group(
            list(ranks), timeout=timeout, pg_options=options, group_desc=name
        )
        if world_rank in ranks:
            own = AxisGroup(ranks.index(world_rank), len(ranks), process_group)
    return own


def _message_options(timeout: timedelta) -> dist.ProcessGroupNCCL.Options:
    """Of groups whose messages travel while the GPU computes: theirs are the next multiprocessors
    that a matrix product leaves, not those that are left when all of it has been scheduled."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # told twice, or torch warns that one of the two is not taken
    return options
