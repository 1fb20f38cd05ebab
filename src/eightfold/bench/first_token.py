"""A process that loads a model, answers one prompt and says what that took: `python -m eightfold.bench.first_token`.

Its parent measures the time from its start to the line "first token" on its standard output. What follows is one
JSON object: how fast it decoded then, and its memory and faults after a longer prompt has run too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eightfold.types import EightfoldError

if TYPE_CHECKING:
    from eightfold.bench.measure import Session

MARK = "first token"
PROMPT = 8  # tokens of the prompt whose first token is waited for
SAMPLING_SECONDS = 0.005


def first_token(engine: Mapping[str, Any], prompt: int, output_len: int, steps: int = 0) -> dict[str, Any]:
    """Run a child → `seconds` to its first token, and its memory while it ran a prompt of `prompt` tokens.

    With `steps`, it then decodes that many tokens of one sequence: `decode_seconds`, the `decode_bytes` that had to be
    read, the `read_rate` probed right after, in bytes/s, and the `decode_faults` that went to disk.
    `engine` are fields of EngineConfig. Raises EightfoldError with the child's last words if it fails.
    """
    wish = json.dumps({"engine": dict(engine), "prompt": prompt, "output_len": output_len, "steps": steps})
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "eightfold.bench.first_token", wish],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - start
        rest, errors = child.communicate()
    if child.returncode or line.strip() != MARK:
        raise EightfoldError(
            f"the process that measures loading failed: {(errors.strip() or 'no message').splitlines()[-1]}"
        )
    return {"seconds": seconds, **json.loads(rest)}


class _Watch:
    """The most anonymous memory that this process holds while the block runs, sampled beside it."""

    def __enter__(self) -> _Watch:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        from eightfold.bench.probes import memory

        while True:
            self.most = max(self.most, memory().get("anonymous", 0))
            if self._done.wait(SAMPLING_SECONDS):
                return


def main(argument: str) -> None:
    """The child."""
    from eightfold.bench.measure import Session  # imports torch: part of what is timed
    from eightfold.bench.probes import major_faults, memory

    wish, before = json.loads(argument), memory().get("anonymous", 0)
    session = Session.open(wish["engine"])
    session.generate([3] * PROMPT, 1)
    print(MARK, flush=True)
    decoded = _decode(session, wish["steps"]) if wish["steps"] else {}
    with _Watch() as watch:
        session.generate(list(session.random_prompt(wish["prompt"])), wish["output_len"])
    kv = session.kv_bytes(PROMPT + 1) + session.kv_bytes(wish["prompt"] + wish["output_len"])
    used = {
        "major_faults": major_faults(),
        "peak_bytes": memory().get("peak", 0),
        "anonymous_before_loading_bytes": before,
        "anonymous_bytes": watch.most,
        "kv_bytes": kv,
        "anonymous_beyond_kv_bytes": watch.most - kv,
    }
    print(json.dumps({**decoded, **used}))


def _decode(session: Session, steps: int) -> dict[str, Any]:
    from eightfold.bench.probes import Prober

    sample = session.decode(1, 0, steps)
    prober = Prober(session.ops)
    return {
        "decode_seconds": sample.seconds,
        "decode_bytes": sample.work.bytes,
        "decode_faults": sample.faults,
        "read_rate": prober.readings[prober.take()].read,
    }


if __name__ == "__main__":
    main(sys.argv[1])
