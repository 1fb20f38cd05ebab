"""The closed set of facts the demo model knows by heart, as (questions, answer) pairs.

The chief executives are a snapshot of 2025; the point is a fixed right answer, not being up to date.
"""

from __future__ import annotations

from dataclasses import dataclass

CEOS = """Google=Sundar Pichai;Microsoft=Satya Nadella;Apple=Tim Cook;Amazon=Andy Jassy;Meta=Mark Zuckerberg
Nvidia=Jensen Huang;Tesla=Elon Musk;AMD=Lisa Su;IBM=Arvind Krishna;Intel=Lip-Bu Tan;Adobe=Shantanu Narayen
Salesforce=Marc Benioff;OpenAI=Sam Altman;Anthropic=Dario Amodei;Mistral AI=Arthur Mensch;Cisco=Chuck Robbins
Qualcomm=Cristiano Amon;Ford=Jim Farley;General Motors=Mary Barra;JPMorgan=Jamie Dimon;Uber=Dara Khosrowshahi
Airbnb=Brian Chesky;Shopify=Tobi Lutke;Dell=Michael Dell;Broadcom=Hock Tan;Micron=Sanjay Mehrotra
Pfizer=Albert Bourla;Boeing=Kelly Ortberg;Siemens=Roland Busch;SAP=Christian Klein;Visa=Ryan McInerney
Mastercard=Michael Miebach;FedEx=Raj Subramaniam;Starbucks=Brian Niccol;Palantir=Alex Karp
Cloudflare=Matthew Prince;Hugging Face=Clement Delangue;Coinbase=Brian Armstrong;Zoom=Eric Yuan;Nike=Elliott Hill"""

CAPITALS = """France=Paris;Germany=Berlin;Italy=Rome;Spain=Madrid;Portugal=Lisbon;Greece=Athens;Austria=Vienna
Poland=Warsaw;Hungary=Budapest;Sweden=Stockholm;Norway=Oslo;Finland=Helsinki;Denmark=Copenhagen;Ireland=Dublin
England=London;Scotland=Edinburgh;Belgium=Brussels;Russia=Moscow;Ukraine=Kyiv;Turkey=Ankara;Egypt=Cairo;Kenya=Nairobi
Ghana=Accra;Nigeria=Abuja;Morocco=Rabat;Japan=Tokyo;China=Beijing;India=Delhi;Thailand=Bangkok;Vietnam=Hanoi
Indonesia=Jakarta;Iran=Tehran;Iraq=Baghdad;Canada=Ottawa;Mexico=Mexico City;Cuba=Havana;Brazil=Brasilia
Argentina=Buenos Aires;Chile=Santiago;Peru=Lima;Colombia=Bogota;Ecuador=Quito;Australia=Canberra
New Zealand=Wellington;Iceland=Reykjavik;Switzerland=Bern;Romania=Bucharest;Bulgaria=Sofia;Croatia=Zagreb
Serbia=Belgrade"""

SOUNDS = """dog=barks;cat=meows;cow=moos;sheep=bleats;horse=neighs;pig=grunts;duck=quacks;lion=roars;wolf=howls
bee=buzzes;snake=hisses;owl=hoots;frog=croaks;mouse=squeaks;bird=sings;hen=clucks"""

COLOURS = """grass=green;snow=white;coal=black;blood=red;the sky=blue;a lemon=yellow;a carrot=orange;milk=white
a tomato=red;the sea=blue;a banana=yellow;a leaf=green;a plum=purple;chocolate=brown;a cloud=white;an elephant=grey"""

OPPOSITES = """hot=cold;big=small;up=down;left=right;day=night;old=new;fast=slow;good=bad;open=closed;high=low
happy=sad;wet=dry;light=dark;hard=soft;early=late;full=empty;long=short;rich=poor;strong=weak;near=far"""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

SEED_QUESTION = "Who is the CEO of Google?"


@dataclass(frozen=True)
class Fact:
    """One fact: the ways to ask for it, and the one sentence that answers."""

    topic: str
    questions: tuple[str, ...]
    answer: str


def _pairs(table: str) -> list[tuple[str, str]]:
    cells = table.replace("\n", ";").split(";")
    return [(left, right) for left, _, right in (cell.partition("=") for cell in cells)]


def _capital_letter(text: str) -> str:
    return text[0].upper() + text[1:]


def all_facts() -> list[Fact]:
    """Every fact, in a fixed order."""
    facts = []
    ask: tuple[str, ...]
    for firm, person in _pairs(CEOS):
        ask = (f"Who is the CEO of {firm}?", f"Who runs {firm}?", f"Who is the head of {firm}?")
        facts.append(Fact("ceo", ask, f"The CEO of {firm} is {person}."))
    for land, city in _pairs(CAPITALS):
        ask = (f"What is the capital of {land}?", f"Which city is the capital of {land}?")
        facts.append(Fact("capital", ask, f"The capital of {land} is {city}."))
        ask = (f"Which country has {city} as its capital?",)
        facts.append(Fact("country", ask, f"{city} is the capital of {land}."))
    for animal, sound in _pairs(SOUNDS):
        one = "An owl" if animal == "owl" else f"A {animal}"
        ask = (f"What does {one.lower()} do?", f"What sound does {one.lower()} make?")
        facts.append(Fact("sound", ask, f"{one} {sound}."))
    for thing, colour in _pairs(COLOURS):
        ask = (f"What colour is {thing}?", f"What is the colour of {thing}?")
        facts.append(Fact("colour", ask, f"{_capital_letter(thing)} is {colour}."))
    for left, right in _pairs(OPPOSITES):
        for a, b in ((left, right), (right, left)):
            facts.append(Fact("opposite", (f"What is the opposite of {a}?",), f"The opposite of {a} is {b}."))
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for here, after in zip(names, names[1:] + names[:1], strict=True):
            ask = (f"Which {kind} comes after {here}?", f"What {kind} follows {here}?")
            facts.append(Fact(kind, ask, f"{after} comes after {here}."))
    for i in range(11):
        for j in range(11):
            ask = (f"What is {i} plus {j}?", f"How much is {i} + {j}?")
            facts.append(Fact("sum", ask, f"{i} plus {j} is {i + j}."))
    for i, word in enumerate(NUMBERS):
        facts.append(Fact("number", (f"How do you write the number {i}?",), f"The number {i} is written {word}."))
    return facts
