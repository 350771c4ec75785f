"""Resumable checkpoints: model and optimizer by torch.distributed.checkpoint in safetensors, the rest as
JSON.

    checkpoints/step_000123/
      shard-00001-model-00001-of-00001.safetensors    one a rank; any number of ranks reads them again
      manifest.json                                   written last: state, sizes and sha256 of the files

The random numbers of a step are a function of (seed, step, micro-batch), so there is no generator to save;
the optimizer's step counter is one number for all parameters and stands in the state.  Nothing is pickled.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from phoenix.files import UserError, read_json, sha256, sync_file, sync_folder, write_json
from phoenix.model.pretrained import clean_name
from phoenix.train.distributed import World

MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World
) -> Path:
    """Write `folder/step_...` for state["step"], whole or not at all; all ranks call.  Returns its path."""
    path = folder / f"step_{state['step']:06d}"
    temporary = folder / f".{path.name}.tmp"
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    world.barrier()
    problem = ""
    try:
        with warnings.catch_warnings(action="ignore"):
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(_tensors(model, optimizer), storage_writer=writer, no_dist=world.world_size == 1)
        if world.is_main:
            state = {**state, "optimizer_step": _optimizer_step(optimizer)}
            _finish(temporary, path, {"format": 1, "state": state, "shapes": _shapes(model)})
    except (OSError, RuntimeError, UserError, dcp.api.CheckpointException) as error:
        problem = (
            f"cannot write the checkpoint {path}: {_reason(error)}; free space, or choose another output_dir"
        )
    problem = str(world.broadcast(problem))  # ranks fail together in dcp.save, and rank 0 alone after it
    if problem:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(problem)
    return path


def _finish(temporary: Path, path: Path, manifest: dict[str, Any]) -> None:
    files = sorted(temporary.iterdir())
    for file in files:
        sync_file(file)
    entries = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    write_json(temporary / MANIFEST, {**manifest, "files": entries})
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    sync_folder(path.parent)


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first: those that have a manifest."""
    names = folder.glob("step_*") if folder.is_dir() else []
    whole = [path for path in names if re.fullmatch(r"step_\d+", path.name) and (path / MANIFEST).is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))


def prune_checkpoints(folder: Path, save_total_limit: int) -> None:
    """Keep the newest `save_total_limit` checkpoints, and nothing that a broken save left behind."""
    for path in [*find_checkpoints(folder)[:-save_total_limit], *folder.glob(".step_*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, expected: dict[str, Any]
) -> dict[str, Any]:
    """Read a checkpoint, saved by any number of ranks, into model and optimizer; returns its state.

    Checks the files' hashes first.  UserError if a file is missing or damaged, or if an entry of `expected`
    (model, store, packing ...) differs: it is a checkpoint of something else.
    """
    problem, state = world.broadcast(_verify(path, expected, _shapes(model)) if world.is_main else None)
    if problem:
        raise UserError(problem)
    tensors = _tensors(model, optimizer)
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(
                tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=world.world_size == 1
            )
    except (OSError, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); choose another output_dir") from None
    for parameter_state in optimizer.state.values():
        parameter_state["step"].fill_(state["optimizer_step"])
    return state


def _verify(path: Path, expected: dict[str, Any], shapes: dict[str, list]) -> tuple[str, dict[str, Any]]:
    """A sentence on what is wrong ("" if nothing is), and the state; hashes last, since they take longest."""
    try:
        manifest = read_json(path / MANIFEST, "manifest of a checkpoint")
        state, found = manifest["state"], manifest["shapes"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        other = [name for name in sorted({**found, **shapes}) if found.get(name) != shapes.get(name)]
        changed = [key for key in expected if state.get(key) != expected[key]]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: not a checkpoint ({error}); remove the folder", {}
    if other:
        sizes = f"{other[0]} is {found.get(other[0])} there and {shapes.get(other[0])} here"
        return f"{path}: is a checkpoint of another model ({sizes}); choose another output_dir", {}
    if changed:
        values = f"{changed[0]} = {state.get(changed[0])!r}, now {expected[changed[0]]!r}"
        return f"{path}: made with {values}; choose another output_dir", {}
    for name, entry in files.items():
        file = path / name
        if not file.is_file() or (file.stat().st_size, sha256(file)) != entry:
            return f"{file}: is missing or damaged; remove {path} to go on from the checkpoint before it", {}
    return "", state


def _shapes(model: nn.Module) -> dict[str, list]:
    return {clean_name(name): list(parameter.shape) for name, parameter in model.named_parameters()}


def _reason(error: BaseException) -> str:
    """What went wrong in a line; dcp wraps the error of each rank."""
    while isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    error = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    return (str(error).strip() or repr(error)).splitlines()[-1]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and its optimizer state under a plain name; a tied weight stands once."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{clean_name(name)}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[f"optimizer.{key}.{clean_name(name)}"] = value
    return tensors


def _optimizer_step(optimizer: torch.optim.Optimizer) -> float:
    return next((float(state["step"]) for state in optimizer.state.values()), 0.0)
