"""Long prompts whose answers are known: needles in real text, and RULER's tasks that need no download.

The tasks follow RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3); wording and code are our own, and
prompts hold no worked example. `depth` in [0, 1] is where in the text a task's (first) fact stands.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ..checks import require

_TEXT_CHARACTERS = 1 << 22  # a million tokens: enough for the longest context
# Tables and listings are cut into lines, and these into pieces, so that needles can stand in them.
_LONGEST_SENTENCE = 400  # characters
_LONGEST_PIECE = 64  # tokens
_KEYS = (
    "amber", "anchor", "basalt", "beacon", "candle", "canyon", "cedar", "compass", "copper", "coral", "crater", "ember",
    "falcon", "fossil", "garnet", "glacier", "harbor", "hazel", "heron", "ivory", "jasper", "juniper", "kettle", "lagoon",
    "lantern", "linen", "marble", "meadow", "nectar", "ocean", "opal", "orchard", "pebble", "pepper", "quartz", "raven",
    "saddle", "sparrow", "thistle", "timber", "tulip", "velvet", "walnut", "willow",
)  # fmt: skip
_COMMON_WORDS, _MOST_REPEATS, _UNCOMMON_REPEATS = 10, 30, 3


@dataclass(frozen=True)
class Sample:
    """A prompt as token ids, the answers that a continuation must contain, and the tokens it may take for them."""

    length: int
    depth: float | None
    prompt: list[int]
    answers: tuple[str, ...]
    new_tokens: int

    def score(self, continuation: str) -> float:
        """Share of the answers that stand in `continuation` as whole words, whatever their case."""
        found = [re.search(rf"(?<!\w){re.escape(a)}(?!\w)", continuation, re.IGNORECASE) for a in self.answers]
        return sum(map(bool, found)) / len(self.answers)


class Haystack:
    """A text cut into sentences of tokens.

    Args:
        tokenizer: of transformers.
        text: the hay; repeated where a context is longer.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = tokenizer
        self.text = "\n\n" + text[:_TEXT_CHARACTERS].strip()
        # Whitespace goes with the sentence that follows it, as tokenizers want it.
        sentences = re.split(r"(?<=[.!?])(?=\s)|(?<!\n)(?=\n\n)", self.text)
        lines = (s.splitlines(keepends=True) if len(s) > _LONGEST_SENTENCE else [s] for s in sentences)
        pieces = [piece for piece in itertools.chain(*lines) if piece.strip()]
        ids = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
        self._pieces = [s[i : i + _LONGEST_PIECE] for s in ids for i in range(0, len(s), _LONGEST_PIECE)]
        require(bool(self._pieces), "the text for the haystack is empty, or the tokenizer makes no tokens of it")
        one = tokenizer("a")["input_ids"]
        self._start = one[:1] if one[:1] == [tokenizer.bos_token_id] else []

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without special tokens."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def frame(self, intro: str, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the body of a prompt."""
        return self._start + self.encode(intro + "\n"), self.encode("\n\n" + question)

    def body(self, random: Random, tokens: int, needles: Sequence[tuple[float, str]]) -> list[int]:
        """Exactly `tokens` token ids of text from a random sentence on, each needle put in at its depth, between
        sentences; needles with the same place keep their order."""
        encoded = sorted(((depth, self.encode(" " + needle)) for depth, needle in needles), key=lambda pair: pair[0])
        hay = tokens - sum(len(ids) for _, ids in encoded)
        first = random.randrange(len(self._pieces))
        filler: list[int] = []
        ends = [0]
        for piece in itertools.cycle(self._pieces[first:] + self._pieces[:first]):
            if len(filler) >= hay:
                break
            filler += piece
            ends.append(min(len(filler), hay))
        out: list[int] = []
        start = 0
        for depth, ids in encoded:
            end = min(ends, key=lambda place, target=depth * hay: abs(place - target))  # type: ignore[misc]
            out += filler[start:end] + ids
            start = end
        return out + filler[start:hay]


@dataclass(frozen=True)
class Task:
    """How to make a sample.

    Attributes:
        make: (haystack, length in tokens with the answer, depth, random) -> sample.
        has_depth: whether depth means anything to it.
    """

    make: Callable[[Haystack, int, float, Random], Sample]
    has_depth: bool = True


def samples(
    task: str, haystack: Haystack, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int
) -> list[Sample]:
    """`trials` samples of `TASKS[task]` for each length and depth; the same arguments always give the same samples.

    Raises `ValueError` if a length is too short for the task.
    """
    kind = TASKS[task]
    grid = itertools.product(lengths, depths if kind.has_depth else (0.0,), range(trials))
    return [kind.make(haystack, n, depth, Random(f"{seed} {task} {n} {depth} {trial}")) for n, depth, trial in grid]


def _single(haystack: Haystack, length: int, depth: float, random: Random) -> Sample:
    """One number to remember."""
    return _numbers(haystack, length, depth, random, others=0)


def _multikey(haystack: Haystack, length: int, depth: float, random: Random) -> Sample:
    """One number to remember, and three of other keys at random depths to tell it from."""
    return _numbers(haystack, length, depth, random, others=3)


def _numbers(haystack: Haystack, length: int, depth: float, random: Random, others: int) -> Sample:
    keys, values = random.sample(_KEYS, 1 + others), _distinct_numbers(random, 1 + others)
    depths = [depth] + [random.random() for _ in range(others)]
    return _hidden(
        haystack, length, depth, random,
        intro="Magic numbers are hidden in the following text. Remember them: you will be asked about them.",
        needles=[(d, _magic(key, value)) for d, key, value in zip(depths, keys, values, strict=True)],
        question=f"Question: What is the magic number for {keys[0]} in the text above?\n"
        f"Answer: The magic number for {keys[0]} in the text above is",
        answers=values[:1], new_tokens=24,
    )  # fmt: skip


def _multivalue(haystack: Haystack, length: int, depth: float, random: Random) -> Sample:
    """Four numbers of one key, spread from `depth` to the end, all to be named."""
    key, values = random.choice(_KEYS), _distinct_numbers(random, 4)
    return _hidden(
        haystack, length, depth, random,
        intro="Magic numbers are hidden in the following text. Remember them: you will be asked about them.",
        needles=_spread(depth, [_magic(key, value) for value in values]),
        question=f"Question: What are all four magic numbers for {key} in the text above?\n"
        f"Answer: The four magic numbers for {key} in the text above are",
        answers=values, new_tokens=96,
    )  # fmt: skip


def _tracking(haystack: Haystack, length: int, depth: float, random: Random) -> Sample:
    """A chain of five variables, each assigned from the one before, spread from `depth` to the end."""
    names: list[str] = []
    while len(set(names)) < 5:
        names = ["".join(random.choices(string.ascii_uppercase, k=5)) for _ in range(5)]
    value = str(random.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names)]
    return _hidden(
        haystack, length, depth, random,
        intro="Variables are assigned in the following text. Track each chain of assignments.",
        needles=_spread(depth, [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]),
        question=f"Question: Which variables hold the value {value}, directly or through others, in the text above?\n"
        f"Answer: Five variables hold the value {value}, they are: VAR",
        answers=names, new_tokens=64,
    )  # fmt: skip


def _common_words(haystack: Haystack, length: int, depth: float, random: Random) -> Sample:
    """A numbered list of words from the text; ten of them stand there far more often than the others."""
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", haystack.text)))
    random.shuffle(words)
    state = random.getstate()
    before, after = haystack.frame(
        "Below is a numbered list of words, some of them more often than others. Remember those most often there.",
        f"Question: Which {_COMMON_WORDS} words stand most often in the list above?\n"
        f"Answer: The {_COMMON_WORDS} words that stand most often in the list above are:",
    )
    new_tokens = 120
    room = length - len(before) - len(after) - new_tokens

    def entries(count: int) -> list[int]:
        """The list's token ids with about `count` entries: at most two fifths are the common words."""
        repeats = min(_MOST_REPEATS, 2 * count // (5 * _COMMON_WORDS))
        uncommon = (count - repeats * _COMMON_WORDS) // _UNCOMMON_REPEATS
        listed = words[:_COMMON_WORDS] * repeats
        listed += words[_COMMON_WORDS : _COMMON_WORDS + uncommon] * _UNCOMMON_REPEATS
        random.setstate(state)
        random.shuffle(listed)
        return haystack.encode("".join(f"\n{number}. {word}" for number, word in enumerate(listed, 1)))

    fits, too_many = 0, max(2, room)  # an entry takes more than one token
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        fits, too_many = (count, too_many) if len(entries(count)) <= room else (fits, count)
    # Below that the common words are no more common than the others.
    fewest = 5 * _COMMON_WORDS * (_UNCOMMON_REPEATS + 1) // 2
    require(fits >= fewest, f"{length} tokens are too few for this task: {fits} words fit, it needs {fewest}")
    needed = _COMMON_WORDS + fits // _UNCOMMON_REPEATS
    require(
        len(words) >= needed,
        f"the text holds {len(words)} words of 4 to 10 letters, {length} tokens of this task need {needed}: give more text",
    )
    return Sample(length, None, before + entries(fits) + after, tuple(words[:_COMMON_WORDS]), new_tokens)


TASKS = {
    "single": Task(_single),
    "multikey": Task(_multikey),
    "multivalue": Task(_multivalue),
    "variable-tracking": Task(_tracking),
    "common-words": Task(_common_words, has_depth=False),
}


def _hidden(
    haystack: Haystack,
    length: int,
    depth: float,
    random: Random,
    *,
    intro: str,
    needles: Sequence[tuple[float, str]],
    question: str,
    answers: Sequence[str],
    new_tokens: int,
) -> Sample:
    """Intro, text with needles and question, `length` tokens with the answer."""
    before, after = haystack.frame(intro, question)
    room = length - len(before) - len(after) - new_tokens
    needed = sum(len(haystack.encode(" " + needle)) for _, needle in needles)
    require(
        room > needed, f"{length} tokens are too few for this task: it needs {length - room + needed} without any text"
    )
    return Sample(length, depth, before + haystack.body(random, room, needles) + after, tuple(answers), new_tokens)


def _magic(key: str, value: str) -> str:
    return f"The magic number for {key} is {value}."


def _spread(depth: float, needles: Sequence[str]) -> list[tuple[float, str]]:
    """The first needle at `depth`, the others at even distances from there to the end."""
    return [(depth + (1 - depth) * i / len(needles), needle) for i, needle in enumerate(needles)]


def _distinct_numbers(random: Random, count: int) -> list[str]:
    return [str(number) for number in random.sample(range(1_000_000, 10_000_000), count)]
