"""A bit flipped or the tail cut, in each kind of file: found, named, and nothing is trained on it."""

import random
import shutil
from pathlib import Path

import pytest
from stages import Stage, assert_same

from phoenix.data.store import TokenStore
from phoenix.files import UserError, verify_folder


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


@pytest.mark.parametrize("damage", [flip, cut])
def test_every_file_of_a_model_folder(inputs, tmp_path, draw, damage):
    verify_folder(inputs.model("base"))
    for name in sorted(path.name for path in inputs.model("base").iterdir() if path.name != "manifest.json"):
        folder = shutil.copytree(inputs.model("base"), tmp_path / name)
        damage(folder / name, draw)
        with pytest.raises(UserError, match=f"{name}: is missing or not what was written"):
            verify_folder(folder)


def test_a_model_of_others_has_no_manifest_and_passes(inputs, tmp_path):
    folder = shutil.copytree(inputs.model("base"), tmp_path / "theirs")
    (folder / "manifest.json").unlink()
    verify_folder(folder)


@pytest.mark.parametrize("damage", [flip, cut])
def test_every_file_of_a_store(inputs, tmp_path, draw, damage):
    for name in sorted(path.name for path in inputs.store().iterdir() if path.suffix == ".npy"):
        folder = shutil.copytree(inputs.store(), tmp_path / name)
        damage(folder / name, draw)
        with pytest.raises(UserError, match=f"{name}: .*; prepare the store again"):
            TokenStore.open(folder, name.split("_")[0], verify=True)


def damaged_input(inputs, root, draw, damage, kind: str) -> tuple[dict, str]:
    """A store or model with one damaged file: the change to a config, and the file's name."""
    folder = shutil.copytree(inputs.store() if kind == "store" else inputs.model("base"), root / kind)
    name = "train_00000_tokens.npy" if kind == "store" else "model.safetensors"
    damage(folder / name, draw)
    return {"store" if kind == "store" else "model_name_or_path": folder}, name


@pytest.mark.parametrize("kind", ["store", "model"])
@pytest.mark.parametrize("damage", [flip, cut])
def test_nothing_is_trained_on_a_damaged_input(children, inputs, root, draw, damage, kind):
    root.mkdir()
    changes, name = damaged_input(inputs, root, draw, damage, kind)
    job = children.run(Stage("sft", inputs, changes={"max_steps": 1, **changes}).job(root / "run"))
    assert job.codes == [2] and name in job.output and job.output.count("error: ") == 1, job.output
    assert not (root / "run" / "out" / "model").exists()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_checkpoint_is_named_and_the_one_before_loads(
    children, inputs, root, draw, damage, world_size
):
    """One sentence that says which folder to remove; without it the run goes on from the older one."""
    stage = Stage("sft", inputs, world_size)
    assert not any(children.run(stage.job(root)).codes)
    expected = stage.result(root)
    newest = root / "out" / "checkpoints" / "step_000004"
    path = draw.choice(sorted(newest.glob("*.safetensors")))
    damage(path, draw)
    job = children.run(stage.job(root))
    assert set(job.codes) == {2} and job.output.count("error: ") == 1, job.output
    assert str(path) in job.output
    shutil.rmtree(newest)
    job = children.run(stage.job(root))
    assert not any(job.codes), job.output
    assert_same(stage.result(root), expected)


def test_no_bit_of_a_checkpoints_manifest_changes_a_run(children, inputs, root):
    """The draw is fixed: it changes one digit of a number in the state."""
    stage = Stage("sft", inputs, changes={"max_steps": 4, "eval_steps": 4, "save_steps": 2})
    running = children.run(stage.job(root))
    assert not any(running.codes)
    shutil.rmtree(root / "out" / "checkpoints" / "step_000004")
    manifest = root / "out" / "checkpoints" / "step_000002" / "manifest.json"
    text = manifest.read_text()
    start = text.index('"num_tokens": ') + len('"num_tokens": ')
    manifest.write_text(text[:start] + chr(ord(text[start]) ^ 1) + text[start + 1 :])
    job = children.run(stage.job(root))
    assert job.codes == [2] and "manifest.json" in job.output
