"""Eightfold as a model of lm-eval, EleutherAI's evaluation harness, and the harness run on it.

The only importer of `lm_eval`, which comes with the extra `lm-eval`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    from eightfold.types import EightfoldError

    raise EightfoldError(f"--lm-eval needs the package lm-eval: pip install 'eightfold[lm-eval]' ({error})") from None

from tqdm import tqdm

from eightfold.data_files import write_text
from eightfold.eval.ask import Engines, Scored, continuation_scores, run, token_scores
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError, RequestOutputKind, SamplingParams

MAX_TOKENS = 256  # of an answer, where the task doesn't say: lm-eval's own number
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, by precedence
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class LmEvalOptions:
    """What to run: names of lm-eval's tasks (patterns too), found in `task_folder` besides lm-eval's own; results go to
    `folder`."""

    tasks: tuple[str, ...]
    folder: Path
    task_folder: str | None = None
    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    chat_template: str | None = None
    allow_code_execution: bool = False
    overwrite: bool = False


class EightfoldLM(TemplateLM):
    """An engine as lm-eval's language model. Texts become tokens as in lm-eval's own `hf` model: the tokenizer's BOS in
    front unless it is there, and control tokens where the text (a chat template's, say) spells them."""

    def __init__(self, engine: Engines, chat_template: str | None = None, name: str = "eightfold") -> None:
        """Raises EightfoldError if the engine has no tokenizer."""
        super().__init__()
        if engine.tokenizer is None:
            raise EightfoldError("lm-eval works on text: an engine without a tokenizer can't be asked")
        self._engine = engine
        self._tok: Tokenizer = engine.tokenizer
        self._chat_template = chat_template
        self._name = name

    @property
    def max_length(self) -> int:
        """The most tokens of context and continuation, less the one that the engine keeps for its answer."""
        return self._engine.max_model_len - 1

    @property
    def eot_token_id(self) -> int:
        if self._tok.eos_token_id is None:
            raise EightfoldError("the tokenizer names no eos_token, which lm-eval needs")
        return self._tok.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before an empty context."""
        return self.eot_token_id if self._tok.bos_token_id is None else self._tok.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tok.encode(string, add_bos=add_special_tokens)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Without `add_generation_prompt` the last message is one to go on with: the text ends where that does."""
        text = self._tok.render_chat(list(chat_history), add_generation_prompt, self._chat_template)
        if not add_generation_prompt:
            last = str(chat_history[-1]["content"]).strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether greedy decoding gives it) for each request. A context
        that is too long loses its beginning."""

        def plans() -> Iterator[tuple[int, Scored]]:
            for number, (_, context, continuation) in enumerate(requests):
                if not 0 < len(continuation) <= self.max_length:
                    raise EightfoldError(
                        f"a continuation of {len(continuation)} tokens can't be scored: 1 to {self.max_length} can"
                    )
                start = (context + continuation)[-(self.max_length + 1) : -len(continuation)]
                yield number, continuation_scores(start, continuation)

        results: dict[int, tuple[float, bool]] = {}
        for number, scored, output in self._all(plans(), len(requests), disable_tqdm):
            scores = token_scores(scored, output)
            results[number] = sum(value for value, _ in scores), all(best for _, best in scores)
            if (key := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[number])
        return [results[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the context's length that share no scored token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += found
            counts.append(len(found))
        values = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that end before the first of a request's stop texts. A context that leaves too little room for the
        answer loses its beginning."""

        def plans() -> Iterator[tuple[int, Scored]]:
            for number, (context, options) in enumerate(request.args for request in requests):
                params = generation_params(options)
                room = self.max_length - (params.max_tokens or 0)
                if room < 1:
                    raise EightfoldError(
                        f"an answer of {params.max_tokens} tokens leaves no room in a context of {self.max_length}"
                    )
                yield number, Scored(self.tok_encode(context)[-room:], params)

        results: dict[int, str] = {}
        for number, scored, output in self._all(plans(), len(requests), disable_tqdm):
            text = self._tok.decode(output.outputs[0].token_ids)
            for stop in scored.params.stop or ():
                text = text.split(stop)[0]
            results[number] = text
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [results[number] for number in range(len(requests))]

    def _all(self, plans: Iterable[tuple[int, Scored]], count: int, silent: bool) -> Iterator[tuple[int, Scored, Any]]:
        with tqdm(total=count, desc="lm-eval", unit="request", leave=False, disable=silent or None) as bar:
            for number, scored, output in run(self._engine, plans):
                if output.error:
                    raise EightfoldError(output.error)
                bar.update()
                yield number, scored, output


def generation_params(options: Mapping[str, Any]) -> SamplingParams:
    """A task's generation_kwargs as ours: greedy unless it samples. Raises EightfoldError on one that has no meaning
    here."""
    left = dict(options)
    lengths = [left.pop(name) for name in _LENGTHS if left.get(name) is not None]
    until = left.pop("until", None) or []
    temperature = float(left.pop("temperature", None) or 0.0)
    do_sample = left.pop("do_sample", None)
    sampled = do_sample or (do_sample is None and temperature > 0)
    chosen = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None} if sampled else {}
    for name in ("num_beams", "use_cache", "num_return_sequences", *_SAMPLING):
        if left.get(name) in (None, 1, 1.0, True, False) or (name in _SAMPLING and not sampled):
            left.pop(name, None)
    if left:
        raise EightfoldError(f"a task's generation_kwargs have {', '.join(left)}, which has no meaning here")
    return SamplingParams(
        temperature=(temperature or 1.0) if sampled else 0.0,
        max_tokens=int(lengths[0]) if lengths else MAX_TOKENS,
        stop=[text for text in ([until] if isinstance(until, str) else until) if text],
        output_kind=RequestOutputKind.FINAL_ONLY,
        **chosen,
    )


def check_tasks(options: LmEvalOptions) -> TaskManager:
    """lm-eval's register of tasks: that of the user's folder if it has all that are asked for, else with lm-eval's own,
    which takes seconds to read. Raises EightfoldError, with the nearest name, if a task is in neither."""
    if options.task_folder is not None and not Path(options.task_folder).is_dir():
        raise EightfoldError(f"--data {options.task_folder}: there is no such folder of task files")
    if options.task_folder is not None:
        manager = TaskManager(include_path=options.task_folder, include_defaults=False)
        if all(manager.match_tasks([name]) for name in options.tasks):
            return manager
    manager = TaskManager(include_path=options.task_folder)
    for name in options.tasks:
        if not manager.match_tasks([name]):
            near = get_close_matches(name, manager.all_tasks, 1)
            hint = f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists them"
            raise EightfoldError(f"lm-eval has no task {name!r}; {hint}")
    return manager


def run_lm_eval(engine: Engines, manager: TaskManager, options: LmEvalOptions, settings: Mapping[str, Any]) -> str:
    """Run tasks of the register that `check_tasks` gave, write lm_eval_results.json → lm-eval's table.

    Each answer is kept in a data base whose name holds a fingerprint of `settings`, so an interrupted run goes on.
    """
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    cache = options.folder / f"lm_eval_{fingerprint}"
    if options.overwrite:
        for path in options.folder.glob(f"{cache.name}_rank*.db"):
            path.unlink()
    results = simple_evaluate(
        model=EightfoldLM(engine, options.chat_template),
        tasks=manager.match_tasks(list(options.tasks)),
        num_fewshot=options.shots,
        limit=options.limit,
        use_cache=str(cache),
        apply_chat_template=options.chat,
        task_manager=manager,
        confirm_run_unsafe_code=options.allow_code_execution,
        log_samples=False,
    )
    content = json.dumps({"settings": dict(settings), **results}, indent=2, default=str, ensure_ascii=False)
    write_text(options.folder / "lm_eval_results.json", content + "\n")
    return str(make_table(results))
