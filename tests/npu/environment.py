"""Makes the virtual environment of the NPU tests: torch_npu over what the tests' own environment already has.

torch_npu makes a plain `import torch` fail where CANN is missing, so it must not be where the other tests run. The
environment is a small one that holds torch_npu alone and looks up everything else beside the Python that runs this.

    python tests/npu/environment.py FOLDER      prints FOLDER/bin/python, or on standard error why there is none

Exit codes: 0; 3 where torch_npu cannot be had for this platform, so that its tests are skipped; 1 for other failures.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

SKIP = 3
RELEASE = "2.13.0"
MACHINES = ("x86_64", "aarch64")


def unavailable() -> str | None:
    """Why torch_npu can't be had here, or None."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        return f"there is no torch_npu for {platform.system()} on {platform.machine()}"
    if platform.python_implementation() != "CPython":
        return f"there is no torch_npu for {platform.python_implementation()}"
    torch = importlib.metadata.version("torch")
    if torch.partition("+")[0] != RELEASE:
        return f"torch_npu {RELEASE} needs torch {RELEASE}, and torch here is {torch}"
    code = "import torch; print(torch.version.cuda or torch.version.hip or '')"
    if build := subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip():
        return f"torch_npu refuses a torch that was built for GPUs (this one for {build}); install a CPU build of torch"
    return None


def make(folder: Path) -> Path:
    """The environment's Python; made anew unless it is there already."""
    python = folder / "bin" / "python"
    done = folder / f"has-torch_npu-{RELEASE}"
    if done.is_file():
        return python
    venv.create(folder, with_pip=False, clear=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    base = sysconfig.get_path(
        "purelib"
    )  # as a site of its own, since an editable installation hooks in by a .pth there
    Path(site, "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    wanted = [f"torch_npu=={RELEASE}"]
    if not _have("pyyaml"):
        wanted.append("pyyaml")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, *wanted], check=True
    )
    done.touch()
    return python


def _have(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    if reason := unavailable():
        print(f"the tests of the NPU backend are SKIPPED: {reason}", file=sys.stderr)
        return SKIP
    try:
        print(make(Path(sys.argv[1]).resolve()))
    except subprocess.CalledProcessError as error:
        print(f"the environment of the NPU tests could not be made: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
