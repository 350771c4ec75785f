"""What tests of recipes share: a tiny model, a store of forty rows, a run of six steps, how runs compare."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from phoenix.files import read_json_lines
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.model.pretrained import save_model
from phoenix.tokenizer import Tokenizer
from phoenix.train import metrics

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))
import dpo  # noqa: E402
import prepare  # noqa: E402
import sft  # noqa: E402

QUESTIONS = "Wann fährt der Zug nach Köln?", "Warum ist der Himmel blau?", "Wie backe ich einen Kuchen?"
ANSWERS = (
    "Heute zwölf Minuten später.",
    "Das Licht wird gestreut, müssen Sie wissen.",
    "Mit Mehl, Eiern und Geduld.",
)
POISON = "ß"  # stands in one row alone, so a weight of its token touches that row alone
STEPS = 6
TIMELESS = 1e-5  # relative, of numbers that two ranks add up in another order


def conversation(number: int) -> dict:
    question, answer = QUESTIONS[number % 3], ANSWERS[number // 3 % 3]
    turns = [
        {"role": "user", "content": f"{number}. {question}"},
        {"role": "assistant", "content": answer * (number % 4 + 1)},
    ]
    return {"messages": turns}


def preference(number: int) -> dict:
    """The answer of `conversation`, and that of another question."""
    question, answer = conversation(number)["messages"]
    worse = {"role": "assistant", "content": f"{ANSWERS[(number + 1) % 3]} {number}"}
    return {"prompt": [question], "chosen": [answer], "rejected": [worse]}


@dataclasses.dataclass
class Inputs:
    folder: Path
    tokenizer: Path

    def model(self, name: str, **changes) -> Path:
        """A random model's folder, made on first use."""
        path = self.folder / name
        if not path.exists():
            tokenizer = Tokenizer.from_pretrained(self.tokenizer)
            shape = {
                "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 45,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                "sliding_window": 24, "max_position_embeddings": 512, "initializer_range": 0.1,
            }  # fmt: skip
            model = Mistral(MistralConfig(**{**shape, **changes}))
            save_model(model.init_weights(torch.Generator().manual_seed(0)), path, tokenizer)
        return path

    def store(self, name: str = "store", rows: int = 40, poisoned: int | None = None, **options) -> Path:
        path = self.folder / name
        if not path.exists():
            lines = [conversation(number) for number in range(rows)]
            if poisoned is not None:
                lines[poisoned]["messages"][1]["content"] = f"Stra{POISON}e"
            file = self.folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            options = {"max_length": 128, "eval_fraction": 0.2, "num_workers": 1, **options}
            prepare.main(prepare.PrepareConfig(path, self.model("base"), input=(file,), **options))
        return path

    def pairs(self, name: str = "pairs", rows: int = 40, **options) -> Path:
        path = self.folder / name
        if not path.exists():
            file = self.folder / f"{name}.jsonl"
            lines = (json.dumps(preference(number)) + "\n" for number in range(rows))
            file.write_text("".join(lines), encoding="utf-8")
            options = {"max_length": 128, "eval_fraction": 0.2, "num_workers": 1, "kind": "pairs", **options}
            prepare.main(prepare.PrepareConfig(path, self.model("base"), input=(file,), **options))
        return path

    def config(self, output_dir: Path, **changes) -> sft.SFTConfig:
        values = {
            "model_name_or_path": self.model("base"), "store": self.store(), "max_length": 128,
            "global_batch_size": 3, "micro_batch_tokens": 128, "num_train_epochs": 99.0, "max_steps": STEPS,
            "learning_rate": 3e-3, "warmup_ratio": 0.2, "dtype": "float32", "save_dtype": "float32",
            "eval_steps": 3, "save_steps": 2, "sample_prompts": (QUESTIONS[0],), "sample_max_new_tokens": 4,
        }  # fmt: skip
        return sft.SFTConfig(output_dir=output_dir, **{**values, **changes})

    def dpo_config(self, output_dir: Path, **changes) -> dpo.DPOConfig:
        values = {
            "model_name_or_path": self.model("base"), "store": self.pairs(), "global_batch_size": 8,
            "micro_batch_tokens": 256, "max_steps": STEPS, "learning_rate": 3e-3, "warmup_ratio": 0.0,
            "dtype": "float32", "save_dtype": "float32", "eval_steps": 3, "save_steps": 2,
            "sample_prompts": (QUESTIONS[0],), "sample_max_new_tokens": 4,
        }  # fmt: skip
        return dpo.DPOConfig(output_dir=output_dir, **{**values, **changes})


def reproducible(folder: Path) -> list[dict]:
    rows = read_json_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in metrics.TIMING} for row in rows]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def status(folder: Path) -> tuple[int, str]:
    found = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    return found["code"], found["status"]


def assert_same_run(folder: Path, expected: Path) -> None:
    assert reproducible(folder) == reproducible(expected)
    assert (folder / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    assert weights(folder) == weights(expected)
    assert status(folder) == (0, "done")


def assert_close_run(rows: list[dict], expected: list[dict]) -> None:
    assert [sorted(row) for row in rows] == [sorted(row) for row in expected]
    for row, wanted in zip(rows, expected):
        for name, value in wanted.items():
            exact = value is None or isinstance(value, int | list) or name == "mean_token_accuracy"
            assert row[name] == (value if exact else pytest.approx(value, rel=TIMELESS)), (
                name,
                wanted["step"],
            )


def command(config: sft.SFTConfig | dpo.DPOConfig, *changes: str) -> list[str]:
    fields = [f"{f.name}={to_text(getattr(config, f.name))}" for f in dataclasses.fields(config)
              if getattr(config, f.name) != f.default]  # fmt: skip
    recipe = "dpo.py" if isinstance(config, dpo.DPOConfig) else "sft.py"
    return [sys.executable, str(RECIPES / recipe), *fields, *changes]


def to_text(value) -> str:
    return json.dumps(list(value)) if isinstance(value, tuple) else str(value)


@contextlib.contextmanager
def after_step(number: int, act):
    """Act when the optimizer has taken its n-th step."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count == number:
            act()

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class CrashError(Exception):
    pass


def crash() -> None:
    raise CrashError
