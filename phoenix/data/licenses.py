"""May this row be used?  The licence of a row, by SPDX name, and four policies.

A licence comes from the row itself, from the source's config, from a table by a field of the row
(recipes/licenses), or from an English original by its instruction.  What is not known is never guessed: a row
of unknown licence passes no policy but "none".  This is bookkeeping, no legal advice.
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

from phoenix.data.reading import read_rows
from phoenix.data.sources import Source
from phoenix.files import UserError

POLICIES = ("none", "stated", "nc", "strict")
FOLDER = Path(__file__).parents[2] / "recipes" / "licenses"
PLATYPUS = "open_platypus"  # the table of rows that have its columns


@functools.lru_cache(4096)
def canonical(name: str) -> str | None:
    """The SPDX spelling of a licence, of LicenseRef-... as it is, or of several joined by AND and OR.

    Letter case, blanks, - . , / and the word "license" make no difference.  None for what is not known: also
    "other", "unknown", "none", "", a family without a version ("cc-by"), and brackets.
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
    refused = {
        "stated": lambda name: False,
        "nc": _FORBIDS.search,
        "strict": lambda name: name not in PERMISSIVE,
    }
    return any(not any(map(refused[policy], parts)) for parts in _alternatives(license))


def unlicensed_sentence(source: Source, policy: str) -> str:
    """For a source none of whose rows has a known licence."""
    missing = "a match in license_join" if source.license_join else "a known licence"
    do = f"state license (an SPDX name) or license_table ({_tables()}), or set license_policy=none"
    return f"{source.path}: no row has {missing}, which license_policy={policy} asks of each; {do}"


class Licenses:
    """The licences of one source's rows, and what the policy says of them."""

    def __init__(self, source: Source, policy: str) -> None:
        """UserError: unknown policy, licence or table, a table in disorder, a join without its columns."""
        if policy not in POLICIES:
            raise UserError(
                f"license_policy is {policy!r}; expected {', '.join(POLICIES)}; choose one of them"
            )
        self.policy = policy
        self.default = _spdx(source.license, f"{source.path}: license")
        self.generator = _spdx(source.generator_license, f"{source.path}: generator_license")
        self.forced = bool(source.license_table or source.license_join) or source.format == PLATYPUS
        self.field, self.table = load_table(source.license_table or PLATYPUS)
        self.joined = self._join(source.license_join) if source.license_join else None

    def of(self, raw: dict[str, Any], stated: str | None) -> str | None:
        """The licence of a row; stated: its own field `license`.  None: unknown.

        With a table or a join the source's `license` does not stand in for what they lack.
        """
        own = canonical(stated) if stated is not None else None
        if stated is not None and own is None:
            return None
        if self.joined is not None:
            found = next((self.joined[key] for key in _keys(raw) if key in self.joined), None)
        elif self.forced or (self.default is None and {"instruction", "output", "data_source"} <= set(raw)):
            found = self.table.get(_plain(raw.get(self.field)))
        else:
            return own or self.default
        return both(found, own) if own else found

    def why_dropped(self, license: str | None) -> str | None:
        """Name of the filter: "no_license", or "license" if it or the generator's terms are forbidden."""
        if license is None:
            return None if self.policy == "none" else "no_license"
        whole = both(license, self.generator) if self.generator else license
        return None if permits(whole, self.policy) else "license"

    def _join(self, path: str) -> dict[int, str | None]:
        """Key of an English instruction -> licence of the rows that have it (all of them: AND)."""
        joined: dict[int, str | None] = {}
        for line, raw in read_rows(Path(path)):
            if not {"instruction", self.field} <= set(raw):
                found = ", ".join(raw)[:200]
                raise UserError(f"{path}, line {line}: found {found}; expected instruction and {self.field}")
            found = self.table.get(_plain(raw[self.field]))
            for key in _keys(raw):
                joined[key] = both(joined[key], found) if key in joined else found
        return joined


def both(first: str | None, second: str | None) -> str | None:
    """The licence of what is under two: A AND B; unknown if one is."""
    if first is None or second is None:
        return None
    pairs = product(_alternatives(first), _alternatives(second))
    return " OR ".join(dict.fromkeys(" AND ".join(sorted({*one, *other})) for one, other in pairs))


def load_table(name_or_path: str) -> tuple[str, dict[str, str]]:
    """(field, its value in plain letters -> licence) of recipes/licenses/NAME.toml, or of a path (*.toml)."""
    path = Path(name_or_path)
    path = path if path.suffix == ".toml" else FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        raise UserError(f"license_table: there is no {path}; choose one of {_tables()}, or give a path")
    known: dict[str, str] = {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        licenses, aliases = table["licenses"], table.get("aliases", {})
        for value, name in [*licenses.items(), *((alias, licenses[of]) for alias, of in aliases.items())]:
            spdx = _spdx(name, f"{path}: the licence of {value!r}")
            if not _plain(value) or known.setdefault(_plain(value), spdx) != spdx:
                raise ValueError(f"{value!r} has no letters, or stands twice")
        return table["field"].strip(), known
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "expected field, [licenses] of value = SPDX name, [aliases] of spelling = value"
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


def _tables() -> str:
    return ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml"))) or "none"


def _alternatives(license: str) -> list[list[str]]:
    return [parts.split(" AND ") for parts in license.split(" OR ")]


def _plain(value: Any) -> str:
    """NFC, casefolded, letters and digits alone; nothing of what is no string."""
    text = unicodedata.normalize("NFC", value).casefold() if isinstance(value, str) else ""
    return re.sub(r"[\W_]", "", text)


def _license_key(name: str) -> str:
    return re.sub("licen[sc]e|version", "", _plain(name))


def _keys(raw: dict[str, Any]) -> list[int]:
    """Of a row's English instruction with its input, if it has one, and of the instruction alone."""
    instruction, more = raw.get("instruction_en") or raw.get("instruction"), raw.get("input")
    if not isinstance(instruction, str):
        return []
    texts = [f"{instruction} {more}"] * (isinstance(more, str) and bool(more.strip())) + [instruction]
    plain = (" ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in texts)
    return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) for text in plain]


_FORBIDS = re.compile(r"(^|-)nc(-|$)|non-?commercial|research|academic", re.IGNORECASE)
_CC = [f"CC-BY{kind}-{version}" for kind in ("", "-SA", "-NC", "-NC-SA", "-ND", "-NC-ND")
       for version in ("1.0", "2.0", "2.5", "3.0", "3.0-DE", "4.0")]  # fmt: skip
# SPDX names that permit commercial use of derivatives; _NAMES: all that are known.
PERMISSIVE = frozenset((
    *(name for name in _CC if "-NC" not in name and "-ND" not in name),
    *"""0BSD AFL-3.0 AGPL-3.0-only AGPL-3.0-or-later Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause
    BSD-3-Clause-Clear BSL-1.0 CC0-1.0 CDLA-Permissive-1.0 CDLA-Permissive-2.0 CDLA-Sharing-1.0 DL-DE-BY-2.0
    DL-DE-ZERO-2.0 ECL-2.0 EPL-2.0 etalab-2.0 EUPL-1.1 EUPL-1.2 GFDL-1.3-only GFDL-1.3-or-later GPL-2.0-only
    GPL-2.0-or-later GPL-3.0-only GPL-3.0-or-later ISC LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only
    LGPL-3.0-or-later MIT MIT-0 MPL-2.0 MS-PL NCSA ODbL-1.0 ODC-By-1.0 OFL-1.1 PDDL-1.0 PostgreSQL Unlicense
    UPL-1.0 W3C WTFPL Zlib""".split(),
))  # fmt: skip
_NAMES = (*_CC, *PERMISSIVE, "C-UDA-1.0", "PolyForm-Noncommercial-1.0.0")
_SHORT = {"cc0": "CC0-1.0", "odbl": "ODbL-1.0", "odcby": "ODC-By-1.0", "pddl": "PDDL-1.0"}  # on the hub
_KNOWN = {_license_key(name): name for name in _NAMES} | _SHORT
