"""Which rows a policy lets pass; the Open-Platypus counts are those that its card publishes."""

import configparser
import dataclasses
import json
import random
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from phoenix.data.formats import FORMATS, stated_license
from phoenix.data.licenses import (
    CONDITIONS,
    FOLDER,
    HUB_NAMES,
    PERMISSIVE,
    POLICIES,
    Licenses,
    both,
    canonical,
    load_table,
    permits,
    unlicensed_sentence,
)
from phoenix.data.sources import Source
from phoenix.files import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "spdx"), [
    ("apache-2.0", "Apache-2.0"), ("Apache License, Version 2.0", "Apache-2.0"), ("MIT License", "MIT"),
    ("CC BY-NC-SA 4.0", "CC-BY-NC-SA-4.0"), ("cc_by_sa_3.0", "CC-BY-SA-3.0"), ("gpl-3.0", "GPL-3.0-only"),
    ("cc0-1.0", "CC0-1.0"), ("odc-by", "ODC-By-1.0"), ("unlicense", "Unlicense"),
    ("dl-de/by-2-0", "DL-DE-BY-2.0"), ("MIT_license", "MIT"), ("mit licence", "MIT"),
    ("mit or apache-2.0 AND cc-by-4.0", "MIT OR Apache-2.0 AND CC-BY-4.0"),
    ("LicenseRef-x AND mit", "LicenseRef-x AND MIT"),
    *((name, None) for name in (
        "", " ", "other", "unknown", "none", "cc", "cc-by", "license", "-", "MIT AND", "MIT OR other",
        "(MIT OR ISC) AND MIT", "LicenseRef-", "LicenseRef-a b", "mit\0", "['mit']", "MIT/Apache-2.0", "ⅯIT",
        "GPL-3.0+", "UN", "U.N.", "unlicensed", "MITlicense", "version",
    )),
])  # fmt: skip
def test_a_licence_is_known_by_any_spelling_and_nothing_else_is(name, spdx):
    assert canonical(name) == spdx


@pytest.mark.parametrize("name", sorted(PERMISSIVE))
def test_a_canonical_name_stays_and_passes_every_policy(name):
    assert canonical(name) == canonical(name.lower()) == name
    assert all(permits(name, policy) for policy in POLICIES)


@pytest.mark.parametrize(("name", "passes"), [
    (None, "none"),
    ("LicenseRef-Non-Commercial", "none stated"),
    ("LicenseRef-NonCommercial-v2", "none stated"),
    *((f"LicenseRef-{name}", "none stated") for name in (
        "research-only", "CCBYNC4.0", "CC-BY-NC4.0", "CC-BY-NCSA", "CCNC", "NCv1", "nc", "NC2.0",
        "not-for-commercial-use", "no-commercial-use", "personal-use-only", "evaluation-only", "Educational",
    )),
    ("LicenseRef-OpenAI-terms", "none stated nc"),
    ("LicenseRef-NCSA-like", "none stated nc"),
    ("CC-BY-NC-4.0", "none stated"),
    ("PolyForm-Noncommercial-1.0.0", "none stated"),
    ("LicenseRef-none-listed", "none stated nc"),
    ("CC-BY-ND-4.0", "none stated nc"),
    ("NCSA", "none stated nc strict"),
    ("MIT AND CC-BY-NC-4.0", "none stated"),
    ("MIT OR CC-BY-NC-4.0", "none stated nc strict"),
    ("MIT AND CC-BY-NC-4.0 OR LicenseRef-x", "none stated nc"),
])  # fmt: skip
def test_policies(name, passes):
    assert [policy for policy in POLICIES if permits(name, policy)] == passes.split()


# https://huggingface.co/docs/hub/repositories-licenses, less those of model weights
HUB = """apache-2.0 mit afl-3.0 artistic-2.0 bsl-1.0 bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0
    cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl-2.0 gpl-3.0 lgpl-2.1 lgpl-3.0 isc ms-pl mpl-2.0 odc-by odbl
    postgresql ofl-1.1 ncsa unlicense zlib pddl""".split()


def test_the_table_of_names():
    assert set(HUB_NAMES.values()) == set(HUB)
    unknown = {"c-uda", "gfdl"}  # families whose version a row has to state
    assert all(canonical(name) in HUB_NAMES for name in {*HUB} - unknown)
    assert set().union(*CONDITIONS.values()) == {"by", "sa", "nc", "nd", "own", "-"}
    for name, asks in CONDITIONS.items():
        assert ("nc" in asks) == (not permits(name, "nc")), name
        if name.startswith("CC-BY"):
            assert set(asks) == {part.lower() for part in name.split("-") if part in ("BY", "SA", "NC", "ND")}
    for (
        name
    ) in "EUPL-1.2 MPL-2.0 EPL-2.0 GPL-3.0-only AGPL-3.0-only ODbL-1.0 OFL-1.1 CDLA-Sharing-1.0".split():
        assert CONDITIONS[name] == ["by", "sa"]


def test_an_installed_package_has_its_tables():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options"]["packages"] == "find_namespace:"  # phoenix.data has no __init__.py
    patterns = [pattern.strip() for pattern in config["options.package_data"]["phoenix.data"].split(",")]
    shipped = {path for pattern in patterns for path in FOLDER.parent.glob(pattern)}
    there = {path for ending in ("toml", "txt") for path in (ROOT / "phoenix").rglob(f"*.{ending}")}
    assert shipped == there >= {FOLDER / "open_platypus.toml", FOLDER.parent / "spdx.txt"}


def test_two_licences_hold_together():
    assert both("MIT", None) is both(None, "MIT") is None
    assert both("MIT", "MIT") == "MIT" and both("MIT", "Apache-2.0") == "Apache-2.0 AND MIT"
    assert both("MIT OR ISC", "CC-BY-4.0") == "CC-BY-4.0 AND MIT OR CC-BY-4.0 AND ISC"
    for one in ("MIT", "MIT OR CC-BY-NC-4.0", "CC-BY-NC-4.0 AND ISC"):
        for other in ("ISC", "CC-BY-NC-4.0", "LicenseRef-x OR ISC"):
            for policy in POLICIES:
                assert permits(both(one, other), policy) == (permits(one, policy) and permits(other, policy))


# value as it might stand in a row, rows, and what the card says of commercial use
PLATYPUS = [
    ("MATH/PRM-800K", 12298, "yes"), ("reclor", 4530, "no"), ("airoboros", 2605, "unclear"),
    ("scienceqa", 1317, "no"), ("leetcode_ne", 1100, "unclear"), ("guanaco", 797, "yes"), ("ARB", 713, "yes"),
    ("scibench", 616, "yes"), ("theoremqa", 564, "yes"), ("tigerbot-kaggle", 386, "yes"),
]  # fmt: skip
SPELLINGS = {
    "MATH/PRM-800K": ["math prm800k", "PRM800K", "Math / PRM-800k"], "reclor": ["ReClor", "RECLOR "],
    "airoboros": ["airoboros-gpt4-1.4.1", "Airoboros"],
    "scienceqa": [" scienceqa ", "ScienceQA", "science_qa"],
    "leetcode_ne": ["leetcode-ne", "LeetCode NE"], "guanaco": ["openassistant-guanaco", "Guanaco"],
    "ARB": ["arb"], "scibench": ["SciBench"], "theoremqa": ["TheoremQA"], "tigerbot-kaggle": ["TigerBot"],
}  # fmt: skip
UNKNOWN = [None, "", "  ", "openbookqa", "reclor2", "unknown", 7, ["ARB"], {"ARB": 1}, "-"]


def platypus_rows():
    """The published counts by source, in other spellings, 500 rows of unknown origin among them, shuffled."""
    rows = [
        {
            "input": "",
            "output": "x = 4",
            "instruction": f"{name} {i}",
            "data_source": [name, *SPELLINGS[name]][i % 2],
        }
        for name, count, _ in PLATYPUS
        for i in range(count)
    ]
    rows += [
        {"instruction": f"? {i}", "output": "a", "data_source": UNKNOWN[i % len(UNKNOWN)]} for i in range(500)
    ]
    random.Random(0).shuffle(rows)
    return rows


@pytest.mark.parametrize(("policy", "kept", "rejected"), [
    ("none", 25426, {}),
    ("stated", 24926, {"no_license": 500}),
    ("nc", 19079, {"no_license": 500, "license": 5847}),
    ("strict", 15374, {"no_license": 500, "license": 9552}),
])  # fmt: skip
def test_open_platypus_is_filtered_by_its_published_counts(policy, kept, rejected):
    licenses = Licenses(Source("platypus.jsonl"), policy)
    counts = Counter(licenses.why_dropped(licenses.of(row, None)) for row in platypus_rows())
    assert counts.pop(None) == kept and counts == rejected


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_data_source_is_found(name):
    licenses = Licenses(Source("a", license_table="open_platypus"), "nc")
    commercial = next(said for value, _, said in PLATYPUS if value == name)
    for value in [name, *SPELLINGS[name], name.upper(), f"\t{name}\n"]:
        license = licenses.of({"data_source": value}, None)
        assert (licenses.why_dropped(license) == "license") == (commercial == "no"), value
        assert permits(license, "strict") == (commercial == "yes"), value


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_table_loads_by_name_and_keeps_each_value(path):
    field, known = load_table(path.stem)
    table = tomllib.loads(path.read_text())
    assert field == table["field"] and load_table(str(path)) == (field, known)
    assert set(known.values()) == set(map(canonical, table["licenses"].values()))


def of(source, raw, stated=None):
    return Licenses(Source("a", **source), "nc").of(raw, stated)


def test_where_a_licence_comes_from_and_what_stands_before_what():
    row, platypus = {"text": "a"}, {"instruction": "a", "output": "b", "data_source": "ARB"}
    assert of({}, row) is None and of({"license": "mit"}, row) == "MIT"
    assert of({"license": "mit"}, row, "cc-by-4.0") == "CC-BY-4.0"
    for unknown in ("other", "gibberish", " "):
        assert of({"license": "mit"}, row, unknown) is None
    assert of({}, platypus) == "CC-BY-4.0"
    assert of({}, {"instruction": "a", "output": "b"}) is None
    # one licence for all does not stand in for that of each origin
    assert of({"license": "mit"}, platypus) == "CC-BY-4.0"
    assert of({"license": "mit"}, {**platypus, "data_source": None}) is None
    # columns of the same names in another set
    assert of({"license": "mit", "format": "alpaca"}, {**platypus, "data_source": "mine"}) == "MIT"
    for source in ({"format": "open_platypus"}, {"license_table": "open_platypus"}):
        for lost in ({**platypus, "data_source": None}, {**platypus, "data_source": "new"}, {"output": "b"}):
            assert of({"license": "mit", **source}, lost) is None
    # a table does not make a row freer than the row says
    assert (
        of({}, platypus, "cc-by-nc-4.0") == "CC-BY-4.0 AND CC-BY-NC-4.0" and of({}, platypus, "other") is None
    )
    assert FORMATS["open_platypus"][1] == set(platypus)


@pytest.mark.parametrize(("row", "stated"), [
    ({}, None), ({"license": None}, None), ({"license": ""}, None), ({"license": [None, ""]}, None),
    ({"license": "MIT"}, "MIT"), ({"License": "MIT"}, "MIT"), ({"licence": "MIT", "license": ""}, "MIT"),
    ({"license": "MIT", "licence": "CC-BY-NC-4.0"}, "MIT AND CC-BY-NC-4.0"),
    ({"license": "MIT", "LICENSE": "MIT"}, "MIT"),
    ({"license": ["MIT", "CC-BY-4.0"]}, "MIT AND CC-BY-4.0"), ({"license": ["MIT"]}, "MIT"),
    ({"license": "MIT or ISC"}, "MIT OR ISC"),
    # of another type, or what needs brackets: known to nobody
    *(({"license": value}, None) for value in ([], {}, False, 0, 7, {"MIT": 1}, [["MIT"]], ["MIT", 1])),
    ({"license": ["MIT OR LicenseRef-x", "CC-BY-NC-4.0"]}, None),
    ({"license": "other", "licence": "MIT"}, None),
])  # fmt: skip
def test_what_a_row_states_itself(row, stated):
    found = stated_license(row)
    nothing = all(value in (None, "", [None, ""]) for value in row.values())
    assert (found is None) == nothing and (nothing or canonical(found) == (stated and canonical(stated)))
    assert of({"license": "CC0-1.0"}, row, found) == ("CC0-1.0" if nothing else stated and canonical(stated))


def test_the_terms_of_the_generator_are_judged_too():
    def dropped(policy, **source):
        licenses = Licenses(Source("a", license="mit", **source), policy)
        return licenses.why_dropped(licenses.of({}, None))

    assert dropped("strict") is None
    assert dropped("strict", generator="gpt-4", generator_license="LicenseRef-OpenAI-terms") == "license"
    assert dropped("nc", generator="gpt-4", generator_license="LicenseRef-OpenAI-terms") is None
    assert dropped("nc", generator_license="cc-by-nc-4.0") == "license"
    assert dropped("none", generator_license="cc-by-nc-4.0") is None


def test_the_terms_of_the_generator_are_part_of_a_rows_licence():
    terms, platypus = (
        {"generator_license": "LicenseRef-x"},
        {"instruction": "", "output": "", "data_source": "ARB"},
    )
    assert of({"license": "mit", **terms}, {}) == "LicenseRef-x AND MIT"
    assert of({"license": "mit", **terms}, {}, "cc0-1.0") == "CC0-1.0 AND LicenseRef-x"
    assert of({"license": "mit", **terms}, {}, "LicenseRef-x AND MIT") == "LicenseRef-x AND MIT"
    assert of(terms, platypus) == "CC-BY-4.0 AND LicenseRef-x" and of(terms, {}) is None


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_join_gives_a_translated_row_the_licence_of_its_original(tmp_path):
    join = write(tmp_path / "platypus.jsonl", [
        {"instruction": "Solve  3x = 12.", "input": "", "output": "4", "data_source": "scibench"},
        {"instruction": "Cafe\u0301?", "input": "", "output": "Yes.", "data_source": "ARB"},
        {"instruction": "Choose.", "input": "A or B", "output": "A", "data_source": "reclor"},
        {"instruction": "Choose.", "input": "C or D", "output": "C", "data_source": "guanaco"},
        {"instruction": "Own", "output": "1", "data_source": "ARB", "license": "cc-by-nc-4.0"},
        {"instruction": "Odd", "output": "1", "data_source": "ARB", "license": []},
        {"instruction": " ", "output": "1", "data_source": "ARB"},
        {"instruction": "Twice", "output": "1", "data_source": "guanaco"},
        {"instruction": "Twice", "output": "2", "data_source": "ARB"},
        {"instruction": "Lost", "output": "1", "data_source": "guanaco"},
        {"instruction": "lost", "output": "2", "data_source": None},
    ])  # fmt: skip
    source = {"license_join": join, "license": "mit"}
    for row, license in [
        ({"instruction": "solve 3X\n= 12. ", "instruction_de": "Löse 3x = 12."}, "MIT"),
        ({"instruction": "Löse", "instruction_en": "Solve 3x = 12."}, "MIT"),
        ({"instruction": "CAFÉ?"}, "CC-BY-4.0"),
        ({"instruction": "Choose.", "input": "C or D"}, "Apache-2.0 AND LicenseRef-Non-Commercial"),
        ({"instruction": "Choose."}, "Apache-2.0 AND LicenseRef-Non-Commercial"),
        ({"instruction": "Own"}, "CC-BY-4.0 AND CC-BY-NC-4.0"),
        ({"instruction": "Odd"}, None),
        ({"instruction": ""}, None),
        ({"instruction": "  "}, None),
        ({"instruction": "Twice"}, "Apache-2.0 AND CC-BY-4.0"),
        ({"instruction": "Lost"}, None),
        ({"instruction": "Löse 3x = 12.", "data_source": "ARB"}, None),
        ({"instruction_de": "Solve 3x = 12."}, None),
        ({"instruction": None}, None),
    ]:
        assert of(source, {"output_de": "...", **row}) == license, row
    assert of(source, {"instruction": "CAFÉ?"}, "mit") == "CC-BY-4.0 AND MIT"
    joined = Licenses(Source("a", license_join="elsewhere"), "nc", Path(join))
    assert joined.origin({"instruction": "twice"}) == "ARB + guanaco"
    assert joined.origin({"instruction": "lost"}) == "None + guanaco"
    assert joined.origin({"instruction": "new"}) == joined.origin({}) == ""


def test_open_schnabeltier_is_filtered_by_a_join_to_open_platypus(tmp_path):
    rows = random.Random(1).sample(platypus_rows(), 3000)
    join = write(tmp_path / "platypus.jsonl", rows)
    translated = [{"instruction": row["instruction"].upper(), "instruction_de": "..."} for row in rows]
    direct = Licenses(Source("platypus.jsonl"), "nc")
    joined = Licenses(Source("schnabeltier.jsonl", license_join=join), "nc")
    assert [joined.of(row, None) for row in translated] == [direct.of(row, None) for row in rows]


TABLE = 'field = "from"\n[licenses]\nwiki = "CC-BY-SA-4.0"\n'


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TABLE + '"Größe" = "LicenseRef-x"\n', encoding="utf-8")
    source = {"license_table": str(path)}
    assert of(source, {"from": "WIKI"}) == "CC-BY-SA-4.0"
    for value in ("Gro\u0308ße", "GR\u00d6SSE", " größe."):
        assert of(source, {"from": value}) == "LicenseRef-x"
    assert of(source, {"from": "Grösse mit"}) is of(source, {"licenses": "wiki"}) is None


@pytest.mark.parametrize(("text", "words"), [
    ("[licenses", ["TOMLDecodeError"]),
    ('[licenses]\nwiki = "mit"\n', ["'field'"]),
    ("field = 3\n[licenses]\n", ["AttributeError"]),
    ('field = "from"\nlicenses = "mit"\n', ["[licenses]"]),
    (TABLE + 'a = "mti"\n', ["'a'", "'mti'", "did you mean 'MIT'?"]),
    (TABLE + 'a = "other"\n', ["'a'", "'other'", "LicenseRef-"]),
    (TABLE + "a = 3\n", ["AttributeError"]),
    (TABLE + '"WIKI" = "MIT"\n', ["'WIKI'", "twice"]),
    (TABLE + '"--" = "MIT"\n', ["'--'", "no letters"]),
    (b"\xff", ["UnicodeDecodeError"]),
])  # fmt: skip
def test_a_table_in_disorder_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_table(str(path))
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_mistakes_in_the_config_are_one_sentence(tmp_path):
    join = write(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    for source, policy, words in [
        ({"license": "apach-2.0"}, "nc", ["a: license is 'apach-2.0'", "did you mean 'Apache-2.0'?"]),
        ({"license": ""}, "nc", ["a: license is ''", "LicenseRef-"]),
        ({"license": "other"}, "none", ["license is 'other'"]),
        ({"generator_license": "openai"}, "nc", ["generator_license is 'openai'"]),
        ({"license_table": "platypus"}, "nc", ["platypus.toml", "open_platypus"]),
        ({"license_join": join}, "nc", [f"{join}, line 1", "found instruction, output", "data_source"]),
        ({"license_join": str(tmp_path / "no.jsonl")}, "nc", ["no.jsonl does not exist"]),
    ]:
        with pytest.raises(UserError) as error:
            Licenses(Source("a", **source), policy)
        assert all(word in str(error.value) for word in words), error.value


def test_a_source_without_any_licence_is_told_what_to_state():
    said = unlicensed_sentence(Source("rows.jsonl"), "nc")
    assert all(word in said for word in ("rows.jsonl", "license_policy=nc", "license_table"))
    assert "format=alpaca" in unlicensed_sentence(Source("rows.jsonl", license="MIT"), "nc")
    assert "license_join" in unlicensed_sentence(Source("rows.jsonl", license_join="b"), "nc")


def test_the_sources_of_the_paper_state_what_is_asked_of_them():
    config = tomllib.loads((ROOT / "recipes" / "configs" / "paper_data.toml").read_text())
    assert config["license_policy"] == "nc" and len(config["sources"]) == 6
    passes = {"nc": set(), "strict": set()}
    for table in config["sources"]:
        source = Source(**table)
        assert source.attribution and source.url and source.language == "de"
        assert bool(source.license) != bool(source.license_join), source.label
        for policy, names in passes.items():
            found = source.license or "MIT"  # of a row that the join finds
            licenses = Licenses(dataclasses.replace(source, license_join=None, license=found), policy)
            names |= {source.label} if licenses.why_dropped(licenses.of({}, None)) is None else set()
    assert passes == {
        "nc": {Source(**table).label for table in config["sources"]},
        "strict": {"Dolly-15k-German"},
    }
