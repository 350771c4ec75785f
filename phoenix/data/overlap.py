"""Whether a row holds a question of a test set: a run of 13 words, or a shorter question as a whole.

The words of a text, case, punctuation and Unicode form aside, are joined; the hash of a run of words is that
of its part of the joined string, a polynomial over its bytes modulo 2^64, and the same in every process.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phoenix.data.reading import read_rows
from phoenix.files import UserError, read_json

RUN = 13  # words, as for GPT-3 (arXiv 2005.14165, appendix C)
SHORT, SHORTEST = 8, 4  # words of a question that is searched within texts, and as a whole text
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
# What a byte stands for in the polynomial; RandomState draws the same in every version of numpy.
BYTES = np.random.RandomState(0).randint(0, 2**64, 256, np.uint64)
FIELDS = (  # where test sets and the formats of rows have their questions
    "turns", "question", "ctx", "ctx_a", "query", "problem", "goal", "prompt", "instruction",
    "instruction_de", "messages", "conversations", "conversation", "chosen", "text",
)  # fmt: skip
FORMATTING = "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0001-\U000e007f]"
# Thai, Lao, Burmese, Khmer, Japanese and Chinese have no blanks between words.
ALONE = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# With the signs of Indic vowels, Hebrew and Arabic, which are no letters to Python.
WORD = r"[\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff]+"
NO_QUESTION = {"assistant", "gpt", "chatgpt", "bing", "bard", "system"}


class EvalIndex:
    """The questions of test files, as sorted hashes: some 30 bytes a word of theirs in memory."""

    def __init__(self, paths: tuple[Path, ...], length: int = RUN) -> None:
        """Read files of MT-Bench, HellaSwag, ARC, MMLU, GSM8K, TruthfulQA, or of rows of any known format.

        length: words in a row of a longer question.  Raises UserError for a file that cannot be read, and for
        a row without a question.
        """
        self.names, self.wholes, self.sizes = [], {}, set()
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        for path in map(Path, paths):
            for name, row in _test_rows(path):
                for question in _questions(path, name, row):
                    found = normal_words(question)
                    size = min(len(found), length)
                    if SHORTEST <= size < SHORT:
                        self.wholes.setdefault(" ".join(found), len(self.names))
                    elif size >= SHORT:
                        self.sizes.add(size)
                        hashes.append(run_hashes(found, [size]))
                        owners.append(np.full(len(hashes[-1]), len(self.names), np.int32))
                self.names.append(f"{path}, row {name}")
        self.hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self.owners = np.concatenate(owners)[first]
        # A table of 16 entries or more a hash says of nearly all runs that they are none, without a search.
        self.shift = np.uint64(60 - len(self.hashes).bit_length())
        self.table = np.zeros(2 ** (64 - int(self.shift)), bool)
        self.table[self.hashes >> self.shift] = True

    def hit(self, texts: Iterable[str]) -> str | None:
        """The row of a test file that the texts of a row hold, with the words: 'evals/mt.json, row 3: "..."'.

        None without one.  A question of 4 to 7 words must be a whole text; a shorter one is not looked for.
        """
        said = []
        for text in texts:
            found = normal_words(text)
            if SHORTEST <= len(found) < SHORT and (whole := " ".join(found)) in self.wholes:
                return f'{self.names[self.wholes[whole]]}: "{whole}"'
            said += found
        runs = run_hashes(said, self.sizes)
        maybe = np.flatnonzero(self.table[runs >> self.shift])
        places = np.minimum(np.searchsorted(self.hashes, runs[maybe]), len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[places] == runs[maybe])
        if not len(hits):
            return None
        starts = [(at, size) for size in self.sizes for at in range(len(said) - size + 1)]
        at, size = starts[maybe[hits[0]]]
        return f'{self.names[self.owners[places[hits[0]]]]}: "{" ".join(said[at : at + size])}"'


def plain_form(text: str) -> str:
    """A text without letter case, a difference of Unicode form, and characters that only format (category
    Cf), such as the soft hyphens of web pages."""
    return unicodedata.normalize("NFC", re.sub(FORMATTING, "", text).casefold())


def normal_words(text: str) -> list[str]:
    """Words of the plain form, without punctuation; in scripts without blanks each letter is one."""
    return re.findall(WORD, re.sub(ALONE, r" \g<0> ", plain_form(text).replace("_", " ")))


def run_hashes(words: list[str], sizes: Collection[int]) -> np.ndarray:
    """[runs] uint64: hashes of all runs of as many words as each of the sizes says, size by size."""
    text = np.frombuffer(" ".join(["", *words, ""]).encode(), np.uint8)
    spaces = np.flatnonzero(text == ord(" "))
    sums = np.cumsum(BYTES[text] * np.cumprod(np.full(len(text), BASE, np.uint64)))[spaces]
    shifts = np.cumprod(np.full(len(text), pow(BASE, -1, 2**64), np.uint64))[spaces]
    runs = [(sums[size:] - sums[:-size]) * shifts[:-size] for size in sizes]
    return np.concatenate(runs) if runs else np.empty(0, np.uint64)


def strings(value: Any, *, asked: bool = False) -> Iterator[str]:
    """All strings in a raw row, however deep; asked: not an assistant's turns, nor choices of an answer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from strings(part, asked=asked)
    elif isinstance(value, dict) and not (asked and _role(value) in NO_QUESTION):
        for key, part in value.items():
            yield from () if asked and key in ("choices", "role", "from") else strings(part, asked=asked)


def _role(turn: dict) -> str:
    return str(turn.get("role", turn.get("from"))).lower()


def _test_rows(path: Path) -> Iterator[tuple[Any, dict]]:
    """(name, row); a .json file may be one object of rows by name, as MT-Bench-DE is."""
    try:
        rows = read_json(path) if path.suffix == ".json" else None
    except UserError:  # JSON lines under this name; read_rows says what is wrong with other files
        rows = None
    if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
        return iter(rows.items())
    return read_rows(path)


def _questions(path: Path, name: Any, row: dict) -> Iterator[str]:
    by_name = {field.lower(): value for field, value in row.items() if value}
    found = [field for field in FIELDS if field in by_name and (field, "ctx" in by_name) != ("ctx_a", True)]
    if not found:
        raise UserError(
            f"{path}, row {name}: found the fields {', '.join(row)[:300]}; expected a question in one of "
            f"{', '.join(FIELDS)}; rename the field"
        )
    for field in found:
        yield from strings(by_name[field], asked=True)
