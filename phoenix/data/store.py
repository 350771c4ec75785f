"""The token store: a folder of memory-mapped .npy shards and a manifest that says what they are.

    manifest.json                    written last: without it the folder is no store
    train_00000_tokens.npy           [tokens] uint16, or int32 from 65,536 tokens of vocabulary on
    train_00000_loss_mask.npy        [tokens] bool: the token has a loss (it belongs to the assistant)
    train_00000_offsets.npy          [documents + 1] int64: where each document starts in this shard
    train_00000_origin.npy           [documents, 2] int64: number of the input file, and line in it
    train_00000_provenance.npy       [documents] int32: source and licence, an index of the manifest's list

A split's stream is what all its shards give one behind the other; a row's documents stand in one shard.  In a
store of kind "pairs" a row is three documents: prompt, chosen, rejected.
"""

import array
import hashlib
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phoenix.files import UserError, inside, read_json, sha256

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
Document = tuple[np.ndarray, np.ndarray]  # tokens, loss mask


@dataclass(frozen=True)
class TokenStore:
    """One split of a store, read only."""

    folder: Path
    manifest: dict
    digest: str  # of the split's arrays
    shards: list[dict[str, np.ndarray]]
    offsets: np.ndarray  # [documents + 1] int64, in the stream

    @classmethod
    def open(
        cls, folder: Path, split: str = "train", *, kind: str = "documents", verify: bool = False
    ) -> "TokenStore":
        """Open a split; verify=True hashes every file, otherwise manifest, sizes and headers are checked.

        Raises UserError if the store or a file is missing, cut, changed, or of another version or kind.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST, "manifest of a token store, which recipes/prepare.py writes")
        try:
            found, expected = (manifest["format_version"], manifest["kind"]), (FORMAT_VERSION, kind)
            if found != expected:
                raise UserError(
                    f"{folder}: format and kind are {found}; expected {expected}; prepare it again"
                )
            if split not in manifest["splits"]:
                raise UserError(f"{folder}: no split {split!r}; it has {', '.join(manifest['splits'])}")
            entries = [shard["files"] for shard in manifest["splits"][split]["shards"]]
            if not isinstance(manifest["chat_template"], str):
                raise TypeError("chat_template is no name")
            if not all(isinstance(entry["path"], str) for entry in manifest["inputs"]):
                raise TypeError("the inputs have no paths")
            shards = [
                {name: _array(folder, file, verify) for name, file in files.items()} for files in entries
            ]
            hashes = "".join(file["sha256"] for files in entries for file in files.values())
            lengths = np.concatenate([_lengths(shard) for shard in shards])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{folder}: the store is damaged ({error!r}); prepare it again") from None
        digest = hashlib.sha256(hashes.encode()).hexdigest()
        return cls(folder, manifest, digest, shards, np.concatenate([[0], lengths.cumsum()]))

    @staticmethod
    def has_split(folder: Path, split: str) -> bool:
        return split in read_json(Path(folder) / MANIFEST, "manifest of a token store").get("splits", {})

    def require_tokenizer(self, digest: str) -> None:
        """UserError if the store was made with another tokenizer than the one of this digest."""
        made = self.manifest.get("tokenizer_digest")
        if made != digest:
            raise UserError(
                f"{self.folder}: made with the tokenizer {str(made)[:12]}, but the model has {digest[:12]}; "
                "prepare the store again with this model's folder as model_name_or_path"
            )

    def require_template(self, digest: str) -> None:
        """UserError if the template of this name was another one when the store was made."""
        if self.manifest.get("template_digest") != digest:
            name = self.manifest.get("chat_template")
            raise UserError(f"{self.folder}: made with another form of the template {name}; prepare it again")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [documents] int64."""
        return np.diff(self.offsets)

    def document(self, index: int) -> Document:
        """tokens [n] and loss_mask [n] of a document: views of the mapped files."""
        return self.span(int(self.offsets[index]), int(self.offsets[index + 1]))

    def span(self, start: int, end: int) -> Document:
        """tokens and loss_mask of the stream's rows [start, end), which may run over several shards."""
        parts, base = [], 0
        for shard in self.shards:
            first, last = max(start - base, 0), min(end - base, len(shard["tokens"]))
            if first < last:
                parts.append((shard["tokens"][first:last], shard["loss_mask"][first:last]))
            base += len(shard["tokens"])
        return parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts)))

    def loss_masks(self) -> Iterator[np.ndarray]:
        """The stream's loss mask, a shard at a time."""
        return (shard["loss_mask"] for shard in self.shards)

    def origins(self, start: int, end: int) -> list[str]:
        """File and line of the rows whose documents touch the stream's rows [start, end)."""
        first, last = self.offsets.searchsorted([start, end - 1], side="right") - 1
        origin = np.concatenate([shard["origin"] for shard in self.shards])[first : last + 1]
        names = dict(enumerate(entry["path"] for entry in self.manifest["inputs"]))
        return [f"{names.get(file, f'input {file}')}, line {line}" for file, line in origin.tolist()]

    def provenance(self, index: int) -> dict[str, str]:
        """Of a document: "source", the name of the data set; "subset", what the row itself states as its
        source, or ""; "license", an SPDX name, or "not stated" if no policy asked for one."""
        for shard in self.shards:
            if index < len(shard["provenance"]):
                return self.manifest["provenance"][shard["provenance"][index]]
            index -= len(shard["provenance"])
        raise IndexError(index)


class StoreWriter:
    """Writes one split; in memory is one shard at most.  A shard ends behind the last document of a row."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int = 2**23) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = np.dtype(np.uint16 if vocab_size < 2**16 else np.int32)
        self.rows, self.shards = 0, []
        self._clear()

    def add(self, documents: Sequence[Document], origin: tuple[int, int], provenance: int = 0) -> None:
        """A row's documents, the number of its file and line, the index of its source and licence."""
        tokens, loss_mask = map(np.concatenate, zip(*documents))
        length = np.array([[len(part) for part, _ in documents]])
        self.add_rows(tokens, loss_mask, length, np.array([origin]), np.array([provenance]))

    def add_rows(
        self, tokens: np.ndarray, loss_mask: np.ndarray, length: np.ndarray, origins: np.ndarray,
        provenance: np.ndarray,
    ) -> None:  # fmt: skip
        """Many rows, one behind the other: tokens [n], loss_mask [n]; length [rows, documents of a row];
        origins [rows, 2], number of the file and line; provenance [rows]."""
        ends, (rows, pieces) = length.sum(1).cumsum(), length.shape
        start = first = 0  # row, and its first token
        while start < rows:
            room = self.shard_tokens - len(self.loss_mask)
            stop = int(ends.searchsorted(first + room, "right"))
            if stop <= start and self.tokens:
                self._write_shard()
                continue
            stop = max(stop, start + 1)  # a row alone may be more than a shard holds
            last, here = int(ends[stop - 1]), slice(start, stop)
            documents = len(self.loss_mask) + length[here].ravel().cumsum()
            self.tokens += tokens[first:last].astype(self.dtype).tobytes()
            self.loss_mask += loss_mask[first:last].astype(bool).tobytes()
            self.offsets.frombytes(documents.astype(np.int64).tobytes())
            self.origin.frombytes(np.repeat(origins[here], pieces, 0).astype(np.int64).tobytes())
            self.provenance.frombytes(np.repeat(provenance[here], pieces).astype(np.int32).tobytes())
            self.rows += stop - start
            start, first = stop, last

    def close(self) -> dict:
        """Write what is left; returns the split's entry for the manifest."""
        if self.tokens:
            self._write_shard()
        names = ("documents", "tokens", "target_tokens")
        counts = {name: sum(shard[name] for shard in self.shards) for name in names}
        return {"rows": self.rows, **counts, "shards": self.shards}

    def _clear(self) -> None:
        self.tokens, self.loss_mask = bytearray(), bytearray()
        self.offsets, self.origin = array.array("q", [0]), array.array("q")
        self.provenance = array.array("i")

    def _write_shard(self) -> None:
        arrays = {
            "tokens": np.frombuffer(self.tokens, self.dtype),
            "loss_mask": np.frombuffer(self.loss_mask, bool),
            "offsets": np.frombuffer(self.offsets, np.int64),
            "origin": np.frombuffer(self.origin, np.int64).reshape(-1, 2),
            "provenance": np.frombuffer(self.provenance, np.int32),
        }
        files = {}
        for name, values in arrays.items():
            path = self.folder / f"{self.split}_{len(self.shards):05d}_{name}.npy"
            np.save(path, values, allow_pickle=False)
            files[name] = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        counts = {"documents": len(self.origin) // 2, "tokens": len(self.loss_mask)}
        self.shards.append({**counts, "target_tokens": int(arrays["loss_mask"].sum()), "files": files})
        self._clear()


def _array(folder: Path, entry: dict, verify: bool) -> np.ndarray:
    path = inside(folder, entry["name"])
    size = path.stat().st_size if path.is_file() else 0
    if size != entry["bytes"]:
        raise UserError(
            f"{path}: has {size} of {entry['bytes']} bytes (missing or cut); prepare the store again"
        )
    if verify and sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: is not what was written (other sha256); prepare the store again")
    try:  # not np.load, which opens a zip file, too
        return np.lib.format.open_memmap(path, mode="r")
    except (tokenize.TokenError, SyntaxError) as error:  # numpy lets these out for some headers
        raise ValueError(f"{path.name}: {error}") from None


def _lengths(shard: dict[str, np.ndarray]) -> np.ndarray:
    kinds = {name: (values.dtype.str, values.shape[1:]) for name, values in shard.items()}
    tokens, expected = kinds.pop("tokens"), {"loss_mask": ("|b1", ()), "offsets": ("<i8", ())}
    expected |= {"origin": ("<i8", (2,)), "provenance": ("<i4", ())}
    if tokens not in (("<u2", ()), ("<i4", ())) or kinds != expected:
        raise ValueError("a shard's arrays have other types or shapes")
    offsets, lengths = shard["offsets"], np.diff(shard["offsets"])
    sizes = (len(shard["tokens"]), len(shard["loss_mask"]))
    owners = {len(shard["origin"]), len(shard["provenance"])}
    if offsets[0] or lengths.min() < 1 or sizes != (offsets[-1],) * 2 or owners != {len(lengths)}:
        raise ValueError("a shard's offsets do not fit its tokens")
    return lengths
