"""Pages: never lost, never shared by mistake, found again by content."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.kv_cache import PagePool


def hold(pool: PagePool, tokens: list[int]) -> list[int]:
    """Do what a sequence does: share what is known, allocate the rest, make it known."""
    pages = pool.match(tokens)
    fresh = pool.allocate(pool.pages_for(len(tokens)) - len(pages))
    assert fresh is not None
    pages += fresh
    pool.remember(pages, tokens, 0)
    return pages


def test_a_prefix_is_shared_by_content() -> None:
    pool = PagePool(8, 4)
    first = hold(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = hold(pool, [1, 2, 3, 4, 5, 6, 7, 8, 7])
    assert first[:2] == second[:2] and first[2] != second[2]
    assert pool.num_free == 8 - 4


def test_the_same_tokens_after_another_page_are_another_content() -> None:
    pool = PagePool(8, 2)
    hold(pool, [1, 2, 3, 4])
    assert pool.match([9, 9, 3, 4]) == []
    assert len(pool.match([1, 2, 3, 5])) == 1


def test_released_pages_are_found_until_given_away() -> None:
    pool = PagePool(3, 2)
    pages = hold(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.num_free == 3
    assert pool.match([1, 2, 3, 4]) == pages
    pool.release(pages)
    pool.allocate(2)  # the never used page first, then the last of the sequence
    assert pool.match([1, 2, 3, 4]) == pages[:1]


def test_without_caching_nothing_is_found() -> None:
    pool = PagePool(4, 2, enable_prefix_caching=False)
    hold(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4]) == []


def test_forgotten_pages_are_not_found() -> None:
    pool = PagePool(4, 2)
    pages = hold(pool, [1, 2, 3, 4])
    pool.forget(pages[0])
    assert pool.match([1, 2, 3, 4]) == []


def test_a_second_copy_leads_on_to_what_follows() -> None:
    pool = PagePool(8, 2)
    hold(pool, [1, 2])
    copy = pool.allocate(2)
    assert copy is not None
    pool.remember(copy, [1, 2, 3, 4], 0)
    assert pool.match([1, 2, 3, 4])[1] == copy[1]


def test_passing_use_takes_its_own_pages_again_before_those_of_others() -> None:
    pool = PagePool(8, 2, passing_pages=2)
    pool.release(hold(pool, [9, 9, 8, 8]))
    first = hold(pool, [1, 2, 3, 4, 5, 6])
    pool.release(first, passing=True)
    assert pool.match([1, 2, 3, 4, 5, 6]) == first and pool.num_free == 5, "what follows soon still finds them"
    pool.release(first, passing=True)
    for number in range(20):
        pages = hold(pool, [10 + number, 11, 12, 13, 14, 15])
        assert set(pages) <= {*range(2, 8)} and pool.num_free == 5
        pool.release(pages, passing=True)
    assert pool.match([9, 9, 8, 8]) == [0, 1]
    assert pool.allocate(6) is not None and pool.num_free == 0


def test_without_a_cache_pages_are_taken_again_at_once() -> None:
    pool = PagePool(8, 2, enable_prefix_caching=False)
    pages = hold(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert sorted(hold(pool, [5, 6, 7, 8])) == sorted(pages)


def test_too_many_pages_take_none() -> None:
    pool = PagePool(2, 2)
    assert pool.allocate(3) is None
    assert pool.num_free == 2


def test_double_release_is_a_bug_that_shows() -> None:
    pool = PagePool(2, 2)
    pages = pool.allocate(1)
    assert pages
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(pages)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 1), min_size=1, max_size=12)), max_size=40))
def test_any_history_keeps_the_books(history: list[tuple[int, list[int]]]) -> None:
    """Whatever is taken and released: a page in use holds what its holder thinks, and free + used = all."""
    pool = PagePool(12, 2, passing_pages=3)
    content: dict[int, tuple[int, ...]] = {}  # full page → all tokens up to its end, as really written
    held: dict[int, tuple[list[int], list[int]]] = {}
    for who, tokens in history:
        if who in held:
            pool.release(held.pop(who)[0], passing=who % 2 == 1)
            continue
        pages = pool.match(tokens)
        for index, page in enumerate(pages):
            assert content[page] == tuple(tokens[: 2 * index + 2])
        fresh = pool.allocate(pool.pages_for(len(tokens)) - len(pages))
        if fresh is None:
            pool.release(pages)
            continue
        pages += fresh
        pool.remember(pages, tokens, 0)
        for index in range(len(tokens) // 2):
            content[pages[index]] = tuple(tokens[: 2 * index + 2])
        held[who] = (pages, tokens)
    for pages, tokens in held.values():
        for index in range(len(tokens) // 2):
            assert content[pages[index]] == tuple(tokens[: 2 * index + 2])
    assert pool.num_free == 12 - len({page for pages, _ in held.values() for page in pages})
