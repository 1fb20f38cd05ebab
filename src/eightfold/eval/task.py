"""What a data set is made of: items, the queries that they put to a model, the answers, and their score. Plain data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from eightfold.tokenizer import Tokenizer

MAX_INPUT = 3072  # tokens of a prompt and of an answer, as the reference system runs its data sets
MAX_OUTPUT = 512


@dataclass(frozen=True, slots=True)
class Generate:
    """Continue `prompt` greedily by at most `max_tokens` tokens."""

    prompt: str
    max_tokens: int = MAX_OUTPUT
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Compare:
    """The log-probabilities of some tokens after `prompt`: of the last token of each choice."""

    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-probability of `continuation` after `prompt`, which must not end with a space."""

    prompt: str
    continuation: str


Query = Generate | Compare | Likelihood


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said. `logprobs` are natural logarithms: one a choice (Compare), one a token of the continuation
    (Likelihood), none (Generate). `shortened` counts the tokens that were left out of the prompt's middle; `error` says
    why the request failed, if it did."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str = ""
    logprobs: tuple[float, ...] = ()
    shortened: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `key` is unique within the data set; `subject` is the row of the table that it counts for."""

    key: str
    subject: str
    golden: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """An item's result as text, and its scores from 0 to 1 by name, the one that counts first."""

    result: str
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a data set is loaded with. `shots` None is the data set's own number of examples, `subjects` () all of them;
    `context` is the most tokens of a prompt and its answer, as `tokenizer` counts them."""

    shots: int | None = None
    subjects: tuple[str, ...] = ()
    context: int = MAX_INPUT + MAX_OUTPUT
    tokenizer: Tokenizer | None = None
    allow_code_execution: bool = False


class Task(ABC):
    """A data set: where its files lie, what it asks, how it is scored."""

    name: ClassVar[str]  # what a user types; the folder under the data folder has this name too
    title: ClassVar[str]  # as in the names of result files
    files: ClassVar[tuple[str, ...]]  # patterns, any of which shows that a folder holds this data set
    default_shots: ClassVar[int | None] = None  # None: the data set takes no examples
    max_input: ClassVar[int | None] = MAX_INPUT  # None: as much as the model's context holds
    max_tokens: ClassVar[int] = MAX_OUTPUT
    takes_max_tokens: ClassVar[bool] = True  # False: it generates nothing, or its files say how much
    total: ClassVar[str] = "micro"  # over items, or "macro": over subjects

    @abstractmethod
    def load(self, folder: Path, options: LoadOptions) -> list[Item]:
        """The items of a folder. Raises EightfoldError that names file and line of what is not as it should be."""

    @abstractmethod
    def queries(self, item: Item) -> Sequence[Query]:
        """What to ask the model for an item, at least one query."""

    def beginning(self, item: Item) -> object:
        """What the prompts of some items begin with: those of an equal one are asked in a row, so that it is computed
        once. None of an item that shares nothing worth it, or stands beside its like already."""
        del item
        return None

    @abstractmethod
    def score(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Judge the answers to `queries(item)`, in their order."""

    def categories(self, subject: str) -> Sequence[str]:
        """The categories that a subject belongs to; each gets a row of its own, the mean over its subjects."""
        del subject
        return ()


@dataclass(frozen=True, slots=True)
class Record:
    """A finished item, as it stands in the records file. The debug CSV leaves out `subject`, `scores`, `shortened`."""

    key: str
    subject: str
    queries: str | list[str]
    input_token_ids: list[Any]
    output_token_ids: list[Any]
    test_result: str
    golden_result: str
    passed: bool
    scores: dict[str, float] = field(default_factory=dict)
    shortened: int = 0
