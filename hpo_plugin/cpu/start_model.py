"""The model a laptop run starts from: it knows how an answer looks, and rarely the answer.

Hysteretic weighting is about *sparse* rewards, so a run that shows it needs a start at which a few percent of the
samples are correct, and an ability that training can bring out. A pretrained language model is like that; it is also
a thousand times too large for two CPU cores. The model built here has some 200,000 parameters and two ways to answer:

- *calculated*: begins with ``=`` and is the solution as far as the model can calculate (``=3*5+7``);
- *guessed*: begins with a number or a parenthesis and is a random expression of the given numbers (``(7-3)*5``).

Both are well-formed, and :func:`~hpo_plugin.tasks.countdown.reward.compute_score` accepts both in the ``terse`` layout.
The model answers in the first way with probability :attr:`StartModelConfig.calculated_share` only. Reinforcement
learning has to find that out, and to improve on the calculation.

How it is trained: one supervised pass in fp32 over demonstrations drawn from training problems. Most demonstrations are
calculated answers, for the skill is what takes time to learn; the *first* token of every demonstration is instead
trained towards the wanted mixture of first tokens, so the share does not depend on how the batches are made up.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import Qwen2Tokenizer

import hpo_plugin
from hpo_plugin.cpu.generation import Generator, Request, Sampling
from hpo_plugin.tasks._files import sha256_of_file
from hpo_plugin.tasks.countdown.problems import CountdownProblem, _join, random_expression
from hpo_plugin.tasks.countdown.prompts import prompt_text
from hpo_plugin.tasks.countdown.reward import Verdict, judge

MANIFEST_NAME = "start_model.json"
EOS_TOKEN, PAD_TOKEN = "<|im_end|>", "<|endoftext|>"
#: What an answer of the calculated kind begins with.
CALCULATED_PREFIX = "="
#: Sampled success at which rewards count as sparse; a start outside of it makes another experiment.
SPARSE_REGIME = (0.02, 0.10)
#: A prompt is its text; an assistant's turn is closed as in ChatML, so that the template also renders conversations.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is not string %}"
    "{{ raise_exception('the start model reads text only: content must be a string') }}"
    "{% endif %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
#: Part of what a request means: raised whenever the same seed and parameters begin to give another model.
_RECIPE = 1
_LAYOUT = "terse"
#: vLLM's CPU attention refuses other head dimensions (and transformers does not mind).
_HEAD_DIMS = (32, 64, 80, 96, 112, 128)
_WARMUP_STEPS = 50

#: Called with (what is being done, how much is done, how much there is).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StartModelConfig:
    """Size of the model and length of the supervised pass.

    Attributes:
        hidden_size: Width.
        layers: Number of layers.
        intermediate_size: Width of the gated MLP.
        head_dim: Dimension of an attention head.
        max_positions: Most tokens of prompt and response together.
        calculated_share: Probability with which the model is taught to begin an answer with ``=``, in (0, 1). Start
            success is close to this times the model's skill, plus the luck of a random guess.
        guessed_demonstrations: Share of a batch whose demonstration is a random expression, in (0, 1).
        steps: Optimizer steps.
        batch_size: Demonstrations per step.
        learning_rate: Peak of AdamW's learning rate; warmed up over 50 steps, then linear to 0.
        threads: CPU threads. Sums are split over threads, so another number gives other rounding.
    """

    hidden_size: int = 64
    layers: int = 3
    intermediate_size: int = 192
    head_dim: int = 32
    max_positions: int = 256
    calculated_share: float = 0.12
    guessed_demonstrations: float = 0.15
    steps: int = 1200
    batch_size: int = 32
    learning_rate: float = 3e-3
    threads: int = 1

    def validate(self) -> None:
        """Check the config.

        Raises:
            ValueError: Naming the field, its value and what to do.
        """
        for name in ("hidden_size", "layers", "intermediate_size", "max_positions", "steps", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_dim not in _HEAD_DIMS:
            raise ValueError(
                f"head_dim={self.head_dim} must be one of {', '.join(map(str, _HEAD_DIMS))}: "
                "vLLM's CPU attention takes no other"
            )
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of head_dim={self.head_dim}")
        for name in ("calculated_share", "guessed_demonstrations"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1, both excluded")
        guessed = round(self.guessed_demonstrations * self.batch_size)
        if not 0 < guessed < self.batch_size:
            raise ValueError(
                f"guessed_demonstrations={self.guessed_demonstrations} of batch_size={self.batch_size} is {guessed} "
                "demonstrations: a batch needs at least one of each kind"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")


@dataclass(frozen=True)
class Success:
    """How a model does on problems.

    Attributes:
        correct: Share of correct responses, in [0, 1].
        calculated: Share of responses that begin with ``=``.
        well_formed: Share of responses that are expressions, correct or not.
        mean_length: Response tokens, the end-of-sequence token included.
        responses: How many responses were judged.
    """

    correct: float
    calculated: float
    well_formed: float
    mean_length: float
    responses: int


@dataclass(frozen=True)
class StartModelReport:
    """What :func:`build_start_model` made, or found.

    Attributes:
        directory: The model folder, for ``actor_rollout_ref.model.path``.
        parameters: Number of trained values.
        sampled: Success on the held-out problems at temperature 1.
        greedy: The same, taking the most probable token.
        first_loss: Mean supervised loss over the first tenth of the steps, in nats per token.
        last_loss: The same over the last tenth.
        seconds: Wall time of building it (also where it was found).
        reused: Whether the folder was there already.
    """

    directory: Path
    parameters: int
    sampled: Success
    greedy: Success
    first_loss: float
    last_loss: float
    seconds: float
    reused: bool

    @property
    def sparse(self) -> bool:
        """Whether sampled success lies in :data:`SPARSE_REGIME`."""
        return SPARSE_REGIME[0] <= self.sampled.correct <= SPARSE_REGIME[1]


def build_start_model(
    output: str | Path,
    problems: Sequence[CountdownProblem],
    held_out: Sequence[CountdownProblem],
    *,
    seed: int = 0,
    config: StartModelConfig | None = None,
    progress: Progress | None = None,
) -> StartModelReport:
    """Build the start model in a folder that ``transformers``, verl and vLLM load; reuse it if it is there.

    The same arguments give the same weights, byte for byte, under one version of torch on one machine. The folder
    appears complete or not at all.

    Args:
        output: The model folder. Must not exist, be empty, or hold a start model made with the same arguments.
        problems: Training problems, from which the demonstrations are made.
        held_out: Problems that no demonstration may touch; start success is measured on them.
        seed: A non-negative integer.
        config: Size and training; the defaults are those of the quickstart.
        progress: Told how far it is, at every step.

    Returns:
        What was made and how well it does.

    Raises:
        ValueError: If the config is invalid, a list is empty, the two share a problem (by sorted numbers and target), a
            training problem cannot be solved, or a demonstration is longer than ``max_positions``.
        FileExistsError: If the folder holds something else.
        OSError: If it cannot be written.
    """
    config = StartModelConfig() if config is None else config
    config.validate()
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    _check_disjoint(problems, held_out)
    directory = Path(output)
    request = {
        "recipe": _RECIPE,
        "seed": seed,
        "config": asdict(config),
        "problems": _digest(problems),
        "held_out": _digest(held_out),
    }
    existing = _read_existing(directory, request)
    if existing is not None:
        return existing
    directory.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    tokenizer = build_tokenizer(config.max_positions)
    with _threads(config.threads):
        model, losses = _train(tokenizer, problems, seed, config, progress)
        sampled = evaluate_success(model, held_out, tokenizer=tokenizer, seed=seed)
        greedy = evaluate_success(model, held_out, tokenizer=tokenizer, temperature=0)
    tenth = max(1, len(losses) // 10)
    results = {
        "parameters": model.num_parameters(),
        "sampled": asdict(sampled),
        "greedy": asdict(greedy),
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "seconds": round(time.perf_counter() - began, 3),
    }
    _publish(directory, model, tokenizer, request, results)
    published = _read_existing(directory, request)
    if published is None:
        raise FileNotFoundError(f"{directory} was written and has vanished; is another program removing it?")
    return StartModelReport(**{**vars(published), "reused": False})


def save_untrained_model(directory: str | Path, *, seed: int = 0, config: StartModelConfig | None = None) -> int:
    """Write a model with random weights, and its tokenizer: what verl's SFT trainer starts from on a laptop.

    Args:
        directory: The model folder; created if needed.
        seed: Of the weights; a non-negative integer.
        config: Its sizes; what concerns training has no effect.

    Returns:
        Number of values.

    Raises:
        ValueError: If the config is invalid.
        OSError: If it cannot be written.
    """
    config = StartModelConfig() if config is None else config
    config.validate()
    tokenizer = build_tokenizer(config.max_positions)
    model = _initial_model(tokenizer, seed, config)
    _save(Path(directory), model, tokenizer)
    return int(model.num_parameters())


def evaluate_success(
    model: str | Path | Qwen2ForCausalLM,
    problems: Sequence[CountdownProblem],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    max_tokens: int = 32,
    batch_size: int = 512,
) -> Success:
    """Measure success on problems in the terse layout, without verl.

    Args:
        model: A model folder, or the model.
        problems: The problems.
        tokenizer: Needed where the model itself is given.
        samples: Responses per problem.
        temperature: Of sampling; 0 takes the most probable token, and then one sample is enough.
        seed: Of the sampling.
        max_tokens: Longest response.
        batch_size: Responses generated together.

    Returns:
        Shares over all responses.

    Raises:
        ValueError: If there is nothing to measure, or no tokenizer.
    """
    if not problems or samples < 1:
        raise ValueError(f"{len(problems)} problems with samples={samples}: there is nothing to measure")
    if not isinstance(model, Qwen2ForCausalLM):
        tokenizer = AutoTokenizer.from_pretrained(model)
        model = Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32)
    elif tokenizer is None:
        raise ValueError("tokenizer: needed where the model is given as an object")
    was_training, generation_config = model.training, model.generation_config
    generate = Generator(model, eos_token_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)
    sampling = Sampling(temperature=temperature)
    asked = [problem for problem in problems for _ in range(samples)]
    requests = [
        Request(tuple(_encode(tokenizer, prompt_text(p.numbers, p.target, _LAYOUT))), max_tokens, seed << 32 | row)
        for row, p in enumerate(asked)
    ]
    responses = [
        response
        for begin in range(0, len(requests), batch_size)
        for response in generate(requests[begin : begin + batch_size], sampling)
    ]
    model.train(was_training)
    model.generation_config = generation_config
    texts = tokenizer.batch_decode([response.token_ids for response in responses], skip_special_tokens=True)
    verdicts = [
        judge(text, {"target": p.target, "numbers": list(p.numbers)}, layout=_LAYOUT)
        for text, p in zip(texts, asked, strict=True)
    ]
    count = len(verdicts)
    return Success(
        correct=verdicts.count(Verdict.CORRECT) / count,
        calculated=sum(text.startswith(CALCULATED_PREFIX) for text in texts) / count,
        well_formed=1 - verdicts.count(Verdict.MALFORMED) / count,
        mean_length=sum(len(response.token_ids) for response in responses) / count,
        responses=count,
    )


def build_tokenizer(max_positions: int = 256) -> Qwen2Tokenizer:
    r"""Return a tokenizer with one token per byte, an end token and a padding token: 258 in all.

    ``transformers`` reads the tokenizer of any folder with a qwen2 model as ``Qwen2Tokenizer``, a byte-level BPE; one
    without merges leaves every byte alone. verl's handling of that family (``QwenContinuousTokenBuilder`` in
    verl/utils/tokenizer/continuous_token.py) needs ``\n`` to be one token and ``<|im_end|>`` to exist.

    Args:
        max_positions: Longest input the model takes.
    """
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {PAD_TOKEN: len(vocabulary), EOS_TOKEN: len(vocabulary) + 1}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=None,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_positions,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _train(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[CountdownProblem],
    seed: int,
    config: StartModelConfig,
    progress: Progress | None,
) -> tuple[Qwen2ForCausalLM, list[float]]:
    """Return the trained model and the loss of every step, in nats per token."""
    model = _initial_model(tokenizer, seed, config)
    demonstrations = _Demonstrations(tokenizer, problems, seed, config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _WARMUP_STEPS) * (1 - step / config.steps)
    )
    losses: list[float] = []
    for step in range(config.steps):
        loss = _loss(model, demonstrations.batch(), config.calculated_share)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress("warm start", step + 1, config.steps)
    return model.eval(), losses


def _initial_model(tokenizer: PreTrainedTokenizerBase, seed: int, config: StartModelConfig) -> Qwen2ForCausalLM:
    heads = config.hidden_size // config.head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=config.max_positions,
                # Larger than the default of 0.02, which is meant for models a hundred times as wide.
                initializer_range=0.05,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                dtype="float32",
            )
        )


@dataclass(frozen=True)
class _Batch:
    """Demonstrations as tensors.

    Attributes:
        tokens: int64 [batch, length], padded on the right.
        starts: int64 [batch], position of the first response token.
        lengths: int64 [batch], tokens of prompt and response.
        calculated_first: int64 [batch], first token of a calculated answer.
        guessed_first: int64 [batch], first token of a guessed answer.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    calculated_first: torch.Tensor
    guessed_first: torch.Tensor


class _Demonstrations:
    """A seeded, endless source of batches: every epoch shows each training problem once, its numbers shuffled anew."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[CountdownProblem],
        seed: int,
        config: StartModelConfig,
    ) -> None:
        self._encode = lambda text: _encode(tokenizer, text)
        self._end = tokenizer.eos_token_id
        self._pad = tokenizer.pad_token_id
        self._random = random.Random(seed)
        self._config = config
        self._guessed = round(config.guessed_demonstrations * config.batch_size)
        self._problems = [problem.identity for problem in problems]
        self._solutions: dict[tuple[tuple[int, ...], int], str] = {}
        self._order: list[int] = []

    def batch(self) -> _Batch:
        """Return the next batch.

        Raises:
            ValueError: If a demonstration does not fit the model.
        """
        rows, starts, calculated_first, guessed_first = [], [], [], []
        for row in range(self._config.batch_size):
            numbers, target = self._next_problem()
            prompt = self._encode(prompt_text(numbers, target, _LAYOUT))
            calculated = self._encode(CALCULATED_PREFIX + self._solution(tuple(numbers), target))
            guessed = self._encode(random_expression(numbers, self._random))
            rows.append([*prompt, *(guessed if row < self._guessed else calculated), self._end])
            starts.append(len(prompt))
            calculated_first.append(calculated[0])
            guessed_first.append(guessed[0])
        longest = max(map(len, rows))
        if longest > self._config.max_positions:
            raise ValueError(
                f"max_positions={self._config.max_positions}: a demonstration has {longest} tokens; raise it"
            )
        return _Batch(
            tokens=torch.tensor([[*row, *[self._pad] * (longest - len(row))] for row in rows]),
            starts=torch.tensor(starts),
            lengths=torch.tensor([len(row) for row in rows]),
            calculated_first=torch.tensor(calculated_first),
            guessed_first=torch.tensor(guessed_first),
        )

    def _next_problem(self) -> tuple[list[int], int]:
        if not self._order:
            self._order = list(range(len(self._problems)))
            self._random.shuffle(self._order)
        sorted_numbers, target = self._problems[self._order.pop()]
        numbers = list(sorted_numbers)
        self._random.shuffle(numbers)
        return numbers, target

    def _solution(self, numbers: tuple[int, ...], target: int) -> str:
        if (numbers, target) not in self._solutions:
            self._solutions[numbers, target] = shown_order_solution(numbers, target)
        return self._solutions[numbers, target]


def shown_order_solution(numbers: Sequence[int], target: int) -> str:
    """Return a solution that keeps the numbers in the order in which they are shown, as far as that goes.

    A function of its arguments, and one in which most numbers are copied in their order, is learned in far fewer
    demonstrations than a solution of a solver's choice.

    Args:
        numbers: The numbers; all their orders are tried, so a handful.
        target: The value to reach.

    Raises:
        ValueError: If there is no solution.
    """
    for order in itertools.permutations(numbers):
        for value, (text, _) in _expressions(order):
            if value == target:
                return text
    raise ValueError(f"numbers {list(numbers)} cannot make {target}: there is no solution to demonstrate")


def _expressions(numbers: Sequence[int]) -> Iterator[tuple[Fraction, tuple[str, int]]]:
    """Yield value and text of every expression of the numbers in this order."""
    if len(numbers) == 1:
        yield Fraction(numbers[0]), (str(numbers[0]), 3)
    # Left to right first: those expressions need the fewest parentheses.
    for cut in range(len(numbers) - 1, 0, -1):
        for a, left in _expressions(numbers[:cut]):
            for b, right in _expressions(numbers[cut:]):
                yield a + b, _join("+", left, right)
                yield a - b, _join("-", left, right)
                yield a * b, _join("*", left, right)
                if b:
                    yield a / b, _join("/", left, right)


def _loss(model: Qwen2ForCausalLM, batch: _Batch, calculated_share: float) -> torch.Tensor:
    """Return the mean cross-entropy of the response tokens, the first one taken against the mixture of first tokens."""
    # Padding is on the right and attention is causal, so no mask is needed (and torch takes its fast path).
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    rows = torch.arange(len(batch.tokens))
    first = torch.log_softmax(model.lm_head(hidden[rows, batch.starts - 1]), dim=-1)
    first_loss = -(
        calculated_share * first[rows, batch.calculated_first]
        + (1 - calculated_share) * first[rows, batch.guessed_first]
    )
    # Position p predicts token p + 1: the tokens after the first response token, the end token included.
    positions = torch.arange(batch.tokens.shape[1] - 1)
    later = (positions >= batch.starts[:, None]) & (positions < batch.lengths[:, None] - 1)
    later_loss = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[:, :-1][later]), batch.tokens[:, 1:][later], reduction="none"
    )
    return (first_loss.sum() + later_loss.sum()) / (len(first_loss) + len(later_loss))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _check_disjoint(problems: Sequence[CountdownProblem], held_out: Sequence[CountdownProblem]) -> None:
    for name, given in (("problems", problems), ("held_out", held_out)):
        if not given:
            raise ValueError(f"{name} is empty: the start model is trained on the one and measured on the other")
    shared = {problem.identity for problem in problems} & {problem.identity for problem in held_out}
    if shared:
        raise ValueError(
            f"problems and held_out share {len(shared)} problems, for example {min(shared)} (sorted numbers, target): "
            "held-out success would measure memory; pass disjoint splits"
        )


def _digest(problems: Sequence[CountdownProblem]) -> str:
    """Return the SHA-256 of problems in their order, which decides the order of the demonstrations."""
    return hashlib.sha256(json.dumps([[list(p.numbers), p.target] for p in problems]).encode()).hexdigest()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the folder ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing one for a single small file, terminal or not."""
    settings = transformers.utils.logging
    was_enabled = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            settings.enable_progress_bar()


def _save(directory: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    # Nothing but the two ids: a checkpoint's sampling defaults would reach vLLM's.
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with _no_progress_bars():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _publish(
    directory: Path,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    request: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Write everything into a folder beside the wanted one, then rename it: a rename is all or nothing."""
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        _save(temporary, model, tokenizer)
        manifest = {
            "request": request,
            "results": results,
            "made_with": {
                "hpo-plugin": hpo_plugin.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
            "files": {path.name: sha256_of_file(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        # mkdtemp makes folders private; a model is as readable as any folder of this user.
        umask = os.umask(0o022)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        try:
            temporary.rename(directory)
        except OSError:
            # Another process was first (renaming onto a folder with content fails). If what it made is what was asked
            # for, all is well; else the caller's look at the folder says what is there.
            if not (directory / MANIFEST_NAME).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_existing(directory: Path, request: dict[str, Any]) -> StartModelReport | None:
    """Return the report of a folder that holds what is asked for, or None if there is nothing.

    Raises:
        FileExistsError: If the folder holds anything else, saying what differs.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_bytes())
        there, results, files = manifest["request"], manifest["results"], manifest["files"]
        report = StartModelReport(
            directory=directory,
            **{**results, "sampled": Success(**results["sampled"]), "greedy": Success(**results["greedy"])},
            reused=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileExistsError(
            f"{directory} is there and is not a start model ({error}); choose another folder or remove it"
        ) from error
    differing = [key for key in request if request[key] != there.get(key)]
    if differing:
        details = "; ".join(f"{key}: {there.get(key)!r} there, {request[key]!r} asked for" for key in differing)
        raise FileExistsError(f"{directory} holds another start model ({details}); choose another folder or remove it")
    damaged = [
        name
        for name, digest in files.items()
        if not (directory / name).is_file() or sha256_of_file(directory / name) != digest
    ]
    if damaged:
        raise FileExistsError(
            f"{directory} is damaged: {', '.join(damaged)} changed since it was made; remove it to build it again"
        )
    return report
