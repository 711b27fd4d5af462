"""The rollout backend ``hf_cpu``, which serves ``generate`` of ``transformers`` to verl's agent loops.

It has the three parts of a rollout in verl: :class:`HFServer` (an actor that generates), :class:`HFReplica` (starts
the server, trainer side) and :class:`HFServerAdapter` (sends new weights to the server, worker side).
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.device_mesh import DeviceMesh
from verl.utils import normalize_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from hpo_plugin.cpu.checks import ROLLOUT_NAME
from hpo_plugin.cpu.generation import GenerationRequest, RequestSeeds, Response, Sampling
from hpo_plugin.cpu.generation import Generator as TextGenerator

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class HFRolloutOptions:
    """The options ``actor_rollout_ref.rollout.engine_kwargs.hf_cpu``.

    Attributes:
        batch_window_ms: A batch starts if no request has arrived for this time, in milliseconds. Requests arrive one by
            one, at intervals of one or two milliseconds. A batch takes about the same time for one row as for hundreds.
    """

    batch_window_ms: float = 60.0

    def __post_init__(self) -> None:
        """Check the value.

        Raises:
            ValueError: The window is negative.
        """
        if not self.batch_window_ms >= 0:
            raise ValueError(
                "actor_rollout_ref.rollout.engine_kwargs.hf_cpu.batch_window_ms="
                f"{self.batch_window_ms} is negative; set at least 0"
            )


@dataclass
class _Waiting:
    request: GenerationRequest
    sampling: Sampling
    answer: asyncio.Future = field(compare=False)


class RequestBatcher:
    """Collects concurrent requests until no more arrive, and generates their responses in one batch.

    All methods run on one event loop. Generation runs in a thread, so that the loop can accept requests during it.
    """

    def __init__(self, generate: TextGenerator, *, window_s: float, max_batch: int) -> None:
        """Prepare an empty queue.

        Args:
            generate: Function of a list of requests and their sampling parameters.
            window_s: Seconds without a new request after which a batch starts.
            max_batch: Maximum number of requests in one batch.
        """
        self._generate = generate
        self._window_s = window_s
        self._max_batch = max_batch
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self._task: asyncio.Task | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def submit(self, request: GenerationRequest, sampling: Sampling) -> Response:
        """Generate the response to one request, as part of a batch."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(request, sampling, answer))
        self._idle.clear()
        self._arrived.set()
        return await answer

    async def drain(self) -> None:
        """Wait until all submitted requests have a response."""
        await self._idle.wait()

    async def run_exclusively(self, function: Any, *arguments: Any) -> Any:
        """Run a function in the generation thread, and therefore not during a batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _pause_in_arrivals(self) -> None:
        while len(self._waiting) < self._max_batch:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), self._window_s)
            except asyncio.TimeoutError:
                return

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._pause_in_arrivals()
            waiting, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
            groups: dict[Sampling, list[_Waiting]] = defaultdict(list)
            for item in waiting:
                groups[item.sampling].append(item)
            for sampling, items in groups.items():
                await self._answer(items, sampling)
            if not self._waiting:
                self._arrived.clear()
                self._idle.set()

    async def _answer(self, items: list[_Waiting], sampling: Sampling) -> None:
        try:
            responses = await self.run_exclusively(self._generate, [item.request for item in items], sampling)
        except Exception as error:
            # Each request fails with the cause. The server continues, so that later requests fail with it too.
            for item in items:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        for item, response in zip(items, responses, strict=True):
            if not item.answer.done():
                item.answer.set_result(response)


class HFServer:
    """Ray actor that serves token-in-token-out requests of verl's agent loops with a ``transformers`` model."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig, replica_rank: int) -> None:
        """Load the model. The trainer replaces its weights before the first request.

        Args:
            config: ``actor_rollout_ref.rollout``.
            model_config: ``actor_rollout_ref.model``.
            replica_rank: Rank of this server among the replicas, which is added to the seed.
        """
        from transformers import AutoModelForCausalLM
        from verl.utils.torch_dtypes import PrecisionType

        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        model_config = omega_conf_to_dataclass(model_config)
        options = HFRolloutOptions(**(self.config.engine_kwargs.get(ROLLOUT_NAME) or {}))
        self._model = AutoModelForCausalLM.from_pretrained(
            model_config.local_path,
            config=model_config.hf_config,
            dtype=PrecisionType.to_dtype(self.config.dtype),
            trust_remote_code=model_config.trust_remote_code,
        )
        eos = getattr(model_config.generation_config, "eos_token_id", None)
        if eos is None:
            eos = model_config.tokenizer.eos_token_id
        pad = model_config.tokenizer.pad_token_id
        eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
        generator = TextGenerator(
            self._model, eos_token_ids=eos_ids, pad_token_id=pad if pad is not None else eos_ids[0]
        )
        self._max_model_len = self.config.max_model_len or self._model.config.max_position_embeddings
        self._interrupted = generator.interrupted
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._rejecting = False
        self._batcher = RequestBatcher(
            generator, window_s=options.batch_window_ms / 1000, max_batch=self.config.max_num_seqs
        )
        self._seeds = RequestSeeds(self.config.seed + replica_rank)
        self._global_steps = 0

    async def ready(self) -> None:
        """Return after the constructor of the actor has finished."""

    async def generate(
        self,
        request_id: str,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        **unused: Any,
    ) -> TokenOutput:
        """Continue one prompt.

        Args:
            request_id: Not used, because the server has no state between the turns of a conversation.
            prompt_ids: Token ids of the prompt.
            sampling_params: ``temperature``, ``top_p``, ``top_k``, ``repetition_penalty``, ``logprobs``, and optionally
                ``max_tokens`` (default: ``rollout.response_length``), ``ignore_eos``, ``seed``.
            image_data: Must be empty.
            video_data: Must be empty.
            unused: Additional keyword arguments of other servers, which must also be empty.

        Returns:
            Token ids, their log-probs under the sampling distribution, and the version of the weights.

        Raises:
            ValueError: An unknown sampling parameter, or a prompt that leaves no room for a response.
            NotImplementedError: Images, videos or other inputs that are not text.
        """
        if image_data or video_data or any(value for value in unused.values()):
            raise NotImplementedError(
                f"actor_rollout_ref.rollout.name={ROLLOUT_NAME} accepts only text, but the request has images, videos "
                f"or a value of {sorted(unused)}. Use another rollout, or prompts with text only."
            )
        prompt = tuple(normalize_token_ids(prompt_ids))
        params = dict(sampling_params)
        wants_log_probs = bool(params.pop("logprobs", False))
        seed = params.pop("seed", None)
        max_tokens = params.pop("max_tokens", None) or params.pop("max_new_tokens", None)
        sampling = Sampling(
            temperature=float(params.pop("temperature", self.config.temperature)),
            top_p=float(params.pop("top_p", self.config.top_p)),
            top_k=int(params.pop("top_k", self.config.top_k)),
            repetition_penalty=float(params.pop("repetition_penalty", self.config.repetition_penalty)),
            ignore_eos=bool(params.pop("ignore_eos", self.config.ignore_eos)),
        )
        if params:
            raise ValueError(
                f"actor_rollout_ref.rollout.name={ROLLOUT_NAME} does not support the sampling parameters "
                f"{sorted(params)}; remove them"
            )
        room = self._max_model_len - len(prompt)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room for a response: the context length is "
                f"{self._max_model_len} tokens (actor_rollout_ref.rollout.max_model_len, or the limit of the model). "
                "Use shorter prompts, or a larger context length."
            )
        request = GenerationRequest(
            prompt_ids=prompt,
            max_tokens=max(1, min(max_tokens or self.config.response_length, room)),
            seed=self._seeds.next(prompt, sampling) if seed is None else int(seed),
        )
        while not self._admitting.is_set() and not self._rejecting:
            await self._admitting.wait()
        response = Response([], [], finished=False)
        if self._admitting.is_set():
            response = await self._batcher.submit(request, sampling)
        complete = response.finished or len(response.token_ids) == request.max_tokens
        return TokenOutput(
            token_ids=response.token_ids,
            log_probs=response.log_probs if wants_log_probs else None,
            # verl's client of the asynchronous trainers continues aborted responses.
            stop_reason="completed" if complete else "aborted",
            num_preempted=0,
            extra_fields={"global_steps": self._global_steps},
        )

    async def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace some of the model's weights.

        Args:
            weights: Full tensors by the parameter names of the model.

        Raises:
            KeyError: The model does not have a parameter with the name.
        """
        await self._batcher.run_exclusively(self._copy_weights, weights)

    @torch.no_grad()
    def _copy_weights(self, weights: dict[str, torch.Tensor]) -> None:
        own = self._model.state_dict()
        for name, tensor in weights.items():
            own[name].copy_(tensor)

    async def finish_update(self, global_steps: int | None) -> None:
        """Set the trainer step of the weights. Later responses contain this number."""
        if global_steps is not None:
            self._global_steps = global_steps
        self._seeds.new_weights(self._global_steps)

    async def sleep(self) -> None:
        """Wait for requests in flight. The server keeps its memory, because it uses no accelerator memory."""
        await self._batcher.drain()

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Return unfinished responses, and process no new requests until :meth:`resume_generation`.

        Args:
            reject_request: Return new requests as aborted, instead of holding them.
        """
        self._rejecting = reject_request
        self._admitting.clear()
        self._interrupted.set()
        await self._batcher.drain()

    async def resume_generation(self) -> None:
        """Process requests again."""
        self._interrupted.clear()
        self._rejecting = False
        self._admitting.set()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Do nothing: the server releases nothing."""

    async def clear_kv_cache(self) -> None:
        """Do nothing: no cache outlives a batch."""

    async def release_kv_cache(self) -> None:
        """Do nothing: no cache outlives a batch."""

    async def resume_kv_cache(self) -> None:
        """Do nothing: nothing was released."""


def _server_name(replica_rank: int, suffix: str = "") -> str:
    return f"{ROLLOUT_NAME}_server_{replica_rank}{suffix}"


class HFReplica(RolloutReplica):
    """Starts one :class:`HFServer` on the node of the training rank that sends its weights."""

    async def launch_servers(self) -> None:
        """Start the server on the node of its training rank and wait until its model is loaded.

        Raises:
            ValueError: A parallel size of the replica is larger than 1, but the server is one process.
        """
        if self.world_size != 1:
            raise ValueError(
                f"actor_rollout_ref.rollout.name={ROLLOUT_NAME} serves a model in one process. Set "
                "actor_rollout_ref.rollout.tensor_model_parallel_size, data_parallel_size and "
                f"pipeline_model_parallel_size to 1; their product is {self.world_size}."
            )
        node_id = await self.workers[0].__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
        server = (
            ray.remote(HFServer)
            .options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
                name=_server_name(self.replica_rank, self.name_suffix),
                max_concurrency=self.max_concurrency,
            )
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        # verl uses the address only as the key of the server.
        self._server_address = f"{ROLLOUT_NAME}://{self.replica_rank}"


class HFServerAdapter(BaseRollout):
    """Worker side: sends the trainer's weights to the server of this rank."""

    def __init__(
        self,
        config: RolloutConfig,
        model_config: HFModelConfig,
        device_mesh: DeviceMesh | None,
        replica_rank: int | None = None,
    ) -> None:
        """Store the rank of the server, which starts later.

        Args:
            config: ``actor_rollout_ref.rollout``.
            model_config: ``actor_rollout_ref.model``.
            device_mesh: Mesh with the dimensions ``dp``, ``infer_tp`` and ``infer_pp``, in a process that also trains.
            replica_rank: Rank of the server, in a process of a rollout that is separate from training.
        """
        super().__init__(config, model_config, device_mesh)
        if replica_rank is None:
            assert device_mesh is not None, "verl passes either device_mesh or replica_rank"
            replica_rank = device_mesh["dp"].get_local_rank()
        self._replica_rank = replica_rank
        self._server: ray.actor.ActorHandle | None = None

    @property
    def server(self) -> "ray.actor.ActorHandle":
        """The server of this rank, looked up on first use because it starts after the workers."""
        if self._server is None:
            self._server = ray.get_actor(_server_name(self._replica_rank))
        return self._server

    async def resume(self, tags: list[str]) -> None:
        """Do nothing: the server does not release its memory."""

    async def release(self) -> None:
        """Wait for requests in flight."""
        await self.server.sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        wire_format: str = "named_tensors",
        *,
        global_steps: int | None = None,
        **unused: Any,
    ) -> None:
        """Send full tensors to the server, in buckets.

        Every rank must read every tensor from the generator, because each tensor is gathered from all ranks.

        Args:
            weights: ``(name, full tensor)`` pairs.
            wire_format: Must be ``"named_tensors"``.
            global_steps: The trainer's step, which later responses contain.
            unused: ``peft_config`` and ``base_sync_done``, which are used only with LoRA adapters.

        Raises:
            NotImplementedError: Another wire format, or LoRA adapters.
        """
        if wire_format != "named_tensors" or unused.get("peft_config"):
            raise NotImplementedError(
                f"actor_rollout_ref.rollout.name={ROLLOUT_NAME} accepts only full weights, not adapters or "
                f"wire_format={wire_format!r}. For LoRA, set actor_rollout_ref.model.lora.merge=True."
            )
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        async for bucket in buckets(weights, limit):
            await self.server.load_weights.remote(bucket)
        await self.server.finish_update.remote(global_steps)


async def buckets(
    weights: NamedTensors | AsyncIterator[tuple[str, torch.Tensor]], limit: int
) -> AsyncIterator[dict[str, torch.Tensor]]:
    """Group named tensors into dictionaries of at most ``limit`` bytes, or of one larger tensor.

    Args:
        weights: ``(name, tensor)`` pairs.
        limit: Maximum number of bytes.

    Yields:
        Detached tensors by name, in the same order.
    """
    from verl.workers.rollout.utils import ensure_async_iterator

    bucket: dict[str, torch.Tensor] = {}
    size = 0
    async for name, tensor in ensure_async_iterator(weights):
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.detach()
        size += tensor.nbytes
    if bucket:
        yield bucket
