"""Model folders in Hugging Face layout: config.json, safetensors (sharded with an index), tokenizer files.

Loading streams tensor by tensor into the wanted dtype and device; a sharded parameter reads only its own
rows.  Every name, shape and dtype is checked first.  Only safetensors are read: no pickle, no code of a model
folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from phoenix.files import (
    UserError,
    atomic_folder,
    describe_file,
    inside,
    read_json,
    unique_keys,
    write_json,
)
from phoenix.model.mistral import Mistral, MistralConfig

if TYPE_CHECKING:
    from phoenix.tokenizer import Tokenizer

INDEX, SINGLE, MANIFEST = "model.safetensors.index.json", "model.safetensors", "manifest.json"


def read_config(folder: Path) -> MistralConfig:
    """The model's shape from config.json.  UserError names file and key of what is missing or unsupported."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: there is no such folder; expected a model folder with config.json")
    path = Path(folder) / "config.json"
    return MistralConfig.from_dict(read_json(path, "config.json of a model folder"), str(path))


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Mistral:
    """A model with the weights of `folder`, cast to `dtype` on `device`; in evaluation mode.

    Raises UserError for a missing, cut or lying file, and for tensors that are missing, too many or of
    another shape.
    """
    model = meta_model(read_config(folder)).to(dtype)
    with open_tensors(folder) as tensors:  # before memory is taken for what config.json claims
        _check(tensors, dict(model.named_parameters()), model.config, folder)
    materialise(model, device)
    load_weights(model, folder)
    return model.eval()


def meta_model(config: MistralConfig) -> Mistral:
    """A model without memory behind it: to shard and wrap before `materialise` and `load_weights`."""
    return Mistral(config, device="meta")


def materialise(model: Mistral, device: Any) -> None:
    """Give a meta model memory on `device`, uninitialised, its tied head still tied."""
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.tie_weights()


@torch.no_grad()
def load_weights(model: Mistral, folder: Path) -> None:
    """Copy the tensors of `folder` into the parameters of `model`, each cast to the parameter's dtype.

    A DTensor parameter reads only the rows that this rank holds.
    """
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    with open_tensors(folder) as tensors:
        _check(tensors, parameters, model.config, folder)
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                _, start = compute_local_shape_and_global_offset(
                    parameter.shape, parameter.device_mesh, parameter.placements
                )
                local = parameter.to_local()
                if local.numel():  # more ranks than rows leave some without any
                    local.copy_(tensors[name][start[0] : start[0] + local.shape[0]])
            else:
                parameter.copy_(tensors[name][:])


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers of activation checkpointing and compiling put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Every tensor of a folder by name, as safetensors slices (shape and dtype known, nothing read yet)."""
    folder, tensors = Path(folder), {}
    with contextlib.ExitStack() as stack:
        for path, expected in _shards(folder).items():
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                with open(path, "rb") as raw:  # of a name that stands twice safetensors takes the last
                    json.loads(raw.read(int.from_bytes(raw.read(8), "little")), object_pairs_hook=unique_keys)
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
            names = set(file.keys())
            if expected is not None and expected - names:
                lost = sorted(expected - names)[0]
                raise UserError(f"{path}: lacks the tensor {lost!r} that {INDEX} places there; copy it again")
            for name in names:
                if name in tensors:
                    raise UserError(f"{path}: the tensor {name!r} stands in another file too; remove one")
                tensors[name] = file.get_slice(name)
        yield tensors


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Each weight file of a folder, with the names that the index places in it (None: no index)."""
    where = folder / INDEX
    if where.exists():
        index = read_json(where, "index of the safetensors files")
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{where}: has no 'weight_map' of tensor names to file names; copy it again")
        shards: dict[Path, set[str] | None] = {}
        for tensor, name in weight_map.items():
            shards.setdefault(inside(folder, name), set()).add(tensor)  # type: ignore[union-attr]
        for path in shards:
            if not path.is_file():
                raise UserError(f"{where}: names {path.name!r}, which is not in the folder; copy it again")
        return shards
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    pickles = [path.name for end in ("*.bin", "*.pt*") for path in sorted(folder.glob(end))]
    found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights"
    raise UserError(f"{folder}: holds {found}; expected {SINGLE} or {INDEX}; convert the weights")


def _check(
    tensors: dict[str, Any], parameters: dict[str, Tensor], config: MistralConfig, folder: Path
) -> None:
    if config.tie_word_embeddings and "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors:
        # Some checkpoints hold a tied head a second time.
        if not torch.equal(tensors["lm_head.weight"][:], tensors["model.embed_tokens.weight"][:]):
            raise UserError(f"{folder}: config.json ties head and embedding, but the two differ; untie them")
        del tensors["lm_head.weight"]
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    for names, what in ((missing, "lacks"), (extra, "has, beyond the model of config.json,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{folder}: {what} the tensor {names[0]!r}{more}; config.json and weights do not fit"
            )
    for name, parameter in parameters.items():
        shape, dtype = tensors[name].get_shape(), tensors[name].get_dtype()
        where, wanted = f"{folder}: {name}", list(parameter.shape)
        if list(shape) != wanted:
            raise UserError(f"{where} has shape {list(shape)}; expected {wanted} as config.json says")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{where} is stored as {dtype}; expected F32, F16 or BF16 (dequantise it first)")


def save_model(
    model: Mistral,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    generation_config: dict[str, Any] | None = None,
    texts: dict[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder in Hugging Face layout, whole or not at all; manifest.json (sizes, sha256) comes last.

    dtype: that of the written tensors (default: the parameters').  A sharded model is gathered tensor by
    tensor: all ranks must call, rank 0 writes; its UserError is raised on all of them.  generation_config:
    what stands in generation_config.json beside bos and eos.  texts: further files by name (README.md).
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    tensors, problem = _whole_tensors(model, dtype), ""
    try:
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            with atomic_folder(folder) as temporary:
                shards = _save_tensors(tensors, temporary, max_shard_bytes)
                dtype = dtype or next(model.parameters()).dtype
                config = {**model.config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
                write_json(temporary / "config.json", config)
                ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
                write_json(temporary / "generation_config.json", {**ends, **(generation_config or {})})
                if tokenizer is not None:
                    tokenizer.save(temporary)
                for name, text in (texts or {}).items():
                    inside(temporary, name).write_text(text, encoding="utf-8")
                _name_shards(temporary, shards)
                names = sorted(path.name for path in temporary.iterdir())
                write_json(
                    temporary / MANIFEST, {"files": {name: describe_file(temporary / name) for name in names}}
                )
    except UserError as error:
        if not sharded:
            raise
        problem = str(error)
    finally:
        for _ in tensors:  # the other ranks wait at each tensor, whatever happened to this one
            pass
    if sharded:
        problems = [problem]
        torch.distributed.broadcast_object_list(problems)
        if problems[0]:
            raise UserError(problems[0])


def _whole_tensors(model: Mistral, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor on the CPU; of a sharded model a collective a tensor."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield clean_name(name), tensor.to("cpu", dtype or tensor.dtype).contiguous()


def _save_tensors(
    tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int
) -> list[dict[str, int]]:
    """Write the tensors as numbered files; returns the bytes of each file's tensors by name."""
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}

    def write() -> None:
        if held:
            shards.append({name: tensor.nbytes for name, tensor in held.items()})
            try:
                save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
            except SafetensorError as error:  # how the Rust side calls a full disk
                raise OSError(str(error)) from error
        held.clear()

    for name, tensor in tensors:
        if sum(other.nbytes for other in held.values()) + tensor.nbytes > max_shard_bytes:
            write()
        held[name] = tensor
    write()
    return shards


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """model.safetensors, or model-00001-of-00003.safetensors and the index, readable as other files are."""
    for number in range(1, len(shards) + 1):  # safetensors writes them for their owner alone
        shutil.copymode(folder / "config.json", folder / f"{number}.safetensors")
    if len(shards) == 1:
        (folder / "1.safetensors").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    total = sum(sum(names.values()) for names in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
