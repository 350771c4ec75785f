"""What translation into one language needs to know of it: a TOML file a language, in recipes/languages/."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phoenix.files import UserError

FOLDER = Path(__file__).parents[2] / "recipes" / "languages"


@dataclass(frozen=True)
class Language:
    """A target language, and the source language of its prompt.

    Words of `formal` and `informal` in lower case are found in any case; capitalised ones ("Sie") only so,
    and not at the start of a sentence, where they may be another word ("sie").
    """

    code: str  # ISO 639-1
    name: str  # in English, as the prompt says it
    length_ratio: tuple[float, float]  # characters of a translation per character of a source of 40 and more
    long_length_ratio: tuple[float, float]  # the same of a source of 150 characters and more
    formal: tuple[str, ...] = ()
    informal: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()  # how a model begins that answers, in the target language
    leaks: tuple[str, ...] = ()  # what stands in a reply that repeats the order to translate
    number_words: dict[str, str] = field(default_factory=dict)  # "12" -> how words for it begin
    source: str = "English"
    source_code: str = "en"


def load_language(name_or_path: str | Path) -> Language:
    """The language of that name ("de": recipes/languages/de.toml), or in the file of that path (*.toml).

    Raises UserError for an unknown name (lists those there are), and for a file that does not exist, does not
    parse, or has a field too many, too few or of the wrong type.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        names = sorted(file.stem for file in FOLDER.glob("*.toml"))
        if str(name_or_path) not in names:
            raise UserError(
                f"unknown language {str(name_or_path)!r}; {FOLDER} has {', '.join(names) or 'none'}; "
                "for another one write such a file and give its path"
            )
        path = FOLDER / f"{name_or_path}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a language's file") from None
    except ValueError as error:  # tomllib's and the codec's
        raise UserError(f"{path}: is not TOML in UTF-8 ({error}); correct it") from None
    return Language(**_checked(path, values))


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values with lists as tuples; UserError names the field that is wrong."""
    fields = {one.name: one for one in dataclasses.fields(Language)}
    required = [name for name, one in fields.items() if one.default is one.default_factory]
    for name in [*values, *required]:
        if name not in fields or name not in values:
            what = "is missing" if name in fields else f"is unknown; fields are {', '.join(fields)}"
            raise UserError(f"{path}: the field {name!r} {what}")
        if not _KINDS[fields[name].type](values[name]):
            expected = _EXPECTED[fields[name].type]
            raise UserError(f"{path}: {name} is {values[name]!r:.80}; expected {expected}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _strings(values: Any) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)


def _bounds(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
    return numbers and len(value) == 2 and 0 <= value[0] < value[1]


_KINDS = {
    str: lambda value: isinstance(value, str) and _strings([value]),
    tuple[float, float]: _bounds,
    tuple[str, ...]: lambda value: isinstance(value, list) and _strings(value),
    dict[str, str]: lambda value: (
        isinstance(value, dict) and _strings(value.values()) and all(map(str.isdecimal, value))
    ),
}
_EXPECTED = {
    str: "a text", tuple[float, float]: "two numbers, the lower one first",
    tuple[str, ...]: "a list of texts", dict[str, str]: 'a table of texts such as 12 = "twelve"',
}  # fmt: skip
