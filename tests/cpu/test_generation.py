"""The sampler of the rollout backend: what it draws, from what, and how that depends on the batch (not at all)."""

from collections import Counter

import pytest
import torch

from hpo_plugin.cpu.generation import GenerationRequest, Generator, RequestSeeds, Sampling

EOS, PAD = 1, 0
PROMPTS = [(5, 6, 7), (8, 9), (10, 11, 12, 13, 14), (5, 6, 7)]


@pytest.fixture
def generator(tiny_model):
    return Generator(tiny_model, eos_token_ids=[EOS], pad_token_id=PAD)


def requests(max_tokens=12):
    return [GenerationRequest(prompt, max_tokens, seed) for seed, prompt in enumerate(PROMPTS)]


def trainer_log_probs(model, prompt, response, temperature=1.0):
    """Log-probs as verl's trainer computes them: one forward pass, logits over temperature, no padding, no cache."""
    ids = torch.tensor([list(prompt) + list(response)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_log_probs_are_those_of_an_unpadded_forward_pass_to_1e_5(generator, tiny_model, temperature):
    responses = generator(requests(), Sampling(temperature=temperature))
    for prompt, response in zip(PROMPTS, responses, strict=True):
        expected = trainer_log_probs(tiny_model, prompt, response.token_ids, temperature)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.8), Sampling(top_k=5), Sampling(temperature=0)])
def test_a_request_gets_the_same_answer_alone_as_in_a_batch(generator, sampling):
    together = generator(requests(), sampling)
    alone = [generator([request], sampling)[0] for request in requests()]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_a_repetition_penalty_is_blind_to_padding(generator):
    sampling = Sampling(repetition_penalty=1.5)
    together = generator(requests(), sampling)
    alone = [generator([request], sampling)[0] for request in requests()]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_greedy_takes_the_most_probable_token(generator, tiny_model):
    response = generator([GenerationRequest((5, 6, 7), 1, seed=3)], Sampling(temperature=0))[0]
    with torch.no_grad():
        logits = tiny_model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert response.token_ids == [int(logits.argmax())]


def test_an_interrupted_batch_ends_unfinished_and_can_be_continued(generator):
    sampling = Sampling(temperature=0, ignore_eos=True)
    whole = generator(requests(), sampling)
    generator.interrupted.set()
    begun = generator(requests(), sampling)
    generator.interrupted.clear()
    for request, first, all_of_it in zip(requests(), begun, whole, strict=True):
        assert len(first.token_ids) == len(first.log_probs) == 1
        assert not first.finished
        rest = GenerationRequest((*request.prompt_ids, *first.token_ids), request.max_tokens - 1, seed=0)
        assert len(all_of_it.token_ids) == request.max_tokens
        assert first.token_ids + generator([rest], sampling)[0].token_ids == all_of_it.token_ids


def test_samples_follow_the_model_distribution(generator, tiny_model):
    """4,000 draws of one token: each frequency within 5 standard errors of its probability."""
    draws = 4000
    responses = generator([GenerationRequest((5, 6, 7), 1, seed) for seed in range(draws)], Sampling())
    counts = Counter(response.token_ids[0] for response in responses)
    with torch.no_grad():
        probs = tiny_model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    for token, p in enumerate(probs.tolist()):
        assert abs(counts[token] / draws - p) <= 5 * (p * (1 - p) / draws) ** 0.5 + 1e-9, token


def test_top_k_draws_from_the_k_most_probable_and_renormalizes(generator, tiny_model):
    responses = generator([GenerationRequest((5, 6, 7), 1, seed) for seed in range(200)], Sampling(top_k=3))
    with torch.no_grad():
        logits = tiny_model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    values, tokens = logits.topk(3)
    expected = dict(zip(tokens.tolist(), values.log_softmax(-1).tolist(), strict=True))
    assert {r.token_ids[0] for r in responses} == set(expected)
    for response in responses:
        assert response.log_probs[0] == pytest.approx(expected[response.token_ids[0]], abs=1e-5)


def test_a_response_ends_with_the_end_token_or_at_its_own_limit(generator):
    sampling = Sampling(temperature=3.0)
    responses = generator([GenerationRequest((5, 6), 4 + seed % 9, seed) for seed in range(100)], sampling)
    for seed, response in enumerate(responses):
        assert len(response.token_ids) == len(response.log_probs) <= 4 + seed % 9
        assert EOS not in response.token_ids[:-1]
        assert response.finished == (response.token_ids[-1] == EOS)
        assert response.finished or len(response.token_ids) == 4 + seed % 9
    assert any(response.finished for response in responses)
    unending = generator(
        [GenerationRequest((5, 6), 6, seed) for seed in range(100)], Sampling(temperature=3.0, ignore_eos=True)
    )
    assert all(len(response.token_ids) == 6 for response in unending)


def test_checkpoint_defaults_do_not_leak_into_sampling(tiny_model):
    """A checkpoint's own generation config (top_k here) must not change what the trainer asked for."""
    tiny_model.generation_config.top_k = 1
    generator = Generator(tiny_model, eos_token_ids=[EOS], pad_token_id=PAD)
    responses = generator([GenerationRequest((5, 6, 7), 1, seed) for seed in range(50)], Sampling())
    assert len({r.token_ids[0] for r in responses}) > 1


def test_seeds_depend_on_prompt_repetition_and_weights_not_on_arrival_order():
    one, other = RequestSeeds(7), RequestSeeds(7)
    a = [one.next((1, 2), Sampling()), one.next((3,), Sampling()), one.next((1, 2), Sampling())]
    b = [other.next((3,), Sampling()), other.next((1, 2), Sampling()), other.next((1, 2), Sampling())]
    assert sorted(a) == sorted(b)
    assert len(set(a)) == 3
    one.new_weights(1)
    assert one.next((1, 2), Sampling()) not in a
    assert RequestSeeds(8).next((1, 2), Sampling()) not in a


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ],
)
def test_sampling_parameters_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
