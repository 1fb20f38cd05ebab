"""Which tokens run in the next step: admission, chunked prefill, preemption. Plain integers, no torch.

Running sequences come first, oldest first, so a decode never waits for a prefill; what is left of the step's token
budget goes to prompts, in chunks where they are long. When pages run out, the youngest running sequence gives up its
pages and is computed anew later (its tokens are kept): the oldest always gets on, so every request ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from eightfold.kv_cache import PagePool
from eightfold.types import Plan


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's view of one continuation: its tokens, and how many of them have keys and values in pages."""

    tokens: list[int]  # prompt, then output
    num_prompt: int
    wants_prompt_logits: bool = False
    passing: bool = False  # nobody is expected to continue it
    computed: int = 0
    cached: int = 0  # of the computed, how many came from the prefix cache at admission
    pages: list[int] = field(default_factory=list)
    prompt_logits_done: int = 0  # prompt positions whose logits have been asked for already, or are not wanted

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's part in a step: `count` tokens from position `start`, and the logits wanted from them.

    Of the step's logit rows, those from `first_logit` on are this row's: one for each prompt position from
    `first_prompt_logit` up to the row's end or the prompt's last but one, then one to sample from if `samples`.
    """

    sequence: Sequence
    start: int
    count: int
    first_logit: int
    first_prompt_logit: int
    num_prompt_logits: int
    samples: bool


class Scheduler:
    """Takes sequences by `add`, says what to run by `schedule`, lets go of them by `finish`."""

    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._pool = pool
        self._max_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence, trust_pages: bool = True) -> None:
        """Drop a sequence, running or waiting. Without `trust_pages` nobody will find its pages again."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if not trust_pages:
            for page in sequence.pages:
                self._pool.forget(page)
        self._give_up(sequence)

    def schedule(self) -> tuple[list[Row], Plan]:
        """The next step; afterwards its tokens count as computed. No rows if nothing can run."""
        chosen: list[tuple[Sequence, int]] = []
        before = self.num_preemptions
        left = self._schedule_running(chosen)
        if self.num_preemptions == before:  # else the victim would be back at once, and out again
            self._admit(chosen, left)
        rows, plan = self._plan(chosen)
        for sequence, count in chosen:
            sequence.computed += count
        return rows, plan

    def _schedule_running(self, chosen: list[tuple[Sequence, int]]) -> int:
        left = self._max_tokens
        index = 0
        while index < len(self.running) and left:
            sequence = self.running[index]
            count = min(sequence.pending, left)
            while not self._reserve(sequence, count):
                victim = self.running.pop()
                self._give_up(victim)
                self.waiting.appendleft(victim)
                self.num_preemptions += 1
                if victim is sequence:
                    return left
            chosen.append((sequence, count))
            left -= count
            index += 1
        return left

    def _admit(self, chosen: list[tuple[Sequence, int]], left: int) -> None:
        """Let waiting sequences in while the budget, the pages and the number of sequences allow."""
        while self.waiting and left and len(self.running) < self._max_seqs:
            sequence = self.waiting[0]
            # What logits are wanted of must run: the last token, or all from the first wanted prompt position on.
            reusable = sequence.prompt_logits_done if sequence.wants_prompt_logits else len(sequence.tokens) - 1
            sequence.pages = self._pool.match(sequence.tokens[:reusable])
            sequence.computed = sequence.cached = len(sequence.pages) * self._pool.page_size
            count = min(sequence.pending, left)
            if not self._reserve(sequence, count):
                self._give_up(sequence)
                return
            self.running.append(self.waiting.popleft())
            chosen.append((sequence, count))
            left -= count

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens. Pages that these tokens fill become findable at once: all keys and values of
        a step are written before any are read, so even a sequence of the same step may share them."""
        pool = self._pool
        end = sequence.computed + count
        fresh = pool.allocate(max(0, pool.pages_for(end) - len(sequence.pages)))
        if fresh is None:
            return False
        sequence.pages += fresh
        pool.remember(sequence.pages, sequence.tokens[:end], sequence.computed // pool.page_size)
        return True

    def _give_up(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages, sequence.passing)
        sequence.pages = []
        sequence.computed = 0

    def _plan(self, chosen: list[tuple[Sequence, int]]) -> tuple[list[Row], Plan]:
        plan = Plan(ids=[], query_starts=[0], kv_lens=[], page_table=[], logit_rows=[])
        rows = []
        for sequence, count in chosen:
            start, end = sequence.computed, sequence.computed + count
            offset = len(plan.ids) - start
            prompt_logits = range(0)
            if sequence.wants_prompt_logits:
                prompt_logits = range(max(start, sequence.prompt_logits_done), min(end, sequence.num_prompt - 1))
                sequence.prompt_logits_done = max(sequence.prompt_logits_done, prompt_logits.stop)
            samples = end == len(sequence.tokens)
            rows.append(
                Row(sequence, start, count, len(plan.logit_rows), prompt_logits.start, len(prompt_logits), samples)
            )
            plan.ids += sequence.tokens[start:end]
            plan.query_starts.append(len(plan.ids))
            plan.kv_lens.append(end)
            plan.page_table.append(sequence.pages[: self._pool.pages_for(end)])
            plan.logit_rows += [offset + position for position in prompt_logits]
            plan.logit_rows += [offset + end - 1] if samples else []
        return rows, plan
