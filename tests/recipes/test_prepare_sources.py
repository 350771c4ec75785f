"""Many sources in one store: rows of every schema, each with a known fault, counted to the last row."""

import dataclasses
import html
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from phoenix.config import run_recipe
from phoenix.data import parts
from phoenix.data.filters import FILTERS, lot, row_keys
from phoenix.data.formats import to_row
from phoenix.data.sources import Source
from phoenix.data.store import TokenStore
from phoenix.tokenizer import Tokenizer

pytest.importorskip("datasketch")
pytest.importorskip("py3langid")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "tests" / "data")]
import prepare  # noqa: E402
import test_licenses  # noqa: E402
import test_sources  # noqa: E402

GERMAN = (
    "Der Bäcker|Die Lehrerin|Mein Nachbar|Das Kind|Der alte Kapitän|Unsere Ärztin|Die Gärtnerin|Ein Maler",
    "verkauft|sucht|findet|zeigt|beschreibt|vergisst|repariert|bemalt|versteckt|verschenkt",
    "am Morgen|jeden Abend|im Winter|nach der Arbeit|vor dem Frühstück|gegen Mittag|seit Jahren|ab und zu",
    "frische Brötchen|alte Landkarten|einen roten Schirm|die kleine Laterne|sein Fahrrad|viele Bücher",
    "auf dem Markt|hinter der Brücke|in der Küche|neben dem Bahnhof|unter dem Dach|am Fluss|im Garten",
)
ENGLISH = (
    "The baker|My neighbour|The old captain|Our doctor|The gardener|A painter|The little child",
    "sells|looks for|finds|shows|describes|forgets|repairs|paints|hides|gives away",
    "fresh bread|old maps|a red umbrella|the small lantern|a bicycle|many books",
    "at the market|behind the bridge|in the kitchen|near the station|under the roof|by the river",
    "in the morning|every evening|in the winter|after work|before breakfast|around noon|for years",
)
TEST_QUESTION = "Stell dir vor du führst mit Elon Musk ein langes Gespräch über die Zukunft von Hydrogels"
REFUSAL = "Als KI-Sprachmodell kann ich dazu leider nichts sagen."
LONG = "Und so weiter. " * 150
COUNT = 5  # rows of each fault in each file that can have it


def prose(draw, sentences, words=GERMAN):
    return " ".join(" ".join(draw.choice(part.split("|")) for part in words) + "." for _ in range(sentences))


@dataclasses.dataclass
class Case:
    """What a row says, what else stands in it, and what must become of it."""

    question: str
    answer: str
    worse: str = ""
    english: tuple[str, str] = ("", "")
    more: dict = dataclasses.field(default_factory=dict)
    reason: str = "kept"
    license: str | None = None
    subset: str | None = None
    scores: tuple[float, float] = (4.5, 2.0)
    raw: dict | None = None  # in place of the schema's own


def case(draw, number):
    return Case(
        f"Frage {number}: {prose(draw, 2)}", f"{prose(draw, 6)} Antwort {number}.",
        f"{prose(draw, 5)} Schlechter {number}.", (f"Question {number}: {prose(draw, 2, ENGLISH)}",
        f"{prose(draw, 6, ENGLISH)} Answer {number}."),
    )  # fmt: skip


def turns(*contents, names=("role", "content"), roles=("user", "assistant")):
    return [dict(zip(names, (roles[i % 2], text))) for i, text in enumerate(contents)]


def messages(c):
    return {"messages": turns(c.question, c.answer)}


def sharegpt(c):
    return {"conversations": turns(c.question, c.answer, names=("from", "value"), roles=("human", "gpt"))}


def alpaca(c):
    return {"instruction": c.question, "input": "", "output": c.answer}


def platypus(c):
    return {"instruction": c.question, "input": "", "output": c.answer, "data_source": c.subset or "guanaco"}


def schnabeltier(c):
    return {
        "instruction": c.english[0],
        "instruction_de": c.question,
        "output": c.english[1],
        "output_de": c.answer,
    }


def dolly_de(c):
    german = {"instruction_de": c.question, "context_de": "", "response_de": c.answer}
    return {"instruction": c.english[0], "context": "", "response": c.english[1], **german}


def oasst(c):
    reply = {"role": "assistant", "text": c.answer, "rank": 0, "replies": []}
    other = {"role": "assistant", "text": "Nein.", "rank": 1, "replies": []}
    root = {"role": "prompter", "text": c.question, "replies": [other, reply]}
    return {"message_tree_id": c.question[:9], "tree_state": "ready_for_export", "prompt": root}


def ultrafeedback(c):
    rate = lambda text, n: {"response": text, "annotations": {"honesty": {"Rating": str(n)}}}  # noqa: E731
    return {"instruction": c.question, "completions": [rate(c.worse, 2), rate(c.answer, 5)]}


def argilla(c):
    said = {"instruction": c.question, "chosen_response": c.answer, "rejected_response": c.worse}
    return {**said, "chosen_avg_rating": c.scores[0], "rejected_avg_rating": c.scores[1]}


def argilla_cleaned(c):
    both = {"chosen": turns(c.question, c.answer), "rejected": turns(c.question, c.worse)}
    return {"prompt": c.question, **both, "chosen-rating": c.scores[0], "rejected-rating": c.scores[1]}


def h4(c):
    both = {"chosen": turns(c.question, c.answer), "rejected": turns(c.question, c.worse)}
    scores = {"score_chosen": c.scores[0], "score_rejected": c.scores[1]}
    return {"prompt": c.question, "prompt_id": "x", "messages": both["chosen"], **both, **scores}


def trl(c):
    both = {"chosen": turns("", c.answer)[1:], "rejected": turns("", c.worse)[1:]}
    return {"prompt": turns(c.question), **both, "score_chosen": c.scores[0], "score_rejected": c.scores[1]}


def no_license(c, schema):
    c.license = None
    if schema is platypus:
        c.subset = "openbookqa"
    elif schema is schnabeltier:
        c.subset = None  # so that its instruction does not stand in the file that is joined
    else:
        c.more["license"] = "unknown"


def forbidden(c, schema):
    if schema is platypus:
        c.subset = "ReClor"
    elif schema is schnabeltier:
        c.subset = "reclor"  # in the file that is joined
    else:
        c.more["license"] = "cc-by-nc-4.0"


def of_a_test_set(c, schema):
    if schema in (platypus, schnabeltier):
        c.subset = "TheoremQA"  # of schnabeltier in the file that is joined
    else:
        c.more["category"] = "theorem_qa"


def too_short(c, schema):
    c.more["translation"] = {"source_characters": 100, "characters": 10}


def endless(c, schema):
    end = LONG * (10 if len(c.question) % 2 else 1)  # by its characters alone, or by its tokens
    c.answer, c.english = c.answer + end, (c.english[0], c.english[1] + end)


def bad(c, schema):
    row = schema(c)
    c.raw = {f"no_{name}": value for name, value in row.items()}


def set_to(**values):
    def change(c, schema):
        for name, value in values.items():
            setattr(c, name, value(c) if callable(value) else value)

    return change


# What is wrong -> how a case is made so.
FAULTS = {
    "bad_row": bad, "no_license": no_license, "license": forbidden, "empty": set_to(answer="\u200b"),
    "equal_answers": set_to(worse=lambda c: c.answer.upper()), "tie": set_to(scores=(3.0, 3.0)),
    "test_set": of_a_test_set, "language": set_to(answer=lambda c: c.english[1]), "length_ratio": too_short,
    "refusal": set_to(answer=lambda c: f"{c.answer} {REFUSAL}"),
    "contaminated": set_to(question=lambda c: f"{c.question} {TEST_QUESTION}?"),
    "too_long": endless, "no_target": set_to(raw={"text": "a"}),
}  # fmt: skip
PAIRS = {"equal_answers", "tie"}
# Name of the file -> schema, fields of its source, faults that its rows cannot have.
DOCUMENTS = {
    "messages": (messages, {"license": "MIT"}, PAIRS),
    "sharegpt": (sharegpt, {"license": "apache-2.0", "weight": 0.5}, {*PAIRS, "no_target"}),
    "alpaca": (alpaca, {"license": "MIT", "cap": 20}, {*PAIRS, "no_target"}),
    "platypus": (platypus, {}, {*PAIRS, "no_target"}),
    "schnabeltier": (schnabeltier, {"license_join": "join"}, {*PAIRS, "no_target"}),
    "dolly_de": (dolly_de, {"license": "CC-BY-SA-3.0", "weight": 2.5}, {*PAIRS, "no_target"}),
    "oasst": (oasst, {"license": "Apache-2.0", "weight": 1.5, "cap": 9}, {*PAIRS, "no_target"}),
}
PREFERENCES = {
    "ultrafeedback": (ultrafeedback, {"license": "MIT", "weight": 0.5}, {"tie", "no_target"}),
    "argilla": (argilla, {"license": "MIT", "cap": 20}, {"no_target"}),
    "argilla_cleaned": (argilla_cleaned, {"license": "MIT", "weight": 2.5}, {"no_target"}),
    "h4": (h4, {"license": "MIT"}, {"no_target"}),
    "trl": (trl, {"license": "MIT", "weight": 0.75}, {"no_target"}),
}
PLATYPUS = {"guanaco": "Apache-2.0", "ARB": "CC-BY-4.0", "scibench": "MIT"}


@pytest.fixture(scope="module")
def tokenizer_folder(bpe_tokenizer_folder, tmp_path_factory):
    """Without BOS and EOS: so that a text of one token has nothing to learn."""
    folder = shutil.copytree(bpe_tokenizer_folder, tmp_path_factory.mktemp("tokenizer"), dirs_exist_ok=True)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    stated = {name: value for name, value in stated.items() if name not in ("bos_token", "eos_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Mixture:
    """Files with rows of each schema and each fault; cases: name of the file -> one of each line."""

    def __init__(self, folder, files, kind):
        self.draw, self.folder, self.files, self.number = random.Random(len(kind)), folder, files, 0
        self.kind = kind
        self.cases = {name: self.make(*files[name]) for name in files}
        clean = []
        for name, (schema, fields, _) in files.items():
            # One that its weight does not draw takes no duplicate with it.
            clean += [c for c in self.cases[name] if c.reason == "kept" and self.drawn(c, schema, fields)]
            for _ in range(COUNT):
                self.repeat(name, schema, fields, clean)
        for name, (schema, _, _) in files.items():
            write(folder / f"{name}.jsonl", [self.row(c, schema) for c in self.cases[name]])
        self.join = write(folder / "join.jsonl", [
            {"instruction": c.english[0].upper(), "output": "x", "data_source": c.subset}
            for c in self.cases.get("schnabeltier", ()) if c.subset
        ])  # fmt: skip
        self.eval_file = write(
            folder / "eval.jsonl", [{"turns": ["Wer war das?"]}, {"turns": [TEST_QUESTION]}]
        )

    def new(self, schema, fields):
        self.number += 1
        made = case(self.draw, self.number)
        made.license = fields.get("license", "").replace("apache", "Apache") or None
        if schema in (platypus, schnabeltier):
            made.subset = self.draw.choice(["guanaco", "ARB", "scibench"])
            made.license = PLATYPUS[made.subset]
        elif self.draw.random() < 0.3:
            made.subset = made.more["source"] = self.draw.choice(["wiki", "forum"])
        return made

    def make(self, schema, fields, without):
        cases = [self.new(schema, fields) for _ in range(30)]
        for reason in [reason for reason in FAULTS if reason not in without]:
            for _ in range(COUNT):
                made = self.new(schema, fields)
                FAULTS[reason](made, schema)
                made.reason = reason
                if (
                    reason in ("no_license", "license", "tie", "test_set", "length_ratio")
                    and self.draw.random() < 0.3
                ):
                    made.answer += f" {REFUSAL}"  # asked later, so it changes nothing
                cases.append(made)
        self.draw.shuffle(cases)
        return cases

    def repeat(self, name, schema, fields, clean):
        """Behind the rows of a file: a duplicate and a near duplicate of one of this file or before."""
        first = clean.pop(self.draw.randrange(len(clean)))
        for reason, change in [
            ("duplicate", {"question": f" {first.question.upper()}\n"}),
            ("near_duplicate", {"answer": first.answer.replace("Antwort", "Entgegnung")}),
        ]:
            said = {"question": first.question, "answer": first.answer, "worse": first.worse, **change}
            self.cases[name].append(dataclasses.replace(self.new(schema, fields), **said, reason=reason))

    @staticmethod
    def row(c, schema):
        return {**(schema(c) if c.raw is None else c.raw), **c.more}

    def sources(self):
        joined = lambda given: {**given, "license_join": str(self.join)} if "license_join" in given else given  # noqa: E731
        return tuple(
            Source(str(self.folder / f"{name}.jsonl"), name=name, language="de", **joined(given))
            for name, (_, given, _) in self.files.items()
        )

    def drawn(self, c, schema, fields, seed=42):
        """How often the weight of its source takes a row."""
        key, _ = row_keys(to_row(self.row(c, schema), (Path("x"), 1), self.kind))
        weight = fields.get("weight", 1.0)
        return int(weight) + (lot(key, -1 - seed) < weight % 1)

    def share_out(self, name):
        """Weight and cap, row by row -> copies of each line."""
        schema, fields, _ = self.files[name]
        room, copies = fields.get("cap", 10**9), []
        for c in self.cases[name]:
            copies.append(0)
            if c.reason in ("kept", "duplicate", "near_duplicate"):
                count = self.drawn(c, schema, fields)
                c.reason = "weight" if count == 0 else c.reason
                if c.reason == "kept":
                    c.reason = "kept" if room else "cap"
                    copies[-1] = min(count, room)
                    room -= copies[-1]
        return copies


@pytest.mark.parametrize(("kind", "files"), [("documents", DOCUMENTS), ("pairs", PREFERENCES)])
def test_every_row_of_a_mixture_is_where_it_belongs(kind, files, tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(parts, "PART_ROWS", 16)
    mixture = Mixture(tmp_path, files, kind)
    config = prepare.PrepareConfig(
        tmp_path / "store", tokenizer_folder, sources=mixture.sources(), license_policy="nc", kind=kind,
        max_length=900, filters=FILTERS, eval_files=(mixture.eval_file,), on_bad_row="drop", num_workers=1,
    )  # fmt: skip
    stores = []
    for workers in (1, 2, 3):
        folder = prepare.main(dataclasses.replace(config, num_workers=workers))
        stores.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert stores[0] == stores[1] == stores[2]

    copies = {name: mixture.share_out(name) for name in files}
    store, in_all = TokenStore.open(folder, kind=kind, verify=True), Counter()
    for (name, cases), entry in zip(mixture.cases.items(), store.manifest["inputs"], strict=True):
        expected = Counter(c.reason for c in cases)
        in_all += expected
        assert entry["rows"] == len(cases) and entry["kept"] == expected.pop("kept"), name
        assert entry["dropped"] == expected, name
        assert entry["rows"] == entry["kept"] + sum(entry["dropped"].values())
        assert entry.get("repeated", 0) == sum(copies[name]) - entry["kept"]
    without = {"documents": PAIRS, "pairs": {"no_target"}}[kind]
    assert in_all.keys() == set(parts.REASONS) - without and min(in_all.values()) >= COUNT

    tokenizer, found, names = Tokenizer.from_pretrained(tokenizer_folder), defaultdict(int), list(files)
    for index in range(0, len(store), config.pieces):
        [origin] = store.origins(int(store.offsets[index]), int(store.offsets[index]) + 1)
        path, line = origin.split(", line ")
        name, line = Path(path).stem, int(line) - 1
        made = mixture.cases[name][line]
        found[name, line] += 1
        whole = "".join(tokenizer.decode(store.document(index + i)[0].tolist()) for i in range(config.pieces))
        assert made.question in whole and made.answer in whole and (kind != "pairs" or made.worse in whole)
        assert store.provenance(index) == {
            "source": name,
            "subset": made.subset or "",
            "license": made.license,
        }
        assert made.license
    assert found == {(n, i): count for n in names for i, count in enumerate(copies[n]) if count}
    assert store.manifest["splits"]["train"]["rows"] == sum(map(sum, copies.values()))


@pytest.fixture
def run(tmp_path, tokenizer_folder, monkeypatch, capsys):
    """run(text of a TOML file) -> exit code, what stands on stderr; the recipe as from the command line."""
    before = signal.getsignal(signal.SIGTERM)

    def run(text):
        base = (
            f'output = "{tmp_path / "store"}"\nmodel_name_or_path = "{tokenizer_folder}"\nnum_workers = 1\n'
        )
        (tmp_path / "config.toml").write_text(base + text.replace("HERE", str(tmp_path)), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "config.toml")])
        try:
            run_recipe(prepare.main, prepare.PrepareConfig)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


ROWS = '[[sources]]\npath = "HERE/rows.jsonl"\n'
MISTAKES = {
    "no licence": (ROWS, ["rows.jsonl: no row has a known licence", "license_policy=stated"]),
    "no table": (ROWS + 'license_table = "HERE/none.toml"', ["there is no", "none.toml", "open_platypus"]),
    "policy": ('license_policy = "strikt"\n' + ROWS, ["'strikt'", "did you mean 'strict'?"]),
    "filter": ('filters = ["emty"]\n' + ROWS, ["'emty'", "did you mean 'empty'?"]),
    "schema": (ROWS + 'format = "mesages"', ["'mesages'", "did you mean 'messages'?"]),
    "field": (ROWS + 'licence = "MIT"', ["sources 1: unknown field 'licence'; did you mean 'license'?"]),
    "licence": (ROWS + 'license = "aphace-2.0"', ["'aphace-2.0'", "did you mean 'Apache-2.0'?"]),
    "table": (ROWS + 'license_table = "platypus"', ["platypus.toml", "open_platypus"]),
    "join": (ROWS + 'license_join = "HERE/none.jsonl"', ["none.jsonl does not exist"]),
    "forbidden": (
        'license_policy = "nc"\n' + ROWS + 'license = "cc-by-nc-4.0"',
        ["no row is left for the split 'train': 3 license"],
    ),
    "dropped": (
        'filters = ["empty", "refusal"]\non_bad_row = "drop"\nmax_length = 40\n'
        '[[sources]]\npath = "HERE/useless.jsonl"\nlicense = "MIT"',
        ["no row is left for the split 'train': 1 bad_row, 1 empty, 1 refusal, 1 too_long"],
    ),
    "weights": (f"{ROWS}weight = 0\n{ROWS}weight = 0", ["sources: none to train on; expected a weight"]),
    "all held out": (f"{ROWS}held_out = true", ["sources: none to train on", "one that is not held out"]),
    "ratio": (f"length_ratio = [2, 0.5]\n{ROWS}", ["length_ratio is [2.0, 0.5]; expected the least first"]),
    "no language": (f'filters = ["language"]\n{ROWS}license = "MIT"', ["but no source states"]),
    "another schema": (
        f'{ROWS}license = "MIT"\nformat = "sharegpt"',
        ["found the fields messages; expected those of a known format: sharegpt (conversations); change"],
    ),
    "no length": (f"max_length = 1\n{ROWS}", ["max_length is 1; expected a number of at least 2"]),
    "no such language": (
        f'on_bad_row = "drop"\nfilters = ["language"]\n{ROWS}license = "MIT"\nlanguage = "xx"',
        ["language is 'xx'; expected a code that py3langid knows"],
    ),
    "negative": (ROWS + 'license = "MIT"\nweight = -1', ["weight is -1.0; expected a number of at least 0"]),
    "infinite": (ROWS + 'license = "MIT"\nweight = inf', ["weight is inf"]),
    "cap": (ROWS + 'license = "MIT"\ncap = 0', ["cap is 0; expected a number above 0"]),
    "language": (ROWS + 'language = "deutsch"', ["language is 'deutsch'; expected a code such as 'de'"]),
    "empty folder": ('[[sources]]\npath = "HERE/empty"', ["empty: no file of rows", "there are none"]),
    "ending": ('[[sources]]\npath = "HERE/config.toml"', ["config.toml", ".parquet"]),
    "revision": (ROWS + 'revision = "v1"', ["has a revision, but is not on the hub"]),
    "no question": (
        'filters = ["contaminated"]\non_bad_row = "drop"\neval_files = ["HERE/odd.jsonl"]\n' + ROWS,
        ["odd.jsonl, row 1: found the fields solution; expected a question in one of"],
    ),
    "no test file": (
        'filters = ["contaminated"]\non_bad_row = "drop"\neval_files = ["HERE/none.jsonl"]\n' + ROWS,
        ["none.jsonl does not exist"],
    ),
    "no test files": ('filters = ["contaminated"]\n' + ROWS, ["contaminated", "eval_files"]),
    "no such filter on": ('eval_files = ["HERE/rows.jsonl"]\n' + ROWS, ["contaminated", "eval_files"]),
}  # fmt: skip


@pytest.mark.parametrize("text", ['license_policy = "none"\n' + ROWS, 'input = ["HERE/rows.jsonl"]\n'])
def test_without_a_policy_no_licence_is_asked(run, tmp_path, text):
    """If it is none, sources or not; if it is not stated, for files of one's own."""
    write(tmp_path / "rows.jsonl", [{"messages": turns("Frage?", "Ja.")}])
    assert run(text) == (0, "")
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert manifest["config"]["license_policy"] == "none"
    assert [row["license"] for row in manifest["provenance"]] == ["not stated"]


def test_beyond_the_most_a_source_of_a_row_that_is_listed_keeps_its_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MOST_SUBSETS", 2)
    named = [{"messages": turns(f"Frage {i}?", "Ja."), "source": name} for i, name in enumerate("abcadb")]
    write(tmp_path / "rows.jsonl", named)
    assert run(ROWS + 'license = "MIT"') == (0, "")
    store = TokenStore.open(tmp_path / "store")
    assert [store.provenance(i)["subset"] for i in range(6)] == ["a", "b", "", "a", "", "b"]


def test_an_error_of_the_programme_is_no_bad_row(run, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(prepare.RowFilters, "why_dropped", broken)
    write(tmp_path / "rows.jsonl", [{"messages": turns("Frage?", "Ja.")}])
    with pytest.raises(ValueError, match="a mistake of ours"):
        run('on_bad_row = "drop"\n' + ROWS + 'license = "MIT"')


def test_an_empty_turn_is_dropped_by_its_filter_and_an_error_without_it(run, tmp_path):
    write(tmp_path / "rows.jsonl", [{"messages": turns("Frage?", said)} for said in (" ", "Ja.")])
    assert run(ROWS + 'license = "MIT"') == (0, "")
    [entry] = TokenStore.open(tmp_path / "store").manifest["inputs"]
    assert entry["dropped"] == {"empty": 1} and entry["kept"] == 1
    code, said = run("filters = []\n" + ROWS + 'license = "MIT"')
    assert code == 2 and "line 1: turn 2 is empty; expected text of the assistant; correct the row" in said


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_config_of_sources_is_one_sentence(name, run, tmp_path):
    text, words = MISTAKES[name]
    write(tmp_path / "rows.jsonl", [{"messages": turns(f"Frage {i}?", "Ja.")} for i in range(3)])
    useless = ["\u200b", "Ja. " * 40, REFUSAL]
    write(tmp_path / "useless.jsonl", [*({"messages": turns("Q", said)} for said in useless), {"a": 1}])
    write(tmp_path / "odd.jsonl", [{"solution": "42"}])
    (tmp_path / "empty").mkdir()
    code, said = run(text)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert not (tmp_path / "store").exists()


def test_a_revision_that_the_hub_lacks_is_one_sentence(tmp_path, tokenizer_folder):
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), test_sources.Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    others = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "recipes/prepare.py", str(tmp_path / "config.toml")]
    text = f'output = "{tmp_path / "store"}"\nmodel_name_or_path = "{tokenizer_folder}"\n'
    (tmp_path / "config.toml").write_text(
        f'{text}[[sources]]\npath = "hf://datasets/org/set"\nrevision = "v9"\n'
    )
    done = subprocess.run(command, cwd=ROOT, env={**others, **address}, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: hf://datasets/org/set: org/set has no revision 'v9'")


@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_the_rows_of_open_platypus_that_may_be_used(step, tmp_path, tokenizer_folder):
    """By the published counts of its sources; 500 rows of unknown origin are in no store."""
    rows = test_licenses.platypus_rows()
    said = {spelling: usable for name, _, usable in test_licenses.PLATYPUS
            for spelling in [name, *test_licenses.SPELLINGS[name]]}  # fmt: skip
    usable = [said.get(row["data_source"]) if isinstance(row["data_source"], str) else None for row in rows]
    path = write(tmp_path / "platypus.jsonl", rows[::step])
    for policy, passes, published in [("nc", ("yes", "unclear"), 19079), ("strict", ("yes",), 15374)]:
        store = TokenStore.open(prepare.main(prepare.PrepareConfig(
            tmp_path / policy, tokenizer_folder, sources=(Source(str(path)),), license_policy=policy,
        )))  # fmt: skip
        [entry] = store.manifest["inputs"]
        expected = {i + 1 for i, value in enumerate(usable[::step]) if value in passes}
        assert entry["kept"] == len(expected) == len(store) and (step > 1 or len(store) == published)
        assert entry["dropped"]["no_license"] == usable[::step].count(None) and (
            step > 1 or entry["dropped"]["no_license"] == 500
        )
        assert {int(line) for shard in store.shards for line in shard["origin"][:, 1]} == expected
        found = {row["license"] for row in store.manifest["provenance"]}
        assert None not in found and "not stated" not in found


def test_planted_test_questions_are_found_and_shown(tmp_path, run):
    questions = [
        "Wie viele Brücken führen heute im Stadtgebiet von Köln über den Rhein und wann wurden sie gebaut?",
        "How many bridges cross the river Rhine within the city of Cologne today and when were they built?",
        "Was ist 7 mal 8?",
    ]
    write(tmp_path / "eval.jsonl", [{"question": question} for question in questions])
    german, english, short = questions
    column = {
        "instruction": f"Please tell me: {english}",
        "instruction_de": "Sag es mir.",
        "output_de": "Sieben.",
    }
    planted = [
        {"messages": turns(german, "Sieben.")},
        {"messages": turns(f"Hallo! {german.upper()}", "Sieben.")},
        {"messages": turns("Guten Tag.", "Gut.", german.replace(" ", " , ").rstrip("?") + " ...", "Sieben.")},
        {"messages": turns("Und?", f"Die Frage lautet: *{german}*")},
        {"messages": turns(f"  {short[:-1].upper()} !", "56.")},
        column,
    ]
    clean = [
        {"messages": turns(" ".join(german.split()[:8]), "Sieben.")},
        {"messages": turns(" ".join(german.split()[::-1]), "Sieben.")},
        {"messages": turns(f"Sag schnell: {short}", "56.")},
        {**column, "instruction": "Please tell me."},
    ]
    rows = [*planted, *clean]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    write(tmp_path / "rows.jsonl", [rows[i] for i in order])
    assert run(
        'filters = ["contaminated"]\neval_files = ["HERE/eval.jsonl"]\n' + ROWS + 'license = "MIT"\n'
    ) == (0, "")
    store = TokenStore.open(tmp_path / "store")
    lines = {int(line) for line in store.shards[0]["origin"][:, 1]}
    assert lines == {order.index(i) + 1 for i in range(len(planted), len(rows))}
    assert store.manifest["inputs"][0]["dropped"] == {"contaminated": len(planted)}
    report = html.unescape((tmp_path / "store" / "report.html").read_text(encoding="utf-8"))
    for i, row, words in [
        (0, 1, "köln über den rhein"),
        (5, 2, "cross the river rhine"),
        (4, 3, "was ist 7 mal 8"),
    ]:
        assert f"rows.jsonl, line {order.index(i) + 1}" in report
        assert f'eval.jsonl, row {row}: "' in report and words in report
