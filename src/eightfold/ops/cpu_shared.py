"""Where ranks share an int8 product, the native kernels stop twice: for the absmax of the rows, and for their sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eightfold import _native
from eightfold.parallel import Group

ABSMAX, SUMS = 0, 1  # what the kernels ask to be made one; anything else is the parts

_Exchange = tuple[int, int, int, Callable[[int, int], int]]


class ExchangeMemory:
    """What kernels write for other ranks to see: a block of rows at a time, in memory that is kept between calls."""

    def __init__(self) -> None:
        self._absmax = torch.empty(_native.SHARED_ROWS)
        self._sums = torch.empty(0, dtype=torch.int32)

    def over(
        self, group: Group, rows: int, width: int, parts: Tensor | None = None, others: Group | None = None
    ) -> _Exchange:
        """For products of `rows` rows and `width` columns that `group` shares, as the kernels take it.

        `parts` [slots, width], where given, are added up over the group `others`, which has the other experts.
        """
        rows = min(rows, _native.SHARED_ROWS)
        if self._sums.numel() < rows * width:
            self._sums = torch.empty(rows * width, dtype=torch.int32)
        sums = self._sums[: rows * width].view(rows, width)
        results: dict[int, Tensor] = {}  # the kernels read them until they ask for the same again

        def agree(what: int, count: int) -> int:
            if what == ABSMAX:
                results[what] = group.all_reduce_max(self._absmax[:count])
            elif what == SUMS:
                results[what] = group.all_reduce_sum(sums[:count])
            else:
                assert parts is not None and others is not None
                results[what] = others.all_reduce_sum(parts[:count])
            return results[what].data_ptr()

        return self._absmax.data_ptr(), sums.data_ptr(), 0 if parts is None else parts.data_ptr(), agree
