"""Config of a recipe: one frozen dataclass <- one flat TOML file <- `key=value` on the command line.

    @dataclass(frozen=True)
    class SFTConfig:
        learning_rate: float = option("peak learning rate", default=2e-5)

    config = load_config(SFTConfig, sys.argv[1:])

Values are converted to the annotated type or refused; nothing is guessed.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import signal
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from phoenix.files import Interrupted, UserError, atomic_write

Config = TypeVar("Config")
MAX_NAME, MAX_PATH = 255, 4095  # bytes that Linux takes


def option(
    meaning: str, default: Any = dataclasses.MISSING, choices: tuple = (), *, bounds: str | None = None
) -> Any:
    """A field of a config: its meaning, its default (none: it must be given), the values it may take.

    bounds: a name in BOUNDS, which `check_bounds` holds the value to.
    """
    metadata = {"meaning": meaning, "choices": choices, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


def check_bounds(config: Any) -> None:
    """UserError for a number out of its field's bounds; None and fields without bounds pass."""
    for field in dataclasses.fields(config):
        bounds, value = field.metadata.get("bounds"), getattr(config, field.name)
        if bounds and value is not None and not BOUNDS[bounds](value):
            raise UserError(f"{field.name} is {value}; expected a number {bounds}")


def load_config(kind: type[Config], arguments: list[str], default_file: Path | None = None) -> Config:
    """The config from `[file.toml] [key=value ...]`; without a file, from `default_file` if there is one.

    `--help` prints every field and exits.  Raises UserError for an unknown key (naming the nearest), a value
    of the wrong type, a missing value, a file that does not exist or is no TOML.
    """
    if "--help" in arguments or "-h" in arguments:
        print(help_text(kind))
        sys.exit(0)
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise UserError(f"unknown flag {flags[0]!r}; fields are set as key=value, and --help lists them")
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise UserError(
            f"{files[1]!r} is not key=value, and {files[0]!r} is the config file already; write key=value"
        )
    path = Path(files[0]) if files else default_file
    values = _read_toml(kind, path) if path is not None else {}
    for argument in arguments:
        if re.search("[\ud800-\udfff]", argument):  # it could not be written into config.toml or a manifest
            raise UserError(f"command line, {argument!r}: is not UTF-8; correct the value")
        key, equals, text = argument.partition("=")
        if equals:
            field = _field(kind, key, f"command line, {argument!r}")
            values[key] = _from_text(field, text, f"command line, {argument!r}")
    missing = [
        f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise UserError(f"{path or 'command line'}: {missing[0]!r} is not set; write {missing[0]}=...")
    return kind(**values)


def run_recipe(main: Callable[[Any], Any], kind: type, default_file: Path | None = None) -> None:
    """Run a recipe from the command line; exits with 0, 2 (UserError, one line) or 75 (stopped)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, if the recipe takes no care of it
    try:
        main(load_config(kind, sys.argv[1:], default_file))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has read enough, and the rest was not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (Interrupted, KeyboardInterrupt) as stop:
        if os.environ.get("RANK", "0") == "0":
            print(str(stop) or "stopped; the same command goes on", file=sys.stderr)
        sys.exit(75)


def save_config(path: Path, config: Any) -> None:
    """Write a config as the TOML file that gives it again."""
    with atomic_write(path) as file:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            file.write(f"{field.name} = {_to_toml('none' if value is None else value)}\n")


def help_text(kind: type) -> str:
    """A line a field: name, type, default, meaning; the fields of a table stand below its own."""
    usage = "usage: [torchrun] recipe.py [config.toml] [key=value ...]"
    return "\n".join([(kind.__doc__ or "").strip(), "", usage, "", *_help_lines(kind)])


def _help_lines(kind: type) -> list[str]:
    lines = []
    for field, annotation in _fields(kind).values():
        default = "required" if field.default is dataclasses.MISSING else f"default {_to_toml(field.default)}"
        choices = field.metadata.get("choices")
        meaning = field.metadata.get("meaning", "")
        meaning += f"; one of {', '.join(map(str, choices))}" if choices else ""
        meaning += f"; {field.metadata['bounds']}" if field.metadata.get("bounds") else ""
        lines += [f"  {field.name}: {_type_name(annotation)} ({default})", f"      {meaning}"]
        if table := _table_type(annotation):
            lines += [f"      {line}" for line in _help_lines(table)]
    return lines


BOUNDS = {
    "above 0": lambda value: 0 < value < math.inf,
    "above 0 (inf: no limit)": lambda value: value > 0,
    "of at least 0": lambda value: 0 <= value < math.inf,
    "of at least 2": lambda value: 2 <= value < math.inf,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "above 0, at most 1": lambda value: 0 < value <= 1,
    "of at least 0 and below 1": lambda value: 0 <= value < 1,
}
# A known name of TRL, transformers, torchtune or the handbook -> ours.
OTHER_NAMES = {
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model": "model_name_or_path",
    "per_device_train_batch_size": "micro_batch_tokens",
    "gradient_accumulation_steps": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "epochs": "num_train_epochs",
    "warmup_steps": "warmup_ratio",
    "completion_only_loss": "assistant_only_loss",
    "chat_template_path": "chat_template",
    "output": "output_dir",
    "bf16": "dtype",
    "torch_dtype": "dtype",
    "packing": "packing_strategy",
    "logging_dir": "output_dir",
    "dataset": "input",
    "dataset_name": "input",
    "ref_model": "reference_model",
    "ref_model_name_or_path": "reference_model",
    "ref_checkpoint_dir": "reference_model",
    "loss": "loss_type",
    "f_alpha_divergence_coef": "f_alpha",
    "optimizer": "optim",
    "gradient_checkpointing": "activation_checkpointing",
    "enable_activation_checkpointing": "activation_checkpointing",
    "clip_grad_norm": "max_grad_norm",
}
_PREPARED, _NO_LORA = "is a field of recipes/prepare.py", "is not here: all weights are trained (no LoRA)"
_SAME_REFERENCE = "is not here: the reference stays the same"
# A known name that a recipe has no field for -> what to do instead.
WITHOUT_FIELD = {
    "max_length": _PREPARED,
    "max_prompt_length": _PREPARED,
    "input": f"{_PREPARED}, which writes the token store that `store` names",
    "max_completion_length": "is not here: no answer is cut; max_length of recipes/prepare.py drops rows",
    "truncation_mode": "is not here: max_prompt_length of recipes/prepare.py cuts prompts from their start",
    "precompute_ref_log_probs": "is always on: recipes/dpo.py computes them once and keeps them",
    "rpo_alpha": "is the weight of sft: add it to loss_type, and a weight for each loss to loss_weights",
    "use_weighting": "is not here: no pair is weighted by the policy (no WPO)",
    "logging_steps": "is not needed: every step is logged",
    "use_peft": _NO_LORA,
    "peft_config": _NO_LORA,
    "lora_r": _NO_LORA,
    "lora_rank": _NO_LORA,
    "lora_alpha": _NO_LORA,
    "model_adapter_name": _NO_LORA,
    "ref_adapter_name": _NO_LORA,
    "load_in_4bit": _NO_LORA,
    "load_in_8bit": _NO_LORA,
    "sync_ref_model": _SAME_REFERENCE,
    "ref_model_mixup_alpha": _SAME_REFERENCE,
    "ref_model_sync_steps": _SAME_REFERENCE,
    "load_best_model_at_end": "is not here: the model of the last step is written",
}


def _fields(kind: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(kind)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(kind)}


def _field(kind: type, key: str, where: str) -> tuple[dataclasses.Field, Any]:
    fields = _fields(kind)
    if key not in fields:
        raise UserError(f"{where}: unknown field {key!r}; {_hint(key, fields)}")
    return fields[key]


def _hint(key: str, fields: dict) -> str:
    other = OTHER_NAMES.get(key, key)
    if other not in fields and other in WITHOUT_FIELD:
        return f"it {WITHOUT_FIELD[other]}" if other == key else f"{other} {WITHOUT_FIELD[other]}"
    near = [other] if other in fields else difflib.get_close_matches(key, fields, n=1)
    return f"did you mean {near[0]!r}?" if near else "--help lists the fields"


def _read_toml(kind: type, path: Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a TOML file ({error})") from None
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
        raise UserError(f"{path}: not valid TOML: {error}") from None
    values = {}
    for key, value in table.items():
        found = re.search(rf"""^\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""", text, re.MULTILINE)
        line = text.count("\n", 0, found.end()) + 1 if found else "?"
        where = f"{path}, line {line}"
        values[key] = _convert(_field(kind, key, where), value, where)
    return values


def _from_text(field: tuple[dataclasses.Field, Any], text: str, where: str) -> Any:
    """A value of the command line: TOML where it parses as such, otherwise the text itself.

    One word is a list of one where a list of words is expected; not a list that does not parse, or none.
    """
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        value = text
    lists = any(typing.get_origin(kind) is tuple for kind in _alternatives(field[1]))
    if not isinstance(value, (str, list) if lists else str) and _accepts_text(field[1]):
        value = text
    if tuple[str, ...] in _alternatives(field[1]) and isinstance(value, str):
        value = [value] if value not in ("", "none") and value[0] != "[" else value
    return _convert(field, value, where)


def _accepts_text(annotation: Any) -> bool:
    kinds = _alternatives(annotation)
    return (str in kinds or Path in kinds) and not {int, float, bool} & set(kinds)


def _alternatives(annotation: Any) -> tuple:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _table_type(annotation: Any) -> type | None:
    """The dataclass of a list of tables, tuple[Dataclass, ...]."""
    item = (*typing.get_args(annotation), None)[0]
    return item if dataclasses.is_dataclass(item) else None


def _to_table(kind: type, table: dict[str, Any], where: str) -> Any:
    values = {key: _convert(_field(kind, key, where), value, where) for key, value in table.items()}
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise UserError(f"{where}: {field.name!r} is not set; write {field.name} = ...")
    return kind(**values)


def _convert(field: tuple[dataclasses.Field, Any], value: Any, where: str) -> Any:
    definition, annotation = field
    table = _table_type(annotation)
    if table and isinstance(value, list) and all(isinstance(item, dict) for item in value):
        numbered = enumerate(value, 1)
        return tuple(_to_table(table, item, f"{where}, {definition.name} {i}") for i, item in numbered)
    if value == "none" and types.NoneType in _alternatives(annotation):
        return None  # TOML has no null
    for kind in _alternatives(annotation):
        accept = None if table else _CONVERSIONS.get(typing.get_origin(kind) or kind)
        converted = accept(kind, value) if accept else None
        if converted is not None:
            _check_choices(definition, converted, where)
            return converted
    expected = _type_name(annotation)
    if isinstance(value, str | list) and value and "path" in expected:
        expected += f" without control characters, its names of at most {MAX_NAME} bytes"
    raise UserError(f"{where}: {definition.name} is {value!r}; expected {expected}; correct the value")


def _check_choices(definition: dataclasses.Field, value: Any, where: str) -> None:
    choices = definition.metadata.get("choices")
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            names = list(map(str, choices))
            near = difflib.get_close_matches(str(item), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
            expected = f"expected one of {', '.join(names)}"
            raise UserError(f"{where}: {definition.name} is {item!r}; {expected}; {hint}")


def _float(_kind: Any, value: Any) -> float | None:
    """Also from text, as TRL's configs write 1e-5 in quotes; nan is no setting."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number is None or math.isnan(number) else number


def _path(_kind: Any, value: Any) -> Path | None:
    """Refuses what no disk takes, and a line break, which would make two lines of one in a log."""
    if not isinstance(value, str) or not value or re.search(r"[\0-\x1f\x7f]", value):
        return None
    names = value.encode().split(b"/")
    return Path(value) if max(map(len, names)) <= MAX_NAME and len(value.encode()) <= MAX_PATH else None


def _tuple(kind: Any, value: Any) -> tuple | None:
    """tuple[float, ...] takes a list of any length, tuple[float, float] one of two numbers."""
    kinds = typing.get_args(kind)
    if not isinstance(value, list) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
        return None
    items = tuple(_CONVERSIONS[kinds[0]](kinds[0], item) for item in value)
    return None if None in items else items


# bool is an int in Python: a float or int field must refuse it.
_CONVERSIONS = {
    bool: lambda kind, value: value if isinstance(value, bool) else None,
    int: lambda kind, value: value if isinstance(value, int) and not isinstance(value, bool) else None,
    float: _float,
    str: lambda kind, value: value if isinstance(value, str) else None,
    Path: _path,
    tuple: _tuple,
}


def _type_name(annotation: Any) -> str:
    names = []
    for kind in _alternatives(annotation):
        if typing.get_origin(kind) is tuple:
            item, *rest = typing.get_args(kind)
            number = "" if Ellipsis in rest else f"{len(rest) + 1} "
            names.append(
                f"list of {number}{'tables' if dataclasses.is_dataclass(item) else _type_name(item)}"
            )
        else:
            names.append("none" if kind is types.NoneType else getattr(kind, "__name__", str(kind)).lower())
    return " or ".join(names)


def _to_toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if dataclasses.is_dataclass(value):
        entries = dataclasses.asdict(value).items()
        return "{" + ", ".join(f"{key} = {_to_toml(v)}" for key, v in entries if v is not None) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_to_toml, value)) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes as JSON does
