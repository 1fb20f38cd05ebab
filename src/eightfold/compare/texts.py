"""What two models are compared on: a text as windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eightfold.data_files import read_text
from eightfold.hub import resolve
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError

PASSAGE = """\
A bridge has to carry three things: whatever crosses it, the wind, and itself. For a short one the last hardly
matters, and a plank will do. As the span grows, the weight of the bridge grows faster than its strength, until nearly
all of the steel is there to hold up the rest of the steel. That is why the longest bridges hang. A cable only has to
be pulled, and a thin wire resists a pull better than a thick beam resists bending.

"Did you bring the map?" asked Ines.
"I thought you had it," said her brother, and put the lamp down. It was twenty past six, the last bus had left, and
between them they had half a loaf of bread, two apples and the address of an uncle whom neither had met. They decided
to follow the river, because a river at least goes somewhere. After an hour it began to rain.

To make a simple soup for four people, cut two onions and three carrots into small pieces and fry them slowly in a
spoon of oil for ten minutes. Add 200 g of red lentils, a litre of water and a little salt. Let it boil, then turn the
heat down and wait for 25 minutes. Taste it before you add more salt. Serve it hot, with lemon.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

print(mean([2, 4, 9]))  # 5.0

Water boils at 100 degrees Celsius at sea level, but at about 93 degrees in a town 2000 metres up, since the air there
presses less on its surface. The difference is small, yet beans take noticeably longer. In the 1680s Denis Papin
closed the pot with a heavy lid and a valve. Inside, the pressure rose, the water became hotter than it could in the
open, and tough meat turned soft in a quarter of the time.

The committee met on Tuesday, 14 March, with seven of nine members present. It agreed to move the library's opening
hours from 9:00–17:00 to 10:00–19:00 on weekdays, to spend no more than €3,500 on shelves, and to ask the town whether
the path behind the school might be lit in winter. A proposal to close on Saturdays was rejected by five votes to two.

Question: If a train covers 180 kilometres in two hours and then 60 kilometres in one hour, what is its average speed?
Answer: It travels 240 kilometres in three hours, so its average speed is 80 kilometres per hour.

Le chat dort sur la chaise près de la fenêtre. Am Abend gehen wir gern am Fluss spazieren. Mañana lloverá en el norte.

Nobody planned the English language. It took its short words from farmers and sailors, its law from French, its
learning from Latin and Greek, and it kept all of them, often side by side: you may ask, question or interrogate, and
each says a little more about you than the one before. Its spelling remembers sounds that nobody has made for five
hundred years. Still, children learn it, and by the age of six they make sentences that were never said before.
"""


@dataclass(frozen=True, slots=True)
class Windows:
    """Sequences of token ids, each run from its own beginning, and what to call the text that they come from."""

    source: str
    ids: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def given_text(path: str) -> str:
    """The text of a file. Raises EightfoldError if it can't be read, isn't UTF-8 or has nothing in it."""
    text = read_text(Path(path))
    if not text.strip():
        raise EightfoldError(f"the text {path} is empty; a few hundred words say something about a model")
    return text


def default_documents(folder: Path) -> tuple[str, list[str]]:
    """What the model in `folder` is compared on where no text is given, and what to call that.

    It is a passage of prose; for the demo model and what was made from it (by its tokenizer one tells) it is the
    demo's held-out passages, as that knows nothing else.
    """
    demo, own = resolve("demo"), folder / "tokenizer.json"
    if own.is_file() and own.read_bytes() == (demo / "tokenizer.json").read_bytes():
        items = [json.loads(line) for line in (demo / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
        return "the demo's held-out passages", [
            f"{item['title']} -- {item['passage']}\nQuestion: {item['question']}?\n"
            f"Answer: {'yes' if item['answer'] else 'no'}"
            for item in items
        ]
    return "the built-in passage", [PASSAGE]


def cut(source: str, documents: Sequence[str], tokenizer: Tokenizer, window: int, most: int) -> Windows:
    """Documents as windows of at most `window` tokens, and `most` tokens in all.

    Where the tokenizer begins a sequence with BOS every window begins with it, so that each token of the text is
    predicted from at least one other. Raises EightfoldError where fewer than two tokens are left.
    """
    first = tuple(tokenizer.encode(""))  # BOS, or nothing
    body, left = window - len(first), most
    windows: list[tuple[int, ...]] = []
    cut_short = False
    for document in documents:
        ids = tokenizer.encode(document, add_bos=False, parse_special=False)
        for start in range(0, len(ids), body):
            piece = (*first, *ids[start : start + body])
            cut_short |= len(piece) > left
            piece = piece[:left]
            if len(piece) > 1:  # of a single token nothing is predicted
                windows.append(piece)
                left -= len(piece)
    if not windows:
        raise EightfoldError(f"{source} makes fewer than two tokens; there is nothing to predict")
    return Windows(f"the beginning of {source}" if cut_short else source, tuple(windows))


def random_windows(vocab_size: int, window: int, most: int) -> Windows:
    """Random token ids, for folders without a tokenizer: they exercise a model, but its perplexity means nothing."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (most,), generator=generator).tolist()
    pieces = [tuple(ids[start : start + window]) for start in range(0, most, window)]
    return Windows("random ids, as there is no tokenizer", tuple(piece for piece in pieces if len(piece) > 1))
