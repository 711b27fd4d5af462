r"""The TeleLogs reward: the label in the last ``\boxed{…}`` of a response, in a closed grammar.

The text comes from a model that is being optimized against this function, so it is treated as hostile: the work done
for it is linear in its last :data:`MAX_SEARCHED_CHARACTERS` characters, and no text makes :func:`compute_score` raise.

The grammar of what a box may hold, in which no spaces exist::

    content = answer | "{" answer "}" | "\text{" answer "}"
    answer  = [ "A" … "Z" ] number
    number  = "1" … "99", ASCII digits without a leading zero

A label is one letter and a number (``C3``) or a number alone (``7``). For a label with a letter, a number alone means
that number with the label's letter: ``\boxed{3}`` and ``\boxed{C3}`` are the same answer where the label is ``C5``. For
a label without a letter, ``C7`` is not ``7``.

What verl makes of the results: ``score`` is the reward. With ``actor_rollout_ref.rollout.val_kwargs.n=4``, validation
logs ``val-core/telelogs/acc/mean@4``, the mean over prompts of the mean over samples, which is the papers' pass@1; and,
because every result has a ``pred``, ``val-core/telelogs/acc/maj@4/mean``. The latter is not the papers' maj@4: verl
draws four of the four samples *with replacement*, a thousand times, lets each draw vote (the first seen among the most
frequent wins, and "" votes like any other answer) and reports the mean. :func:`summarize` has the papers' maj@4, from
the same samples.

This module imports the standard library only: verl loads it in each of its reward workers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

#: ``data_source`` of the rows that this package writes.
DATA_SOURCE = "telelogs"
#: Only this many characters at the end of a response are searched for boxes.
MAX_SEARCHED_CHARACTERS = 262_144

_BOX = r"\boxed{"
_BRACE = re.compile(r"\\boxed\{|[{}]")
_ANSWER = re.compile(r"[A-Z]?[1-9][0-9]?")
_CONTENT = re.compile(rf"((?:\\text)?\{{)?({_ANSWER.pattern})(?(1)\}})")


class TeleLogsVerdict(str, Enum):
    """What a response is, and why it is not correct if it is not."""

    CORRECT = "correct"
    #: There is no closed ``\boxed{…}``.
    NO_ANSWER = "no_answer"
    #: The last box holds something outside of the grammar.
    MALFORMED = "malformed"
    #: The last box holds an answer, and it is not the label.
    WRONG_LABEL = "wrong_label"


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Score one response, in verl's reward interface (``reward.custom_reward_function``).

    Binary: 1.0 for the label, 0.0 for every other text. No text makes it raise. What does raise is a row that cannot be
    scored, because a bad reward must stop a run rather than train on zeros.

    Args:
        data_source: Not used, because a label explains itself; :data:`DATA_SOURCE` in the rows of this package. Part of
            verl's interface, and of the names of its metrics.
        solution_str: The decoded response, without the prompt.
        ground_truth: The label: ``C3``, ``M4``, ``7``.
        extra_info: Not used; part of verl's interface.
        **kwargs: Other keywords of verl's reward managers; ignored.

    Returns:
        ``score`` and ``acc``, both 1.0 or 0.0, and ``pred``: the answer with the label's letter if it has none of its
        own, or "" if the response has no answer. ``pred`` is what verl's ``maj@N`` counts votes of.

    Raises:
        ValueError: If ``ground_truth`` is not a label.
        TypeError: If ``solution_str`` is not a string.
    """
    label = _checked_label(ground_truth)
    answer = read_answer(solution_str)
    pred = "" if answer is None else _with_letter_of(label, answer)
    score = 1.0 if pred == label else 0.0
    return {"score": score, "acc": score, "pred": pred}


def judge(solution_str: str, ground_truth: Any) -> TeleLogsVerdict:
    """Say whether a response is correct, and if not, why.

    Args:
        solution_str: The decoded response, without the prompt.
        ground_truth: As in :func:`compute_score`.

    Returns:
        The verdict.

    Raises:
        ValueError: If ``ground_truth`` is not a label.
        TypeError: If ``solution_str`` is not a string.
    """
    label = _checked_label(ground_truth)
    answer = read_answer(solution_str)
    if answer is None:
        return TeleLogsVerdict.NO_ANSWER if _last_box(solution_str) is None else TeleLogsVerdict.MALFORMED
    return TeleLogsVerdict.CORRECT if _with_letter_of(label, answer) == label else TeleLogsVerdict.WRONG_LABEL


def read_answer(text: str) -> str | None:
    r"""Return the answer in the last closed ``\boxed{…}`` of a text, as it is written there.

    The last box that is closed counts, up to the brace that closes it; one that is never closed is not an answer and
    does not hide an earlier one. A box inside of a box begins later than the outer one, so it is the one that counts.
    A brace is a brace, also after a backslash. Only the last :data:`MAX_SEARCHED_CHARACTERS` characters are searched.

    Args:
        text: The decoded response, without the prompt.

    Returns:
        The answer (``C3``, ``3``), or None if there is no closed box or the last one holds anything else.

    Raises:
        TypeError: If ``text`` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"the response must be decoded text (str), got {type(text).__name__}")
    box = _last_box(text)
    matched = None if box is None else _CONTENT.fullmatch(text, *box)
    return None if matched is None else matched[2]


def majority_vote(preds: Sequence[str]) -> str:
    """Return the most frequent of the answers to one prompt.

    Args:
        preds: The answers, in the order of the samples; "" is a sample without an answer.

    Returns:
        The most frequent answer, the first seen of several. Samples without an answer do not vote: "" is returned only
        if there is no answer at all.
    """
    votes = Counter(pred for pred in preds if pred)
    return max(votes, key=votes.__getitem__, default="")


def summarize(predictions: Sequence[Sequence[str]], labels: Sequence[str]) -> dict[str, float]:
    """Compute the papers' metrics, pass@1 and maj@k, from the k answers to each prompt.

    Answers and labels stand in the files that verl writes to ``trainer.validation_data_dir``, one sample a line, as
    ``pred`` and ``gts``. verl's default trainer names samples ``<prompt>_<session>_<index>`` in ``uid``; the lines of
    one prompt agree in the first part.

    Args:
        predictions: For each prompt its answers, in the order of the samples: ``pred`` of :func:`compute_score`, or
            what :func:`read_answer` returned, with "" for None. Every prompt has the same number k of them.
        labels: For each prompt its label.

    Returns:
        ``pass@1``, the share of correct samples, and ``maj@k`` (``maj@4`` for four samples), the share of prompts whose
        :func:`majority_vote` is correct.

    Raises:
        ValueError: If there are no prompts or no samples, if their numbers disagree, or if an answer or a label is
            malformed.
    """
    if len(predictions) != len(labels):
        raise ValueError(f"predictions of {len(predictions)} prompts, and {len(labels)} labels")
    sizes = sorted({len(preds) for preds in predictions})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(
            f"every prompt must have the same number of samples, at least one; found {sizes or 'no prompts'}. "
            'Add "" for a sample that was lost'
        )
    correct_samples = correct_votes = 0
    for preds, ground_truth in zip(predictions, labels, strict=True):
        label = _checked_label(ground_truth)
        votes = [_checked_pred(pred, label) for pred in preds]
        correct_samples += votes.count(label)
        if majority_vote(votes) == label:
            correct_votes += 1
    return {"pass@1": correct_samples / (len(labels) * sizes[0]), f"maj@{sizes[0]}": correct_votes / len(labels)}


def _last_box(text: str) -> tuple[int, int] | None:
    """Return begin and end of what the last closed box holds, or None."""
    first = text.find(_BOX, max(0, len(text) - MAX_SEARCHED_CHARACTERS))
    if first < 0:
        return None
    # For each open brace where its content begins if it opens a box, else -1, which is never later than the last box.
    opened: list[int] = []
    last_begin = last_end = -1
    for match in _BRACE.finditer(text, first):
        token = match[0]
        if token == "{":
            opened.append(-1)
        elif token == _BOX:
            opened.append(match.end())
        elif opened:
            begin = opened.pop()
            if begin > last_begin:
                last_begin, last_end = begin, match.start()
    return None if last_begin < 0 else (last_begin, last_end)


def _with_letter_of(label: str, answer: str) -> str:
    # Of two answers of the grammar, only one without a letter begins with a digit.
    return label[0] + answer if answer[0].isdigit() and not label[0].isdigit() else answer


def _checked_label(ground_truth: Any) -> str:
    if isinstance(ground_truth, str) and _ANSWER.fullmatch(ground_truth):
        return ground_truth
    raise ValueError(
        f"malformed TeleLogs ground truth {_shown(ground_truth)}: expected a label, at most one letter A to Z and a "
        'number from 1 to 99 such as "C3", "M4" or "7", in the column reward_model.ground_truth'
    )


def _checked_pred(pred: Any, label: str) -> str:
    if isinstance(pred, str):
        if not pred:
            return ""
        if _ANSWER.fullmatch(pred):
            return _with_letter_of(label, pred)
    raise ValueError(f'malformed TeleLogs prediction {_shown(pred)}: expected an answer such as "C3" or "3", or ""')


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
