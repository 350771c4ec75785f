"""Log-probs of the answers under the reference model: computed once, kept on disk, never stale.

    FOLDER/manifest.json                of which model, in which dtype, by which versions
    FOLDER/SHA256.safetensors           digests [n, 16] uint8 and logps [n] fp32; the name is the file's hash

An answer is known by the digest of its exact tokens, prompt and loss mask, so a value can never meet another
row, template or truncation; another model or dtype has another folder.  A shard is written as soon as some
micro-batches are done: a killed computation goes on where it was.  A damaged shard is found by its name, and
what it held is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from tqdm import tqdm

import phoenix
from phoenix.data.pairs import PairLoader
from phoenix.files import Interrupted, UserError, atomic_write, inside, read_json, sha256, write_json
from phoenix.model.mistral import Mistral
from phoenix.train.distributed import World

FLUSH = 16  # micro-batches of a rank between two shards
SAMPLE = 8  # pairs that are computed again before a cached value is trusted
# Nats a token by which two computations of one log-prob may differ: other batches add up in another order.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2}
Values = dict[bytes, np.float32]


def model_digest(folder: Path) -> str:
    """Hex sha256 over config.json and the weights of a model folder: from its manifest, which
    `verify_folder` holds against the files, or of the files themselves."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix == ".safetensors")
    files.append(Path(folder) / "config.json")
    manifest = Path(folder) / "manifest.json"
    stated = read_json(manifest)["files"] if manifest.exists() else {}
    hashes = [(path.name, stated[path.name]["sha256"] if path.name in stated else sha256(path))
              for path in files]  # fmt: skip
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


class ReferenceCache:
    """The values of one reference model in one dtype, below `root`.  All ranks make and use it alike."""

    def __init__(self, root: Path, model_folder: Path, dtype: torch.dtype, world: World) -> None:
        self.dtype, self.world = dtype, world
        digest = world.broadcast(model_digest(model_folder) if world.is_main else None)  # it was verified
        name = str(dtype).removeprefix("torch.")
        self.folder = Path(root) / f"{digest[:16]}_{name}"
        self.key = {"kind": "reference_logps", "model": digest, "dtype": name}
        world.on_main(self._claim)
        values, lost = world.broadcast(self._read() if world.is_main else None)
        self.values: Values = values
        for path in lost:
            world.say(f"{path}: is damaged; what it held is computed again")

    @torch.no_grad()
    def logps(self, model: Mistral, loader: PairLoader, rows: np.ndarray) -> np.ndarray:
        """[pairs, 2] fp32, of the chosen and the rejected answers of these rows; NaN for all others.

        model: the reference, in the state that `model_digest` named.  Raises UserError if a sample of the
        cached values is not what the model gives now.
        """
        digests = loader.digests
        missing = [n for n in rows.tolist() if not all(one in self.values for one in digests[n])]
        was_training = model.training
        model.eval()
        try:
            known = np.setdiff1d(rows, missing)
            if len(known):
                self._check(model, loader, digests, known)
            if missing:
                self._compute(model, loader, digests, np.array(missing))
        finally:
            model.train(was_training)
        table = np.full((len(digests), 2), np.nan, np.float32)
        table[rows] = [[self.values[one] for one in digests[row]] for row in rows.tolist()]
        return table

    def _claim(self) -> None:
        path = self.folder / "manifest.json"
        if path.exists():
            found = read_json(path, "manifest of a cache of reference log-probs")
            differs = [name for name, value in self.key.items() if found.get(name) != value]
            if differs:
                raise UserError(
                    f"{self.folder}: belongs to something else ({differs[0]} is {found.get(differs[0])!r}); "
                    "choose another reference_cache"
                )
        elif self.folder.exists() and any(path.name[0] != "." for path in self.folder.iterdir()):
            raise UserError(
                f"{self.folder}: holds files of others (no manifest.json); choose another reference_cache"
            )
        else:
            versions = {"phoenix": phoenix.__version__, "torch": torch.__version__}
            write_json(path, {**self.key, "versions": versions})

    def _read(self) -> tuple[Values, list[Path]]:
        values, lost = {}, []
        for path in sorted(self.folder.glob("*.safetensors")):
            content = path.read_bytes()
            try:
                if hashlib.sha256(content).hexdigest() != path.stem:
                    raise ValueError("another hash than its name")
                tensors = safetensors.numpy.load(content)
                rows = [bytes(row) for row in tensors["digests"]]
                values.update(zip(rows, tensors["logps"].astype(np.float32), strict=True))
            except (ValueError, KeyError, SafetensorError):
                lost.append(path)
                with contextlib.suppress(OSError):
                    path.unlink()
        return values, lost

    def _compute(self, model: Mistral, loader: PairLoader, digests: list, missing: np.ndarray) -> None:
        """All ranks take turns at the micro-batches; rank 0 writes what they have found."""
        world, batches = self.world, loader.cut(missing)
        bar = tqdm(total=len(missing), desc="reference", unit="pair", disable=None if world.is_main else True)
        for first in range(0, len(batches), FLUSH * world.world_size):
            chunk = batches[first : first + FLUSH * world.world_size]
            turns = -(-len(chunk) // world.world_size)
            mine = [chunk[at] if at < len(chunk) else missing[:0]
                    for at in range(world.rank, turns * world.world_size, world.world_size)]  # fmt: skip
            found: Values = {}
            for rows in mine:
                for row, pair in zip(rows, self._pairs(model, loader, rows)):
                    found.update(zip(digests[row], pair))
            parts, stops = zip(*world.gather((found, world.stop)))
            gathered = {key: value for part in parts for key, value in part.items()}
            _require_finite(gathered, loader, np.concatenate(chunk))
            world.on_main(lambda gathered=gathered: self._write(gathered))
            self.values.update(gathered)
            bar.update(sum(map(len, chunk)))
            if any(stops):
                bar.close()
                raise Interrupted(
                    f"stopped after {bar.n} of {bar.total} pairs of the reference; start again to go on"
                )
        bar.close()

    def _pairs(self, model: Mistral, loader: PairLoader, rows: np.ndarray) -> np.ndarray:
        micro = loader.packed_batch(rows).to(self.world.device)
        return torch.stack(micro.logps(model(micro.batch)), 1).float().cpu().numpy()

    def _write(self, values: Values) -> None:
        tensors = {
            "digests": np.array([list(digest) for digest in values], np.uint8),
            "logps": np.array(list(values.values()), np.float32),
        }
        content = safetensors.numpy.save(tensors)
        path = inside(self.folder, f"{hashlib.sha256(content).hexdigest()}.safetensors")
        with atomic_write(path, "wb") as file:
            file.write(content)

    def _check(self, model: Mistral, loader: PairLoader, digests: list, known: np.ndarray) -> None:
        """A sample of the pairs once more, one micro-batch each, on all ranks alike."""
        problem = ""
        for row in np.random.default_rng(len(known)).choice(known, min(SAMPLE, len(known)), replace=False):
            [now] = self._pairs(model, loader, np.array([row]))
            kept = np.array([self.values[one] for one in digests[row]])
            tokens = loader.packed_batch(np.array([row])).lengths.numpy()[0]
            if not (np.abs(now - kept) <= TOLERANCE[self.dtype] * np.maximum(tokens, 8)).all():
                problem = problem or (
                    f"{self.folder}: holds {kept.tolist()} for pair {row}, but the model gives "
                    f"{now.tolist()}; remove the folder to compute it again"
                )
        if found := [text for text in self.world.gather(problem) if text]:
            raise UserError(found[0])


def _require_finite(values: Values, loader: PairLoader, rows: np.ndarray) -> None:
    """UserError that names the first pair whose log-prob is not: kept, it would never go away."""
    for row in rows.tolist():
        found = [values[digest] for digest in loader.digests[row]]
        if not np.isfinite(found).all():
            [(start, end)] = loader.spans(np.array([row]))
            [origin, *_] = loader.store.origins(start, end)
            raise UserError(
                f"{origin}: the reference gives log-probs of {found[0]} and {found[1]}; look at this pair, "
                "or set dtype=float32"
            )
