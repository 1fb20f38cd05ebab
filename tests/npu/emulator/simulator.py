"""Builds the simulated ACL libraries with the C compiler, and loads torch_npu over them instead of over CANN.

torch_npu's shared objects are bound at load time, so every symbol of CANN that they name must exist. What
`simulated_acl.c` does not define becomes a stub that says its name and aborts the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

SOURCES = tuple(Path(__file__).with_name(f"simulated{name}") for name in ("_acl.c", "_graphs.c", "_hccl.c", ".h"))
NAMES = ("libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel", "libatb")
CANN = ("acl", "rt", "Msprof", "Hccl", "hccl", "ge", "_ZN3atb", "_ZNK3atb")  # how the names of CANN's functions begin
LIBC = ("rti", "gete", "getp")  # … and how some that are not CANN's do

# Called while torch_npu is imported or shut down, with nothing to do on a simulated device: they return 0.
QUIET = (
    "MsprofRegisterCallback",
    "aclAppLog",
    "aclmdlFinalizeDump",
    "aclmdlInitDump",
)


def package_folder() -> Path:
    """Where torch_npu lies, without importing it."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch_npu is not installed in this environment; `make test-npu` makes one that has it")
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """Compiles the libraries into a folder under `folder`, unless they are there already → that folder."""
    wheel = package_folder()
    key = hashlib.sha256(f"{wheel} {wheel.stat().st_mtime_ns}".encode())
    for source in (*SOURCES, Path(__file__)):
        key.update(source.read_bytes())
    target = folder / key.hexdigest()[:16]
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch) / "libraries"
        work.mkdir()
        _compile(wheel, work)
        try:
            work.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def load(folder: Path) -> ModuleType:
    """torch_npu, imported over the libraries in `folder`."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # The emulator's operations are done at once, so collectives, which torch_npu launches, must not wait in a queue.
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    import torch  # noqa: F401  its libraries come first

    for name in NAMES:
        ctypes.CDLL(str(folder / f"{name}.so"), ctypes.RTLD_GLOBAL)
    import torch_npu

    return torch_npu


def _compile(wheel: Path, work: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None or shutil.which("nm") is None:
        raise RuntimeError("the emulator needs a C compiler and nm: install gcc")
    flags = ["-shared", "-fPIC", "-O1", "-w"]
    headers = wheel / "include" / "third_party" / "acl" / "inc"
    stubs, simulated = work / "stubs.c", []
    for source in SOURCES:
        if source.suffix == ".c":
            simulated.append(work / f"{source.stem}.o")
            command = [compiler, "-c", *flags[1:], f"-I{headers}", str(source), "-o", str(simulated[-1])]
            subprocess.run(command, check=True)
    missing = sorted(_wanted(wheel) - _symbols(simulated, "--defined-only"))
    lines = ["#include <stdio.h>", "#include <stdlib.h>"]
    for name in missing:
        body = "return 0;"
        if name not in QUIET:
            body = f'fputs("simulated ACL: {name} is not simulated\\n", stderr); abort();'
        lines.append(f"long {name}(void) {{ {body} }}")
    stubs.write_text("\n".join(lines) + "\n")
    for name in NAMES:
        # The others need it, so that a look-up in any of them finds what it defines.
        empty = ["-x", "c", os.devnull, "-x", "none", "-Wl,--no-as-needed", str(work / "libascendcl.so")]
        sources = [*map(str, simulated), str(stubs)] if name == "libascendcl" else empty
        command = [
            compiler,
            *flags,
            *sources,
            f"-Wl,-soname,{name}.so",
            "-o",
            str(work / f"{name}.so"),
            "-lpthread",
            "-lrt",
        ]
        subprocess.run(command, check=True)


def _wanted(wheel: Path) -> set[str]:
    """CANN's symbols that the wheel's libraries leave undefined."""
    libraries = [*sorted((wheel / "lib").glob("*.so")), *sorted(wheel.glob("_C*.so"))]
    names = _symbols(libraries, "--undefined-only") - _symbols(libraries, "--defined-only")
    return {name for name in names if name.startswith(CANN) and not name.startswith(LIBC)}


def _symbols(libraries: list[Path], which: str) -> set[str]:
    kind = ["-D"] if libraries[0].suffix == ".so" else []
    run = subprocess.run(["nm", *kind, which, *map(str, libraries)], check=True, capture_output=True, text=True)
    words = (line.split() for line in run.stdout.splitlines())
    return {line[-1].partition("@")[0] for line in words if len(line) >= 2}
