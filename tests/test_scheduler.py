"""The scheduler alone: a made-up model answers, and every plan is checked against what was promised."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.kv_cache import PagePool
from eightfold.scheduler import Row, Scheduler, Sequence
from eightfold.types import Plan


class Memory:
    """Stands for the model: remembers which token each page slot holds, and reads them back as attention would."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, slot) → all tokens up to this one

    def run(self, rows: list[Row], plan: Plan) -> None:
        starts = plan.query_starts
        for index, row in enumerate(rows):
            tokens, table = row.sequence.tokens, plan.page_table[index]
            assert plan.kv_lens[index] == row.start + row.count
            assert plan.ids[starts[index] : starts[index + 1]] == tokens[row.start : row.start + row.count]
            for position in range(row.start, row.start + row.count):
                page, slot = table[position // self.page_size], position % self.page_size
                self.slots[page, slot] = tuple(tokens[: position + 1])
        for index, row in enumerate(rows):  # all writes come before all reads
            table = plan.page_table[index]
            for position in range(plan.kv_lens[index]):
                seen = self.slots[table[position // self.page_size], position % self.page_size]
                assert seen == tuple(row.sequence.tokens[: position + 1]), "a page holds another sequence's tokens"


def run_all(scheduler: Scheduler, memory: Memory, lengths: dict[Sequence, int]) -> list[list[int]]:
    """Steps until every sequence has its length; the counts of each step."""
    steps = []
    while scheduler.running or scheduler.waiting:
        rows, plan = scheduler.schedule()
        assert rows, "something waits but nothing runs"
        memory.run(rows, plan)
        for row in rows:
            if row.samples:
                tokens = row.sequence.tokens
                tokens.append(sum(tokens) % 7)
                if len(tokens) >= lengths[row.sequence]:
                    scheduler.finish(row.sequence)
        steps.append([row.count for row in rows])
    return steps


def test_decodes_do_not_wait_for_a_long_prompt() -> None:
    scheduler = Scheduler(PagePool(64, 4), max_num_seqs=8, max_num_batched_tokens=8)
    short, long = Sequence([1, 2], 2), Sequence(list(range(30)), 30)
    for sequence in (short, long):
        scheduler.add(sequence)
    steps = run_all(scheduler, Memory(4), {short: 6, long: 31})
    assert steps[:4] == [[2, 6], [1, 7], [1, 7], [1, 7]]


def test_sequences_join_and_leave() -> None:
    scheduler = Scheduler(PagePool(64, 4), max_num_seqs=2, max_num_batched_tokens=64)
    sequences = [Sequence([i, i + 1, i + 2], 3) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_all(scheduler, Memory(4), dict(zip(sequences, (5, 9, 6), strict=True)))
    assert [len(sequence.tokens) for sequence in sequences] == [5, 9, 6]


def test_the_last_prompt_token_always_runs() -> None:
    scheduler = Scheduler(PagePool(16, 4), 8, 64)
    first, again = Sequence([1, 2, 3, 4, 5, 6, 7, 8], 8), Sequence([1, 2, 3, 4, 5, 6, 7, 8], 8)
    scheduler.add(first)
    scheduler.add(again)
    rows, _ = scheduler.schedule()
    assert [(row.start, row.count) for row in rows] == [(0, 8), (4, 4)]


def test_prompt_logits_are_asked_for_once_each() -> None:
    scheduler = Scheduler(PagePool(16, 4), 8, max_num_batched_tokens=3)
    sequence = Sequence(list(range(8)), 8, wants_prompt_logits=True)
    scheduler.add(sequence)
    asked = []
    while sequence.pending:
        rows, plan = scheduler.schedule()
        asked += [rows[0].start + index for index in plan.logit_rows]
    assert asked == list(range(8))


def test_untrusted_pages_are_not_found_again() -> None:
    pool = PagePool(16, 4)
    scheduler = Scheduler(pool, 8, 64)
    sequence = Sequence(list(range(9)), 9)
    scheduler.add(sequence)
    scheduler.schedule()
    scheduler.finish(sequence, trust_pages=False)
    assert pool.match(list(range(9))) == []
    assert pool.num_free == 16


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=8),
    outputs=st.lists(st.integers(1, 12), min_size=8, max_size=8),
    page_size=st.sampled_from([1, 2, 4, 8]),
    spare=st.integers(0, 12),
    budget=st.integers(1, 24),
    max_seqs=st.integers(1, 8),
    caching=st.booleans(),
)
def test_any_load_ends_and_reads_only_its_own(
    prompts: list[list[int]],
    outputs: list[int],
    page_size: int,
    spare: int,
    budget: int,
    max_seqs: int,
    caching: bool,
) -> None:
    """Few pages force preemption, small budgets force chunks; still each sequence reads what it wrote or shares."""
    longest = max(len(prompt) + extra for prompt, extra in zip(prompts, outputs, strict=False))
    pool = PagePool(-(-longest // page_size) + spare, page_size, caching)
    scheduler = Scheduler(pool, max_seqs, budget)
    sequences = [Sequence(list(prompt), len(prompt)) for prompt in prompts]
    for sequence in sequences:
        scheduler.add(sequence)
    lengths = {s: s.num_prompt + extra for s, extra in zip(sequences, outputs, strict=False)}
    steps = run_all(scheduler, Memory(page_size), lengths)
    assert all(sum(step) <= budget for step in steps)
    assert all(len(s.tokens) == lengths[s] for s in sequences)
    assert pool.num_free == pool.num_pages
