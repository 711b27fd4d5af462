r"""The TeleLogs reward: the label in the last ``\boxed{…}`` of a response, in a closed grammar.

The text comes from a model that is being optimized against this function, so it is treated as hostile: the work done
for it is linear in its last :data:`MAX_SEARCHED_CHARACTERS` characters, and no text makes :func:`compute_score` raise.

A box is read as it is shown: braces, ``$``, font commands such as ``\textbf{…}`` and blank commands such as ``\,`` show
nothing of their own. The grammar of what it shows::

    shown       = [ "(" ] label [ punctuation ] [ option text [ punctuation ] ]
    label       = [ letter [ "_" ] ] number, where blanks may stand between the parts
    letter      = "A" … "Z" | "a" … "z"
    number      = "1" … "99", ASCII digits without a leading zero
    punctuation = any of ". : , ( ) - – —" and blanks

A label is one letter and a number (``C3``) or a number alone (``7``). For a label with a letter, a number alone means
that number with the label's letter: ``\boxed{3}`` and ``\boxed{C3}`` are the same answer where the label is ``C5``. For
a label without a letter, ``C7`` is not ``7``. The option text is one of the eight sentences of the root causes,
compared without case and blanks, and it must be the label's own: the row's ``extra_info["cause"]`` says which that is.
Anything else in the box, a second label included, makes it malformed. docs/telelogs.md lists forms with the decision
and the reason.

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

from hpo_plugin.tasks.telelogs.tables import Cause

#: ``data_source`` of the rows that this package writes.
DATA_SOURCE = "telelogs"
#: Only this many characters at the end of a response are searched for boxes.
MAX_SEARCHED_CHARACTERS = 16_384
#: A box that holds more is malformed; the longest option text has 88 characters.
MAX_BOX_CHARACTERS = 512

_ANSWER = re.compile(r"[A-Z]?[1-9][0-9]?")
_BOX_COMMAND = r"\boxed"
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile("[{}]")
_OPENING, _CLOSING = b"{}"
#: All bytes but the braces and NUL.
_NO_TOKENS = bytes(set(range(256)) - {0, _OPENING, _CLOSING})
#: What shows nothing of its own.
_INVISIBLE = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|math(?:bf|it|rm|sf|tt|normal)|emph|underline|mbox|boldsymbol|bm"
    r"|operatorname)\s*(?=\{)|[{}$]"
)
_BLANKS = re.compile(r"(?:\\[,;:! ]|\\q?quad(?![A-Za-z])|[~\s])+")
_LABEL = re.compile(r" ?\(? ?(?:([A-Za-z]) ?_? ?)?([1-9][0-9]?)(?![0-9])")
_PUNCTUATION = ".:,()-–—"


def _compared(text: str) -> str:
    return "".join(text.split()).lower().replace("’", "'").strip(_PUNCTUATION)


_CAUSE_OF_TEXT = {_compared(cause.text): cause for cause in Cause}


class TeleLogsVerdict(str, Enum):
    """The verdict on a response: correct, or the reason why it is not."""

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
        extra_info: Of the row. ``cause``, as this package writes it, is the root cause behind the label: its sentence
            may follow the label in the box. Without it, the labels ``C1`` to ``C8`` have their published sentences.
        **kwargs: Other keywords of verl's reward managers; ignored.

    Returns:
        ``score`` and ``acc``, both 1.0 or 0.0, and ``pred``: the answer with the label's letter if it has none of its
        own, or "" if the response has no answer. ``pred`` is what verl's ``maj@N`` counts votes of.

    Raises:
        ValueError: If ``ground_truth`` is not a label.
        TypeError: If ``solution_str`` is not a string.
    """
    label = _checked_label(ground_truth)
    pred = _pred(_read_box(_last_box(solution_str)), label, extra_info)
    score = 1.0 if pred == label else 0.0
    return {"score": score, "acc": score, "pred": pred}


def judge(solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None) -> TeleLogsVerdict:
    """Judge a response: correct, or the reason why it is not.

    Args:
        solution_str: The decoded response, without the prompt.
        ground_truth: As in :func:`compute_score`.
        extra_info: As in :func:`compute_score`.

    Returns:
        The verdict.

    Raises:
        ValueError: If ``ground_truth`` is not a label.
        TypeError: If ``solution_str`` is not a string.
    """
    label = _checked_label(ground_truth)
    box = _last_box(solution_str)
    if box is None:
        return TeleLogsVerdict.NO_ANSWER
    pred = _pred(_read_box(box), label, extra_info)
    if not pred:
        return TeleLogsVerdict.MALFORMED
    return TeleLogsVerdict.CORRECT if pred == label else TeleLogsVerdict.WRONG_LABEL


def read_answer(text: str) -> str | None:
    r"""Return the answer in the last closed ``\boxed{…}`` of a text, in upper case.

    The last box that is closed counts, up to the brace that closes it; one that is never closed is not an answer and
    does not hide an earlier one. A box inside of a box begins later than the outer one, so it is the one that counts.
    A brace is a brace, also after a backslash. Only the last :data:`MAX_SEARCHED_CHARACTERS` characters are searched.

    Args:
        text: The decoded response, without the prompt.

    Returns:
        The answer (``C3``, ``3``), or None if there is no closed box or the last one holds anything else. An option
        text after the label must be the published one of the label.

    Raises:
        TypeError: If ``text`` is not a string.
    """
    read = _read_box(_last_box(text))
    return None if read is None or read[1] not in (None, Cause.__members__.get(read[0])) else read[0]


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
        raise ValueError(
            f"got predictions for {len(predictions)} prompts, but {len(labels)} labels; pass one label per prompt"
        )
    sizes = sorted({len(preds) for preds in predictions})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(
            f"every prompt must have the same number of samples, at least one; found {sizes or 'no prompts'}. "
            'Pass "" for a missing sample'
        )
    correct_samples = correct_votes = 0
    for preds, ground_truth in zip(predictions, labels, strict=True):
        label = _checked_label(ground_truth)
        votes = [_checked_pred(pred, label) for pred in preds]
        correct_samples += votes.count(label)
        if majority_vote(votes) == label:
            correct_votes += 1
    return {"pass@1": correct_samples / (len(labels) * sizes[0]), f"maj@{sizes[0]}": correct_votes / len(labels)}


def _last_box(text: str) -> str | None:
    """Return what the last closed box holds, or None; of a long one, the first MAX_BOX_CHARACTERS + 1 characters."""
    if not isinstance(text, str):
        raise TypeError(f"the response must be decoded text (str), got {type(text).__name__}")
    first = text.find(_BOX_COMMAND, max(0, len(text) - MAX_SEARCHED_CHARACTERS))
    if first < 0:
        return None
    # The braces alone, with a NUL for the command and the brace of a box. Loops over bytes are the fastest.
    marked = _BOX.sub("\0", text[first:].replace("\0", "?"))
    tokens = marked.encode("ascii", "replace").translate(None, _NO_TOKENS)
    # Read backward, an opening brace takes a closing brace that is still free. The first box that gets one is the last
    # closed box.
    boxes = free = 0
    for token in reversed(tokens):
        if token == _CLOSING:
            free += 1
        elif token == _OPENING:
            if free:
                free -= 1
        else:
            boxes += 1
            if free:
                break
    else:
        return None
    begin = [match.end() for match in _BOX.finditer(text, first)][-boxes]
    depth = 1
    for match in _BRACE.finditer(text, begin, begin + MAX_BOX_CHARACTERS + 1):
        depth += -1 if match[0] == "}" else 1
        if depth == 0:
            return text[begin : match.start()]
    return text[begin : begin + MAX_BOX_CHARACTERS + 1]


def _read_box(box: str | None) -> tuple[str, Cause | None] | None:
    """Return the label that a box shows and the cause whose text follows it; None if it shows anything else."""
    if box is None or len(box) > MAX_BOX_CHARACTERS:
        return None
    shown = _BLANKS.sub(" ", _INVISIBLE.sub("", box))
    matched = _LABEL.match(shown)
    if matched is None:
        return None
    rest = _compared(shown[matched.end() :])
    if rest and rest not in _CAUSE_OF_TEXT:
        return None
    return ((matched[1] or "") + matched[2]).upper(), _CAUSE_OF_TEXT.get(rest)


def _pred(read: tuple[str, Cause | None] | None, label: str, extra_info: Mapping[str, Any] | None) -> str:
    """Return the answer with the label's letter; "" without an answer, or if label and option text contradict."""
    if read is None:
        return ""
    answer, named = _with_letter_of(label, read[0]), read[1]
    if named is not None:
        cause = extra_info.get("cause") if isinstance(extra_info, Mapping) else None
        own = Cause.__members__.get(str(cause or label))
        # Of the other options only one thing is known: their text is not that of the right option.
        if own is None or (named is own) != (answer == label):
            return ""
    return answer


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
