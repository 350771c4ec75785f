"""One run on one, two, four ranks and on one again: the global batches, and so the numbers, are the same."""

import pytest
from inputs import assert_close_run, reproducible
from stages import Stage

WORLDS = {"warmup_ratio": 0.0, "schedule_steps": 8, "eval_steps": 2, "save_steps": 2, "global_batch_size": 6}


def test_one_two_four_one(children, inputs, tmp_path):
    """A run on one rank pauses as often, since it evaluates at its last step."""
    for folder, worlds in {"one": (1, 1, 1, 1), "many": (1, 2, 4, 1)}.items():
        for number, world_size in enumerate(worlds, 1):
            stage = Stage("sft", inputs, world_size, changes={**WORLDS, "max_steps": 2 * number})
            job = children.run(stage.job(tmp_path / folder))
            assert not any(job.codes), job.output
    one, many = (reproducible(tmp_path / folder / "out") for folder in ("one", "many"))
    assert [row["step"] for row in many if "loss" in row] == list(range(1, 9))
    assert_close_run(many, one)


@pytest.mark.parametrize("changes, sentence", [
    ({"global_batch_size": 1}, "2 processes, but a global batch has only 1 micro-batches"),
    ({"dp_replicate": 3}, "2 processes cannot hold dp_replicate=3 equal copies"),
])  # fmt: skip
def test_a_world_that_does_not_fit_is_refused_in_a_sentence(children, inputs, root, changes, sentence):
    job = children.run(Stage("sft", inputs, 2, changes=changes).job(root))
    assert job.codes == [2, 2] and job.output.count("error: ") == 1, job.output
    assert sentence in job.output and "Traceback" not in job.output
