"""Parts: what a killed, stopped or hindered run leaves, and what the next one takes of it."""

import dataclasses
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
from safetensors.numpy import load_file, save_file

from phoenix import files
from phoenix.config import load_config
from phoenix.data import parts, reading
from phoenix.data.sources import Source
from phoenix.data.store import TokenStore
from phoenix.files import UserError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import prepare  # noqa: E402

ROWS, SIZE = 1000, 20  # rows of the large file, and of a part
PARTS = ROWS // SIZE
WORDS = "Der Zug nach Köln fährt heute zwölf Minuten später ab weil auf der Strecke gebaut wird".split()
DRIVER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "recipes")!r}]
import prepare
from phoenix.config import run_recipe
from phoenix.data import parts, reading

if __name__ == "__main__":
    parts.PART_ROWS = {SIZE}
    run_recipe(prepare.main, prepare.PrepareConfig)
"""


def rows(count, seed=0):
    draw = random.Random(seed)
    say = lambda role, size: {"role": role, "content": " ".join(draw.choices(WORDS, k=size))}  # noqa: E731
    return [{"messages": [say("user", 20), say("assistant", 60)], "n": i} for i in range(count)]


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def found_parts(output):
    """Part of each file and number -> when it was written."""
    folder = output.with_name(f".{output.name}.parts")
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}


@pytest.fixture(scope="module")
def large(tmp_path_factory, bpe_tokenizer_folder):
    """The driver's command for an output, and the store that an uninterrupted run makes."""
    folder = tmp_path_factory.mktemp("large")
    path = write(folder / "rows.jsonl", rows(ROWS))
    (folder / "driver.py").write_text(DRIVER)

    def command(output):
        return [
            sys.executable, str(folder / "driver.py"), f'input=["{path}"]', f"output={output}",
            f"model_name_or_path={bpe_tokenizer_folder}", "num_workers=2", "shard_tokens=20000",
            "eval_fraction=0.1", 'filters=["empty", "duplicate", "near_duplicate"]',
        ]  # fmt: skip

    return command, finish(command, folder / "whole")[1]


def finish(command, output):
    """The same run in this process -> how many parts it makes, and the store."""
    config = load_config(prepare.PrepareConfig, command(output)[2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_ROWS", SIZE)
        return made_again(patch, dataclasses.replace(config, num_workers=1))


class Started:
    """The driver, in a group of its own as a shell starts it."""

    def __init__(self, command, output):
        self.output = output
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command(output), start_new_session=True, **options)

    def wait_for(self, is_there):
        """False if the run ended before."""
        deadline = time.monotonic() + 60
        while not is_there():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return True

    def end(self, number=None, group=False):
        """Exit code and what stands on stderr."""
        if number:
            (os.killpg if group else os.kill)(self.process.pid, number)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said.strip()


def kill_until_whole(command, expected, output, draw, kills):
    """Kill at so many random points, each run starting from what the one before has left."""
    for _ in range(kills):
        before, run = found_parts(output), Started(command, output)
        if draw.random() < 0.8:
            wanted = min(len(before) + draw.randint(1, PARTS // 3), PARTS)
            reached = run.wait_for(lambda: len(found_parts(output)) >= wanted)  # noqa: B023
        else:
            reached = run.wait_for(lambda: any(output.parent.glob(f".{output.name}.*.tmp/*.npy")))
        assert run.end(signal.SIGKILL)[0] == -9 or not reached or output.exists()
        after = found_parts(output)
        assert not after or all(after[path] == before[path] for path in before), "a part was made again"
        assert not output.exists() or contents(output) == expected
    before = len(found_parts(output))
    assert finish(command, output) == (PARTS - before, expected)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_at_random_points_changes_nothing(kills, large, tmp_path):
    seed = int(os.environ.get("PHOENIX_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"PHOENIX_TEST_SEED={seed}")
    kill_until_whole(*large, tmp_path / "store", random.Random(seed), kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_one_line_and_the_same_command_goes_on(number, large, tmp_path):
    command, expected = large
    output = tmp_path / "store"
    run = Started(command, output)
    assert run.wait_for(lambda: len(found_parts(output)) > 10)
    assert run.end(number, group=number == signal.SIGINT) == (75, "stopped; the same command goes on")
    found = len(found_parts(output))
    assert 10 < found < PARTS and [path.name for path in tmp_path.iterdir()] == [".store.parts"]
    assert finish(command, output) == (PARTS - found, expected)


def test_a_second_run_and_a_killed_worker_are_one_sentence(large, tmp_path):
    command, expected = large
    output = tmp_path / "store"
    run = Started(command, output)
    assert run.wait_for(lambda: found_parts(output))
    os.kill(run.process.pid, signal.SIGSTOP)  # so that it does not come to its end meanwhile
    said = f"^{output}: another run is writing it; wait, or choose another output$"
    with pytest.raises(UserError, match=said):
        finish(command, output)
    os.kill(workers(run.process.pid)[-1], signal.SIGKILL)
    os.kill(run.process.pid, signal.SIGCONT)
    said = "error: a worker was killed (no memory?); start again with a lower num_workers"
    assert run.end() == (2, said)
    found = len(found_parts(output))
    assert finish(command, output) == (PARTS - found, expected)


def workers(pid):
    """Children of the children of a process."""
    children = lambda pid: Path(f"/proc/{pid}/task/{pid}/children").read_text().split()  # noqa: E731
    return [int(worker) for child in children(pid) for worker in children(child)]


@pytest.fixture
def stopped(tmp_path, bpe_tokenizer_folder, monkeypatch):
    """stopped(**changes): the config of a run that ended in an error when all of its parts stood there."""
    monkeypatch.setattr(parts, "PART_ROWS", SIZE)
    files = write(tmp_path / "a.jsonl", rows(50, 1)), write(tmp_path / "b.jsonl", rows(30, 2))

    def stop(*_):
        raise UserError("stopped")

    def stopped(**changes):
        base = prepare.PrepareConfig(tmp_path / "store", bpe_tokenizer_folder, input=files, num_workers=1)
        config = dataclasses.replace(base, **changes)
        with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped"):
            patch.setattr(prepare, "write_store", stop)
            prepare.main(config)
        return config

    return stopped


def made_again(monkeypatch, config):
    """How many parts a run makes, and the store."""
    made, serialized = [], parts._serialized
    with monkeypatch.context() as patch:
        patch.setattr(parts, "_serialized", lambda *given: made.append(1) or serialized(*given))
        store = contents(prepare.main(config))
    assert [path.name for path in config.output.parent.iterdir() if path.name.startswith(".")] == []
    return len(made), store


def fresh(config):
    """The store of a run that finds no parts."""
    return contents(prepare.main(dataclasses.replace(config, output=config.output.with_name("fresh"))))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def change_an_array(path, _others):
    arrays = load_file(path)
    save_file({**arrays, "reason": np.ones_like(arrays["reason"])}, path, {"notes": "{}"})


DAMAGE = {
    "cut": lambda path, _: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path, _: path.write_bytes(b""),
    "zeroed": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "zeros at the end": lambda path, _: path.write_bytes(path.read_bytes()[:-2000] + bytes(2000)),
    "a bit of the tokens": lambda path, _: flip(path, -1000),
    "another part": lambda path, others: path.write_bytes(others[0].read_bytes()),
    "another array": change_an_array,
    "no metadata": lambda path, _: save_file(load_file(path), path),
    "gone": lambda path, _: path.unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_is_made_again_and_no_other(name, stopped, monkeypatch):
    config = stopped()
    first, *others = sorted(found_parts(config.output))
    assert len(others) == 4
    DAMAGE[name](first, others)
    number, store = made_again(monkeypatch, config)
    assert number == 1 and store == fresh(config)


def test_a_bit_anywhere_in_a_part_is_seen(stopped, monkeypatch):
    config = stopped()
    path, draw = min(found_parts(config.output)), random.Random(0)
    sound, size = parts.Part(0, path), path.stat().st_size
    assert sound.is_whole
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    places = [draw.randrange(header, size) for _ in range(60)] + [draw.randrange(header) for _ in range(60)]
    for place in places:
        flip(path, place)
        assert not sound.is_whole or path.read_bytes()[place : place + 1].isspace(), place
        flip(path, place)
    assert sound.is_whole


def test_parts_are_taken_by_the_same_run_alone(stopped, monkeypatch, tmp_path):
    eval_file = write(tmp_path / "eval.jsonl", [{"question": "Wer bist du und woher kommst du heute?"}])
    config = stopped(filters=("contaminated",), eval_files=(eval_file,))
    assert made_again(monkeypatch, config)[0] == 0
    changes = {
        "max_length": 1024, "seed": 1, "license": "MIT", "filters": ("empty", "contaminated"),
        "eval_fraction": 0.5, "chat_template": "zephyr", "input": config.input[:1], "on_bad_row": "drop",
    }  # fmt: skip
    for name, value in changes.items():
        config = stopped(filters=("contaminated",), eval_files=(eval_file,))
        other = dataclasses.replace(config, **{name: value})
        number, store = made_again(monkeypatch, other)
        assert number == (3 if name == "input" else 5) and store == fresh(other), name
    for name, value in {"num_workers": 2, "preview": 3}.items():
        config = stopped(filters=("contaminated",), eval_files=(eval_file,))
        assert made_again(monkeypatch, dataclasses.replace(config, **{name: value}))[0] == 0, name


def test_a_changed_file_is_read_again(stopped, monkeypatch, tmp_path):
    config = stopped()
    path = config.input[0]
    path.write_bytes(path.read_bytes().replace(b'"n": 5}', b'"n": 6}'))
    number, store = made_again(monkeypatch, config)
    assert number == 3 and store == fresh(config), "those of the other file are taken"


def test_a_change_of_what_the_rows_are_judged_by_is_seen(stopped, monkeypatch, tmp_path):
    """Test questions, a table of licences, the file that licences are joined from."""
    eval_file = write(tmp_path / "eval.jsonl", [{"question": "Wer bist du und woher kommst du heute?"}])
    table, join = tmp_path / "table.toml", tmp_path / "join.jsonl"
    table.write_text('field = "from"\n[licenses]\nus = "MIT"\n')
    asked = [{"instruction": f"Question {i}", "output": "x", "from": "us"} for i in range(3)]
    write(join, asked)
    german = [{**row, "instruction_de": "Frage", "output_de": f"Antwort {i}", "from": "us"}
              for i, row in enumerate(asked)]  # fmt: skip
    path = str(write(tmp_path / "c.jsonl", german))
    changes = {
        "license_table": lambda: table.write_text(table.read_text().replace("MIT", "CC0-1.0")),
        "license_join": lambda: write(join, asked[:2]),
        "eval_files": lambda: write(eval_file, [{"question": "Antwort: eins zwei drei vier fünf sechs?"}]),
    }
    for name, change in changes.items():
        given = {"license_table": str(table), "license_join": str(join) if name == "license_join" else None}
        config = stopped(
            input=(), sources=(Source(path, **given),), filters=("contaminated",), eval_files=(eval_file,)
        )
        change()
        number, store = made_again(monkeypatch, config)
        assert number == 1 and store == fresh(config), name
    assert len(TokenStore.open(config.output)) == 3


def test_one_file_under_two_licences_keeps_both(stopped, monkeypatch):
    """Each file of a source has parts of its own, even if another source names the same file."""
    config = stopped()
    path = str(config.input[0])
    twice = tuple(Source(path, license=name) for name in ("MIT", "CC0-1.0"))
    stores = []
    for workers in (1, 2):
        options = {"input": (), "sources": twice, "filters": ("empty",), "num_workers": workers}
        stores.append(contents(prepare.main(dataclasses.replace(config, **options))))
    store = TokenStore.open(config.output)
    assert stores[0] == stores[1] and len(store) == 100
    found = [store.provenance(i)["license"] for i in (0, 49, 50, 99)]
    assert found == ["MIT", "MIT", "CC0-1.0", "CC0-1.0"]
    held_out = dataclasses.replace(config, eval_input=config.input[:1], filters=("empty",))
    assert len(TokenStore.open(prepare.main(held_out), "eval")) == 50


def test_the_lock_of_a_run_that_just_ended_is_none(tmp_path, monkeypatch):
    lock = files.fcntl.flock

    def end_first(file, how):
        lock(file, how)
        os.unlink(tmp_path / ".store.parts" / "lock")

    monkeypatch.setattr(files.fcntl, "flock", end_first)
    with pytest.raises(UserError, match="another run is writing it"), parts.parts_folder(tmp_path / "store"):
        pass


def writers():
    def parquet(path, made):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(made), path)

    def table(path, made):
        path.write_text("text\n" + "".join(f"{row['text']}\n" for row in made))

    return {
        "jsonl": write, "json": lambda path, made: path.write_text(json.dumps(made)), "csv": table,
        "parquet": parquet,
    }  # fmt: skip


@pytest.mark.parametrize("ending", writers())
def test_parts_are_bounded_by_bytes_whatever_the_file(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    path, parsed, loads = tmp_path / f"a.{ending}", [], reading.json.loads
    writers()[ending](path, [{"text": f"{i} " + "x" * 1000} for i in range(100)])
    monkeypatch.setattr(reading.json, "loads", lambda *a, **more: parsed.append(1) or loads(*a, **more))
    cut = list(parts._split(parts.file_rows(path)))
    assert {len(lines) for lines in cut[:-1]} <= {19, 20} and sum(map(len, cut)) == 100
    assert len(parsed) <= 1, "the file is parsed once, and of JSON lines the first line"
