"""Hostile rollouts to ``hpo-plugin preview``: lines with wrong or odd JSON, and damaged parquet files.

Rows with a known outcome are written together with it: the values that are used, or why the row is skipped. All other
lines are mutations of them. No line disappears: each is used, or counted as skipped.
"""

from __future__ import annotations

import json
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hpo_plugin.preview.rollouts import PreviewError, open_rollouts
from hpo_plugin.preview.steps import preview_step
from torture.probe import Probe, Result, seeded
from torture.text import LIMIT_MS, LONG, cpu_ms, mutated, shown

#: Why a row is skipped (docs/preview.md).
NO_OBJECT = "not a JSON object"
NO_STEP = "the step is missing or not an integer"
NO_GROUP = "prompt is missing"
NO_REWARD = "the reward is missing, or larger than 1e+12 in magnitude"
NO_RESPONSE = "the response or its length is missing"

PIECES = [*'{}[]",:\\ \t\r', "null", "NaN", "Infinity", "-1e999", "1e13", "\\u0000", "\\ud800", '"reward": 1', '"step"']
PIECES += ['{"prompt": ', "\x00", "\x01", "\x1f", "\ufeff", "<script>", "'; DROP TABLE every; --", '"$[*]"', "9" * 400]
_TEXTS = ["", "a", "ä", "\U0001f600", "e\u0301", "\u2028", 'a"b', "\\", "\n", "'", "x" * 5000, "<b>", "NULL", "{}", "%"]
_WRONG_REWARDS: list[Any] = [None, "much", "", [], {}, [1.0], 1e13, -1e300, math.nan, math.inf, "nan", "1e999"]
_WRONG_STEPS: list[Any] = [None, 1.5, "x", [], {}, 1e300, math.nan, "1 2"]


@dataclass(frozen=True)
class Line:
    """A line of a file.

    Attributes:
        text: The line.
        used: The step, the reward and the length of a row that is used.
        reason: Why the row is skipped. If both are None, the outcome is not known.
    """

    text: str
    used: tuple[int, float, float] | None = None
    reason: str | None = None


def row(rng: random.Random) -> tuple[dict[str, Any], tuple[int, float, float]]:
    """A row that is used, and its values."""
    step, reward = rng.randrange(4), rng.choice((0, 1, 0.5, -1.0, 1e12, 1e-300, -0.0, True, False))
    response = "".join(rng.choices(_TEXTS, k=rng.randrange(4)))
    made: dict[str, Any] = {
        "step": rng.choice((step, float(step), str(step))),
        "prompt": rng.choice((rng.choice(_TEXTS) + "p", rng.randrange(9), [1], {"a": "b"}, True)),
        "response": response if rng.random() < 0.8 else [{"role": "assistant", "content": response}],
        "reward": reward if rng.random() < 0.8 else str(float(reward)),
    }
    if rng.random() < 0.2:
        made[rng.choice(_TEXTS) + "?"] = rng.choice((None, [], {"reward": 7}, "x"))
    items = list(made.items())
    rng.shuffle(items)
    return dict(items), (step, float(reward), float(len(response)))


def line(rng: random.Random) -> Line:
    """A row as JSON: one that is used, or one with a mistake."""
    values, used = row(rng)
    reason: str | None = None
    kind = rng.random()
    if kind < 0.08:
        values["reward"], reason = rng.choice(_WRONG_REWARDS), NO_REWARD
    elif kind < 0.12:
        values["step"], reason = rng.choice(_WRONG_STEPS), NO_STEP
    elif kind < 0.16:
        values["prompt"], reason = None, NO_GROUP
    elif kind < 0.20:
        values["response"], reason = None, NO_RESPONSE
    elif kind < 0.24:
        del values[rng.choice(("reward", "step", "prompt", "response"))]
        absent = {"step": NO_STEP, "prompt": NO_GROUP, "reward": NO_REWARD, "response": NO_RESPONSE}
        reason = next(why for name, why in absent.items() if name not in values)
    text = json.dumps(values, ensure_ascii=rng.random() < 0.5, separators=rng.choice(((",", ":"), (", ", ": "))))
    # Python writes NaN and Infinity, which are not JSON.
    if reason is not None and ("NaN" in text or "Infinity" in text):
        return Line(text)
    if kind >= 0.96:
        text, reason = rng.choice((text[:-1], f"[{text}]", f'"{len(text)}"', "12", "null", text + "}", "{")), NO_OBJECT
    return Line(text, None if reason else used, reason)


def lines(rng: random.Random, size: int, *, mutations: float) -> Iterator[Line]:
    """The lines of a file; the first one is a plain row, so that the columns are known."""
    yield Line('{"step": 0, "prompt": "p", "response": "abc", "reward": 1}', (0, 1.0, 3.0))
    others: list[str] = ["{}"]
    for _ in range(size - 1):
        made = line(rng)
        if rng.random() < mutations:
            text = mutated(rng, made.text, PIECES, others)
            others = [*others[-20:], made.text]
            made = Line(text.replace("\n", " ").replace("\r", " ") or "x")
        yield made


def read(paths: list[Path]) -> tuple[Counter[tuple[int, float, float]], dict[str, int]]:
    """The rows that are used, as the preview computes with them, and the numbers of skipped rows."""
    used: Counter[tuple[int, float, float]] = Counter()
    with open_rollouts(paths) as rollouts:
        for step in rollouts.steps():
            preview_step(step, (0.1,))
            used.update(zip([step.step] * len(step.rewards), step.rewards.tolist(), step.lengths.tolist(), strict=True))
        return used, dict(rollouts.bad)


def examine_lines(made: list[Line], folder: Path, rng: random.Random, result: Result) -> None:
    """Preview a file of lines, and compare the rows that are used and skipped with the expected ones."""
    path = folder / "rollouts.jsonl"
    encoded = [each.text.encode("utf-8", "surrogatepass") for each in made]
    path.write_bytes(rng.choice((b"\n", b"\r\n")).join(encoded) + rng.choice((b"", b"\n", b"\r\n")))
    result.inputs += len(made)
    try:
        used, bad = read([path])
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {error}")
        return
    result.count("used", used.total())
    result.count("skipped", sum(bad.values()))
    expected = Counter(each.used for each in made if each.used is not None)
    reasons = Counter(each.reason for each in made if each.reason is not None)
    blank = sum(all(unicodedata.category(character) == "Zs" for character in each.text) for each in made)
    if used.total() + sum(bad.values()) != len(made) - blank:
        result.failures.append(
            f"{len(made)} lines, {blank} blank: {used.total()} are used and {bad} are skipped; the first are "
            f"{[shown(each.text) for each in made[:3]]}"
        )
    unknown = len(made) - blank - expected.total() - reasons.total()
    missing = expected - used
    if missing or (not unknown and used != expected):
        result.failures.append(f"not used: {list(missing)[:3]}; used by mistake: {list(used - expected)[:3]}")
    for reason, number in reasons.items():
        found = bad.get(reason, 0)
        if found < number or (not unknown and found != number):
            result.failures.append(f"{found} rows are skipped because {reason!r}, not {number}")


def time_of_long_lines(folder: Path, rng: random.Random, result: Result, size: int = 20) -> None:
    """The CPU time for a line of 256 kB: that of a file with some, without that of the same file with short lines."""

    def preview(made: list[str], repeats: int) -> float:
        path = folder / "long.jsonl"
        path.write_bytes("\n".join(made).encode("utf-8", "surrogatepass"))
        return cpu_ms(lambda: read([path]), repeats)

    short = [made.text for made in lines(rng, size, mutations=0.5)]
    word = rng.choice([*PIECES, *_TEXTS[1:], "[", '{"a":']).replace("\n", " ").replace("\r", " ")
    place = rng.randrange(60)
    count = LONG // len(word.encode("utf-8", "surrogatepass"))
    long = [text[:place] + word * count + text[place:] for text in short]
    for repeats in (2, 20):
        # The first line decides which columns there are.
        milliseconds = (preview([short[0], *long], repeats) - preview([short[0], *short], repeats)) / size
        if milliseconds <= LIMIT_MS:
            break
    result.inputs += 2 * (size + 1)
    result.measure("slowest line of 256 kB (CPU ms)", round(milliseconds, 3))
    if milliseconds > LIMIT_MS:
        result.failures.append(f"{milliseconds:.1f} ms for each line of 256 kB with {word!a}")


def json_lines(folder: Path, seed: int, files: int, size: int = 5000) -> Result:
    """Files of JSON lines: half of them with known outcomes only, half of them with mutations."""
    result = Result()
    rng = random.Random(seed)
    for _ in range(files):
        time_of_long_lines(folder, rng, result)
    for number in range(files):
        made = list(lines(rng, size, mutations=0.0 if number % 2 else 0.5))
        examine_lines(made, folder, rng, result)
        if number % 2 == 0:
            # One undecodable line is skipped alone.
            good = [each.text.encode() for each in made[:50] if each.used]
            path = folder / "bytes.jsonl"
            path.write_bytes(b"\n".join([*good, b'{"prompt": "\xff\xfe"}', b""]))
            result.inputs += len(good) + 1
            used, bad = read([path])
            if used.total() != len(good) or sum(bad.values()) != 1:
                result.failures.append(f"a line of bytes: {used.total()} of {len(good)} used, {bad}")
    return result


def _columns(rng: random.Random, size: int) -> dict[str, pa.Array]:
    """Columns of odd types: what is not a number or a text has to be skipped or converted, not to raise."""

    def column(*choices: Callable[[], pa.Array]) -> pa.Array:
        return rng.choice(choices)()

    def numbers(kind: Any) -> pa.Array:
        return pa.array(np.arange(size) % 3, kind)

    texts = [rng.choice(_TEXTS) for _ in range(size)]
    return {
        "step": column(
            lambda: numbers(pa.int64()),
            lambda: numbers(pa.float32()),
            lambda: numbers(pa.uint8()),
            lambda: pa.nulls(size),
            lambda: pa.array(texts),
        ),
        "prompt": column(
            lambda: pa.array(texts),
            lambda: pa.array(texts).dictionary_encode(),
            lambda: pa.array([[text] for text in texts]),
            lambda: pa.array([{"a": text} for text in texts]),
            lambda: numbers(pa.timestamp("us")),
            lambda: pa.array([text.encode() + b"\xff" for text in texts]),
        ),
        "response": column(
            lambda: pa.array(texts),
            lambda: pa.array(texts, pa.large_string()),
            lambda: pa.array([[{"role": "assistant", "content": text}] for text in texts]),
            lambda: pa.array([None if text == "a" else text for text in texts]),
            lambda: numbers(pa.int32()),
        ),
        "reward": column(
            lambda: numbers(pa.float64()),
            lambda: numbers(pa.bool_()),
            lambda: numbers(pa.int32()).cast(pa.decimal128(12, 2)),
            lambda: pa.array([rng.choice((0.0, 1.0, math.nan, math.inf, 1e300, None)) for _ in range(size)]),
            lambda: pa.array(texts),
            lambda: pa.array([[1.0]] * size),
        ),
    }


def parquet(folder: Path, seed: int, files: int, size: int = 200) -> Result:
    """Parquet files with odd types, whole, with changed bytes, and truncated."""
    result = Result()
    rng = random.Random(seed)
    path = folder / "rollouts.parquet"
    for _ in range(files):
        pq.write_table(pa.table(_columns(rng, size)), path, compression=rng.choice(("zstd", "snappy", "none")))
        damaged = rng.random() < 0.7
        if damaged:
            data = bytearray(path.read_bytes())
            if rng.random() < 0.3:
                del data[rng.randrange(len(data)) :]
            for _ in range(rng.choice((1, 4, 40))):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
        result.inputs += size
        try:
            used, bad = read([path])
        except PreviewError as error:
            result.count("files with an error that names the reason")
            if not str(error) or len(str(error)) > 2000:
                result.failures.append(f"error {str(error)!r}")
            continue
        except Exception as error:
            result.failures.append(f"{type(error).__name__}: {error}")
            continue
        result.count("used", used.total())
        result.count("skipped", sum(bad.values()))
        if not damaged and used.total() + sum(bad.values()) != size:
            result.failures.append(f"{used.total()} used and {bad} skipped, of {size} rows")
    return result


PROBES: tuple[Probe, ...] = (
    Probe(
        "preview-lines",
        "text",
        "`preview`, JSON lines",
        "each row is used with its values, or counted as skipped with the reason; no exception; at most 5 ms for a "
        "line of 256 kB",
        seeded(4, lambda folder, seed: json_lines(folder, seed, 50)),
    ),
    Probe(
        "preview-parquet",
        "text",
        "`preview`, parquet files with odd types and damaged bytes",
        "each row is used or counted as skipped, or `PreviewError` for the file",
        seeded(4, lambda folder, seed: parquet(folder, seed, 500)),
    ),
)
