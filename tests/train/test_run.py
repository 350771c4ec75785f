"""A run folder says what was asked, on what it ran, and how it ended."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import phoenix
from phoenix.config import load_config, option
from phoenix.files import Interrupted, UserError
from phoenix.train.distributed import World
from phoenix.train.run import environment, is_done, model_card, record_start, run_folder


@dataclass(frozen=True)
class Settings:
    output_dir: Path = option("run folder")
    model_name_or_path: Path = option("base model", Path("models/grün"))
    store: Path = option("store", Path("stores/mine"))
    learning_rate: float = option("rate", 1e-4)
    max_steps: int | None = option("steps", None)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "error, code, words",
    [
        (None, 0, "done"),
        (UserError("a.jsonl, line 3: müßig"), 2, "a.jsonl, line 3: müßig"),
        (Interrupted("stopped at step 3"), 75, "stopped at step 3"),
        (ValueError("got [8, 5]"), 1, "ValueError: got [8, 5]"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt: "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_status_says_how_a_run_ended(tmp_path, error, code, words):
    folder = tmp_path / "run"
    try:
        with run_folder(folder, World()):
            assert status(folder)["code"] == 1 and "killed" in status(folder)["status"]
            assert not is_done(folder)
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert status(folder) == {"code": code, "status": words}
    assert is_done(folder) == (code == 0)


def test_a_folder_without_a_status_is_not_done(tmp_path):
    assert not is_done(tmp_path) and not is_done(tmp_path / "none")


def test_the_config_is_one_that_can_be_run_again(tmp_path):
    config = Settings(tmp_path, learning_rate=3e-5)
    with run_folder(tmp_path, World()):
        record_start(tmp_path, config, World())
    assert load_config(Settings, [str(tmp_path / "config.toml")]) == config


def test_the_environment_names_versions_and_device(tmp_path):
    with run_folder(tmp_path, World()):
        record_start(tmp_path, Settings(tmp_path), World())
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written == json.loads(json.dumps(environment(World())))
    assert written["phoenix"] == phoenix.__version__ and written["packages"]["torch"] == torch.__version__
    assert written["device"] and written["world_size"] == 1


def run_on_ranks(world: World, folder: Path) -> str:
    here = folder if world.is_main else folder / "other"
    try:
        with run_folder(here, world):
            record_start(here, Settings(here), world)
    except UserError as error:
        return str(error)
    return ""


def test_other_ranks_write_nothing_and_hear_of_errors(tmp_path, two_ranks):
    assert two_ranks(run_on_ranks, tmp_path / "run") == ["", ""]
    assert status(tmp_path / "run")["code"] == 0 and not (tmp_path / "run" / "other").exists()
    (tmp_path / "file").write_text("mine")
    first, second = two_ranks(run_on_ranks, tmp_path / "file")
    assert first == second and "cannot write" in first


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with (
        pytest.raises(UserError, match="cannot write"),
        run_folder(tmp_path / "run", World()),
    ):
        pass
    assert (tmp_path / "run").read_text() == "mine"


def test_a_second_process_on_one_folder_is_refused(tmp_path):
    with run_folder(tmp_path, World()):
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        with (
            pytest.raises(UserError, match="another process trains in this folder"),
            run_folder(tmp_path, World()),
        ):
            pass
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with run_folder(tmp_path, World()):
        pass  # the first has ended
    assert status(tmp_path)["code"] == 0


DATA = {"chat_template": "chatml", "splits": {"train": {"rows": 7, "documents": 21}}}


def test_the_card_tells_what_ran(tmp_path):
    rows = [
        {"step": 0, "eval_loss": 5.0},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 1.5},
    ]
    card = model_card(Settings(tmp_path / "mein-lauf"), rows, DATA)
    for part in (
        "# mein-lauf",
        "models/grün",
        "fine-tuned with Phoenix",
        "chatml.  Rows: 7.",
        "step 2.0000",
        "over 2 steps 3.0000",
        "rows 1.5000",
        "0.0001",
    ):
        assert part in card, part


@dataclass(frozen=True)
class Preferences(Settings):
    loss_type: tuple[str, ...] = ("sigmoid", "sft")
    reference_model: Path | None = None
    has_reference: bool = True


def test_the_card_of_preference_training_names_reference_and_rewards(tmp_path):
    held_out = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.25}
    rows = [{"step": 0, "eval_loss": 0.69}, {"step": 1, "loss": 0.6}, {"step": 1, **held_out}]
    data = {**DATA, "kind": "pairs"}
    card = model_card(Preferences(tmp_path / "run"), rows, data)
    for part in (
        "trained on preferences (recipes/dpo.py, loss sigmoid + sft) with Phoenix",
        "chatml.  Pairs: 7.  Reference: models/grün.",
        "- loss on held-out pairs 0.5000\n- eval_rewards/accuracies 0.7500\n- eval_rewards/margins 1.2500\n",
    ):
        assert part in card, part
    other = Preferences(tmp_path / "run", reference_model=Path("models/other"))
    assert "Reference: models/other." in model_card(other, rows, data)
    without = Preferences(tmp_path / "run", loss_type=("simpo",), has_reference=False)
    assert "Reference:" not in model_card(without, rows, data)
    assert "held-out pairs nan" in model_card(other, [{"step": 0, "eval_loss": None}], data)


@pytest.mark.parametrize("rows", [[], [{"step": 0, "eval_loss": 5.0}], [{"step": 1, "loss": None}]], ids=str)
def test_a_card_without_losses(tmp_path, rows):
    assert "# run" in model_card(Settings(tmp_path / "run"), rows, DATA)
