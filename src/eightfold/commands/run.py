"""`eightfold run`: one prompt streams, several run together as a batch."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from eightfold.commands import console
from eightfold.commands.generation import shown, steps, stream
from eightfold.commands.options import sampling_params
from eightfold.commands.prompts import Prompt, read_prompts
from eightfold.types import (
    CompletionOutput,
    EightfoldError,
    Logprob,
    Request,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

if TYPE_CHECKING:
    from eightfold.engine import Engine
    from eightfold.llm import LLM

LABEL_WIDTH = 70


def main(args: argparse.Namespace) -> int:
    """0, or 1 if a request failed in the middle."""
    params = sampling_params(args)
    asked = args.logprobs is not None or args.prompt_logprobs is not None or args.logprob_token_ids is not None
    if asked and not args.json:
        raise EightfoldError("log-probabilities are printed with --json only; add it")
    if args.chat is False and args.chat_template is not None:
        raise EightfoldError("--no-chat leaves no use for --chat-template; give one of them")
    prompts = read_prompts(args)
    llm, load_seconds = console.load(args)
    jobs = [_job(llm, number, prompt, params, args) for number, prompt in enumerate(prompts, 1)]
    start = time.perf_counter()
    if len(jobs) == 1 and params.n == 1 and not args.json:
        outputs = [stream(llm.engine, jobs[0].request, jobs[0].is_chat)]
    else:
        outputs = _run_all(llm.engine, jobs, args.json)
    seconds = time.perf_counter() - start
    for output in outputs:
        if output.error:
            print("eightfold: error:", output.error, file=sys.stderr)
    print(f"{console.statistics(outputs, seconds)} · loaded in {load_seconds:.2f} s", file=sys.stderr)
    return int(any(output.error for output in outputs))


class _Job(NamedTuple):
    """A request, and what its answer's label needs to know."""

    request: Request
    title: str
    is_chat: bool


def _job(llm: LLM, number: int, prompt: Prompt, params: SamplingParams, args: argparse.Namespace) -> _Job:
    """Raises EightfoldError if an option contradicts the prompt."""
    name, title = str(number), _title(prompt)
    if isinstance(prompt, list) and not isinstance(prompt[0], dict):
        return _Job(Request(name, prompt, params), title, False)
    tokenizer = llm.get_tokenizer()
    if isinstance(prompt, str):
        is_chat = tokenizer.has_chat_template or args.chat_template is not None if args.chat is None else args.chat
        if not is_chat and args.system is not None:
            raise EightfoldError("--system is for chat; add --chat, or put its text into the prompt")
        if not is_chat:
            return _Job(Request(name, tokenizer.encode(prompt), params, prompt), title, False)
        messages: list[Any] = [{"role": "user", "content": prompt}]
    else:
        if args.chat is False:
            raise EightfoldError("messages need the chat template; take --no-chat away, or give prompts instead")
        messages = prompt
    if args.system is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": args.system}, *messages]
    ids = tokenizer.encode_chat(messages, True, args.chat_template)
    return _Job(Request(name, ids, params, tokenizer.decode(ids, skip_special_tokens=False)), title, True)


def _run_all(engine: Engine, jobs: list[_Job], as_json: bool) -> list[RequestOutput]:
    """Run requests together and print each as it finishes."""
    outputs = []
    by_name = {job.request.request_id: job for job in jobs}
    with console.new_bar("Prompts", "prompt", len(jobs)) as bar:
        for output in steps(engine, [job.request for job in jobs], RequestOutputKind.FINAL_ONLY):
            text = json.dumps(_as_json(output)) if as_json else _labelled(output, by_name[output.request_id])
            bar.write(text, file=sys.stdout)
            sys.stdout.flush()
            bar.update()
            outputs.append(output)
    return outputs


def _title(prompt: Prompt) -> str:
    """A prompt as a label: on one line, and not all of a long one."""
    if isinstance(prompt, list):
        prompt = str(prompt[-1].get("content")) if isinstance(prompt[-1], dict) else " ".join(map(str, prompt))
    line = " ".join(prompt.split())
    return line if len(line) <= LABEL_WIDTH else line[: LABEL_WIDTH - 1] + "…"


def _labelled(output: RequestOutput, job: _Job) -> str:
    several = len(output.outputs) > 1
    blocks = []
    for one in output.outputs:
        label = f"{output.request_id}.{one.index + 1}" if several else output.request_id
        blocks.append(f"[{label}] {job.title}\n{shown(one, job.request, job.is_chat)}\n")
    return "\n".join(blocks)


def _as_json(output: RequestOutput) -> dict[str, Any]:
    times = output.metrics
    assert times is not None and times.finished_time is not None
    return {
        "id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": None
        if output.prompt_logprobs is None
        else [entry and _logprobs(entry) for entry in output.prompt_logprobs],
        "outputs": [_completion(one) for one in output.outputs],
        "error": output.error,
        "cached_tokens": times.num_cached_tokens,
        "first_token_seconds": console.first_token_seconds(output),
        "seconds": times.finished_time - times.arrival_time,
    }


def _completion(one: CompletionOutput) -> dict[str, Any]:
    return {
        "index": one.index,
        "text": one.text,
        "token_ids": one.token_ids,
        "finish_reason": one.finish_reason,
        "stop_reason": one.stop_reason,
        "cumulative_logprob": one.cumulative_logprob,
        "logprobs": None if one.logprobs is None else [_logprobs(entry) for entry in one.logprobs],
    }


def _logprobs(entry: dict[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": token, "logprob": _number(value.logprob), "rank": value.rank, "text": value.decoded_token}
        for token, value in entry.items()
    ]


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
