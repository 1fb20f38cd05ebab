"""`LLM`: the engine for a list of prompts, with the names and results that vLLM's users know."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from eightfold.config import EngineConfig
from eightfold.loader import check_place, load_engine
from eightfold.parallel.place import find_place
from eightfold.tokenizer import Tokenizer
from eightfold.types import EightfoldError, Progress, Request, RequestOutput, RequestOutputKind, SamplingParams
from eightfold.worker import follow_as_told

if TYPE_CHECKING:
    from eightfold.parallel.launch import Job

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A Mixtral checkpoint, ready to answer.

    `model` is a folder, "demo", or a name on the Hugging Face hub. The options are the fields of `EngineConfig`.
    `progress` hears of the bytes of weights that have come into memory. `trust_remote_code` is accepted for
    compatibility: no code from a checkpoint is ever executed. Raises EightfoldError if the model can't be run as asked.

    With `tensor_parallel_size` above 1 the other ranks of this machine are started as processes of their own, and end
    with `close()`. Under torchrun, or with a `node_rank` above 0, all processes but rank 0's stay in here until rank 0
    closes, and end then. RankError, which names the rank, is raised when one fails.
    """

    _job: Job | None = None
    _finalizer: weakref.finalize[Any, LLM] | None = None

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        kv_cache_dtype: str = "auto",
        block_size: int = 32,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        threads: int | None = None,
        strict_kernels: bool = False,
        enforce_eager: bool = True,
        skip_tokenizer_init: bool = False,
        load_mode: str = "mmap",
        allow_pickle: bool = False,
        exact_ranks: bool = True,
        tensor_parallel_size: int | None = None,
        moe_tensor_parallel_size: int | None = None,
        moe_expert_parallel_size: int | None = None,
        enable_expert_parallel: bool = False,
        nnodes: int = 1,
        node_rank: int = 0,
        master_addr: str | None = None,
        master_port: int | None = None,
        distributed_timeout_seconds: int = 8,
        trust_remote_code: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        del trust_remote_code  # nothing remote is ever executed, so there is nothing to trust
        options = {name: value for name, value in locals().items() if name in EngineConfig.__dataclass_fields__}
        config = EngineConfig(**options)
        place = find_place(config, os.environ)
        if place.rank != 0:
            sys.exit(follow_as_told(options))
        self.world_size, self.nodes = place.size, place.nodes  # ranks, this one among them, and their machines
        ranks = None
        if place.size > 1:
            check_place(config, place)
            from eightfold.parallel.launch import Job  # brings torch.distributed with it

            self._job = job = Job(config, place, os.environ)
            config, ranks = job.config, job.ranks
            self._finalizer = weakref.finalize(self, job.close)
        try:
            self.engine = load_engine(config, progress, ranks)
        except BaseException:
            self.close()
            raise
        self._next_id = 0

    @property
    def cores(self) -> list[int] | None:
        """The cores that this machine's ranks compute on; None of one rank, which has those of its process."""
        return None if self._job is None else self._job.cores

    def rank_failure(self) -> str | None:
        """Which of the other ranks failed, and why; None while all is well. The next step would raise it as RankError,
        but a program that waits for something else may want to know."""
        return None if self._job is None else self._job.failure()

    def close(self) -> None:
        """End the other ranks, where there are any; nothing can be generated afterwards. So does the end of this
        object, or of the program."""
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises EightfoldError if the LLM was made without one."""
        if self.engine.tokenizer is None:
            raise EightfoldError("this LLM was made with skip_tokenizer_init=True: give token ids instead of text")
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; results in the order of the prompts.

        A prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}. Parameters are one
        for all or one each. Progress is shown by default where standard error is a terminal. Raises EightfoldError,
        with nothing started, if a prompt or its parameters can't be run; a request that fails in the middle comes
        back with finish_reason "error".
        """
        single = isinstance(prompts, (str, Mapping)) or bool(prompts and isinstance(prompts[0], int))
        listed: Sequence[Any] = [prompts] if single else prompts  # type: ignore[assignment]
        return self._run([self._tokens(prompt) for prompt in listed], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: each a list of {"role", "content"}."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        tokenizer = self.get_tokenizer()
        prompts = []
        for conversation in conversations:
            ids = tokenizer.encode_chat(conversation, add_generation_prompt, chat_template)
            prompts.append((tokenizer.decode(ids, skip_special_tokens=False), ids))
        return self._run(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Continue one prompt, an output for each step that has something new."""
        self._check_idle()
        name = self._add(*self._tokens(prompt), sampling_params or SamplingParams())
        finished = False
        try:
            while not finished:
                for output in self.engine.step():
                    finished = output.finished
                    yield output
        finally:
            self.engine.abort(name)

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            keys = set(prompt)
            if keys == {"prompt"}:
                return self._tokens(str(prompt["prompt"]))
            if keys <= {"prompt", "prompt_token_ids"} and "prompt_token_ids" in keys:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            raise EightfoldError(f"a prompt has the keys {sorted(keys)}; it must have prompt or prompt_token_ids")
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt)
        return None, list(prompt)

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        self._check_idle()
        each = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise EightfoldError(f"{len(prompts)} prompts but {len(each)} sampling parameters; give one, or one each")
        names: list[str] = []
        done: dict[str, RequestOutput] = {}
        hidden = not (sys.stderr.isatty() if use_tqdm is None else use_tqdm)
        try:
            for (text, tokens), one in zip(prompts, each, strict=True):
                whole = replace(one, output_kind=RequestOutputKind.FINAL_ONLY)
                names.append(self._add(text, tokens, whole))
            with tqdm(total=len(names), desc="Prompts", unit="prompt", disable=hidden) as bar:
                while len(done) < len(names):
                    for output in self.engine.step():
                        if output.finished:
                            done[output.request_id] = output
                            bar.update()
        finally:
            for name in names:
                self.engine.abort(name)
        return [done[name] for name in names]

    def _check_idle(self) -> None:
        if self.engine.has_unfinished_requests:
            raise EightfoldError("an answer of this LLM is still being streamed; read it to its end or close it first")

    def _add(self, text: str | None, tokens: list[int], params: SamplingParams) -> str:
        name = str(self._next_id)
        self.engine.add(Request(name, tokens, params, text, time.perf_counter()))
        self._next_id += 1
        return name
