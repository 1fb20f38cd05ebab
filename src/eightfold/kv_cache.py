"""The bookkeeping of pages: who holds which, what each contains, which to give away. No memory and no torch here.

A page holds the keys and values of `page_size` consecutive tokens of a sequence. A full page is known by its content:
the page before it and its own tokens. A sequence whose prompt starts with the same tokens shares the page. Contents
are compared, never hashes alone, so one prompt can never be answered from another's cache.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

Content = tuple[int, tuple[int, ...]]  # (identity of the content before it, the page's tokens)
ROOT = 0
PASSING_PAGES = 512  # free pages of passing use that keep their content: prompts with a common beginning come in a row


class PagePool:
    """`num_pages` pages of `page_size` tokens each.

    A page is in use (references > 0) or free. A free page keeps its content, and may be found again, until it is
    allocated for something else: the least recently freed goes first. Of those whose last use was a passing one only
    `passing_pages` wait; the others go before all, so that such uses neither drive out what others may come back
    for, nor walk through all of the memory.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        enable_prefix_caching: bool = True,
        passing_pages: int = PASSING_PAGES,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._caching = enable_prefix_caching
        self._references = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._passing: OrderedDict[int, None] = OrderedDict()  # free too
        self._passing_pages = passing_pages if enable_prefix_caching else 0
        self._found: dict[Content, int] = {}  # content → page
        self._content: dict[int, Content] = {}  # page → content
        self._identity: dict[int, int] = {}  # page → a number that stands for its content, never used again
        self._new_identity = itertools.count(ROOT + 1)

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._passing)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_size)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The longest run of known full pages that `tokens` starts with, now in use by the caller too."""
        pages: list[int] = []
        before = ROOT
        for start in range(0, len(tokens) - self.page_size + 1 if self._caching else 0, self.page_size):
            page = self._found.get((before, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            before = self._identity[page]
            pages.append(page)
        for page in pages:
            self._references[page] += 1
            self._free.pop(page, None)
            self._passing.pop(page, None)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages for the caller, their old content forgotten; None, and nothing taken, if too few are free."""
        if count > self.num_free:
            return None
        pages = [self._oldest() for _ in range(count)]
        for page in pages:
            self.forget(page)
            self._references[page] = 1
        return pages

    def remember(self, pages: Sequence[int], tokens: Sequence[int], first: int) -> None:
        """Make the full pages from index `first` findable; `tokens` are the sequence's, with all these pages full.

        A page whose content is known already under another page stays unfindable itself, but what follows it is
        found as if it followed the other.
        """
        if not self._caching:
            return
        size = self.page_size
        before = self._identity.get(pages[first - 1]) if first else ROOT
        for index in range(first, len(tokens) // size):
            if before is None:  # the page before is not findable, so neither is this one
                return
            content = (before, tuple(tokens[index * size : (index + 1) * size]))
            known = self._found.setdefault(content, pages[index])
            if known == pages[index]:
                self._content[known] = content
                self._identity.setdefault(known, next(self._new_identity))
            before = self._identity[pages[index]] = self._identity[known]

    def forget(self, page: int) -> None:
        """Make a page unfindable; whoever holds it keeps it."""
        content = self._content.pop(page, None)
        if content is not None:
            del self._found[content]
        self._identity.pop(page, None)

    def release(self, pages: Sequence[int], passing: bool = False) -> None:
        """The caller, whose use of them may have been a passing one, holds these pages no longer. A sequence's last
        pages are given away before its first."""
        free = self._passing if passing or not self._caching else self._free
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] < 0:
                raise AssertionError(f"page {page} was released more often than it was taken")
            if not self._references[page]:
                free[page] = None

    def _oldest(self) -> int:
        """Takes the free page that is to be given away next."""
        passing = len(self._passing) > self._passing_pages or not self._free
        return (self._passing if passing else self._free).popitem(last=False)[0]
