"""prepare as people run it: rows in files -> a store, the same whatever the number of workers."""

import dataclasses
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phoenix import chat
from phoenix.config import load_config
from phoenix.data.sources import resolve
from phoenix.data.store import MANIFEST, TokenStore
from phoenix.files import UserError
from phoenix.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import prepare  # noqa: E402

WORDS = "Der Zug nach Köln fährt heute zwölf Minuten später ab weil auf der Strecke gebaut wird".split()


def say(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def conversations(count, seed=0):
    draw = random.Random(seed)
    text = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))  # noqa: E731
    return [{"messages": say(*(text() for _ in range(2 * draw.randint(1, 3)))), "n": i} for i in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def configure(tmp_path, bpe_tokenizer_folder):
    def configure(rows, **options):
        files = rows if isinstance(rows, tuple) else (write(tmp_path / "rows.jsonl", rows),)
        base = prepare.PrepareConfig(tmp_path / "store", bpe_tokenizer_folder, input=files, num_workers=1)
        return dataclasses.replace(base, **options)

    return configure


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_store_holds_the_rendered_rows(configure, bpe_tokenizer_folder, capsys):
    rows = conversations(50)
    folder = prepare.main(configure(rows))
    tokenizer, store = Tokenizer.from_pretrained(bpe_tokenizer_folder), TokenStore.open(folder, verify=True)
    assert len(store) == 50
    for index, row in enumerate(rows):
        rendered = chat.render(row["messages"], tokenizer, "chatml")
        tokens, mask = store.document(index)
        assert tokens.tolist() == rendered.tokens and mask.tolist() == rendered.loss_mask
        name = store.origins(int(store.offsets[index]), int(store.offsets[index + 1]))
        assert name == [f"{folder.parent / 'rows.jsonl'}, line {index + 1}"]
    store.require_tokenizer(tokenizer.digest)
    assert store.manifest["chat_template"] == "chatml" and store.manifest["kind"] == "documents"
    assert not (folder / "preview.html").exists() and not TokenStore.has_split(folder, "eval")
    out = capsys.readouterr().out
    assert "rows in" in out and f"{store.lengths.sum()}" in out and str(folder) in out


def test_the_store_is_the_same_for_any_number_of_workers(configure, tmp_path):
    rows = conversations(150)
    files = (
        write(tmp_path / "a.jsonl", rows),
        write(tmp_path / "b.jsonl", [*rows[:20], *conversations(70, 1)]),
    )
    options = {"shard_tokens": 2000, "eval_fraction": 0.2, "max_length": 120, "preview": 3}
    stores = []
    for workers in (1, 2, 3):
        folder = prepare.main(
            configure(files, num_workers=workers, output=tmp_path / f"s{workers}", **options)
        )
        stores.append(contents(folder))
    assert stores[0] == stores[1] == stores[2]
    assert len(stores[0]) > 8 and b"duplicate" in stores[0][MANIFEST] and b"too_long" in stores[0][MANIFEST]


def test_filters_count_what_they_drop(configure, tmp_path):
    long = {"messages": say("Warum?", "weil " * 200)}
    rows = [
        {"messages": say("Hallo", "Guten Tag")},
        {"messages": say("hallo", "Guten  Tag")},
        long,
        {"messages": say("Hallo", "\u200b")},
        {"text": "Ein Text."},
        {"text": "\n"},
        {"messages": say("Hallo", "Guten Tag!"), "license": "CC0-1.0"},
    ]
    files = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:1])
    store = TokenStore.open(prepare.main(configure(files, max_length=100, license="MIT")))
    first, second = store.manifest["inputs"]
    assert (first["rows"], first["kept"]) == (7, 3)
    assert first["dropped"] == {"duplicate": 1, "empty": 2, "too_long": 1}
    assert first["licenses"] == {"CC0-1.0": 1, "MIT": 2}
    assert (second["rows"], second["kept"], second["dropped"]) == (1, 0, {"duplicate": 1})
    assert len(store) == 3
    twice = TokenStore.open(prepare.main(configure(files, max_length=100, filters=prepare.STRUCTURE[:-1])))
    assert len(twice) == 5


def test_a_row_of_just_max_length_stays_whole(configure):
    rows = conversations(40)
    lengths = TokenStore.open(prepare.main(configure(rows))).lengths
    limit = int(np.sort(lengths)[20])
    store = TokenStore.open(prepare.main(configure(rows, max_length=limit)))
    assert store.lengths.tolist() == [length for length in lengths if length <= limit]
    assert store.lengths.max() == limit


def test_a_row_lands_on_its_side_whatever_else_is_in_the_file(configure):
    rows = conversations(300)

    def held_out(rows, **options):
        folder = prepare.main(configure(rows, eval_fraction=0.3, **options))
        return {
            split: {tuple(store.document(i)[0].tolist()) for i in range(len(store))}
            for split in ("train", "eval")
            for store in [TokenStore.open(folder, split)]
        }

    whole, half = held_out(rows), held_out(rows[::-2])
    assert 50 < len(whole["eval"]) < 130 and not whole["eval"] & whole["train"]
    assert all(half[split] < whole[split] for split in ("train", "eval"))
    assert held_out(rows, seed=1)["eval"] != whole["eval"]


@pytest.mark.parametrize("template", ["chatml", "zephyr"])
def test_a_pair_is_three_documents_that_join_to_whole_conversations(configure, sp_tokenizer_folder, template):
    def messages(prompt, answer):
        return [*prompt, {"role": "assistant", "content": answer}]

    prompts = [say("Wie geht es?"), say("Hallo", "Guten Tag", "Und dir?")]
    rows = [{"chosen": messages(p, "Sehr gut."), "rejected": messages(p, "Schlecht")} for p in prompts]
    rows += [
        {"chosen": messages(say("Gleich?"), "Ja."), "rejected": messages(say("Gleich?"), "ja.")},
        {"chosen": messages(say("Lang?"), "Ja."), "rejected": messages(say("Lang?"), "ja " * 200)},
        rows[0],
    ]
    options = {"kind": "pairs", "model_name_or_path": sp_tokenizer_folder, "chat_template": template}
    store = TokenStore.open(prepare.main(configure(rows, max_length=150, **options)), kind="pairs")
    assert store.manifest["inputs"][0]["dropped"] == {"duplicate": 1, "equal_answers": 1, "too_long": 1}
    assert len(store) == 6 and store.manifest["splits"]["train"]["rows"] == 2
    tokenizer = Tokenizer.from_pretrained(sp_tokenizer_folder)
    for index, row in enumerate(rows[:2]):
        prompt, *answers = (store.document(3 * index + part) for part in range(3))
        assert not prompt[1].any()
        asked = chat.render(prompts[index], tokenizer, template, add_generation_prompt=True)
        assert prompt[0].tolist() == asked.tokens
        for (tokens, mask), name in zip(answers, ("chosen", "rejected")):
            whole = chat.render(row[name], tokenizer, template)
            assert [*prompt[0], *tokens] == whole.tokens
            assert mask.tolist() == whole.loss_mask[len(prompt[0]) :] and mask[0]


def test_a_prompt_is_held_out_with_all_its_pairs_and_never_one_of_training(configure, tmp_path):
    def pairs(numbers, chosen):
        return [{"prompt": f"Frage {n}?", "chosen": chosen, "rejected": "Nein."} for n in numbers]

    options = {"kind": "pairs", "eval_fraction": 0.3}
    rows = [*pairs(range(60), "Gut."), *pairs(range(60), "Besser."), *pairs(range(5), "gut. ")]
    other = write(tmp_path / "other.jsonl", [*pairs(range(60), "Am besten."), *pairs([99], "Gut.")])
    files = write(tmp_path / "rows.jsonl", rows), other
    folder = prepare.main(configure(files[:1], eval_input=files[1:], **options))
    splits = {name: TokenStore.open(folder, name, kind="pairs") for name in ("train", "eval")}
    prompts = {
        name: [store.document(i)[0].tobytes() for i in range(0, len(store), 3)]
        for name, store in splits.items()
    }
    assert not set(prompts["train"]) & set(prompts["eval"])
    assert len(set(prompts["train"])) + len(set(prompts["eval"])) == 61
    trained, held_out = len(set(prompts["train"])), len(set(prompts["eval"])) - 1
    assert min(trained, held_out) > 5
    assert len(prompts["train"]) == 2 * trained, "both pairs of a prompt"
    assert len(prompts["eval"]) == 3 * held_out + 1, "both, and the one of eval_input"
    first, second = splits["train"].manifest["inputs"]
    assert first["dropped"] == {"duplicate": 5} and second["dropped"] == {"duplicate": trained}


def test_the_manifest_states_what_shapes_the_rows(configure, tmp_path):
    config = configure(conversations(30), eval_fraction=0.25, license="MIT")
    manifest = json.loads((prepare.main(config) / MANIFEST).read_text())
    stated = manifest["config"]
    names = {field.name for field in dataclasses.fields(config)}
    assert names - stated.keys() == {"output", "model_name_or_path", "num_workers", "preview"}
    assert stated["input"] == [str(tmp_path / "rows.jsonl")] and stated["eval_input"] == []
    assert stated["chat_template"] == manifest["chat_template"] == "chatml", "as resolved"
    assert (stated["eval_fraction"], stated["license"]) == (0.25, "MIT")
    made_with = prepare.made_with(config, prepare.Renderer(config))
    assert {name: manifest[name] for name in made_with} == made_with, "as JSON gives it back"
    other = dataclasses.replace(config, filters=prepare.STRUCTURE[:-1])
    assert prepare.made_with(other, prepare.Renderer(other))["config"] != stated


def test_a_killed_run_leaves_no_store_and_the_next_one_is_whole(configure, tmp_path, bpe_tokenizer_folder):
    rows = write(tmp_path / "rows.jsonl", conversations(600))
    whole = contents(prepare.main(configure((rows,), output=tmp_path / "whole", shard_tokens=2000)))
    command = [
        sys.executable, "recipes/prepare.py", f'input=["{rows}"]', f"output={tmp_path / 'killed'}",
        f"model_name_or_path={bpe_tokenizer_folder}", "num_workers=2", "shard_tokens=2000",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and not any(tmp_path.glob(".killed.*.tmp/*.npy")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists() or contents(tmp_path / "killed") == whole
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline, "the workers outlive the run"
        time.sleep(0.02)
    assert contents(prepare.main(configure((rows,), output=tmp_path / "killed", shard_tokens=2000))) == whole


def alive(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty: a zombie
    except OSError:
        return False


def descendants(pid):
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def test_the_preview_shows_the_rows_as_stored(configure, capsys):
    rows = [{"messages": say("Was <b>heißt</b> das?", "Es heißt\x1b[31m fett.")}, *conversations(5)]
    folder = prepare.main(configure(rows, preview=2))
    page, out = (folder / "preview.html").read_text(), capsys.readouterr().out
    assert page.count("<h2>") == 2 and "<b>" not in page and "\x1b[31m" not in out
    lengths = TokenStore.open(folder).lengths
    assert page.count("<span") == lengths[:2].sum()
    assert f"line 1, whole: {lengths[0]} tokens" in out and "line 3" not in out


BAD = [
    ({"messages": say("Q", "A", "R")}, "roles out of order"),
    ({"question": "Q"}, "found the fields question"),
    ({"chosen": say("Q", "A"), "rejected": say("Q", "B")}, "PreferencePair"),
    ({"messages": [*say("Q"), {"role": "tool", "content": "A"}]}, "has the role 'tool'"),
    ({"messages": say("Q", "half \ud800")}, "turn 2' holds a NUL or half a surrogate pair"),
    ({"messages": say("Q", "A"), "license": "half \ud800"}, "'license' holds a NUL or half"),
    ({"Q\n\x1b[2J\ud800": "A"}, r"found the fields Q\\n\\x1b\[2J\\ud800"),
]


@pytest.mark.parametrize("row, reason", BAD)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_stops_or_is_dropped_and_counted(configure, row, reason, workers, tmp_path):
    rows = [*conversations(40), row, *conversations(40, 1)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # escapes halves of surrogate pairs
    rows = (path,)
    with pytest.raises(UserError, match=reason) as error:
        prepare.main(configure(rows, num_workers=workers))
    assert str(error.value).isprintable()
    assert "rows.jsonl, line 41: " in str(error.value) and "on_bad_row=drop" in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "store" in path.name], "nothing half-written stays"
    store = TokenStore.open(prepare.main(configure(rows, on_bad_row="drop")))
    assert store.manifest["inputs"][0]["dropped"] == {"bad_row": 1} and len(store) == 80


GOOD = (json.dumps({"messages": say("Q", "A")}) + "\n").encode()
HOSTILE = {
    "cut": (GOOD * 1411 + GOOD[:30], "line 1412: cannot be read (JSONDecodeError"),
    "NUL": (GOOD * 1411 + GOOD.replace(b"A", b"\0"), "line 1412: cannot be read (ValueError: holds a NUL"),
    "100 MB": (
        GOOD * 1411 + GOOD.replace(b"A", b"A" * 10**8),
        "line 1412: cannot be read (ValueError: longer",
    ),
    "Latin-1": (GOOD * 1411 + GOOD.replace(b"A", b"\xfc"), "line 1412: cannot be read (UnicodeDecodeError"),
    "surrogate": (
        GOOD * 1411 + GOOD.replace(b"A", rb"\udfff"),
        "line 1412: 'content of turn 2' holds a NUL or",
    ),
    "key twice": (
        GOOD * 1411 + b'{"messages": 1, ' + GOOD[1:],
        "line 1412: cannot be read (ValueError: the key 'messages' stands twice",
    ),
    "deep": (GOOD * 1411 + b'{"a": ' + b"[" * 10**6 + b"\n", "line 1412: cannot be read (RecursionError"),
    "schema": (GOOD * 1411 + b'{"question": "Q"}\n', "line 1412: found the fields question; expected"),
    "empty": (b"", "input: the files hold no row at all; expected rows of a known format; give others"),
    "blank": (b"\xef\xbb\xbf\r\n \n", "input: the files hold no row at all"),
    "gzip bomb": (
        gzip.compress(b'{"messages": "' + b"A" * 10**8),
        "line 1: cannot be read (ValueError: longer",
    ),
    "no gzip": (b"\x1f\x8b", "line 1: cannot be read (EOFError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_line_and_little_memory(name, tmp_path, bpe_tokenizer_folder):
    data, reason = HOSTILE[name]
    path = tmp_path / ("rows.jsonl.gz" if "gzip" in name else "rows.jsonl")
    path.write_bytes(data)
    code, error, memory = as_a_user(path, tmp_path / "store", bpe_tokenizer_folder)
    assert code == 2 and error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert memory < 400 and not (tmp_path / "store").exists()


def test_a_huge_text_is_too_long_before_its_tokens_fill_the_memory(tmp_path, bpe_tokenizer_folder):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + GOOD.replace(b"A", b"Er sagt es. " * 10**6))
    code, error, memory = as_a_user(path, tmp_path / "store", bpe_tokenizer_folder)
    assert (code, error) == (0, "") and memory < 400
    assert json.loads((tmp_path / "store" / MANIFEST).read_text())["inputs"][0]["dropped"] == {"too_long": 1}


# The kernel's own count of a child begins with the memory of the parent, so the child reads its own.
RUN = """
import atexit, re, runpy, sys
status = lambda: open("/proc/self/status").read()
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", status())[1]))
runpy.run_path("recipes/prepare.py", run_name="__main__")
"""


def as_a_user(path, output, model, *options):
    """Exit code, what stands on stderr behind the bar, and peak MB of a process that prepares a file."""
    command = [
        sys.executable, "-c", RUN, f'input=["{path}"]', f"output={output}", "eval_fraction=0.0",
        f"model_name_or_path={model}", "num_workers=1", "preview=0", *options,
    ]  # fmt: skip
    path = os.pathsep.join(["recipes", *sys.path])
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    return done.returncode, done.stderr, int(done.stdout.split()[-1]) / 1024


@pytest.mark.parametrize("change", [
    lambda data: b"\xef\xbb\xbf" + data,
    lambda data: data.replace(b"\n", b"\r\n"),
    lambda data: data.rstrip(b"\n"),
])  # fmt: skip
def test_byte_order_mark_and_line_ends_make_no_difference(configure, tmp_path, change):
    write(tmp_path / "plain.jsonl", conversations(20))
    (tmp_path / "other.jsonl").write_bytes(change((tmp_path / "plain.jsonl").read_bytes()))
    stores = []
    for name in ("plain", "other"):
        folder = prepare.main(configure((tmp_path / f"{name}.jsonl",), output=tmp_path / name))
        arrays = {file: data for file, data in contents(folder).items() if file.endswith(".npy")}
        stores.append(arrays)  # the other files name the input
    assert stores[0] == stores[1]


def test_a_row_of_the_longest_tokens_alone_stays(configure, bpe_tokenizer_folder):
    tokenizer = Tokenizer.from_pretrained(bpe_tokenizer_folder)
    longest = max(map(tokenizer.piece, range(tokenizer.vocab_size)), key=lambda p: len(p) * p.isalpha())
    word = longest.replace("Ġ", " ")
    row = {"messages": say("Q", word * 50)}
    [length] = TokenStore.open(prepare.main(configure([row]))).lengths
    assert length < 70, "one token a word"
    store = TokenStore.open(prepare.main(configure([row], max_length=int(length))))
    assert store.lengths.tolist() == [length]


def test_a_line_that_does_not_parse_always_stops(configure, tmp_path):
    path = write(tmp_path / "rows.jsonl", conversations(3))
    path.write_text(path.read_text() + '{"messages": [\n')
    with pytest.raises(UserError, match=r"rows.jsonl, line 4"):
        prepare.main(configure((path,), on_bad_row="drop"))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"max_length": 5}, "no row is left for the split 'train': 30 too_long"),
        ({"input": ()}, "input: .*the list is empty"),
        ({"input": (Path("nowhere.jsonl"),)}, "no such file: nowhere.jsonl"),
        ({"model_name_or_path": Path("nowhere")}, "nowhere"),
        ({"chat_template": "chatmk"}, "did you mean 'chatml'"),
        ({"chat_template": "mistral-v3"}, "^the chat template 'mistral-v3' needs the token"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"eval_fraction": 1e-9}, "no row is left for the split 'eval': 30 kept"),
        ({"max_length": 1}, "max_length is 1; expected a number of at least 2"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0; expected a number above 0"),
        ({"max_prompt_length": -3}, "max_prompt_length is -3; expected a number above 0"),
        ({"shard_tokens": 0}, "shard_tokens is 0; expected a number above 0"),
        ({"num_workers": -1}, "num_workers is -1; expected a number of at least 0"),
        ({"preview": -1}, "preview is -1; expected a number of at least 0"),
        ({"model_name_or_path": Path("a\nb")}, r"^a\\nb: there is no such folder"),
    ],
)
def test_a_mistake_is_one_sentence(configure, options, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as error:
        prepare.main(configure(conversations(30), **options))
    assert "\n" not in str(error.value) and not (tmp_path / "store").exists()


def test_a_folder_that_is_no_store_is_never_replaced(configure, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is no token store"):
        prepare.main(configure(conversations(3), output=tmp_path / "thesis"))
    assert (tmp_path / "thesis" / "thesis.tex").exists()
    first = contents(prepare.main(configure(conversations(3))))
    assert contents(prepare.main(configure(conversations(4)))) != first


def test_the_quickstart_config_names_every_file_of_the_sample_but_the_held_out_one():
    config = load_config(prepare.PrepareConfig, [], prepare.QUICKSTART)
    names = {path.name for path in (ROOT / "recipes/sample").glob("*.jsonl")}
    assert {path.name for path in config.input} == names - {"held_out.jsonl"}


def test_a_long_prompt_loses_its_first_turns_then_its_first_tokens(tmp_path, bpe_tokenizer_folder, capsys):
    """Once a pair, so both answers see the same prompt; an answer is never cut."""
    asked = say("Wer bist du?", "Ein Modell.", "Und wer hat dich gemacht?")
    answers = {"chosen": [{"role": "assistant", "content": "Viele."}]}
    answers |= {"rejected": [{"role": "assistant", "content": "Weiß nicht."}]}
    rows = [{"prompt": asked, **answers}, {"prompt": asked[:1], **answers}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def documents(limit):
        config = prepare.PrepareConfig(
            tmp_path / f"store_{limit}", bpe_tokenizer_folder, input=(tmp_path / "rows.jsonl",), kind="pairs",
            max_length=200, max_prompt_length=limit, num_workers=1,
        )  # fmt: skip
        store = TokenStore.open(prepare.main(config), kind="pairs")
        return store, [store.document(number)[0].tolist() for number in range(len(store))]

    whole, tokenizer = documents(None)[1], Tokenizer.from_pretrained(bpe_tokenizer_folder)
    last = chat.render(asked[2:], tokenizer, "chatml", add_generation_prompt=True).tokens
    store, turns = documents(len(last))
    assert turns[0] == last and turns[1:3] == whole[1:3]
    assert "1 prompts were cut to " in capsys.readouterr().out
    assert store.manifest["inputs"][0]["prompts_cut"] == 1
    _, tokens = documents(7)
    assert tokens[0] == last[-7:] and tokens[3] == whole[3][-7:]
    assert tokens[1:3] == whole[1:3] and tokens[4:] == whole[4:]
    with pytest.raises(UserError, match="max_prompt_length is 200, max_length 200: no answer would fit"):
        documents(200)


ANSWERS = {"chosen": say("x", "Viele.")[1:], "rejected": say("x", "Weiß nicht.")[1:]}


def cut_store(configure, rows, limit, model):
    """Documents and manifest of a store of pairs whose prompts are cut to `limit` tokens."""
    options = {"kind": "pairs", "max_length": 100, "max_prompt_length": limit, "model_name_or_path": model}
    store = TokenStore.open(prepare.main(configure(rows, chat_template="zephyr", **options)), kind="pairs")
    return [store.document(number)[0].tolist() for number in range(len(store))], store.manifest["inputs"][0]


@pytest.mark.parametrize("limit", [1, 2, 7, 30])
def test_a_cut_prompt_keeps_its_bos(configure, sp_tokenizer_folder, limit):
    tokenizer = Tokenizer.from_pretrained(sp_tokenizer_folder)
    asked = say("Der Zug nach Köln fährt heute zwölf Minuten später ab.")
    whole = chat.render(asked, tokenizer, "zephyr", add_generation_prompt=True).tokens
    assert whole[0] == tokenizer.bos_id and len(whole) > 30
    [prompt, *answers], entry = cut_store(
        configure, [{"prompt": asked, **ANSWERS}], limit, sp_tokenizer_folder
    )
    assert prompt == [tokenizer.bos_id, *whole[len(whole) - limit + 1 :]] and len(prompt) == limit
    assert entry["prompts_cut"] == 1
    for tokens, name in zip(answers, ("chosen", "rejected")):
        full = chat.render((*asked, *ANSWERS[name]), tokenizer, "zephyr").tokens
        assert tokens == full[len(whole) :]


@pytest.mark.parametrize("limit", [None, 40])
def test_a_prompt_is_rendered_once_and_with_each_answer(configure, monkeypatch, limit):
    rendered, render = [], chat.render
    monkeypatch.setattr(chat, "render", lambda *args, **more: rendered.append(args) or render(*args, **more))
    rows = [{"prompt": say("Wer bist du?"), **ANSWERS}]
    config = configure(rows, kind="pairs", max_prompt_length=limit)
    renderer = prepare.Renderer(config, [resolve(source) for source in config.all_sources])
    rendered.clear()
    outcome = renderer.outcome(Path("rows.jsonl"), 0, 1, rows[0])
    assert len(outcome.documents) == 3 and not outcome.prompt_is_cut
    assert len(rendered) == 3


def test_a_prompt_that_will_be_cut_is_never_too_long(configure, sp_tokenizer_folder):
    """However long: an early turn, the last one, the system's; and it is cut to the tokens of the whole."""
    tokenizer = Tokenizer.from_pretrained(sp_tokenizer_folder)
    long = " ".join(WORDS * (2 * 100 * tokenizer.max_token_bytes // 50))
    assert len(long) > 100 * tokenizer.max_token_bytes
    system = [{"role": "system", "content": long}]
    prompts = [say(long, "Ja.", "Und nun?"), say("Hallo", "Ja.", long), [*system, *say("Und nun?")]]
    rows = [{"prompt": prompt, **ANSWERS} for prompt in prompts]
    documents, entry = cut_store(configure, rows, 40, sp_tokenizer_folder)
    assert entry["kept"] == entry["prompts_cut"] == 3
    ask = lambda turns: chat.render(turns, tokenizer, "zephyr", add_generation_prompt=True).tokens  # noqa: E731
    assert documents[0] == ask(say("Und nun?"))
    for prompt, document in zip((prompts[1][2:], prompts[2]), documents[3::3]):
        assert document == [tokenizer.bos_id, *ask(prompt)[-39:]]
    rows = [{**rows[0], "chosen": say("x", long)[1:]}, rows[0]]
    assert cut_store(configure, rows, 40, sp_tokenizer_folder)[1]["dropped"] == {"too_long": 1}


def test_a_huge_prompt_is_cut_before_its_tokens_fill_the_memory(tmp_path, bpe_tokenizer_folder):
    path, turns = tmp_path / "rows.jsonl", say("Er sagt es. " * 10**6)
    write(path, [{"prompt": turns, **ANSWERS}])
    options = ["kind=pairs", "max_prompt_length=50"]
    code, error, memory = as_a_user(path, tmp_path / "store", bpe_tokenizer_folder, *options)
    assert (code, error) == (0, "") and memory < 400
    assert json.loads((tmp_path / "store" / MANIFEST).read_text())["inputs"][0]["prompts_cut"] == 1
