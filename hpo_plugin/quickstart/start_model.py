"""The start model of a laptop run: it writes well-formed answers, which are rarely correct.

HPO is about *sparse* rewards, so a run that shows it needs a start at which a few percent of the samples are correct,
and an ability that training can amplify. A pretrained language model has both; it is also a thousand times too large
for two CPU cores. The model built here has some 200,000 parameters and two ways to answer a prompt, the two of a
:class:`~hpo_plugin.tasks.task.Demonstration`:

- *calculated*: the solution, as far as the model has learned to find it. It begins with the task's
  :attr:`~hpo_plugin.tasks.task.LaptopForm.solution_prefix` (Countdown: ``=3*5+7``);
- *guessed*: well-formed and rarely correct (Countdown: a random expression of the given numbers, ``(7-3)*5``).

The model answers in the first way with probability :attr:`StartModelConfig.calculated_share` only. Reinforcement
learning has to find out that this way is better, and to improve the calculation.

Training is one supervised pass in fp32 over demonstrations of training rows. Most demonstrations are calculated,
because the skill is what takes time to learn. The *first* token of every demonstration is trained towards the requested
mixture of first tokens instead, so the share does not depend on how the batches are composed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import Qwen2Tokenizer

import hpo_plugin
from hpo_plugin.console import Progress
from hpo_plugin.cpu.generation import GenerationRequest, Generator, Sampling
from hpo_plugin.files import sha256_of_file
from hpo_plugin.tasks.task import CORRECT, MALFORMED, TASK_NAMES, Row, Task, laptop_form, prompt_text

START_MODEL_MANIFEST = "start_model.json"
EOS_TOKEN, PAD_TOKEN = "<|im_end|>", "<|endoftext|>"
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
#: vLLM's CPU attention refuses other head dimensions (and transformers does not mind).
_HEAD_DIMS = (32, 64, 80, 96, 112, 128)
_WARMUP_STEPS = 50
_FIGURES = ("parameters", "sampled", "greedy", "first_loss", "last_loss", "seconds")
#: The fields of :class:`StartModelConfig` that are sizes of the model.
SIZES = ("hidden_size", "layers", "intermediate_size", "head_dim", "max_positions")


@dataclass(frozen=True)
class StartModelConfig:
    """Size of the model and length of the supervised pass.

    Attributes:
        hidden_size: Width.
        layers: Number of layers.
        intermediate_size: Width of the gated MLP.
        head_dim: Dimension of an attention head.
        max_positions: Most tokens of prompt and response together.
        calculated_share: Probability with which the model is taught to begin a calculated answer, in (0, 1). Start
            success is close to this times the model's skill, plus the luck of a guess.
        guessed_demonstrations: Share of a batch whose demonstration is a guess, in (0, 1).
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
                "vLLM's CPU attention supports no other value"
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
                "guessed demonstrations; a batch needs at least one guessed and one calculated demonstration"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")


@dataclass(frozen=True)
class Success:
    """Success of a model on rows of a task.

    Attributes:
        correct: Share of correct responses, in [0, 1].
        calculated: Share of responses that begin with the task's solution prefix.
        well_formed: Share of responses that are answers, correct or not.
        mean_length: Mean number of response tokens, the end-of-sequence token included.
        responses: Number of responses.
    """

    correct: float
    calculated: float
    well_formed: float
    mean_length: float
    responses: int


@dataclass(frozen=True)
class StartModelReport:
    """Result of :func:`build_start_model`.

    Attributes:
        directory: The model folder, for ``actor_rollout_ref.model.path``.
        parameters: Number of trained values.
        sampled: Success on the held-out rows at temperature 1.
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
    def results(self) -> Mapping[str, Any]:
        """The figures, as JSON values."""
        figures = asdict(self)
        return {name: figures[name] for name in _FIGURES}

    @property
    def sparse(self) -> bool:
        """Whether sampled success lies in :data:`SPARSE_REGIME`."""
        return SPARSE_REGIME[0] <= self.sampled.correct <= SPARSE_REGIME[1]


def build_start_model(
    output: str | Path,
    task: Task,
    rows: Sequence[Row],
    held_out: Sequence[Row],
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
        task: The task; it has a laptop form.
        rows: Training rows, which are demonstrated.
        held_out: Rows that no demonstration may show; start success is measured on them.
        seed: A non-negative integer.
        config: Size and training; the defaults are those of the quickstart.
        progress: Told how far it is, at every step.

    Returns:
        What was made and how well it does.

    Raises:
        ValueError: If the config is invalid, a list is empty, the two share a row (:meth:`Task.identity`), a training
            row cannot be demonstrated, or a demonstration is longer than ``max_positions``.
        FileExistsError: If the folder holds something else.
        OSError: If it cannot be written.
    """
    config = StartModelConfig() if config is None else config
    config.validate()
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    _check_disjoint(task, rows, held_out)
    directory = Path(output)
    request = {
        "recipe": _RECIPE,
        "seed": seed,
        "config": asdict(config),
        "problems": _digest(task, rows),
        "held_out": _digest(task, held_out),
        **demonstrated(task, rows, seed),
    }
    existing = _read_existing(directory, request)
    if existing is not None:
        return existing
    directory.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    tokenizer = build_tokenizer(config.max_positions)
    with _threads(config.threads):
        model, losses = _train(tokenizer, task, rows, seed, config, progress)
        limit = laptop_form(task).response_tokens
        sampled = evaluate_success(model, task, held_out, tokenizer=tokenizer, seed=seed, max_tokens=limit)
        greedy = evaluate_success(model, task, held_out, tokenizer=tokenizer, temperature=0, max_tokens=limit)
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
        raise FileNotFoundError(
            f"{directory} was written but no longer exists; check whether another program removed it"
        )
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
    task: Task,
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    max_tokens: int = 32,
    batch_size: int = 512,
) -> Success:
    """Measure success on rows of a task, without verl.

    Args:
        model: A model folder, or the model.
        task: The task.
        rows: Its rows.
        tokenizer: Required where the model itself is given.
        samples: Responses per row.
        temperature: Of sampling; 0 takes the most probable token, and then one sample is enough.
        seed: Of the sampling.
        max_tokens: Longest response.
        batch_size: Responses generated together.

    Returns:
        Shares over all responses.

    Raises:
        ValueError: If there is nothing to measure, or no tokenizer.
    """
    if not rows or samples < 1:
        raise ValueError(f"{len(rows)} rows with samples={samples} leave nothing to measure; pass at least one of each")
    if not isinstance(model, Qwen2ForCausalLM):
        tokenizer = AutoTokenizer.from_pretrained(model)
        model = Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32)
    elif tokenizer is None:
        raise ValueError("tokenizer is missing; it is required if model is an object")
    was_training, generation_config = model.training, model.generation_config
    generate = Generator(model, eos_token_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)
    sampling = Sampling(temperature=temperature)
    asked = [row for row in rows for _ in range(samples)]
    requests = [
        GenerationRequest(tuple(_encode(tokenizer, prompt_text(row))), max_tokens, seed << 32 | number)
        for number, row in enumerate(asked)
    ]
    responses = [
        response
        for begin in range(0, len(requests), batch_size)
        for response in generate(requests[begin : begin + batch_size], sampling)
    ]
    model.train(was_training)
    model.generation_config = generation_config
    texts = tokenizer.batch_decode([response.token_ids for response in responses], skip_special_tokens=True)
    verdicts = [task.judge(row, text) for text, row in zip(texts, asked, strict=True)]
    count = len(verdicts)
    prefix = laptop_form(task).solution_prefix
    return Success(
        correct=verdicts.count(CORRECT) / count,
        calculated=sum(text.startswith(prefix) for text in texts) / count,
        well_formed=1 - verdicts.count(MALFORMED) / count,
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
    task: Task,
    rows: Sequence[Row],
    seed: int,
    config: StartModelConfig,
    progress: Progress | None,
) -> tuple[Qwen2ForCausalLM, list[float]]:
    """Return the trained model and the loss of every step, in nats per token."""
    model = _initial_model(tokenizer, seed, config)
    batches = _Batches(tokenizer, task, rows, seed, config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _WARMUP_STEPS) * (1 - step / config.steps)
    )
    losses: list[float] = []
    for step in range(config.steps):
        loss = _loss(model, batches.next(), config.calculated_share)
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
        rows: int64 [decisions], row of each token that decides between a calculated and a guessed answer.
        positions: int64 [decisions], its position.
        calculated_first: int64 [decisions], the token if the answer is calculated.
        guessed_first: int64 [decisions], the token if it is guessed.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    calculated_first: torch.Tensor
    guessed_first: torch.Tensor


class _Batches:
    """A seeded, endless source of batches."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        rows: Sequence[Row],
        seed: int,
        config: StartModelConfig,
    ) -> None:
        self._encode = lambda text: _encode(tokenizer, text)
        self._end = tokenizer.eos_token_id
        self._pad = tokenizer.pad_token_id
        self._config = config
        self._guessed = round(config.guessed_demonstrations * config.batch_size)
        self._prefix = laptop_form(task).solution_prefix
        self._lesson = task.lesson(rows, seed)

    def next(self) -> _Batch:
        """Return the next batch.

        Raises:
            ValueError: If a demonstration does not fit the model, or its two answers begin alike.
        """
        rows, starts = [], []
        decisions: list[tuple[int, int, int, int]] = []
        for row, shown in zip(range(self._config.batch_size), self._lesson, strict=False):
            if not shown.solution.startswith(self._prefix) or shown.guess.startswith(self._prefix):
                raise ValueError(
                    f"the solution {shown.solution!r} must begin with the task's solution prefix {self._prefix!r}, and "
                    f"the guess {shown.guess!r} must not"
                )
            prompt = self._encode(shown.prompt)
            calculated, guessed = self._encode(shown.solution), self._encode(shown.guess)
            guesses = row < self._guessed
            rows.append([*prompt, *(guessed if guesses else calculated), self._end])
            starts.append(len(prompt))
            decisions.append((row, len(prompt), calculated[0], guessed[0]))
            for offset, begins in shown.decisions if guesses else ():
                position = len(prompt) + len(self._encode(shown.guess[:offset]))
                decisions.append((row, position, calculated[0], self._encode(begins)[0]))
        longest = max(map(len, rows))
        if longest > self._config.max_positions:
            raise ValueError(
                f"max_positions={self._config.max_positions}: a demonstration has {longest} tokens; raise it"
            )
        deciding_rows, positions, calculated_first, guessed_first = torch.tensor(decisions).T
        return _Batch(
            tokens=torch.tensor([[*row, *[self._pad] * (longest - len(row))] for row in rows]),
            starts=torch.tensor(starts),
            lengths=torch.tensor([len(row) for row in rows]),
            rows=deciding_rows,
            positions=positions,
            calculated_first=calculated_first,
            guessed_first=guessed_first,
        )


def _loss(model: Qwen2ForCausalLM, batch: _Batch, calculated_share: float) -> torch.Tensor:
    """Return the mean cross-entropy of the response tokens, deciding ones taken against the mixture of first tokens."""
    # Padding is on the right and attention is causal, so no mask is needed (and torch takes its fast path).
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    first = torch.log_softmax(model.lm_head(hidden[batch.rows, batch.positions - 1]), dim=-1)
    decision = torch.arange(len(first))
    first_loss = -(
        calculated_share * first[decision, batch.calculated_first]
        + (1 - calculated_share) * first[decision, batch.guessed_first]
    )
    # Position p predicts token p + 1: the tokens after the first response token, the end token included.
    positions = torch.arange(batch.tokens.shape[1] - 1)
    later = (positions >= batch.starts[:, None]) & (positions < batch.lengths[:, None] - 1)
    later[batch.rows, batch.positions - 1] = False
    later_loss = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[:, :-1][later]), batch.tokens[:, 1:][later], reduction="none"
    )
    return (first_loss.sum() + later_loss.sum()) / (len(first_loss) + len(later_loss))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _check_disjoint(task: Task, rows: Sequence[Row], held_out: Sequence[Row]) -> None:
    for name, given in (("rows", rows), ("held_out", held_out)):
        if not given:
            raise ValueError(f"{name} is empty; the start model is trained on rows and measured on held_out")
    shared = {json.dumps(task.identity(row)) for row in rows} & {json.dumps(task.identity(row)) for row in held_out}
    if shared:
        raise ValueError(
            f"rows and held_out share {len(shared)} problems, for example {min(shared)}: held-out success would "
            "measure memorization; pass disjoint splits"
        )


def demonstrated(task: Task, rows: Sequence[Row], seed: int) -> dict[str, str]:
    """Return a digest of what the first rows demonstrate, by which an edited task file gets another start model.

    The tasks of this package change with its version only, and their start models of version 0.1.0 stay valid.
    """
    if task.name in TASK_NAMES:
        return {}
    rng = random.Random(seed)
    shown = [asdict(task.demonstrate(row, rng)) for row in rows[:100]]
    text = json.dumps([task.name, laptop_form(task).solution_prefix, shown])
    return {"demonstrations": hashlib.sha256(text.encode()).hexdigest()}


def _digest(task: Task, rows: Sequence[Row]) -> str:
    """Return the SHA-256 of rows in their order, which decides the order of the demonstrations."""
    return hashlib.sha256(json.dumps([task.key(row) for row in rows]).encode()).hexdigest()


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
        (temporary / START_MODEL_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        # mkdtemp makes folders private; a model is as readable as any folder of this user.
        umask = os.umask(0o022)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        try:
            temporary.rename(directory)
        except OSError:
            # Another process was first (renaming onto a folder with content fails). If what it made is what was asked
            # for, all is well; else the caller's look at the folder says what is there.
            if not (directory / START_MODEL_MANIFEST).exists():
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
        manifest = json.loads((directory / START_MODEL_MANIFEST).read_bytes())
        there, results, files = manifest["request"], manifest["results"], manifest["files"]
        report = StartModelReport(
            directory=directory,
            **{**results, "sampled": Success(**results["sampled"]), "greedy": Success(**results["greedy"])},
            reused=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileExistsError(
            f"{directory} exists but is not a start model ({error}); choose another folder or remove it"
        ) from error
    differing = [key for key in request if request[key] != there.get(key)]
    if differing:
        details = "; ".join(f"{key}: found {there.get(key)!r}, requested {request[key]!r}" for key in differing)
        raise FileExistsError(
            f"{directory} holds a different start model ({details}); choose another folder or remove it"
        )
    damaged = [
        name
        for name, digest in files.items()
        if not (directory / name).is_file() or sha256_of_file(directory / name) != digest
    ]
    if damaged:
        raise FileExistsError(
            f"{directory} is damaged: {', '.join(damaged)} changed after it was built; remove the folder to build it "
            "again"
        )
    return report
