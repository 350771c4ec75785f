"""The stages that write: how each is run, what must be the same in the end, what may lie there meanwhile."""

import dataclasses
from pathlib import Path

from children import Job
from inputs import Inputs, command, reproducible, status, weights

from phoenix.config import option
from phoenix.data.store import TokenStore
from phoenix.files import read_json, verify_folder
from phoenix.model.mistral import Mistral
from phoenix.model.pretrained import save_model
from phoenix.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SaveConfig:
    """A model folder, read and written again, in several files."""

    model_name_or_path: Path = option("folder to read")
    output: Path = option("folder to write")


def save(config: SaveConfig) -> None:
    model = Mistral.from_pretrained(config.model_name_or_path)
    tokenizer = Tokenizer.from_pretrained(config.model_name_or_path)
    save_model(model, config.output, tokenizer, max_shard_bytes=40_000, texts={"README.md": "of a test"})


@dataclasses.dataclass
class Stage:
    """`job` runs it below a folder; `result` is what must not depend on what happened on the way."""

    name: str
    inputs: Inputs
    world_size: int = 1
    torchrun: bool = False
    changes: dict[str, object] = dataclasses.field(default_factory=lambda: {"max_steps": 4, "eval_steps": 2})

    def job(self, root: Path) -> Job:
        root.mkdir(parents=True, exist_ok=True)
        recipe = self.name.split()[0]
        if recipe == "prepare":
            values = {"input": f'["{self.inputs.store()}.jsonl"]', "output": root / "out"}
            values |= {"model_name_or_path": self.inputs.model("base"), "max_length": 128}
            values |= {"eval_fraction": 0.2, "num_workers": 1, "shard_tokens": 800, "preview": 1}
            if self.name == "prepare in parts":
                recipe, values["filters"] = "prepare_in_parts", '["duplicate", "near_duplicate"]'
        elif recipe == "save":
            values = {"model_name_or_path": self.inputs.model("base"), "output": root / "out"}
        else:
            values = {"sample_max_new_tokens": 2, "save_steps": 1, **self.changes}
            if recipe == "dpo":
                cache = {"reference_cache": root / "reference"}
                config = self.inputs.dpo_config(root / "out", **cache, **values)
            else:
                config = self.inputs.config(root / "out", **values)
            return Job(root, recipe, command(config)[2:], self.world_size, self.torchrun)
        return Job(root, recipe, [f"{name}={value}" for name, value in values.items()])

    def result(self, root: Path) -> dict[str, object]:
        folder = root / "out"
        if not self.name.startswith(("sft", "dpo")):
            return {
                str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
            }
        return {
            "metrics": reproducible(folder), "samples": (folder / "samples.jsonl").read_bytes(),
            "weights": weights(folder), "status": status(folder), "files": sorted(map(str, names(root))),
        }  # fmt: skip

    def assert_sound(self, root: Path) -> None:
        """What stands under a final name is whole: it says what its files are, and they are that."""
        out = root / "out"
        if not self.name.startswith(("sft", "dpo")):
            assert not out.exists() or assert_whole(out)
            return
        assert not (out / "model").exists() or assert_whole(out / "model")
        # Of those that shall go some files may be gone, so the newest alone has to be whole.
        for newest in sorted(out.glob("checkpoints/step_*/manifest.json"))[-1:]:
            assert_whole(newest.parent)


# Two ranks take a second to find each other, so their run is shorter.
TWO_RANKS = {"world_size": 2, "changes": {"max_steps": 3, "eval_steps": 3, "sample_max_new_tokens": 1}}
STAGES = {
    "prepare": {},
    "prepare in parts": {},
    "save": {},
    "sft": {},
    "sft on two ranks": TWO_RANKS,
    "dpo": {"changes": {"max_steps": 2, "eval_steps": 2, "sample_max_new_tokens": 1}},
}


def names(root: Path) -> set[Path]:
    """Every path, since nothing may be left behind; but of the checkpoints the newest alone.

    What becomes of older ones that a kill saved from their removal, test_kill.py asks.
    """
    older = sorted(root.glob("out/checkpoints/step_*"))[:-1]
    paths = (path for path in root.rglob("*") if not set(older) & {path, *path.parents})
    return {path.relative_to(root) for path in paths}


def assert_whole(folder: Path) -> bool:
    manifest = read_json(folder / "manifest.json")
    if "splits" in manifest:
        for split in manifest["splits"]:
            TokenStore.open(folder, split, verify=True)
    else:
        verify_folder(folder)
    return True


def assert_same(found: dict, expected: dict, where: str = "") -> None:
    for key in [*expected, *found]:
        if found.get(key) != expected.get(key):
            parts = [
                list(x) if isinstance(x, list) else len(x or "") for x in (found.get(key), expected.get(key))
            ]
            raise AssertionError(f"{key} differs, {where}:\n{parts[0]}\n{parts[1]}")
