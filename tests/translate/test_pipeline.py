"""Processes that come, are killed and go on in one folder: the same rows, and a batch asked again at most."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from phoenix.files import UserError
from phoenix.translate import pipeline
from phoenix.translate.assembly import Translations
from phoenix.translate.claims import Claims
from phoenix.translate.engines import Reply
from phoenix.translate.language import load_language
from phoenix.translate.pipeline import Record, identify, read_lines, record_line

RUN = Path(__file__).parent / "logged_run.py"
sys.path.insert(0, str(RUN.parent))
import logged_run  # noqa: E402
from logged_run import pair  # noqa: E402

CONTEXT = multiprocessing.get_context("forkserver")  # a child starts in milliseconds: all is imported there
CONTEXT.set_forkserver_preload(["logged_run"])
ROWS, SHARD, BATCH = 150, 40, 8


@pytest.fixture
def draw():
    seed = int(os.environ.get("PHOENIX_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"PHOENIX_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def rows(tmp_path):
    """Conversations of two segments each, the first one of two conversations alike."""
    path = tmp_path / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(ROWS):
            texts = pair(1000 + number // 2)[0], f"- {pair(2000 + number)[0]}\n"
            roles = zip(("user", "assistant"), texts)
            file.write(
                json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}) + "\n"
            )
    return path


class Runs:
    """Processes on one folder; asked: how often the engines were asked each segment and attempt."""

    def __init__(self, folder: Path, rows: Path, seconds: float = 0.0) -> None:
        self.folder, self.rows, self.seconds = folder / "out", rows, seconds
        self.log, self.said = folder / "log", folder / "said"

    def start(self, **changes) -> multiprocessing.Process:
        values = {
            "input": self.rows, "output": self.folder, "engine": "table", "table": self.rows,
            "shard_size": SHARD, "batch_size": BATCH, "stale_after": 5, **changes,
        }  # fmt: skip
        arguments = [f"{name}={value}" for name, value in values.items()]
        arguments = (str(self.log), self.seconds, arguments, str(self.said))
        process = CONTEXT.Process(target=logged_run.run, args=arguments, daemon=True)
        process.start()
        return process

    def run(self, **changes) -> tuple[int, str]:
        process = self.start(**changes)
        process.join(120)
        return process.exitcode, self.said.read_text()

    def lines(self) -> int:
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    def wait_for(self, lines: int, processes: list[multiprocessing.Process]) -> None:
        while self.lines() < lines and any(process.is_alive() for process in processes):
            time.sleep(0.003)

    def asked(self) -> Counter:
        return Counter(self.log.read_text().splitlines())

    def result(self) -> tuple[bytes, dict]:
        """The rows, and the ledger without what is time."""
        ledger = json.loads((self.folder / "ledger.json").read_bytes())
        del ledger["time_and_money"], ledger["digest"]
        return (self.folder / "translated.jsonl").read_bytes(), ledger


@pytest.fixture
def whole(tmp_path, rows) -> Runs:
    (tmp_path / "whole").mkdir()
    runs = Runs(tmp_path / "whole", rows)
    code, output = runs.run()
    assert code == 0, output
    return runs


@pytest.fixture
def runs(tmp_path, rows) -> Runs:
    (tmp_path / "runs").mkdir()
    return Runs(tmp_path / "runs", rows, seconds=0.03)


def test_each_segment_is_asked_once_and_again_where_it_failed(whole):
    translated = [json.loads(line) for line in whole.result()[0].splitlines()]
    for number, row in enumerate(translated):
        first, second = 1000 + number // 2, 2000 + number
        expected = [pair(first)[first % 31 != 0], f"- {pair(second)[second % 31 != 0]}\n"]
        assert [message["content"] for message in row["messages"]] == expected
        assert row["translation"]["kept_in_source"] == (first % 31 == 0) + (second % 31 == 0)
    numbers = [*range(1000, 1000 + ROWS // 2), *range(2000, 2000 + ROWS)]
    expected = Counter()
    for number in numbers:
        attempts = 3 if number % 31 == 0 else 2 if number % 7 == 0 else 1
        expected.update(f"{attempt} {pair(number)[0]}" for attempt in range(attempts))
    assert whole.asked() == expected
    ledger = whole.result()[1]
    assert ledger["segments"] == len(numbers) and ledger["input"]["segments"] == 2 * ROWS
    assert ledger["failed"] == sum(number % 31 == 0 for number in numbers) == ledger["flags"]["empty"]
    assert ledger["completion_tokens"] == 10 * sum(expected.values())


def test_killed_at_random_with_two_processes_and_a_third_that_joins_late(whole, runs, draw):
    kills = asked = 0
    while asked < 200:  # of about 330
        processes = [runs.start(), runs.start()]
        runs.wait_for(asked + draw.randint(1, 60), processes)
        processes.append(runs.start())
        runs.wait_for(runs.lines() + draw.randint(0, 40), processes)
        for process in draw.sample(processes, draw.choice([1, 2, 3])):
            kills += process.is_alive()
            process.kill()
        if draw.random() < 0.7:  # else the others go on beside the next ones
            for process in processes:
                kills += process.is_alive()
                process.kill()
                process.join()
        asked = runs.lines()
    code, output = runs.run()
    assert code == 0, output
    assert runs.result() == whole.result()
    found, expected = runs.asked(), whole.asked()
    again = sum((found - expected).values())
    print(f"{kills} kills, {again} segments asked again")
    assert not expected - found and again <= kills * BATCH


def test_a_signal_stops_after_the_batch_and_loses_nothing(whole, runs):
    process = runs.start()
    while not runs.log.exists():
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    output = runs.said.read_text()
    assert process.exitcode == 75 and "Traceback" not in output and "goes on" in output, output
    assert runs.run()[0] == 0
    assert runs.result() == whole.result() and runs.asked() == whole.asked()


def test_a_process_whose_engine_hangs_ends_and_the_other_does_all(whole, runs):
    processes = [runs.start(batch_timeout=4), runs.start(batch_timeout=4)]
    runs.wait_for(40, processes)
    runs.log.with_name("hang").touch()
    for process in processes:
        process.join(60)
    output = runs.said.read_text()
    assert sorted(process.exitcode for process in processes) == [0, 1] and "Traceback" not in output, output
    said = r"\nerror: shard-0000\d: no answer to a batch in 4 s, so this process ends; start it again; .*\n"
    assert re.search(said, output) and output.count("error:") == 1, output
    assert runs.result() == whole.result()
    again = runs.asked() - whole.asked()
    assert not whole.asked() - runs.asked() and 1 <= sum(again.values()) <= BATCH


def test_what_a_kill_cut_off_and_what_a_disk_changed_is_asked_again(whole, runs, draw):
    process = runs.start()
    while not (finished := sorted(runs.folder.glob("done/shard-*"))) or not any(
        finished[0].stem not in journal.name for journal in runs.folder.glob("journal/shard-*")
    ):
        time.sleep(0.003)
    process.kill()
    process.join()
    before = runs.asked()
    journal = next(path for path in runs.folder.glob("journal/shard-*") if finished[0].stem not in path.name)
    with open(journal, "ab") as file:
        file.write(b'{"check": "00000000", "id": "cut off')
    flipped = 0
    for path in (journal, finished[0]):
        content = bytearray(path.read_bytes())
        if content.count(b"\n"):
            content[draw.randrange(content.rindex(b"\n") + 1)] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            flipped += 1
    assert flipped and runs.run()[0] == 0
    assert runs.result() == whole.result()
    again = sum((runs.asked() - whole.asked()).values())
    assert before and 1 <= again <= 3 * 2 * flipped + BATCH  # a flipped line break damages two lines


def test_parts_that_pieces_share_are_asked_and_booked_once():
    class Engine:
        name, asked = "any", []

        def translate(self, sources, *, attempt=0):
            self.asked += sources
            return [Reply("Ja.", "stop", 10, 1) for _ in sources]

    engine, old = Engine(), Record("", ("empty",), 0, 5, 2)
    german = load_language("de")
    batch = {"Yes. One two three. Yes.": old, "Yes. Four five six.": old}
    records = pipeline.Translator(engine, german, 2)(batch)
    assert engine.asked == ["Yes.", "One two three.", "Four five six."]
    assert sum(record.prompt_tokens for record in records.values()) == 2 * 5 + 3 * 10
    assert sum(record.completion_tokens for record in records.values()) == 2 * 2 + 3


def test_every_bit_of_a_line_counts(tmp_path):
    path, good = tmp_path / "lines", record_line("Grün \ud800", Record("Blau", ("empty",)))
    for bit in range(8 * len(good)):
        line = bytearray(good)
        line[bit // 8] ^= 1 << bit % 8
        path.write_bytes(good + line + good)
        found = list(read_lines(path))
        assert len(found) <= 2 and all(entry["id"] == identify("Grün \ud800").hex() for entry in found)
    path.write_bytes(good + good[:-1])
    assert len(list(read_lines(path))) == 1


def test_a_claim_is_taken_over_when_it_is_given_up_or_stale_and_only_then(tmp_path):
    with Claims(tmp_path, 1000) as first, Claims(tmp_path, 1000) as second:
        assert first.take(["a", "b"]) == "a" and second.take(["a", "b"]) == "b"
        with Claims(tmp_path, 1000) as third:
            assert third.take(["a", "b"]) is None
            first.give_up()
            assert third.take(["a", "b"]) == "a" and third.is_held()
            (tmp_path / "a.2").touch()
            assert not third.is_held()
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    owner = json.loads((tmp_path / "b.0").read_text())
    (tmp_path / "c.0").write_text(json.dumps([owner[0], dead.pid, "1"]))
    (tmp_path / "d.0").write_text(json.dumps(["another machine", dead.pid, "1"]))
    with Claims(tmp_path, 1000) as other:
        assert other.take(["d"]) is None and other.take(["c"]) == "c"
    with Claims(tmp_path, 0.0) as other:
        other.take(["d"])
        assert other.take(["d"]) == "d"


def test_a_living_process_keeps_its_claim_and_other_files_are_no_claims(tmp_path):
    for name in (".DS_Store", "notes.txt", ".nfs0001.7"):
        (tmp_path / name).touch()
    with Claims(tmp_path, 1) as first, Claims(tmp_path, 1) as second:
        assert first.take(["a"]) == "a"
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert second.take(["a"]) is None and first.is_held()
            time.sleep(0.1)


def test_a_process_that_stood_still_gives_way_to_the_one_that_took_over(whole, runs):
    first = runs.start(stale_after=1)
    runs.wait_for(20, [first])
    os.kill(first.pid, signal.SIGSTOP)
    second = runs.start(stale_after=1)
    second.join(60)
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert [first.exitcode, second.exitcode] == [0, 0] and runs.result() == whole.result()
    assert sum((runs.asked() - whole.asked()).values()) <= 2 * BATCH


def test_of_many_that_come_at_once_one_wins(tmp_path):
    code = (
        "import sys; from pathlib import Path; from phoenix.translate.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1])); claims.folder.mkdir(exist_ok=True)\n"
        "print(sum(claims.take([str(n)]) is not None for n in range(200)), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, tmp_path]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": RUN.parents[2]}
    processes = [subprocess.Popen(command, **options) for _ in range(3)]
    wins = [int(process.stdout.readline()) for process in processes]
    for process in processes:
        process.communicate()
    assert sum(wins) == 200


def test_translations_are_found_by_their_source_whatever_it_is(tmp_path):
    sources = sorted({"a", "b\r", "\ud83d", "ä" * 1000, *map(str, range(500))}, key=identify)
    translations = Translations(tmp_path)
    for start in range(0, len(sources), 100):
        translations.add({source: Record(source + "!") for source in sources[start : start + 100]})
    assert all(translations.get(source) == Record(source + "!") for source in sources)
    assert translations.get("missing") is None and not list(tmp_path.iterdir())


def test_segments_are_unique_sorted_and_cut_into_shards(tmp_path):
    texts = [[str(number % 700), "x"] for number in range(2000)]
    rows = (("", {}, None, {("t",): [pipeline.Piece(text) for text in two]}) for two in texts)
    pipeline.collect(tmp_path, rows, 100)
    shards = pipeline.Shards(tmp_path)
    sources = [source for number in range(len(shards.sizes)) for source in shards.sources(number)]
    assert sources == sorted({text for two in texts for text in two}, key=identify)
    assert shards.sizes == [100] * 7 + [1] and shards.counts["segments"] == 4000
    path = tmp_path / "segments" / "shard-00003.jsonl"
    path.write_bytes(path.read_bytes().replace(b"7", b"8", 1))
    with pytest.raises(UserError, match=r"shard-00003.jsonl: is damaged; remove .*segments"):
        shards.sources(3)
