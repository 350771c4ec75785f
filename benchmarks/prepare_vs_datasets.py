"""Rows a second of recipes/prepare.py beside `datasets.map` with the same template and tokenizer.

    python benchmarks/prepare_vs_datasets.py [--rows=100000] [--repeats=3] [--workers=2] [--output=PATH]

Each side is a process of its own, from the start of Python to its result on the disk; the sides take turns.
`phoenix` also reads licences, filters, drops duplicates and writes report and card.  `datasets` maps a row at
a time as TRL's SFTTrainer does: apply_chat_template with the mask of the assistant's tokens.  `batched` is
the fastest form of it that keeps the mask: 1,000 rows a call.  `tokens alone` renders without a mask, which
is less than the others do.  Tokens and masks of all rows are compared.  Needs datasets and transformers (make
.venv).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from side_by_side import environment, ratio, spread  # noqa: E402

from phoenix.data.store import TokenStore  # noqa: E402
from phoenix.files import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "prepare_vs_datasets.json"
MODEL = ROOT / "models" / "smollm2-135m-instruct"
SIDES = ("phoenix", "datasets", "batched", "tokens alone")
# chatml as phoenix/chat.py has it, with the marks that give transformers the assistant's tokens.
TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- set said = m.content + '<|im_end|>' %}
{%- if m.role == 'assistant' %}{% generation %}{{ said }}{% endgeneration %}{% else %}{{ said }}{% endif %}
{{- '\n' }}{% endfor %}"""
PEER = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer

file, output, model, side, workers, template = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.chat_template = template

def encode(rows):
    mask = side != "tokens alone"
    chats = rows["messages"]
    found = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=mask)
    return {"input_ids": found["input_ids"], **({"loss_mask": found["assistant_masks"]} if mask else {})}

rows = load_dataset("json", data_files=file, split="train", cache_dir=output)
rows.map(encode, batched=side != "datasets", num_proc=int(workers), remove_columns=rows.column_names)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="phoenix, datasets, ...")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    seconds = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(Path(folder) / "rows.jsonl", options.rows)
        for number in range(options.repeats):
            for side, taken in seconds.items():
                taken.append(run(side, file, Path(folder) / f"{side} {number}", options.workers))
                print(f"{side}: {options.rows / taken[-1]:.0f} rows/s", flush=True)
        tokens = compare(Path(folder))
    sides = {
        side: {"rows_per_second": options.rows / statistics.median(taken), "spread": spread(taken)}
        for side, taken in seconds.items()
    }
    ratios = {side: ratio(seconds[side], seconds["phoenix"]) for side in options.sides[1:]}
    packages = ("torch", "tokenizers", "transformers", "datasets")
    counts = {"rows": options.rows, "tokens": tokens, "workers": options.workers}
    write_json(options.output, {**counts, "sides": sides, "times_as_fast": ratios, **environment(packages)})
    print(json.dumps({"sides": sides, "times_as_fast": ratios}, indent=2))


def write_rows(path: Path, count: int) -> Path:
    """Short chats of the words of the shipped sample, all different."""
    words, draw = [], random.Random(0)
    for file in sorted((ROOT / "recipes" / "sample").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            words += [word for turn in json.loads(line)["messages"] for word in turn["content"].split()]

    def text(least: int, most: int) -> str:
        start = draw.randrange(len(words) - most)
        return " ".join(words[start : start + draw.randint(least, most)])

    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            turns = [("user", f"{number}: {text(5, 20)}"), ("assistant", text(10, 50))]
            row = {"messages": [{"role": role, "content": said} for role, said in turns], "license": "MIT"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def run(side: str, file: Path, place: Path, workers: int) -> float:
    """Seconds that a side takes, start and end of its processes included."""
    if side == "phoenix":
        command = [
            sys.executable, str(ROOT / "recipes" / "prepare.py"), f'input=["{file}"]', f"output={place}",
            f"model_name_or_path={MODEL}", "chat_template=chatml", f"num_workers={workers}",
            "eval_fraction=0.0", "license_policy=stated",
        ]  # fmt: skip
    else:
        arguments = map(str, (file, place, MODEL, side, workers, TEMPLATE))
        command = [sys.executable, "-c", PEER, *arguments]
    # A process for each row's tokens: the tokenizers' own threads would fight with them.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, **quiet}, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - start


def compare(folder: Path) -> int:
    """Tokens of the first repeat; raises AssertionError where a side has others."""
    from datasets import Dataset, concatenate_datasets

    store, total = TokenStore.open(folder / "phoenix 0"), 0
    files = sorted((folder / "datasets 0").rglob("cache-*.arrow"))
    rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    assert len(rows) == len(store), f"{len(rows)} and {len(store)} rows"
    for index, row in enumerate(rows):
        tokens, mask = store.document(index)
        assert tokens.tolist() == row["input_ids"] and mask.tolist() == [bool(m) for m in row["loss_mask"]]
        total += len(tokens)
    return total


if __name__ == "__main__":
    main()
