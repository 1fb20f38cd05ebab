"""Benchmarks: `kernels` measures each operation of a backend, `offline` the engine from end to end.

Both say what share of the machine's limits was reached, as probed in the same run. The method is in
`docs/performance.md`.
"""
