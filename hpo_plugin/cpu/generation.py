"""Batched, seeded generation with ``generate`` of ``transformers``. This module uses neither Ray nor verl.

A sample depends on the seed, the version of the weights, the prompt, and the number of earlier requests for the prompt.
It does not depend on the other requests of its batch: each request has its own random stream. Sampling takes the arg
max of log-probability plus Gumbel noise, which is a draw from the distribution.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Requests with equal parameters share a batch.

    Attributes:
        temperature: Temperature; 0 means greedy.
        top_p: Probability of the nucleus in (0, 1]; 1 keeps all tokens.
        top_k: Number of tokens to keep; -1 or 0 keeps all.
        repetition_penalty: Penalty for tokens of the prompt and the response; 1 means none.
        ignore_eos: Whether to continue after the end-of-sequence token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: A value is out of range; the message names the parameter and the value.
        """
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} is negative; set at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]; set a value in (0, 1]")
        if self.top_k < -1:
            raise ValueError(f"top_k={self.top_k} is invalid; set a positive number, or -1 or 0 to keep all tokens")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} is not positive; set a positive number")

    @property
    def greedy(self) -> bool:
        """Whether sampling takes the most probable token."""
        return self.temperature == 0


@dataclass(frozen=True)
class GenerationRequest:
    """A request to continue one prompt.

    Attributes:
        prompt_ids: Token ids of the prompt.
        max_tokens: Maximum number of response tokens, at least 1.
        seed: Seed of the random stream of this request.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Response:
    """The response to one request.

    Attributes:
        token_ids: Response tokens, including the end-of-sequence token if the response has one.
        log_probs: Log-probability of each response token under the sampling distribution (after temperature, top-k and
            top-p), or under the model's own distribution for greedy decoding.
        finished: Whether the response ends with the end-of-sequence token.
    """

    token_ids: list[int]
    log_probs: list[float]
    finished: bool


class RequestSeeds:
    """Seeds of requests. A seed depends on the prompt and its repetition, not on the order of different prompts."""

    def __init__(self, seed: int) -> None:
        """Start without earlier requests.

        Args:
            seed: Seed of the run (``actor_rollout_ref.rollout.seed``).
        """
        self._seed = seed
        self._weights_version = 0
        self._seen: Counter[tuple] = Counter()

    def new_weights(self, version: int) -> None:
        """Start new random streams after an update of the weights.

        Args:
            version: Version of the weights, which is the trainer's step.
        """
        self._weights_version = version
        self._seen.clear()

    def next(self, prompt_ids: tuple[int, ...], sampling: Sampling) -> int:
        """Return the seed (64 bits) of the next request for this prompt.

        Args:
            prompt_ids: Token ids of the prompt.
            sampling: Sampling parameters; requests with different parameters are counted separately.
        """
        key = (prompt_ids, sampling)
        repetition = self._seen[key]
        self._seen[key] += 1
        text = repr((self._seed, self._weights_version, prompt_ids, sampling, repetition))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class _SeededSampler(LogitsProcessor):
    """Turns logits into scores whose arg max is the sample, and keeps the log-probs of the sampled tokens.

    It keeps the full log-probs (batch x vocabulary) of one step only.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._greedy = sampling.greedy
        warpers = LogitsProcessorList()
        if not sampling.greedy:
            if sampling.temperature != 1:
                warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k > 0:
                warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        self._warpers = warpers
        self._streams = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self._noise: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None
        self.log_probs: list[torch.Tensor] = []

    def collect(self, last_tokens: torch.Tensor) -> None:
        """Record the log-probs of the tokens of the previous step; ``last_tokens`` has shape (batch,)."""
        if self._pending is not None:
            self.log_probs.append(self._pending.gather(1, last_tokens[:, None])[:, 0])
            self._pending = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (batch, vocabulary) whose arg max is this step's token."""
        self.collect(input_ids[:, -1])
        log_probs = torch.log_softmax(self._warpers(input_ids, scores).float(), dim=-1)
        self._pending = log_probs
        if self._greedy:
            return log_probs
        if self._noise is None:
            self._noise = torch.empty_like(log_probs)
        for row, stream in zip(self._noise, self._streams, strict=True):
            row.exponential_(generator=stream)
        # -log(Exponential(1)) is Gumbel noise.
        return log_probs - self._noise.log()


class _Interruption(StoppingCriteria):
    """Stops all rows of a batch once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set())


class Generator:
    """Continues prompts with a causal language model.

    Attributes:
        interrupted: While this event is set, a batch ends after its next token, with unfinished responses.
    """

    def __init__(self, model: PreTrainedModel, *, eos_token_ids: Sequence[int], pad_token_id: int) -> None:
        """Set the model to evaluation mode.

        Args:
            model: The model, on CPU.
            eos_token_ids: Tokens that end a response.
            pad_token_id: Padding token, which is always masked.
        """
        self.interrupted = threading.Event()
        self._model = model.eval()
        self._eos = list(eos_token_ids)
        self._pad = pad_token_id
        # Defaults of the checkpoint, for example a top_k, must not change the trainer's sampling parameters. The same
        # applies to its end-of-sequence tokens, which `generate` uses if eos_token_id is None.
        self._model.generation_config = GenerationConfig(pad_token_id=self._pad)

    @torch.inference_mode()
    def __call__(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Response]:
        """Continue all requests as one left-padded batch.

        Args:
            requests: At least one request.
            sampling: Sampling parameters of all requests.

        Returns:
            A response for each request, in the same order.
        """
        if sampling.repetition_penalty != 1 and len({len(request.prompt_ids) for request in requests}) > 1:
            # The penalty depends on the tokens of the prompt, so prompts with different lengths cannot be padded.
            return [self([request], sampling)[0] for request in requests]
        width = max(len(request.prompt_ids) for request in requests)
        max_tokens = max(request.max_tokens for request in requests)
        input_ids = torch.full((len(requests), width), self._pad, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention_mask[row, width - len(request.prompt_ids) :] = 1
        sampler = _SeededSampler(sampling, [request.seed for request in requests])
        processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        processors.append(sampler)
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Interruption(self.interrupted)]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=None if sampling.ignore_eos else self._eos,
                pad_token_id=self._pad,
            ),
        )
        sampler.collect(output[:, -1])
        tokens = output[:, width:].tolist()
        log_probs = torch.stack(sampler.log_probs, dim=1).tolist()
        return [
            self._cut(row, row_log_probs, request.max_tokens, sampling)
            for row, row_log_probs, request in zip(tokens, log_probs, requests, strict=True)
        ]

    def _cut(self, tokens: list[int], log_probs: list[float], max_tokens: int, sampling: Sampling) -> Response:
        length = min(len(tokens), max_tokens)
        finished = False
        if not sampling.ignore_eos:
            for position, token in enumerate(tokens[:length]):
                if token in self._eos:
                    length, finished = position + 1, True
                    break
        return Response(token_ids=tokens[:length], log_probs=log_probs[:length], finished=finished)
