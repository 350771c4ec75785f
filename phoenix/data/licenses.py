"""May this row be used?  The licence of a row, by SPDX name, and four policies.

A licence comes from the row itself, from the source's config, from a table by a field of the row
(license_tables), or from an English original by its instruction; the terms of the model that wrote a row hold
beside it.  What is not known is never guessed: a row of unknown licence passes no policy but "none".  This is
bookkeeping, no legal advice.
"""

import difflib
import functools
import hashlib
import re
import tomllib
import unicodedata
from itertools import product
from pathlib import Path
from typing import Any

from phoenix.data.formats import FORMATS, stated_license
from phoenix.data.reading import read_rows
from phoenix.data.sources import Source
from phoenix.files import UserError

POLICIES = ("none", "stated", "nc", "strict")
FOLDER = Path(__file__).parent / "license_tables"
PLATYPUS = "open_platypus"  # the table of rows that have its columns


@functools.lru_cache(4096)
def canonical(name: str) -> str | None:
    """The SPDX spelling of a licence, of LicenseRef-... as it is, or of several joined by AND and OR.

    Letter case, blanks, - . , / and the words "license" and "version" make no difference.  None for what is
    not known: also "other", "unknown", "none", "", a family without a version ("cc-by"), and brackets.
    """
    parts = re.split(r"\s+(AND|OR|and|or)\s+", name.strip())
    parts[1::2] = map(str.upper, parts[1::2])
    for index, part in list(enumerate(parts))[::2]:
        is_reference = re.fullmatch(r"LicenseRef-[A-Za-z0-9.-]+", part)
        key = _license_key(part) if re.fullmatch(r"[\w\s.,/-]+", part) else ""  # "(" and "+" mean something
        parts[index] = part if is_reference else _KNOWN.get(key) or _KNOWN.get(f"{key}only")  # hub: gpl-3.0
    return None if None in parts else " ".join(parts)


def permits(license: str | None, policy: str) -> bool:
    """Whether a policy lets a licence pass (canonical, or None: unknown, which only "none" lets pass).

    "stated": any known one; "nc": none that forbids commercial use; "strict": only those of PERMISSIVE, so no
    LicenseRef and none that forbids derivatives.  Of A AND B all must pass, of A OR B one.
    """
    if policy == "none" or license is None:
        return policy == "none"
    passes = {"stated": bool, "nc": lambda name: not _FORBIDS.search(name), "strict": PERMISSIVE.__contains__}
    return any(all(map(passes[policy], parts)) for parts in _alternatives(license))


def unlicensed_sentence(source: Source, policy: str) -> str:
    """For a source none of whose rows has a known licence."""
    what = "match in license_join" if source.license_join else "known licence"
    do = "state license (an SPDX name) or license_table (by a field of the row), or set license_policy=none"
    if source.license:
        do = f"rows with {PLATYPUS}'s columns go by its table: state format=alpaca if yours are others"
    return f"{source.path}: no row has a {what}, which license_policy={policy} asks of each; {do}"


class Licenses:
    """The licences of one source's rows, and what the policy says of them."""

    def __init__(self, source: Source, policy: str, join: Path | None = None) -> None:
        """join: where the file that license_join names lies on this disk; None: there.

        UserError: unknown licence or table, a table in disorder, a join without its columns.
        """
        self.policy = policy
        self.default = _spdx(source.license, f"{source.path}: license")
        self.generator = _spdx(source.generator_license, f"{source.path}: generator_license")
        self.forced = bool(source.license_table) or source.format == PLATYPUS
        self.by_columns = source.format is None
        self.field, self.table = load_table(source.license_table or PLATYPUS)
        self.joined = self._join(join or Path(source.license_join)) if source.license_join else None

    def of(self, raw: dict[str, Any], stated: str | None) -> str | None:
        """The licence of a row, AND its generator's terms; stated: what it states itself.  None: unknown.

        With a table, a join, or the columns of Open-Platypus, whose rows are of many licences, the source's
        `license` does not stand in for what they lack; columns do not count where `format` names another.
        """
        if self.joined is not None:
            found = _with(self.joined.get(_key(raw), (None,))[0], stated)
        elif self.forced or (self.by_columns and FORMATS[PLATYPUS][1] <= raw.keys()):
            found = self._by_table(raw, stated)
        else:
            found = self.default if stated is None else canonical(stated)
        return both(found, self.generator) if self.generator else found

    def origin(self, raw: dict[str, Any]) -> str:
        """What the joined rows state where they are from, several with " + " between; "" without a join."""
        return " + ".join(self.joined.get(_key(raw), (None, ()))[1]) if self.joined else ""

    def why_dropped(self, license: str | None) -> str | None:
        """Name of the filter for what `of` gave: "no_license", "license" if it is forbidden, or None."""
        if permits(license, self.policy):
            return None
        return "license" if license else "no_license"

    def _by_table(self, raw: dict[str, Any], stated: str | None) -> str | None:
        return _with(self.table.get(_plain(raw.get(self.field))), stated)

    def _join(self, path: Path) -> dict[int | None, tuple[str | None, tuple[str, ...]]]:
        """Key of an English instruction -> licence of the rows that have it (all: AND), their origins."""
        joined: dict[int | None, tuple[str | None, tuple[str, ...]]] = {}
        for line, raw in read_rows(path):
            if not {"instruction", self.field} <= raw.keys():
                found = ", ".join(raw)[:200]
                raise UserError(f"{path}, line {line}: found {found}; expected instruction and {self.field}")
            key, license = _key(raw), self._by_table(raw, stated_license(raw))
            before, origins = joined.get(key, (license, ()))
            origins = tuple(sorted({*origins, str(raw[self.field])}))
            joined[key] = both(before, license), origins
        joined.pop(None, None)  # rows without an instruction
        return joined


def both(first: str | None, second: str | None) -> str | None:
    """The licence of what is under two: A AND B; unknown if one is."""
    if first is None or second is None:
        return None
    pairs = product(_alternatives(first), _alternatives(second))
    return " OR ".join(dict.fromkeys(" AND ".join(sorted({*one, *other})) for one, other in pairs))


def load_table(name_or_path: str) -> tuple[str, dict[str, str]]:
    """(field, its value in plain letters -> licence) of license_tables/NAME.toml, or of a path (*.toml)."""
    path = Path(name_or_path)
    path = path if path.suffix == ".toml" else FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
        raise UserError(f"license_table: there is no {path}; choose one of {names}, or give a path")
    known: dict[str, str] = {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for value, name in table["licenses"].items():
            spdx = _spdx(name, f"{path}: the licence of {value!r}")
            if not _plain(value) or known.setdefault(_plain(value), spdx) != spdx:
                raise ValueError(f"{value!r} has no letters, or stands twice")
        return table["field"].strip(), known
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "expected field, and [licenses] of value = SPDX name"
        raise UserError(f"{path}: {type(error).__name__}: {error}; {expected}; correct the table") from None


def _spdx(name: str | None, what: str) -> str | None:
    """The canonical form; UserError that names the nearest for what is not known.  None stays None."""
    known = None if name is None else canonical(name)
    if name is None or known:
        return known
    names = {known.upper(): known for known in _KNOWN.values()}
    near = difflib.get_close_matches(name.upper(), names, n=1)
    hint = f"did you mean {names[near[0]]!r}?" if near else "write LicenseRef-... for another"
    raise UserError(f"{what} is {name!r}; expected an SPDX name; {hint}")


def _with(found: str | None, stated: str | None) -> str | None:
    return found if stated is None else both(found, canonical(stated))


def _alternatives(license: str) -> list[list[str]]:
    return [parts.split(" AND ") for parts in license.split(" OR ")]


def _plain(value: Any) -> str:
    """NFC, casefolded, letters and digits alone; nothing of what is no string."""
    text = unicodedata.normalize("NFC", value).casefold() if isinstance(value, str) else ""
    return re.sub(r"[\W_]", "", text)


def _license_key(name: str) -> str:
    """Without the words "license" and "version", but with all letters of "Unlicense"."""
    return _plain(re.sub(r"(?<![^\W_])(licen[sc]e|version)(?![^\W_])", "", name, flags=re.IGNORECASE))


def _key(raw: dict[str, Any]) -> int | None:
    """64 bits of a row's English instruction; None if it has none."""
    instruction = raw.get("instruction_en") or raw.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        return None
    text = " ".join(unicodedata.normalize("NFC", instruction).casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


# A line: SPDX name, the hub's name or "-", what it asks (by, sa, nc, nd, own) or "-", other names.
_TABLE = [line.split() for line in (FOLDER.parent / "spdx.txt").read_text(encoding="utf-8").splitlines()[1:]]
HUB_NAMES = {name: hub for name, hub, *_ in _TABLE if hub != "-"}
CONDITIONS = {name: asks.split(",") for name, _, asks, *_ in _TABLE}
# Those that permit commercial use of derivatives.
PERMISSIVE = frozenset(name for name, asks in CONDITIONS.items() if not {"nc", "nd", "own"} & {*asks})
_KNOWN = {_license_key(alias): name for name, _, _, *others in _TABLE for alias in (name, *others)}
_FORBIDS = re.compile(
    r"(?i)(by|cc)-?nc|(^|[-.])nc(v?[\d.-]|$)|no[nt]?[a-z-]*commerc|research|academic|educat|personal|evaluation"
)
