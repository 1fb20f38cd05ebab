"""`run_pa.sh` and `run_pa.py`: questions in, greedy answers out, with the reference's lines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eightfold.compat.console import log, note
from eightfold.compat.dialogue_grammar import Dialogue, parse_python, parse_script
from eightfold.compat.environment import Environment, has_npu, read_environment
from eightfold.types import EightfoldError, Request, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from eightfold.config import ModelConfig
    from eightfold.llm import LLM

WARM_UP = 64  # tokens of a prompt that reaches all experts


def main(argv: Sequence[str]) -> int:
    """run_pa.sh or run_pa.py with its words → 0. Raises EightfoldError."""
    environment = read_environment(os.environ, has_npu())
    parse = parse_script if argv[0] == "run_pa.sh" else parse_python
    dialogue = parse(argv[1:], environment)
    for text in dialogue.notes:
        note(text)
    say_ineffective(environment)
    run(dialogue, environment)
    return 0


def say_ineffective(environment: Environment) -> None:
    """Name the switches that are set and do nothing here, once."""
    if environment.ineffective:
        note(f"no effect on this backend: {', '.join(environment.ineffective)}")


def check_limit(context: int | None, model: ModelConfig) -> None:
    """Raises EightfoldError where max_position_embeddings, if it is given, is more than the model was made for."""
    if context is not None and context > model.max_position_embeddings:
        raise EightfoldError(
            f"max_position_embeddings is {context}; the model has {model.max_position_embeddings} at most"
        )


def run(dialogue: Dialogue, environment: Environment) -> None:
    """Load the model, answer, print. Raises EightfoldError on inputs that can't be run, before any is."""
    from eightfold.compat.tables import check_target
    from eightfold.config import load_model_config  # torch, for which a mistake in the words should not have to wait
    from eightfold.hub import resolve
    from eightfold.llm import LLM

    if environment.benchmark_file is not None:
        check_target(environment.benchmark_file)
    if dialogue.context is not None:
        check_limit(dialogue.context, load_model_config(resolve(dialogue.model)))
    # As with the reference, a batch of one prompt is that prompt so many times: all of it is computed each time.
    options: dict[str, Any] = dialogue.layout.engine_options()
    if dialogue.prefill_tokens is not None:
        options["max_num_batched_tokens"] = dialogue.prefill_tokens
    with LLM(
        dialogue.model,
        device=environment.device,
        block_size=dialogue.block_size,
        max_num_seqs=dialogue.batch,
        max_model_len=dialogue.context,
        skip_tokenizer_init=not dialogue.load_tokenizer,
        enable_prefix_caching=False,
        **options,
    ) as llm:
        _answer(llm, dialogue, environment)


def prompts_of(llm: LLM, dialogue: Dialogue) -> list[tuple[str, list[int]]]:
    """Each question as it is printed, and its tokens."""
    if dialogue.ids:
        return [(",".join(map(str, ids)), list(ids)) for ids in dialogue.ids]
    tokenizer = llm.get_tokenizer()
    if dialogue.conversations:
        return [
            (str(talk), tokenizer.encode_chat(talk, True, dialogue.chat_template)) for talk in dialogue.conversations
        ]
    if dialogue.chat:
        talks = [[{"role": "user", "content": text}] for text in dialogue.texts]
        encoded = [tokenizer.encode_chat(talk, True, dialogue.chat_template) for talk in talks]
        return list(zip(dialogue.texts, encoded, strict=True))
    return [(text, tokenizer.encode(text)) for text in dialogue.texts]


def replicated(prompts: Sequence[list[int]], batch: int) -> list[list[int]]:
    """A single prompt `batch` times; several as they are."""
    return list(prompts) * (batch if len(prompts) == 1 else 1)


def print_answers(questions: Sequence[str], answers: Sequence[tuple[str, int]]) -> None:
    """The reference's lines; `answers` are texts with their numbers of tokens. A replicated question stands once."""
    for number, (text, count) in enumerate(answers):
        if number < len(questions):
            print(f"Question[{number}]: {questions[number]}")
        print(f"Answer[{number}]: {text}")
        print(f"Generate[{number}] token num: {(number, count)}", flush=True)


def _answer(llm: LLM, dialogue: Dialogue, environment: Environment) -> None:
    from eightfold.compat.tables import write_benchmark
    from eightfold.compat.timed import run_timed

    log(f"device: {environment.device}, ranks: {dialogue.layout.world}")
    log(f"memory after init: {_memory()}")
    prompts = prompts_of(llm, dialogue)
    for number, (_, ids) in enumerate(prompts):
        if len(ids) > dialogue.input_length:
            raise EightfoldError(
                f"question {number} has {len(ids)} tokens, above --max_input_length {dialogue.input_length}: raise it"
            )
        if len(ids) >= llm.engine.max_model_len:
            raise EightfoldError(
                f"question {number} has {len(ids)} tokens; the context holds {llm.engine.max_model_len}, of which at "
                "least one is for the answer: shorten it, or raise --max_position_embeddings"
            )
    params = SamplingParams(
        temperature=0,
        max_tokens=dialogue.output_length,
        ignore_eos=dialogue.ignore_eos,
        detokenize=dialogue.load_tokenizer,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    batch = replicated([ids for _, ids in prompts], dialogue.batch)
    log("warm-up begins")
    warm = SamplingParams(temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    run_timed(llm.engine, [Request("question 0, for the warm-up", batch[0][:WARM_UP], warm)])
    log(f"warm-up ends; memory: {_memory()}")
    log("inference begins")
    timed = run_timed(llm.engine, [Request(f"question {number}", ids, params) for number, ids in enumerate(batch)])
    log(f"inference ends after {timed.seconds:.3f} s")
    answers = [output.outputs[0] for output in timed.outputs]
    texts = [one.text if dialogue.load_tokenizer else ",".join(map(str, one.token_ids)) for one in answers]
    counts = [len(one.token_ids) for one in answers]
    print_answers([text for text, _ in prompts], list(zip(texts, counts, strict=True)))
    if environment.benchmark_file is not None:
        write_benchmark(environment.benchmark_file, timed, len(batch[0]), dialogue.output_length)
        log(f"times are in {environment.benchmark_file}")


def _memory() -> str:
    from eightfold.bench.probes import memory

    return ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in memory().items()) or "not known"
