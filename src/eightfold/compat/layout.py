"""How many ranks, and who of them does what, in the reference's terms: dp, tp, moe_tp, moe_ep, pp, sp, cp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightfold.types import EightfoldError

UNSET = -1
DEGREES = ("dp", "tp", "moe_tp", "pp", "microbatch_size", "moe_ep", "sp", "cp")
_REFUSED = {
    "dp": "one engine batches all requests of its ranks; for copies of the model start the command several times",
    "pp": "layers are not spread over ranks here; tensor or expert parallelism (tp, moe_ep) shares the weights out",
    "microbatch_size": "it belongs to pp, which there is not here",
    "sp": "sequences are not cut over ranks here; tp shares out keys and values by heads",
    "cp": "sequences are not cut over ranks here; tp shares out keys and values by heads",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The ranks of a job, in all `world`, as many on each of `nodes` machines."""

    world: int = 1
    moe_tp: int | None = None
    moe_ep: int | None = None
    nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None

    def engine_options(self) -> dict[str, Any]:
        """As fields of EngineConfig."""
        return {
            "tensor_parallel_size": self.world,
            "moe_tensor_parallel_size": self.moe_tp,
            "moe_expert_parallel_size": self.moe_ep,
            "nnodes": self.nodes,
            "node_rank": self.node_rank,
            "master_addr": self.master_addr,
        }


def make_layout(degrees: Mapping[str, int], world: int | None, world_name: str) -> Layout:
    """`degrees` by name, -1 where nothing was said; `world` ranks by `world_name`, or None if nothing else says it.

    Without a `world` it is tp, or 1. Raises EightfoldError on a degree that is not there, or that contradicts another.
    """
    for name, value in degrees.items():
        if value < 1 and value != UNSET:
            raise EightfoldError(f"{name} is {value}; it must be at least 1, or -1 for the default")
        if name in _REFUSED and value > 1:
            raise EightfoldError(f"{name} is {value}, and only 1 (or -1) is possible: {_REFUSED[name]}")
    given = {name: value for name, value in degrees.items() if value != UNSET}
    tp, moe_tp, moe_ep = given.get("tp"), given.get("moe_tp"), given.get("moe_ep")
    if world is None:
        world = tp or (moe_tp or 1) * (moe_ep or 1)
        world_name = "tp" if tp else "moe_tp · moe_ep"
    if tp is not None and tp != world:
        raise EightfoldError(f"tp is {tp}, but there are {world} ranks ({world_name}); make them equal")
    if moe_tp is not None and moe_ep is not None and moe_tp * moe_ep != world:
        raise EightfoldError(
            f"moe_tp {moe_tp} times moe_ep {moe_ep} is {moe_tp * moe_ep}, not the {world} ranks ({world_name})"
        )
    for name, part in (("moe_tp", moe_tp), ("moe_ep", moe_ep)):
        if part is not None and world % part:
            raise EightfoldError(f"{name} is {part}, which does not divide the {world} ranks ({world_name})")
    return Layout(world, moe_tp, moe_ep)
