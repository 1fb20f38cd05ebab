"""Where a process stands among the ranks of a job: from the options, and from torchrun's environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eightfold.config import EngineConfig
from eightfold.types import EightfoldError

DEFAULT_PORT = 20030  # where several machines must agree and nobody says; on one machine any free port serves
# By kind of device: the variable that chooses among a machine's, how their drivers show them, and what
# torch.distributed calls their connections.
VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
DEVICE_FILES = Path("/dev")
FILES_OF = {"npu": "davinci[0-9]*", "cuda": "nvidia[0-9]*"}
BACKENDS = {"npu": "hccl", "cuda": "nccl"}


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's place. Every machine (`node`) has `local_size` ranks, numbered one machine after the other.

    `address` and `port` are rank 0's, where ranks find one another; port 0 is any free one. `port_name` is where the
    user sets it. With `torchrun` the other ranks are there already, and so is the server at that port.
    """

    rank: int
    size: int
    local_size: int
    moe_tp: int
    moe_ep: int
    address: str = "127.0.0.1"
    port: int = 0
    port_name: str = "MASTER_PORT"
    torchrun: bool = False

    @property
    def local_rank(self) -> int:
        return self.rank % self.local_size

    @property
    def node(self) -> int:
        return self.rank // self.local_size

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


def find_place(config: EngineConfig, environ: Mapping[str, str]) -> Place:
    """Raises EightfoldError where options and environment contradict one another, or say too little."""
    for name in ("tensor_parallel_size", "moe_tensor_parallel_size", "moe_expert_parallel_size", "nnodes"):
        _check_range(name, getattr(config, name), 1, 4096)
    _check_range("master_port", config.master_port, 1, 65535)
    place = _under_torchrun(config, environ) if by_torchrun(environ) else _by_options(config, environ)
    _check_devices(config.device, place.local_size, environ)
    return place


def by_torchrun(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, or a launcher that speaks its language, has started this process."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def _by_options(config: EngineConfig, environ: Mapping[str, str]) -> Place:
    size, nodes = config.tensor_parallel_size or 1, config.nnodes
    _check_range("node_rank", config.node_rank, 0, nodes - 1)
    if size % nodes:
        raise EightfoldError(f"--tensor-parallel-size is {size}; it must be a multiple of the {nodes} of --nnodes")
    local_size = size // nodes
    address = config.master_addr or environ.get("MASTER_ADDR", "")
    if nodes == 1:
        address = "127.0.0.1"
    elif not address:
        raise EightfoldError(
            "--nnodes is above 1: --master-addr (or MASTER_ADDR) must say at which address machine 0 is reached"
        )
    port = config.master_port or _number(environ, "MASTER_PORT", 0 if nodes == 1 else DEFAULT_PORT)
    name = "--master-port" if config.master_port else "MASTER_PORT"
    return Place(config.node_rank * local_size, size, local_size, *_experts(config, size), address, port, name)


def _under_torchrun(config: EngineConfig, environ: Mapping[str, str]) -> Place:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    local_rank, local_size = _number(environ, "LOCAL_RANK"), _number(environ, "LOCAL_WORLD_SIZE")
    if config.tensor_parallel_size not in (None, size):
        raise EightfoldError(
            f"--tensor-parallel-size is {config.tensor_parallel_size} but torchrun started {size} ranks (WORLD_SIZE): "
            "make them equal, or leave the option out"
        )
    if config.nnodes > 1 or config.node_rank > 0:
        raise EightfoldError("--nnodes and --node-rank are torchrun's own here: give them to torchrun alone")
    if local_size < 1 or size % local_size or not 0 <= rank < size or rank % local_size != local_rank:
        raise EightfoldError(
            f"torchrun made rank {rank} of {size} number {local_rank} of {local_size} on its machine; every machine "
            "must have the same number of ranks (--nproc-per-node)"
        )
    address, port = environ.get("MASTER_ADDR", ""), _number(environ, "MASTER_PORT")
    if not address:
        raise EightfoldError(
            "RANK and WORLD_SIZE are set, as torchrun does, but MASTER_ADDR is not: set it, or unset them"
        )
    return Place(rank, size, local_size, *_experts(config, size), address, port, torchrun=True)


def _experts(config: EngineConfig, size: int) -> tuple[int, int]:
    """moe_tp, moe_ep of `size` ranks: as given, or what is left of the other, or by --enable-expert-parallel."""
    tp, ep = config.moe_tensor_parallel_size, config.moe_expert_parallel_size
    if config.enable_expert_parallel and ep is None:
        ep = size // (tp or 1)
    if tp is None:
        tp = size // (ep or 1)
    if ep is None:
        ep = size // tp
    if tp * ep != size:
        raise EightfoldError(
            f"--moe-tensor-parallel-size {tp} times --moe-expert-parallel-size {ep} is {tp * ep}; it must be the "
            f"number of ranks, {size}"
        )
    return tp, ep


def _check_devices(device: str, local_size: int, environ: Mapping[str, str]) -> None:
    kind, _, number = device.partition(":")
    variable = VISIBLE_DEVICES.get(kind)
    if variable is None:
        return
    if number:
        if local_size > 1:
            raise EightfoldError(
                f"--device {device} is one device, but each of the {local_size} ranks on this machine needs its own: "
                f"write {kind}, and choose with {variable}"
            )
        return
    if variable in environ:
        count = len(visible(environ[variable]))
        found = f"{variable}={environ[variable]!r} names {count} devices"
    else:
        count = len(list(DEVICE_FILES.glob(FILES_OF[kind])))
        if not count:
            return  # not how this driver shows them; the backend will say what it finds
        found = f"it has {count} devices ({DEVICE_FILES / FILES_OF[kind]})"
    if count < local_size:
        raise EightfoldError(f"{local_size} ranks on this machine but {found}: a rank needs one of its own")


def visible(devices: str) -> list[str]:
    """The devices that a variable such as CUDA_VISIBLE_DEVICES lists."""
    return [name.strip() for name in devices.split(",") if name.strip()]


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise EightfoldError(f"--{name.replace('_', '-')} is {value}; it must be from {low} to {high}")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isascii() or not text.isdigit():
        raise EightfoldError(f"{name} is {text!r}; it must be a number")
    return int(text)
