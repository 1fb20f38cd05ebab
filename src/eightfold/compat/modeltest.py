"""modeltest's `run.sh`: performance and accuracy tests, and where their results go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.compat.console import note
from eightfold.compat.dialogue import check_limit, say_ineffective
from eightfold.compat.environment import Environment, has_npu, read_environment
from eightfold.compat.modeltest_grammar import ModelTest, parse
from eightfold.types import EightfoldError

if TYPE_CHECKING:
    from eightfold.config import ModelConfig

# What the data types are computed in. On CPUs fp16 is fp32 arithmetic on the weights as they lie, with keys and values
# in fp16: nothing is narrower than asked for, and 16-bit weights of the other kind need no converted copy.
DTYPES = {"cpu": {"fp16": "float32", "bf16": "bfloat16"}, "npu": {"fp16": "float16", "bf16": "bfloat16"}}
KV_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
USAGE = """\
bash run.sh {pa_fp16|pa_bf16|fa|basic} TEST …, with TEST … one of

  performance CASES BATCH [prefill_bs] [prefill_length N] [dataset NAME [padding] [batches|INF]]
  performance_maxbs CASES [[lo,hi],…] TIME_LIMIT_MS
  performance_single|precision_single CASES '["a","b"]'|FILE BATCH
  full_DATASET [shot] BATCH                     (full_NeedleBench [4k|8k|16k|32k|64k|128k] BATCH)

and then mixtral [chat|base] WEIGHTS [trust_remote_code] CHIPS [parallel_list] [max_position_embeddings];
on several machines RANK_TABLE WORLD_SIZE NODES RANK_START MASTER_ADDR in the place of CHIPS.
Results go to tests/modeltest/outputs, data sets lie in tests/modeltest/data. See docs/from_mindie.md."""


@dataclass(frozen=True, slots=True)
class Places:
    """Folders of a test's files, and where the data sets lie."""

    results: Path
    data: Path
    debug: Path
    datasets: Path
    benchmark: Path


def main(argv: Sequence[str]) -> int:
    """`run.sh`, modeltest's folder, and the words that the user typed → 0. Raises EightfoldError."""
    words = list(argv[2:])
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0 if words else 2
    environment = read_environment(os.environ, has_npu())
    test = parse(words)
    for text in test.notes:
        note(text)
    say_ineffective(environment)
    for text in unused_switches(test, environment):
        note(text)
    run(test, environment, environment.modeltest_home or Path(argv[1]))
    return 0


def unused_switches(test: ModelTest, environment: Environment) -> list[str]:
    """Notes on what the environment asks for and this test does not do. Raises EightfoldError on too few devices."""
    notes = []
    timed = test.test.startswith("performance")
    if environment.benchmark_file is not None and not timed:
        notes.append(f"ATB_LLM_BENCHMARK_ENABLE has no effect on {test.test} tests: their times are not kept")
    if environment.split_prefill and test.test != "performance":
        notes.append(f"MODELTEST_PD_SPLIT_ENABLE has no effect on {test.test} tests")
    if environment.split_prefill and test.prefill_batch is not None:
        notes.append("the prefill batch has no effect with MODELTEST_PD_SPLIT_ENABLE=1: prefill_length counts")
    here = test.layout.world // test.layout.nodes
    if environment.devices is not None and environment.devices != here:
        listed = f"{environment.devices_variable} lists {environment.devices} devices, and CHIPS makes {here} here"
        if environment.hardware != "CPU" and environment.devices < here:
            raise EightfoldError(f"{listed}: ask for as many as are listed")
        notes.append(f"{listed}: CHIPS counts")
    return notes


def run(test: ModelTest, environment: Environment, home: Path) -> None:
    """Everything that may be wrong is looked at before the model is loaded. Raises EightfoldError."""
    from eightfold.config import EngineConfig, load_model_config
    from eightfold.eval.results import check_writable
    from eightfold.hub import resolve
    from eightfold.loader import check_place  # torch and all, for which mistakes in the words need not wait
    from eightfold.parallel.place import find_place

    if environment.torchrun_ranks is not None:
        raise EightfoldError("run.sh starts its ranks itself: call it without torchrun")
    model = load_model_config(resolve(test.weights))
    config = EngineConfig(**engine_options(test, environment))
    check_place(config, find_place(config, os.environ))
    check_context(test, model)
    places = places_of(test, environment, model, home)
    for folder in (places.results, places.data, places.debug, places.benchmark.parent):
        check_writable(folder)
    if test.test == "full":
        from eightfold.compat.precision import run_precision

        run_precision(test, environment, places)
    else:
        from eightfold.compat.performance import run_lengths
        from eightfold.compat.tables import check_target

        check_target(places.benchmark)
        run_lengths(test, environment, model, places)


def places_of(test: ModelTest, environment: Environment, model: ModelConfig, home: Path) -> Places:
    """As the reference names them: …/results/CPU/precision_test/full/fp16_w8a8_dynamic/mixtral."""
    from eightfold.quant_config import quantize_key

    kind = "performance_test" if test.test.startswith("performance") else "precision_test"
    scheme = "" if model.scheme == "dense" else f"_{quantize_key(model.scheme)}"
    below = Path(environment.hardware) / kind / test.test / f"{test.data_type}{scheme}" / test.model
    outputs = home / "outputs"
    return Places(
        results=outputs / "results" / below,
        data=outputs / "data" / below,
        debug=outputs / "debug" / below,
        datasets=home / "data",
        benchmark=environment.benchmark_file or home / "benchmark.csv",
    )


def check_context(test: ModelTest, model: ModelConfig) -> None:
    """Raises EightfoldError where a case does not fit the model's context, or the one that was asked for."""
    check_limit(test.context, model)
    context = test.context or model.max_position_embeddings
    for case in test.cases:
        if sum(case) > context and not test.texts:
            raise EightfoldError(
                f"CASES: [{case.input_len},{case.output_len}] makes sequences of {sum(case)} tokens, and the context "
                f"holds {context}"
            )


def engine_options(test: ModelTest, environment: Environment) -> dict[str, Any]:
    """What all tests have in common, as fields of EngineConfig."""
    kind = "cpu" if environment.hardware == "CPU" else "npu"
    return {
        "model": test.weights,
        "device": environment.device,
        "dtype": DTYPES[kind][test.data_type],
        "kv_cache_dtype": KV_DTYPES[test.data_type],
        **test.layout.engine_options(),
    }
