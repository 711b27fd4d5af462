"""The start model of the laptop run: its tokenizer, its demonstrations, its folder.

How well the model does is measured in ``docs/start-model.md``; a test that trains it to the end would take minutes.
"""

import dataclasses
import json
import random
import re
from fractions import Fraction

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from hpo_plugin.quickstart import start_model
from hpo_plugin.quickstart.start_model import (
    EOS_TOKEN,
    StartModelConfig,
    build_start_model,
    build_tokenizer,
    evaluate_success,
)
from hpo_plugin.tasks.countdown.dataset import generate_splits, to_row
from hpo_plugin.tasks.countdown.problems import CountdownConfig, CountdownProblem
from hpo_plugin.tasks.countdown.prompts import chat_prompt
from hpo_plugin.tasks.countdown.reward import CountdownVerdict, judge
from hpo_plugin.tasks.countdown.task import CALCULATED_PREFIX, TASK, shown_order_solution

TINY = StartModelConfig(hidden_size=32, layers=1, intermediate_size=32, steps=3, batch_size=8, threads=1)
PROBLEMS, HELD_OUT_PROBLEMS = generate_splits(CountdownConfig(counts=(3,), max_number=12), train_size=200, test_size=16)


def rows_of(problems):
    return [to_row(problem, "train", 0, "terse") for problem in problems]


TRAIN, HELD_OUT = rows_of(PROBLEMS), rows_of(HELD_OUT_PROBLEMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_start_model(tmp_path_factory.mktemp("start") / "model", TASK, TRAIN, HELD_OUT, config=TINY).directory


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


# --- tokenizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["3 12 5=22:", "=(3+12)*5", "  two  spaces ", "\n", "a\n\nb", "٣×½ 日本 '\u00e9", "\x00\x7f"]
)
def test_every_text_survives_the_tokenizer_with_one_token_per_byte(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_folder_loads_as_the_class_that_was_saved_with_258_tokens(tokenizer):
    assert type(tokenizer) is type(build_tokenizer())
    assert len(tokenizer) == 256 + 2
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_end_and_padding_are_two_tokens_and_no_text_of_a_response(tokenizer):
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert end != pad
    assert tokenizer.convert_tokens_to_ids(EOS_TOKEN) == end
    assert tokenizer.decode([*tokenizer.encode("=1+2"), end, pad], skip_special_tokens=True) == "=1+2"


def test_the_chat_template_adds_nothing_to_a_prompt(tokenizer):
    ids = tokenizer.apply_chat_template(
        chat_prompt((3, 12, 5), 22, "terse"), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert tokenizer.decode(ids) == "3 12 5=22:"


def test_the_chat_template_refuses_content_that_is_not_text(tokenizer):
    with pytest.raises(Exception, match="reads text only"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "3"}]}])


def test_verl_builds_its_agent_loop_tokens_with_this_tokenizer(folder):
    """The class verl picks for qwen2 raises where a newline is several tokens or <|im_end|> is unknown."""
    from verl.utils.tokenizer import hf_tokenizer
    from verl.utils.tokenizer.chat_template import initialize_system_prompt, initialize_turn_separator
    from verl.utils.tokenizer.continuous_token import QwenContinuousTokenBuilder

    verl_tokenizer = hf_tokenizer(str(folder))
    QwenContinuousTokenBuilder(verl_tokenizer)
    assert initialize_system_prompt(verl_tokenizer) == []
    assert initialize_turn_separator(verl_tokenizer) == []


# --- demonstrations ------------------------------------------------------------------------------------------------


def test_calculated_demonstrations_are_correct_for_every_order_of_the_numbers():
    rng = random.Random(0)
    for problem in PROBLEMS:
        numbers = rng.sample(problem.numbers, 3)
        answer = CALCULATED_PREFIX + shown_order_solution(numbers, problem.target)
        truth = {"target": problem.target, "numbers": numbers}
        assert judge(answer, truth, layout="terse") is CountdownVerdict.CORRECT


@pytest.mark.parametrize(
    ("numbers", "target", "solution"),
    [
        ((3, 5, 7), 22, "3*5+7"),
        ((7, 3, 5), 22, "7+3*5"),
        ((3, 7, 5), 22, "3*5+7"),
        ((12, 4, 2), 6, "12-4-2"),
        ((8, 3, 3), 8, "8+3-3"),
    ],
)
def test_a_solution_keeps_the_shown_order_where_it_can(numbers, target, solution):
    assert shown_order_solution(numbers, target) == solution


def test_division_by_zero_on_the_way_to_a_solution_is_stepped_over():
    # 1/(2-2) comes up before 2/(2-1).
    solution = shown_order_solution((1, 2, 2), 2)
    assert eval(re.sub(r"(\d+)", r"Fraction(\1)", solution), {"Fraction": Fraction}) == 2


def test_a_problem_without_a_solution_is_refused():
    with pytest.raises(ValueError, match=r"\[1, 1, 1\] equals 99"):
        shown_order_solution((1, 1, 1), 99)


def test_a_batch_holds_each_kind_in_its_share_and_ends_every_answer(tokenizer):
    config = dataclasses.replace(TINY, batch_size=20, guessed_demonstrations=0.15)
    batch = start_model._Batches(tokenizer, TASK, TRAIN, 0, config).next()
    responses = [
        tokenizer.decode(row[start:length])
        for row, start, length in zip(batch.tokens, batch.starts.tolist(), batch.lengths.tolist(), strict=True)
    ]
    assert [response.startswith("=") for response in responses] == [False] * 3 + [True] * 17
    assert all(response.endswith(EOS_TOKEN) for response in responses)


def test_a_demonstration_longer_than_the_model_is_refused(tmp_path):
    config = dataclasses.replace(TINY, max_positions=12)
    with pytest.raises(ValueError, match="max_positions=12"):
        build_start_model(tmp_path / "m", TASK, TRAIN, HELD_OUT, config=config)
    assert list(tmp_path.iterdir()) == []


def test_the_first_token_is_taught_the_mixture_and_the_others_the_demonstration(tokenizer):
    """By hand, for a model that finds every token equally likely (weights 0): every term is log 258."""
    model = start_model._initial_model(tokenizer, 0, TINY)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    batch = start_model._Batches(tokenizer, TASK, TRAIN, 0, TINY).next()
    assert start_model._loss(model, batch, 0.25).item() == pytest.approx(torch.tensor(258.0).log().item(), abs=1e-5)


def test_the_loss_is_least_where_the_first_token_has_the_wanted_share(tokenizer):
    """Stationary: with the final hidden state free, softmax must meet the share, whatever the batch is made of."""
    first = torch.zeros(258, requires_grad=True)
    optimizer = torch.optim.Adam([first], lr=0.2)
    batch = start_model._Batches(tokenizer, TASK, TRAIN, 0, dataclasses.replace(TINY, batch_size=64)).next()

    class Stub:
        def model(self, input_ids, use_cache):
            return type("Output", (), {"last_hidden_state": torch.zeros(*input_ids.shape, 1)})

        def lm_head(self, hidden):
            return first.expand(len(hidden), -1) if len(hidden) == 64 else torch.zeros(len(hidden), 258)

    for _ in range(300):
        optimizer.zero_grad()
        start_model._loss(Stub(), batch, 0.12).backward()
        optimizer.step()
    share = torch.softmax(first.detach(), -1)[tokenizer.convert_tokens_to_ids("=")].item()
    assert share == pytest.approx(0.12, abs=0.005)


def test_padding_does_not_change_the_loss(tokenizer):
    model = start_model._initial_model(tokenizer, 0, TINY)
    batch = start_model._Batches(tokenizer, TASK, TRAIN, 0, TINY).next()
    padding = torch.full((len(batch.tokens), 9), tokenizer.pad_token_id)
    padded = dataclasses.replace(batch, tokens=torch.cat([batch.tokens, padding], dim=1))
    torch.testing.assert_close(start_model._loss(model, padded, 0.12), start_model._loss(model, batch, 0.12))


def test_the_supervised_pass_lowers_the_loss_and_teaches_the_alphabet(tmp_path):
    """An even guess over 258 tokens costs 5.55 nats; over the 16 characters of an answer, 2.77."""
    config = dataclasses.replace(TINY, steps=80, learning_rate=1e-2)
    report = build_start_model(tmp_path / "m", TASK, TRAIN, HELD_OUT, config=config)
    assert report.first_loss > 3.5
    assert report.last_loss < 2.77


# --- the folder ----------------------------------------------------------------------------------------------------


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder, tmp_path):
    torch.manual_seed(99)
    build_start_model(tmp_path / "same", TASK, TRAIN, HELD_OUT, config=TINY)
    build_start_model(tmp_path / "other", TASK, TRAIN, HELD_OUT, config=TINY, seed=1)
    assert weights(tmp_path / "same") == weights(folder)
    assert weights(tmp_path / "other") != weights(folder)


def test_building_leaves_the_random_state_and_the_threads_of_the_caller_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    build_start_model(tmp_path / "m", TASK, TRAIN, HELD_OUT, config=TINY)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_the_same_request_is_answered_from_the_folder(folder, monkeypatch):
    monkeypatch.setattr(start_model, "_train", lambda *_: pytest.fail("trained again"))
    report = build_start_model(folder, TASK, TRAIN, HELD_OUT, config=TINY)
    assert report.reused
    assert report.sampled.responses == len(HELD_OUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: found 0, requested 1"),
        ({"config": dataclasses.replace(TINY, steps=4)}, "config: "),
        ({"rows": TRAIN[:-1]}, "problems: "),
        ({"held_out": HELD_OUT[:-1]}, "held_out: "),
    ],
)
def test_a_folder_with_another_start_model_is_refused_and_kept(folder, change, message):
    before = weights(folder)
    arguments = {"task": TASK, "rows": TRAIN, "held_out": HELD_OUT, "config": TINY, **change}
    with pytest.raises(FileExistsError, match=message):
        build_start_model(folder, **arguments)
    assert weights(folder) == before


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a start model"):
        build_start_model(tmp_path, TASK, TRAIN, HELD_OUT, config=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damaged_weights_are_noticed(tmp_path):
    directory = build_start_model(tmp_path / "m", TASK, TRAIN, HELD_OUT, config=TINY).directory
    (directory / "model.safetensors").write_bytes(weights(directory)[:-1] + bytes([weights(directory)[-1] ^ 1]))
    with pytest.raises(FileExistsError, match=r"model\.safetensors changed"):
        build_start_model(directory, TASK, TRAIN, HELD_OUT, config=TINY)


def test_an_interruption_leaves_nothing_behind(tmp_path):
    def interrupt(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_start_model(tmp_path / "m", TASK, TRAIN, HELD_OUT, config=TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_step_up_to_the_total(tmp_path):
    seen = []
    build_start_model(tmp_path / "m", TASK, TRAIN, HELD_OUT, config=TINY, progress=lambda *told: seen.append(told))
    assert seen == [("warm start", 1, 3), ("warm start", 2, 3), ("warm start", 3, 3)]


def test_the_manifest_says_what_the_model_was_made_of_and_how_well_it_does(folder):
    manifest = json.loads((folder / start_model.START_MODEL_MANIFEST).read_text())
    assert manifest["request"]["config"] == dataclasses.asdict(TINY)
    assert manifest["made_with"]["torch"] == torch.__version__
    assert manifest["results"]["parameters"] == Qwen2ForCausalLM.from_pretrained(folder).num_parameters()
    measured = evaluate_success(folder, TASK, HELD_OUT)
    assert manifest["results"]["sampled"] == dataclasses.asdict(measured)


def test_the_checkpoint_brings_no_sampling_defaults(folder):
    settings = json.loads((folder / "generation_config.json").read_text())
    assert set(settings) - {"transformers_version", "_from_model_config"} == {"eos_token_id", "pad_token_id"}


# --- arguments -----------------------------------------------------------------------------------------------------


def test_a_held_out_problem_among_the_training_problems_is_refused_in_any_order_of_its_numbers(tmp_path):
    seen = HELD_OUT_PROBLEMS[0]
    (leaked,) = rows_of([CountdownProblem(tuple(reversed(seen.numbers)), seen.target)])
    with pytest.raises(ValueError, match="share 1 problems"):
        build_start_model(tmp_path / "m", TASK, [*TRAIN, leaked], HELD_OUT, config=TINY)


def test_numbers_with_another_target_are_another_problem(tmp_path):
    one, other = rows_of([CountdownProblem((3, 5, 7), 22), CountdownProblem((3, 5, 7), 15)])
    start_model._check_disjoint(TASK, [one], [other])


@pytest.mark.parametrize("empty", ["rows", "held_out"])
def test_an_empty_split_is_refused(tmp_path, empty):
    arguments = {"task": TASK, "rows": TRAIN, "held_out": HELD_OUT, empty: []}
    with pytest.raises(ValueError, match=f"{empty} is empty"):
        build_start_model(tmp_path / "m", **arguments, config=TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 16}, "head_dim=16"),
        ({"hidden_size": 48}, "hidden_size=48 must be a multiple of head_dim=32"),
        ({"calculated_share": 0.0}, "calculated_share=0.0"),
        ({"calculated_share": 1.0}, "calculated_share=1.0"),
        ({"guessed_demonstrations": 0.01}, "guessed_demonstrations=0.01 of batch_size=8 is 0"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_a_config_out_of_range_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_start_model(tmp_path / "m", TASK, TRAIN, HELD_OUT, config=dataclasses.replace(TINY, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed=-1"):
        build_start_model(tmp_path / "m", TASK, TRAIN, HELD_OUT, config=TINY, seed=-1)


# --- measuring -----------------------------------------------------------------------------------------------------


def test_success_is_counted_by_the_reward_over_all_samples(folder, tokenizer, monkeypatch):
    """Four problems, each asked twice; the answer the stub always gives is right for the first of them only."""
    rows = rows_of([CountdownProblem((3, 5, 7), target) for target in (22, 23, 24, 25)])
    answer = tokenizer.encode("=3*5+7" + EOS_TOKEN)

    class Stub:
        def __init__(self, model, *, eos_token_ids, pad_token_id):
            pass

        def __call__(self, requests, sampling):
            assert len({request.seed for request in requests}) == len(requests)
            return [start_model_response(answer) for _ in requests]

    monkeypatch.setattr(start_model, "Generator", Stub)
    success = evaluate_success(folder, TASK, rows, samples=2)
    assert success == start_model.Success(0.25, 1.0, 1.0, 7.0, 8)


def start_model_response(token_ids):
    from hpo_plugin.cpu.generation import Response

    return Response(token_ids=token_ids, log_probs=[0.0] * len(token_ids), finished=True)


def test_sampling_repeats_under_its_seed_whatever_the_batch_size(folder):
    one = evaluate_success(folder, TASK, HELD_OUT, seed=3, max_tokens=8)
    assert evaluate_success(folder, TASK, HELD_OUT, seed=3, max_tokens=8, batch_size=5) == one


def test_nothing_to_measure_is_refused(folder):
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate_success(folder, TASK, [])
