"""The power fails at a random moment: what was not synced is gone, and what stands there is whole."""

import copy
import json

import pytest
from disk import Disk
from stages import STAGES, Stage, assert_same


@pytest.mark.parametrize("name", STAGES)
def test_power_cut(children, inputs, root, draw, name):
    cut_and_compare(children, Stage(name, inputs, **STAGES[name]), root, draw, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_many_power_cuts(children, inputs, root, draw, name):
    cut_and_compare(children, Stage(name, inputs, **STAGES[name]), root, draw, 13)


def test_the_log_is_safe_before_a_checkpoint_that_counts_on_it(children, inputs, root):
    """A run goes on at its newest checkpoint: the rows of the steps before are on the disk."""
    (root / "out").mkdir(parents=True)
    job, disk = Stage("sft", inputs).job(root), Disk(root)
    children.run(job, with_data=True)
    for event in job.events:
        disk.apply(event)
        name = event.other.rsplit("/", 1)[-1]
        if event.kind == "rename" and name.startswith("step_"):
            rows = disk.top.now["out"].safe["metrics.jsonl"].safe.decode().splitlines()
            assert int(name.removeprefix("step_")) in [json.loads(row)["step"] for row in rows], name


def cut_and_compare(children, stage: Stage, root, draw, points: int) -> None:
    whole = root / "whole"
    if stage.name.startswith("sft"):
        (whole / "out").mkdir(parents=True)  # nobody syncs the folder around it
    else:
        assert not any(children.run(stage.job(whole)).codes)  # an older folder that is replaced
    job = stage.job(whole)
    start = Disk(whole)
    disk = copy.deepcopy(start)
    job = children.run(job, with_data=True)
    assert not any(job.codes), job.output
    expected, log = stage.result(whole), whole / "out" / "metrics.jsonl"
    for event in job.events:
        disk.apply(event)
    replayed = root / "replayed"
    disk.write(replayed, "all")
    for path in whole.rglob("*"):  # nothing was written past the journal
        if path.is_file():
            assert (replayed / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    for number in range(points):
        place, at, kept = root / str(number), draw.randint(1, len(job.events)), draw.choice(["safe", "torn"])
        disk = copy.deepcopy(start)
        for event in job.events[:at]:
            disk.apply(event)
        if log.exists():
            disk.keep(log)  # whether it is safe is asked above
        disk.write(place, kept, draw)
        where = f"cut behind event {at} of {len(job.events)}, {kept}"
        print(where)
        stage.assert_sound(place)
        again = children.run(stage.job(place))
        assert not any(again.codes), f"{where}: {again.output}"
        assert_same(stage.result(place), expected, where)
