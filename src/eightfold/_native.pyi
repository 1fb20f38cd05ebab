"""The CPU kernels (csrc/module.cpp): addresses and sizes in; `eightfold.ops.cpu` is the interface."""

from collections.abc import Callable

# data, scales, rows, columns, stride, dtype code, whether int8 takes float activations
_Groups = tuple[int, int, int, int]  # int4's scales: address, dtype, size of a group, stride
_Matrix = tuple[int, int, int, int, int, int, bool, _Groups]
_Exchange = tuple[int, int, int, Callable[[int, int], int]]  # absmax, sums, parts, agree(which, rows) → address
_Strides = tuple[int, int, int]  # of page, head, position, in elements

SHARED_ROWS: int  # tokens or slots of which ranks exchange absmax and sums at once
MOE_TOKENS: int  # tokens of which they exchange parts at once

def known_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def isa() -> str: ...
def num_threads() -> int: ...
def keep_freed_memory() -> None: ...
def probe_int8_peak(threads: int = 0, ms: float = 50.0, isa: str = "") -> float: ...
def probe_bf16_peak(threads: int = 0, ms: float = 50.0, isa: str = "") -> float: ...
def probe_fp32_peak(threads: int = 0, ms: float = 50.0, isa: str = "") -> float: ...
def probe_read_bandwidth(nbytes: int, threads: int = 0, isa: str = "") -> float: ...
def round_rows(
    data: int, dtype: int, rows: int, cols: int, stride: int, out: int, scales: int, isa: str = ""
) -> int: ...

class Engine:
    def __init__(self, threads: int = 0, isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def bf16_dot(self) -> bool: ...
    def rms_norm(
        self,
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        weight: int,
        weight_dtype: int,
        out: int,
        total: int,
        tokens: int,
        width: int,
        eps: float,
        /,
    ) -> None: ...
    def rope_write(
        self,
        qkv: int,
        qkv_stride: int,
        cos: int,
        sin: int,
        table_rows: int,
        positions: int,
        slots: int,
        q: int,
        k: int,
        v: int,
        k_scale: int,
        v_scale: int,
        kv_dtype: int,
        k_strides: _Strides,
        v_strides: _Strides,
        tokens: int,
        heads: int,
        kv_heads: int,
        dim: int,
        pages: int,
        page_size: int,
        interleaved: bool,
        /,
    ) -> None: ...
    def attention(
        self,
        q: int,
        out: int,
        k: int,
        v: int,
        k_scale: int,
        v_scale: int,
        kv_dtype: int,
        k_strides: _Strides,
        v_strides: _Strides,
        query_starts: int,
        kv_lens: int,
        page_table: int,
        table_stride: int,
        tokens: int,
        rows: int,
        heads: int,
        kv_heads: int,
        dim: int,
        pages: int,
        page_size: int,
        window: int,
        bf16_products: bool,
        /,
    ) -> None: ...
    def route(
        self,
        x: int,
        x_stride: int,
        gate: int,
        gate_dtype: int,
        gate_stride: int,
        ids: int,
        weights: int,
        tokens: int,
        width: int,
        experts: int,
        chosen: int,
        /,
    ) -> None: ...

class RankLost(Exception): ...  # noqa: N818

class Segment:
    def __init__(
        self, fd: int, rank: int, size: int, patience: float, spin_micros: int, expendable: bool, /
    ) -> None: ...
    @staticmethod
    def region_start() -> int: ...
    def seated(self) -> int: ...
    def fail(self, reason: str, /) -> None: ...
    def end(self) -> None: ...
    def ended(self) -> bool: ...
    def begin_step(self, seconds: float) -> None: ...
    def end_step(self) -> None: ...
    def advance(self) -> None: ...
    def still(self) -> float: ...
    def failure(self) -> tuple[int, int, int, str]: ...

class SharedGroup:
    def __init__(self, segment: Segment, offset: int, members: list[int], me: int, /) -> None: ...
    @staticmethod
    def region_bytes(members: int, /) -> int: ...
    def all_reduce(self, x: int, count: int, operation: int, /) -> None: ...
    def all_gather(self, x: int, out: int, rows: int, width: int, /) -> None: ...
    def broadcast(self, data: int, nbytes: int, endless: bool, /) -> None: ...

class Linear:
    def __init__(self, engine: Engine, weights: list[_Matrix], rounded: bool, /) -> None: ...
    def run(self, x: int, x_stride: int, tokens: int, out: int, /) -> None: ...
    def run_shared(self, x: int, x_stride: int, tokens: int, out: int, exchange: _Exchange, /) -> None: ...

class Experts:
    def __init__(
        self, engine: Engine, experts: list[list[_Matrix]], rounded: bool, first: int, total: int, /
    ) -> None: ...
    def run(self, x: int, x_stride: int, tokens: int, ids: int, weights: int, chosen: int, out: int, /) -> None: ...
    def run_shared(
        self,
        x: int,
        x_stride: int,
        tokens: int,
        ids: int,
        weights: int,
        chosen: int,
        out: int,
        exchange: _Exchange,
        /,
    ) -> None: ...
