"""The run folder: what was asked, on what it ran, and how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import phoenix
from phoenix.config import save_config
from phoenix.files import Interrupted, UserError, lock, read_json, write_json
from phoenix.train.distributed import World

DONE, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 75


@contextlib.contextmanager
def run_folder(folder: Path, world: World) -> Iterator[contextlib.ExitStack]:
    """Hold the folder against other processes, and write status.json (code and words) at the end.

    Gives a stack for what must have ended before others may write here.  Raises UserError, on all ranks
    alike, if the folder cannot be written or another process trains in it.
    """
    with contextlib.ExitStack() as stack:
        taken = (
            f"{folder}: another process trains in this folder; wait for its end, or choose another output_dir"
        )
        world.on_main(lambda: stack.callback(os.close, lock(folder / ".lock", taken)))
        with _status(folder, world), contextlib.ExitStack() as at_end:
            yield at_end


def record_start(folder: Path, config: Any, world: World) -> None:
    """Write config.toml and environment.json, once the folder's run is known to be this one."""

    def write() -> None:
        save_config(folder / "config.toml", config)
        write_json(folder / "environment.json", environment(world))

    world.on_main(write)


@contextlib.contextmanager
def _status(folder: Path, world: World) -> Iterator[None]:
    code, words = FAILED, "ended without a word: killed, or still running"
    try:
        _write_status(folder, code, words, world)
        yield
        code, words = DONE, "done"
    except UserError as error:
        code, words = USER_ERROR, str(error)
        raise
    except Interrupted as stop:
        code, words = STOPPED, str(stop)
        raise
    except BaseException as error:
        words = f"{type(error).__name__}: {error}"
        raise
    finally:
        _write_status(folder, code, words, world)


def is_done(folder: Path) -> bool:
    """True if the run in this folder came to its end."""
    path = folder / "status.json"
    return path.exists() and read_json(path, "status of a run").get("code") == DONE


def model_card(config: Any, rows: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """README.md of a trained model: what really ran, from the resolved config, metrics.jsonl and the data's
    manifest.

    rows: of metrics.jsonl; data: the token store's manifest, which also tells fine-tuning from DPO.
    """
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row][-1:]
    is_dpo, count = data.get("kind") == "pairs", data["splits"]["train"]["rows"]
    table = "\n".join(
        f"| {field.name} | {getattr(config, field.name)} |" for field in dataclasses.fields(config)
    )
    losses = [row["loss"] for row in steps if row["loss"] is not None]
    mean = sum(losses) / max(1, len(losses))
    results = (
        [f"- loss of the last step {losses[-1]:.4f}, mean over {len(losses)} steps {mean:.4f}"]
        if losses
        else []
    )
    results += [f"- steps skipped, their loss not finite: {len(steps) - len(losses)}"]
    shown = {"eval_loss": f"loss on held-out {'pairs' if is_dpo else 'rows'}"}
    shown |= {name: name for name in ("eval_rewards/accuracies", "eval_rewards/margins")}
    results += [
        f"- {words} {math.nan if row[name] is None else row[name]:.4f}"
        for row in held_out
        for name, words in shown.items()
        if name in row
    ]
    how, what = "fine-tuned", f"Rows: {count}."
    if is_dpo:
        how = f"trained on preferences (recipes/dpo.py, loss {' + '.join(config.loss_type)})"
        what = f"Pairs: {count}."
        if config.has_reference:  # some losses do without
            what += f"  Reference: {config.reference_model or config.model_name_or_path}."
    return "\n".join([
        f"# {Path(config.output_dir).name}", "",
        f"{config.model_name_or_path}, {how} with Phoenix {phoenix.__version__} on {config.store}.", "",
        f"Chat template: {data['chat_template']}.  {what}", "",
        "## Results", "", *results, "", "## Config", "", "| field | value |", "| --- | --- |", table, "",
    ])  # fmt: skip


def _write_status(folder: Path, code: int, words: str, world: World) -> None:
    if world.is_main:
        with contextlib.suppress(UserError):  # a full disk must not hide why the run ended
            write_json(folder / "status.json", {"code": code, "status": words})


def environment(world: World) -> dict[str, Any]:
    """Versions, device and processor flags: what a figure of this run was measured on."""
    packages = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "flash-attn")
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    cuda = world.device.type == "cuda"
    flags = torch.cpu.get_capabilities()
    return {
        "phoenix": phoenix.__version__,
        "python": platform.python_version(),
        "packages": versions,
        "device": torch.cuda.get_device_name(world.device) if cuda else str(flags.get("cpu_name", "cpu")),
        "cpu_flags": sorted(name for name, value in flags.items() if value is True),
        "threads": torch.get_num_threads(),
        "world_size": world.world_size,
        "command": sys.argv,
    }
