"""The checkpoint engine ``gloo``, which sends the actor's weights to separate rollout servers.

verl's own engines for this purpose need an accelerator. ``actor_rollout_ref.rollout.checkpoint_engine.backend=gloo``
selects this engine, for trainers whose rollout is separate from training. verl imports this module as
``checkpoint_engine.custom_backend_module``.
"""

import io
from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from typing_extensions import override
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

from hpo_plugin.cpu.rollout import buckets

#: Time limit of one broadcast. The sender computes each bucket while the receivers wait.
TIMEOUT = timedelta(minutes=10)

#: Host and port of the store that the ranks of one update use.
Address = tuple[str, int]


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Broadcasts buckets of weights from actor rank 0 to all rollout workers, in a new process group per update."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        """Build an engine without a process group.

        Args:
            bucket_size: Maximum number of bytes of one broadcast, or of one tensor if that is larger
                (``checkpoint_engine.update_weights_bucket_megabytes``).
            is_master: Whether this process is actor rank 0, which sends.
        """
        self._bucket_size = bucket_size
        self._is_master = is_master
        self._store: dist.TCPStore | None = None
        self._group: Any = None

    @override
    def prepare(self) -> Address | None:
        """Open the store in the sender. All other processes return None."""
        if not self._is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return host, self._store.port

    @classmethod
    @override
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Assign rank 0 to the sender, the following ranks to the rollout workers, and −1 to the other actor ranks."""
        world_size = 1 + rollout_world_size

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            n = len(ranks)
            return {"rank": ranks, "world_size": [world_size] * n, "address": [metadata[0]] * n}

        return (
            arguments([0] + [-1] * (actor_wg_world_size - 1)),
            arguments(list(range(1, world_size))),
        )

    @override
    def init_process_group(self, rank: int, world_size: int, address: Address) -> None:
        """Join the group of this update.

        Args:
            rank: Rank of this process; −1 if it neither sends nor receives.
            world_size: Number of senders and receivers.
            address: Address of the sender's store.
        """
        if rank < 0:
            return
        store = self._store or dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        self._group = dist.ProcessGroupGloo(store, rank, world_size, TIMEOUT)

    @override
    def finalize(self) -> None:
        """Leave the group of this update."""
        self._group = None
        self._store = None

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self._group is not None, "call init_process_group before a transfer"
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()
        return tensor

    @override
    @torch.no_grad()
    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        """Send all weights. Actor ranks that do not send take part in gathering them.

        Args:
            weights: ``(name, full tensor)`` pairs; each tensor is gathered from all actor ranks.
            global_steps: Not used.
        """
        if not self._is_master:
            for _ in weights:
                pass
            return
        async for bucket in buckets(weights, self._bucket_size):
            stream = io.BytesIO()
            # torch.save would save the whole storage of a view.
            torch.save({name: tensor.contiguous().clone() for name, tensor in bucket.items()}, stream)
            payload = torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)
            self._broadcast(torch.tensor([payload.numel()]))
            self._broadcast(payload)
        self._broadcast(torch.tensor([0]))

    @override
    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Receive the weights that :meth:`send_weights` sends.

        Args:
            global_steps: Not used.

        Yields:
            ``(name, full tensor)`` pairs.
        """
        while size := int(self._broadcast(torch.zeros(1, dtype=torch.int64))):
            payload = self._broadcast(torch.empty(size, dtype=torch.uint8))
            for name, tensor in torch.load(io.BytesIO(payload.numpy().tobytes()), weights_only=True).items():
                yield name, tensor
