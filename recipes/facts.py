"""Puts facts into a text and asks for them later in it, so that a model learns to find things again over long contexts.

    python recipes/facts.py TEXT OUT [--share 0.5] [--pairs 20] [--seed 0]

TEXT holds documents, separated by lines of a record separator (U+001E) as for `flashsfa train tokenize`; so does OUT. A fact says which
number belongs to someone; 200 to 28,000 characters on it is asked for and said once more. No wording is that of the tasks of
`flashsfa eval needle`.
"""

from __future__ import annotations

import argparse
import bisect
import math
import re
from pathlib import Path
from random import Random

from flashsfa.training.data import text_documents

_SEPARATOR = "\x1e\n"
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")
_NEAREST, _FARTHEST = 200, 28_000  # characters between a fact and its question
_FIRST_NAMES = "Anna Boris Clara Daniel Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nils Olga Peter Rosa Simon Teresa Viktor"
_LAST_NAMES = "Adler Baker Costa Dumont Engel Fischer Greene Hansen Ivanov Jensen Keller Lopez Moreau Novak Olsen Porter Rossi Silva Turner Weber"
_THINGS = (
    "telephone number",
    "room number",
    "account number",
    "ticket number",
    "locker number",
    "serial number",
    "code",
    "member number",
)
_WORDINGS = (
    ("The {thing} of {name} is {number}.", "What is the {thing} of {name}? The {thing} of {name} is {number}."),
    ("{name} has the {thing} {number}.", "As was said before, {name} has the {thing} {number}."),
    ("Note that for {name} the {thing} is {number}.", "Question: Which {thing} was given for {name}?\nAnswer: The {thing} given for {name} is {number}."),
    ("Remember: {thing} {number} belongs to {name}.", "To whom does {thing} {number} belong? It belongs to {name}."),
)  # fmt: skip


def with_facts(document: str, pairs: int, random: Random) -> str:
    """`document` with up to `pairs` facts and their questions between its sentences."""
    places = [match.end() for match in _BETWEEN_SENTENCES.finditer(document)]
    insertions: list[tuple[int, str]] = []
    for _ in range(pairs if places else 0):
        fact = random.choice(places)
        distance = math.exp(random.uniform(math.log(_NEAREST), math.log(_FARTHEST)))
        question = bisect.bisect_left(places, fact + distance)
        said, asked = _pair(random)
        if question < len(places):
            insertions += [(fact, said), (places[question], asked)]
    out, start = [], 0
    for place, text in sorted(insertions):
        out += [document[start:place], text, "\n"]
        start = place
    return "".join([*out, document[start:]])


def _pair(random: Random) -> tuple[str, str]:
    words = {
        "thing": random.choice(_THINGS),
        "name": f"{random.choice(_FIRST_NAMES.split())} {random.choice(_LAST_NAMES.split())}",
        "number": str(random.randrange(10 ** random.randint(3, 6), 10**7)),
    }
    said, asked = random.choice(_WORDINGS)
    return said.format(**words), asked.format(**words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the documents that get facts")
    parser.add_argument("--pairs", type=int, default=20, help="facts in each of them, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = Random(options.seed)
    with options.out.open("x", encoding="utf-8") as out:
        for place, document in enumerate(text_documents(options.text)):
            if random.random() < options.share:
                document = with_facts(document, options.pairs, random)
            out.write((_SEPARATOR if place else "") + document)


if __name__ == "__main__":
    main()
