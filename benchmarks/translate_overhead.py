"""Tokens a second of translation by vLLM beside a bare `LLM.generate`, in turns, in one process.

    python benchmarks/translate_overhead.py [--model=FOLDER] [--pieces=160] [--rounds=5] [--rows=FILE]

Three sides answer the same prompts with the same running engine: `bare`, one call of LLM.generate with the
texts and the sampling that we use; `engine`, VLLMEngine.translate; `recipe`, a whole run of
recipes/translate.py in a new folder, from the file of rows to translated.jsonl and report, each piece asked
once.  Tokens are those that were generated, seconds those of the wall clock; own_cpu_seconds are those of
this process alone, which other work on the machine does not stretch: what a side needs there beyond the bare
call is its overhead.  vLLM's cache of prompts is emptied before each.  Ends with 1 if a side stays below 90 %
of the bare call in the median of the rounds.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from phoenix.data.reading import read_rows  # noqa: E402
from phoenix.files import write_json  # noqa: E402
from phoenix.translate.engines import VLLMEngine, open_engine, prompt  # noqa: E402
from phoenix.translate.language import load_language  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "translate_overhead.json"
MODEL = ROOT / "models" / "smollm2-135m-instruct"
ROWS = ROOT / "recipes" / "sample" / "english.jsonl"
ENOUGH = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--pieces", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    recipe, language = load_recipe(), load_language("de")
    with tempfile.TemporaryDirectory() as folder:
        config = recipe.TranslateConfig(
            input=Path(folder) / "rows.jsonl", output=Path(folder) / "run", model=str(options.model),
            max_model_len=1024, enforce_eager=True, max_attempts=1,
        )  # fmt: skip
        sources = write_rows(options.rows, config.input, options.pieces)
        engine = open_engine(config, language)
        sides = {
            "bare": make_bare(engine, sources),
            "engine": lambda number: sum(reply.completion_tokens for reply in engine.translate(sources)),
            "recipe": lambda number: run_recipe(recipe, engine, config, number),
        }
        rounds = [measure(engine, sides, number) for number in range(options.rounds + 1)][1:]
        result = {"environment": describe(engine, options.model), "pieces": len(sources), "rounds": rounds}
        engine.close()
    result |= summarise(rounds)
    write_json(options.output, result)
    print(
        json.dumps({name: result[name] for name in result if name not in ("rounds", "environment")}, indent=2)
    )
    sys.exit(min(result["share_of_bare"].values()) < ENOUGH)


def load_recipe():
    """recipes/ is no package."""
    spec = importlib.util.spec_from_file_location("recipe_translate", ROOT / "recipes" / "translate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_rows(source: Path, path: Path, number: int) -> list[str]:
    """The first lines of letters in the texts of a file of rows, each a row; they are the pieces, too."""
    texts = []
    for _, row in read_rows(source):
        texts += [row["source"]] if "source" in row else [m["content"] for m in row["messages"]]
    lines = dict.fromkeys(line for text in texts for line in text.split("\n"))
    plain = [line for line in lines if line[:1].isalpha() and line[-1:] in ".?!" and len(line) < 500
             and not set(line) & set("`*_<>{}[]|$#@/\\%")][:number]  # fmt: skip
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in plain))
    return plain


def make_bare(engine: VLLMEngine, sources: list[str]) -> Callable[[int], int]:
    """The call that one would write without Phoenix, with the same prompts and sampling."""
    budgets = [engine.prompts.fit(source, engine.max_model_len)[1] for source in sources]
    prompts, params = [prompt(s, engine.language) for s in sources], engine.sampling_params(budgets, 0)

    def bare(number: int) -> int:
        outputs = engine._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return bare


def run_recipe(recipe, engine: VLLMEngine, config, number: int) -> int:
    """A run from rows to rows, with the engine that runs already."""
    output = config.output.with_name(f"run-{number}")
    stays_open = Borrowed(engine)
    recipe.open_engine = lambda config, language: stays_open
    recipe.main(dataclasses.replace(config, output=output))
    return stays_open.tokens


class Borrowed:
    """An engine that its borrower cannot close; it counts the tokens generated."""

    name = "vllm"

    def __init__(self, engine: VLLMEngine) -> None:
        self.engine, self.tokens, self.settings = engine, 0, engine.settings

    def translate(self, sources, *, attempt=0):
        replies = self.engine.translate(sources, attempt=attempt)
        self.tokens += sum(reply.completion_tokens for reply in replies)
        return replies

    def close(self) -> None:
        pass


def measure(engine: VLLMEngine, sides: dict[str, Callable[[int], int]], number: int) -> dict[str, dict]:
    """Tokens and seconds of each side, in an order that turns with the rounds."""
    names, found = list(sides), {}
    for name in names[number % len(names) :] + names[: number % len(names)]:
        engine._llm.reset_prefix_cache()
        began, own = time.perf_counter(), time.process_time()
        tokens = sides[name](number)
        seconds, own = time.perf_counter() - began, time.process_time() - own
        found[name] = {
            "tokens": tokens, "seconds": seconds, "own_cpu_seconds": own,
            "tokens_per_second": tokens / seconds,
        }  # fmt: skip
        said = f"round {number}: {name:6} {tokens} tokens in {seconds:.1f} s, {own:.2f} s of this process"
        print(said, file=sys.stderr, flush=True)
    return found


def summarise(rounds: list[dict[str, dict]]) -> dict:
    """Median tokens a second of each side, and the median over the rounds of its share of the bare call."""
    speed = {name: [each[name]["tokens_per_second"] for each in rounds] for name in rounds[0]}
    shares = {name: [ours / bare for ours, bare in zip(speed[name], speed["bare"])] for name in speed}
    own = {name: statistics.median(each[name]["own_cpu_seconds"] for each in rounds) for name in rounds[0]}
    return {
        "own_cpu_seconds": own,
        "tokens_per_second": {name: statistics.median(values) for name, values in speed.items()},
        "share_of_bare": {name: statistics.median(shares[name]) for name in ("engine", "recipe")},
        "lowest_share": {name: min(shares[name]) for name in ("engine", "recipe")},
        "needed_share": ENOUGH,
    }


def describe(engine: VLLMEngine, model: Path) -> dict:
    from side_by_side import environment

    about = environment(["torch", "transformers"])
    return {**about, "vllm": engine._vllm.__version__, "cores": os.cpu_count(), "model": model.name}


if __name__ == "__main__":
    main()
