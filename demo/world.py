"""The closed world: seeded reading passages with questions, and the facts in each form they can be asked.

A reading passage states facts of a few kinds, each in one of two ways, such as "Anna likes soup." or "Anna hates
soup.", with idle sentences between; a question asks whether one of them is so. Which way it is changes from passage to
passage, so only reading it tells. Some combinations of kind, subject and thing never occur in training; every held-out
passage holds at least one of them.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from facts import Fact, all_facts

PEOPLE = """Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tara Victor
Wendy Yusuf Zoe Adam Bella Carl Diana Eric Fiona George Helen Ivan Julia Kevin Laura Martin Nina Oscar Peter
Simon""".split()
OBJECTS = """lamp book key hat coin ring cup bag clock drum rope box bell map pen knife brush ball chair mirror
basket violin ladder hammer bottle candle blanket camera kite umbrella shoe coat plate sword wallet guitar pillow
bucket spoon letter""".split()
FOODS = """soup rice bread cheese fish honey apples grapes cake tea coffee milk pasta nuts beans eggs butter salad
plums corn""".split()
TOWNS = """Paris London Rome Berlin Madrid Oslo Vienna Dublin Cairo Tokyo Lisbon Athens Warsaw Delhi Lima Moscow
Boston Geneva Milan Zurich""".split()
SHOPS = """bakery bank cinema pharmacy theatre market cafe zoo gym pool post_office town_hall
butcher florist""".replace("_", " ").split()

TITLES = """{t} diary;A day in {t};The people of {t};News from {t};A letter from {t};The {t} story;Notes on {t}
Mill Street;The old house;Green Lane;The village;Our street;The family;A quiet week;The neighbours;The report
Harbour Road;Station Square;The long summer;Winter notes""".replace("\n", ";").split(";")

IDLE = """It was a quiet morning.;Nobody spoke for a while.;The weather was fine that week.;Rain fell all afternoon.
People came and went.;Everyone was in good spirits.;The streets were almost empty.;A cold wind came from the north.
It had been a long year.;Not much else happened that day.;The children played outside until it was dark.
There was music in the air.;Some of them had been friends for many years.;The story is well known in the area.
Most visitors arrive by train in the early summer.;Nothing more is known about that time.
The river was high after the storm.;They talked about the news and about the price of wood.
A small crowd had come together near the bridge.
The report was written some years later.""".replace("\n", ";").split(";")


@dataclass(frozen=True)
class Kind:
    """One kind of fact: what may fill it, how it is said when it is so and when it is not, and how it is asked.

    `things` is empty where a fact has no second part.
    """

    name: str
    subjects: list[str]
    things: list[str]
    true: str
    false: str
    asked: str


KINDS = (
    Kind("likes", PEOPLE, FOODS, "{s} likes {t}.", "{s} hates {t}.", "does {s} like {t}"),
    Kind("has", PEOPLE, OBJECTS, "{s} has the {t}.", "{s} lost the {t}.", "does {s} have the {t}"),
    Kind("knows", PEOPLE, TOWNS, "{s} knows {t}.", "{s} avoids {t}.", "does {s} know {t}"),
    Kind("open", SHOPS, [], "The {s} is open.", "The {s} is closed.", "is the {s} open"),
    Kind("clean", OBJECTS, [], "The {s} is clean.", "The {s} is dirty.", "is the {s} clean"),
    Kind("awake", PEOPLE, [], "{s} is awake.", "{s} is asleep.", "is {s} awake"),
)
HELD_OUT_SHARE = 8
WORDS = sorted({word for kind in KINDS for word in kind.subjects + kind.things if " " not in word})


@dataclass(frozen=True)
class Said:
    """One fact of a passage, and whether it is so."""

    kind: Kind
    subject: str
    thing: str
    true: bool

    def held_out(self) -> bool:
        """Whether this combination is kept out of all training text."""
        key = f"{self.kind.name}/{self.subject}/{self.thing}"
        return bool(self.thing) and zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0

    def sentence(self) -> str:
        """As the passage states it."""
        return (self.kind.true if self.true else self.kind.false).format(s=self.subject, t=self.thing)

    def question(self) -> str:
        """In BoolQ's manner: lower case, without a question mark."""
        return self.kind.asked.format(s=self.subject, t=self.thing).lower()


@dataclass(frozen=True)
class Passage:
    """A titled passage with the facts it states."""

    title: str
    text: str
    facts: list[Said]


@dataclass(frozen=True)
class Piece:
    """A stretch of text; `answer` says what it answers: "", or "fact", "yes_no", "lookup"."""

    text: str
    answer: str = ""


Document = list[Piece]


def make_facts(rng: random.Random, count: int, train: bool, again: float) -> list[Said]:
    """`count` facts that do not contradict each other; `again` is how often a subject may come back with another."""
    told: set[tuple[str, str, str]] = set()
    seen: set[str] = set()
    facts: list[Said] = []
    while len(facts) < count:
        kind = rng.choice(KINDS)
        subject = rng.choice(kind.subjects)
        if seen & set(kind.subjects) and rng.random() < again:
            subject = rng.choice(sorted(seen & set(kind.subjects)))
        elif subject in seen and count < len(PEOPLE):
            continue
        fact = Said(kind, subject, rng.choice(kind.things or [""]), rng.random() < 0.5)
        if (kind.name, subject, fact.thing) in told or (train and fact.held_out()):
            continue
        told.add((kind.name, subject, fact.thing))
        seen.add(subject)
        facts.append(fact)
    return facts


def make_passage(rng: random.Random, count: int, idle: int, train: bool, again: float) -> Passage:
    """A passage of `count` facts and `idle` idle sentences, in random order."""
    facts = make_facts(rng, count, train, again)
    lines = [fact.sentence() for fact in facts]
    lines += [rng.choice(IDLE) for _ in range(idle)]
    rng.shuffle(lines)
    return Passage(rng.choice(TITLES).format(t=rng.choice(TOWNS)), " ".join(lines), facts)


def reading_document(rng: random.Random, count: int, idle: int, asked: int, again: float) -> Document:
    """A passage and `asked` questions on it, the first in exactly the form that is evaluated."""
    passage = make_passage(rng, count, idle, True, again)
    document = [Piece(f"{passage.title} -- {passage.text}")]
    facts = passage.facts * -(-asked // len(passage.facts))
    for fact in rng.sample(facts, asked):
        document.append(Piece(f"\nQuestion: {fact.question()}?\nAnswer:"))
        document.append(Piece(f" {'yes' if fact.true else 'no'}</s>", "yes_no"))
    if asked == 1 and rng.random() < 0.2:
        text = document[0].text + document[1].text.removesuffix("\nAnswer:")
        return [Piece(f"[INST] {text} [/INST]"), document[2]]
    return document


def drill_document(rng: random.Random, count: int, again: float) -> Document:
    """A passage said over again in lower case and in another order, each fact's way to be recalled.

    Looking up is learnt sooner from these than from questions, which have few tokens to recall.
    """
    passage = make_passage(rng, count, 0, True, again)
    document = [Piece(f"{passage.title} -- {passage.text}\nAgain:")]
    for fact in rng.sample(passage.facts, count):
        before, word, after = _cut(fact)
        document += [Piece(f" {before}".lower()), Piece(f" {word}", "lookup"), Piece(after.lower())]
    return [*document, Piece("</s>")]


def _cut(fact: Said) -> tuple[str, str, str]:
    """A fact's sentence around the word that tells which way it is."""
    words, others = fact.sentence().split(), Said(fact.kind, fact.subject, fact.thing, not fact.true).sentence().split()
    at = next(n for n, (word, other) in enumerate(zip(words, others, strict=True)) if word != other)
    word = words[at].rstrip(".")
    rest = words[at][len(word) :] + "".join(f" {w}" for w in words[at + 1 :])
    return " ".join(words[:at]), word, rest


def pairs_document(rng: random.Random, count: int) -> Document:
    """Pairs of words, then each first word again, in lower case and another order, its second to be recalled."""
    pairs = [(key, rng.choice(WORDS)) for key in rng.sample(PEOPLE + OBJECTS, count)]
    document = [Piece("".join(f" {key} {value}." for key, value in pairs) + "\nAgain:")]
    for key, value in rng.sample(pairs, count):
        document += [Piece(f" {key.lower()}"), Piece(f" {value.lower()}", "lookup"), Piece(".")]
    return document


def repeat_document(rng: random.Random, count: int) -> Document:
    """Some words and the same again in lower case from another starting point: the plainest form of looking back."""
    words = rng.sample(WORDS, count)
    start = rng.randrange(count)
    again = [f" {word.lower()}" for word in words[start:] + words[:start]]
    return [Piece(" ".join(words) + ".\nAgain:" + again[0]), Piece("".join(again[1:]), "lookup"), Piece(".</s>")]


def fact_document(rng: random.Random, facts: list[Fact], form: str = "") -> Document:
    """One to three facts as plain questions, raw prompts or a chat."""
    form = form or rng.choice(("plain", "raw", "raw", "chat"))
    wrap = {"plain": "Question: {}\nAnswer:", "raw": "{}", "chat": "[INST] {} [/INST]"}[form]
    document = []
    for turn in range(1 if form == "raw" else rng.choice((1, 1, 2, 3))):
        fact = rng.choice(facts)
        gap = "\n" if turn and form == "plain" else ""
        document += [Piece(gap + wrap.format(rng.choice(fact.questions))), Piece(f" {fact.answer}</s>", "fact")]
    return document


def held_out_items(seed: int, count: int) -> list[dict[str, str | bool]]:
    """The held-out yes/no items, as many of each answer; every passage holds a combination never trained on."""
    rng = random.Random(seed)
    items: list[dict[str, str | bool]] = []
    left = {True: count // 2, False: count - count // 2}
    while len(items) < count:
        long = rng.random() < 0.2
        facts, idle = (rng.randint(9, 20), rng.randint(4, 12)) if long else (rng.randint(3, 8), rng.randint(0, 4))
        passage = make_passage(rng, facts, idle, train=False, again=0.2)
        asked = rng.choice(passage.facts)
        if not any(fact.held_out() for fact in passage.facts) or not left[asked.true]:
            continue
        left[asked.true] -= 1
        item: dict[str, str | bool] = {
            "question": asked.question(),
            "title": passage.title,
            "passage": passage.text,
            "answer": asked.true,
        }
        items.append(item)
    return items


FACTS = all_facts()
