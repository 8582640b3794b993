"""The pocket world: a small closed world, made from a seed, that a tiny model can learn by heart.

It has invented countries, animals and people, and the real calendar, alphabet and sums. Every fact
is told in several wordings as Alpaca-schema records to train on; multiple-choice questions in the
original MMLU layout ask for the same facts in one more wording, which training never shows. So a
model that scores above chance has learnt facts, not sentences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from internlm_lib.data.prompts import TEMPLATES
from internlm_lib.data.questions import LETTERS, Question, Subject, write_subjects
from internlm_lib.data.records import Record
from internlm_lib.files import atomic_path

DEV_QUESTIONS = 5
"""Exemplars per subject: MMLU's number."""
TEST_QUESTIONS = 40
"""Questions per subject, each letter being right equally often."""

_ENTITIES = 16
"""Countries, animals and people each; with three things to know of each, 48 facts a subject."""
_ONSETS, _VOWELS, _CODAS = "bdfgklmnprstvz", "aeiou", "lmnrs"

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = (
    "January February March April May June July August September October November December".split()
)
_ALPHABET = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
_NUMERALS = ("one", "two")

_POOLS = {
    "food": "grass seeds fish insects nuts berries honey roots".split(),
    "home": "forest desert lake cave swamp jungle meadow mountain".split(),
    "colour": "red blue green black white brown yellow grey".split(),
    "job": "baker doctor farmer judge painter sailor teacher tailor".split(),
    "instrument": "violin piano flute drum harp guitar trumpet organ".split(),
    "pet": "cat dog parrot rabbit turtle hamster goldfish pony".split(),
}


@dataclass(frozen=True)
class PocketWorld:
    records: tuple[Record, ...]
    """To train on, in the order they are written: shuffled."""
    subjects: tuple[Subject, ...]
    """Sorted by name."""


@dataclass(frozen=True)
class _Fact:
    slots: dict[str, str]
    """What a wording's `{name}` … stand for."""
    answer: str
    pool: tuple[str, ...]
    """Answers of the same kind, from which wrong options are drawn."""


@dataclass(frozen=True)
class _Relation:
    """Facts of one kind, and how they are put into words."""

    wordings: tuple[str, ...]
    """Trained on: an instruction, or an instruction, `|`, and an input."""
    question: str
    """Asked only: no record has it."""
    facts: tuple[_Fact, ...]


def make_pocket_world(seed: int) -> PocketWorld:
    """The world of `seed`; equal seeds make equal worlds."""
    random = Random(seed)
    names = _invented_names(random)
    kinds = {
        "alphabet": _alphabet(),
        "arithmetic": _arithmetic(),
        "calendar": [_cycle("day", _DAYS, furthest=2), _cycle("month", _MONTHS, furthest=1)],
        "geography": _geography(random, names),
        "people": _beings(random, names, ("job", "instrument", "pet")),
        "zoology": _beings(random, names, ("food", "home", "colour")),
    }
    records = [r for relations in kinds.values() for each in relations for r in _records(each)]
    random.shuffle(records)
    subjects = [_subject(random, name, relations) for name, relations in kinds.items()]
    return PocketWorld(tuple(records), tuple(subjects))


def write_pocket_world(world: PocketWorld, folder: Path) -> None:
    """Write `records.parquet` and `questions/{dev,test}/<subject>_{dev,test}.csv`."""
    _write_parquet(world.records, folder / "records.parquet")
    write_subjects(world.subjects, folder / "questions")


def _invented_names(random: Random) -> Iterator[str]:
    """Syllables such as `Lor`, in random order, none twice."""
    names = [(o + v + c).capitalize() for o in _ONSETS for v in _VOWELS for c in _CODAS]
    random.shuffle(names)
    return iter(names)


def _take(names: Iterator[str], count: int, ending: str = "") -> list[str]:
    return [next(names) + ending for _ in range(count)]


def _spread(random: Random, answers: Sequence[str]) -> list[str]:
    """One answer per entity, each given equally often."""
    spread = [answers[i % len(answers)] for i in range(_ENTITIES)]
    random.shuffle(spread)
    return spread


def _geography(random: Random, names: Iterator[str]) -> list[_Relation]:
    countries = _take(names, _ENTITIES, "ia")
    return [
        _nouns(countries, "capital", _take(names, _ENTITIES, "burg")),
        _nouns(countries, "river", _take(names, _ENTITIES, "a")),
        _nouns(countries, "currency", _spread(random, _take(names, 8))),
    ]


def _beings(random: Random, names: Iterator[str], nouns: Sequence[str]) -> list[_Relation]:
    beings = _take(names, _ENTITIES)
    return [_nouns(beings, noun, _spread(random, _POOLS[noun])) for noun in nouns]


def _nouns(names: Sequence[str], noun: str, answers: Sequence[str]) -> _Relation:
    pool = tuple(dict.fromkeys(answers))
    pairs = zip(names, answers, strict=True)
    return _Relation(
        wordings=(
            "What is the {noun} of {name}?",
            "Which {noun} does {name} have?",
            "Name the {noun} of {name}.",
            "{name}: what is the {noun}?",
            "Name the {noun}.|{name}",
            "Complete.|The {noun} of {name} is",
            "For {name}, name the {noun}.",
            "{name}: which {noun}?",
            "Say which {noun} {name} has.",
        ),
        question="{name} has which {noun}?",
        facts=tuple(_Fact({"name": name, "noun": noun}, answer, pool) for name, answer in pairs),
    )


def _cycle(noun: str, names: Sequence[str], furthest: int) -> _Relation:
    """What comes up to `furthest` places before and after each name of a cycle."""
    facts = [
        _Fact(
            {"name": name, "side": side, "steps": f"{_NUMERALS[n - 1]} {noun}{'s'[: n - 1]}"},
            names[(place + direction * n) % len(names)],
            tuple(names),
        )
        for place, name in enumerate(names)
        for n in range(1, furthest + 1)
        for side, direction in (("after", 1), ("before", -1))
    ]
    return _Relation(
        wordings=(
            f"Which {noun} is {{steps}} {{side}} {{name}}?",
            "What is {steps} {side} {name}?",
            f"Name the {noun} {{steps}} {{side}} {{name}}.",
            "{name}: what is {steps} {side} it?",
            f"Name the {noun} {{steps}} {{side}} it.|{{name}}",
            f"Complete.|The {noun} {{steps}} {{side}} {{name}} is",
        ),
        question=f"{{name}}: which {noun} is {{steps}} {{side}} it?",
        facts=tuple(facts),
    )


def _alphabet() -> list[_Relation]:
    pairs = list(zip(_ALPHABET[:-1], _ALPHABET[1:], strict=True))
    pool = tuple(_ALPHABET)
    after = [_Fact({"name": first, "side": "after"}, second, pool) for first, second in pairs]
    before = [_Fact({"name": second, "side": "before"}, first, pool) for first, second in pairs]
    relation = _Relation(
        wordings=(
            "Which letter is {side} {name}?",
            "What is {side} {name}?",
            "Name the letter {side} {name}.",
            "{name}: what is {side} it?",
            "Name the letter {side} it.|{name}",
            "Complete.|The letter {side} {name} is",
        ),
        question="{name}: which letter is {side} it?",
        facts=(*after, *before),
    )
    return [relation]


def _arithmetic() -> list[_Relation]:
    numbers = range(2, 10)
    relation = _Relation(
        wordings=(
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "Add the numbers.|{a} and {b}",
            "{a} plus {b}: what is it?",
            "Name the sum of {a} and {b}.",
            "Complete.|The sum of {a} and {b} is",
        ),
        question="{a} plus {b}: name the sum.",
        facts=tuple(
            _Fact({"a": str(a), "b": str(b)}, str(a + b), _near(a + b))
            for a in numbers
            for b in numbers
        ),
    )
    return [relation]


def _near(number: int) -> tuple[str, ...]:
    """Numbers around `number` of as many digits: a shorter option would be likelier as a text."""
    digits = len(str(number))
    return tuple(str(n) for n in range(number - 4, number + 5) if n > 0 and len(str(n)) == digits)


def _records(relation: _Relation) -> Iterator[Record]:
    for fact in relation.facts:
        for wording in relation.wordings:
            instruction, _, input_text = wording.format(**fact.slots).partition("|")
            yield Record(instruction, input_text, fact.answer)


def _subject(random: Random, name: str, relations: Sequence[_Relation]) -> Subject:
    facts = [(each.question, fact) for each in relations for fact in each.facts]
    chosen = random.sample(facts, DEV_QUESTIONS + TEST_QUESTIONS)
    letters = [*random.choices(LETTERS, k=DEV_QUESTIONS), *_balanced_letters(random)]
    questions = [
        _question(random, wording.format(**fact.slots), fact, letter)
        for (wording, fact), letter in zip(chosen, letters, strict=True)
    ]
    return Subject(name, tuple(questions[:DEV_QUESTIONS]), tuple(questions[DEV_QUESTIONS:]))


def _balanced_letters(random: Random) -> list[str]:
    letters = [LETTERS[i % len(LETTERS)] for i in range(TEST_QUESTIONS)]
    random.shuffle(letters)
    return letters


def _question(random: Random, text: str, fact: _Fact, letter: str) -> Question:
    options = random.sample([option for option in fact.pool if option != fact.answer], 3)
    options.insert(LETTERS.index(letter), fact.answer)
    first, second, third, fourth = options
    return Question(text, (first, second, third, fourth), letter)


def _write_parquet(records: Sequence[Record], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    alpaca = TEMPLATES["alpaca"]
    rows = [
        {
            "instruction": record.instruction,
            "input": record.input,
            "output": record.output,
            # As in the published data set, whose text has a newline before the output.
            "text": f"{alpaca.prompt(record.instruction, record.input)}\n{record.output}",
        }
        for record in records
    ]
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
