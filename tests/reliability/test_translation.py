"""Translation when the disk refuses, the power fails, signals do not end: nothing that was synced is lost."""

import copy
import json

import pytest
from children import KILLS, KINDS, Job
from disk import Disk
from stages import assert_same
from test_faults import fail_and_compare

ROWS = 40
WORDS = "zero one two three four five six seven eight nine".split()
WOERTER = "null eins zwei drei vier fünf sechs sieben acht neun".split()


class Translation:
    """As a Stage of stages.py: two texts a row, three shards, batches of six; one segment in ten fails."""

    name, world_size = "translate", 1

    def job(self, root, **changes) -> Job:
        root.mkdir(parents=True, exist_ok=True)
        rows, table = root.parent / "rows.jsonl", root.parent / "table.jsonl"
        numbers = [f"{number + 100}" for number in range(2 * ROWS)]
        english, german = (
            [" ".join(words[int(d)] for d in n) for n in numbers] for words in (WORDS, WOERTER)
        )
        if not table.exists():
            texts = zip(english[::2], english[1::2])
            rows.write_text(
                "".join(json.dumps({"instruction": a, "output": f"* {b}\n"}) + "\n" for a, b in texts)
            )
            answers = [{"source": a, "translation": b} for a, b in zip(english, german)]
            table.write_text("".join(json.dumps(x) + "\n" for n, x in enumerate(answers) if n % 10))
        values = {"input": rows, "output": root / "out", "engine": "table", "table": table}
        values |= {"shard_size": 27, "batch_size": 6, "stale_after": 2, "max_attempts": 2, **changes}
        return Job(root, "translate", [f"{name}={value}" for name, value in values.items()])

    def result(self, root) -> dict[str, object]:
        ledger = json.loads((root / "out" / "ledger.json").read_text())
        del ledger["time_and_money"], ledger["digest"]
        kept = {p.name for folder in (root / "out", root / "out" / "segments") for p in folder.iterdir()}
        return {
            "rows": (root / "out" / "translated.jsonl").read_bytes(),
            "ledger": ledger,
            "names": sorted(kept),
        }

    def assert_sound(self, root) -> None:
        """What stands under a final name is whole."""
        for path in (root / "out").glob("[!.]*.json*"):
            text = path.read_text()
            for value in [text] if path.suffix == ".json" else text.split("\n")[:-1]:
                json.loads(value)
            assert text.endswith("\n")
        for path in (root / "out").glob("done/shard-*"):
            assert path.read_bytes().endswith(b"\n")


def test_a_spread_of_calls_fails(children, root, draw):
    fail_and_compare(children, Translation(), root, draw, 12)


@pytest.mark.slow
def test_every_call_fails(children, root, draw):
    fail_and_compare(children, Translation(), root, draw, 150)


@pytest.mark.parametrize("points", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_its_calls(children, root, draw, points):
    stage = Translation()
    whole = children.run(stage.job(root / "whole"))
    assert not any(whole.codes), whole.output
    for number in range(points):
        place, at = root / str(number), draw.randint(1, int(0.9 * whole.calls))
        job = children.run(stage.job(place), at, draw.choice(KILLS))
        assert job.killed, job.output
        stage.assert_sound(place)
        children.run(stage.job(place), draw.randint(1, at), draw.choice(KILLS))
        again = children.run(stage.job(place))
        assert not any(again.codes), again.output
        assert_same(
            stage.result(place), stage.result(root / "whole"), f"killed at call {at} of {whole.calls}"
        )


@pytest.mark.parametrize("points", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_power_cut(children, root, draw, points):
    stage = Translation()
    stage.job(root / "whole" / "inner")
    (root / "whole" / "out").mkdir()
    (root / "whole" / "inner").rmdir()
    start = Disk(root / "whole")
    job = children.run(stage.job(root / "whole"), with_data=True)
    assert not any(job.codes), job.output
    expected = stage.result(root / "whole")
    for number in range(points):
        place, at, kept = root / str(number), draw.randint(1, len(job.events)), draw.choice(["safe", "torn"])
        disk = copy.deepcopy(start)
        synced = sum(disk.apply(event) or is_batch(event) for event in job.events[:at])
        disk.write(place, kept, draw)
        print(f"cut behind event {at} of {len(job.events)}, {kept}")
        again = children.run(stage.job(place), with_data=True)
        assert not any(again.codes), again.output
        assert_same(stage.result(place), expected, f"cut behind event {at}, {kept}")
        assert sum(map(is_batch, again.events)) + synced <= sum(map(is_batch, job.events)) + (synced == 0)


def is_batch(event) -> bool:
    """A batch is safe."""
    return event.kind == "fsync" and "/journal/shard-" in event.path


def test_signals_that_do_not_end_do_no_harm(children, root, draw):
    stage = Translation()
    whole = children.run(stage.job(root / "whole"))
    counted = [event for event in whole.events if event.kind in KINDS]
    first = next(n for n, event in enumerate(counted, 1) if "/journal/" in event.path)
    job = children.run(stage.job(root / "stopped"), draw.randint(first, first + 20), "terminate on")
    assert job.codes == [75] and "Traceback" not in job.output, job.output
    assert not any(children.run(stage.job(root / "stopped")).codes)
    assert_same(stage.result(root / "stopped"), stage.result(root / "whole"))


def test_a_reader_that_has_gone_ends_nothing(children, root):
    stage = Translation()
    job = stage.job(root / "whole")
    job.environment["PHOENIX_NOBODY_READS"] = "1"
    children.run(job)
    assert (root / "whole" / "out" / "ledger.json").exists() and "Traceback" not in job.output, job.output
