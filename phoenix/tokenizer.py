"""Text <-> token ids: sentencepiece's tokenizer.model and tokenizer.json behind one small class.

Text never becomes a control token: the libraries are set up without special and added tokens, `encode` gives
the strings of these as ordinary pieces, and only chat templates place their ids.  Decoding joins bytes, not
strings, so a stream shows whole characters only, and its parts join to what `decode` gives.

A folder with both files is read from tokenizer.model: the model was trained with it, and conversions to
tokenizer.json differ from it on text with leading spaces.  A tokenizer.json alone is read in sentencepiece's
way there too (one space before every text that starts), because the other way loses a leading space.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from phoenix.files import UserError, atomic_write, read_json, write_json

MAX_ID = 2**24  # vocabularies end below 300,000; a file must not ask for any amount of memory
SPACE = "▁"  # sentencepiece's sign for a space
MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ADDED, MAP = "added_tokens.json", "special_tokens_map.json"


class Tokenizer:
    """The tokenizer of a model folder.

    bos_id: the id that stands before a text, None if this tokenizer puts none (`add_bos_token`); eos_id: int
    or None; special_ids: each string that is a token of its own -> id; legacy: text behind a control token
    starts with sentencepiece's "▁", as text at the very start does (`</s>\\n` is 2 28705 13, otherwise 2 13);
    prefix: whether there is such a "▁"; vocab_size: largest id + 1 (a model may have more rows);
    chat_template: the name in chat.TEMPLATES that the folder states, or None, jinja: the text that it states
    for other programs (chat.apply_template sets both); max_token_bytes: of the longest token's text; digest:
    hex sha256 of all that decides the ids.
    Raises UserError for a folder without tokenizer files, and for broken ones.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        paths = {name: self.folder / name for name in (MODEL, JSON, CONFIG, ADDED, MAP)}
        self._files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
        if not self._files.keys() & {MODEL, JSON}:
            found = "no tokenizer here" if self.folder.is_dir() else "there is no such folder"
            raise UserError(f"{folder}: {found}; expected {MODEL} or {JSON}; copy it from the model")
        tables = {name: read_json(paths[name]) for name in self._files if name != MODEL}
        for name in (name for name, table in tables.items() if not isinstance(table, dict)):
            raise UserError(f"{paths[name]}: not an object of fields with values; copy it again")
        self._config = {key: value for key, value in tables.get(CONFIG, {}).items() if value is not None}
        stated = tables.get(MAP, {}) | self._config
        names = {end: _text(stated.get(f"{end}_token")) for end in ("bos", "eos", "unk", "pad")}
        read = self._read_sentencepiece if MODEL in self._files else self._read_json
        identity, adds_bos = read(tables, names)
        self._add_tokens(tables, names)
        self._ends = {f"{end}_token": names[end] for end in ("bos", "eos")}
        self.vocab_size = len(self._pieces)
        self.bos_id = self._ids.get(names["bos"]) if stated.get("add_bos_token", adds_bos) else None
        self.eos_id = self._ids.get(names["eos"])
        self.max_token_bytes = max(map(len, self._texts))
        self.legacy = self.prefix and bool(stated.get("legacy", self.legacy))
        self.chat_template: str | None = stated.get("phoenix_chat_template")
        self.jinja: str | None = stated.get("chat_template")
        decides = [identity, self.prefix, self.legacy, self.bos_id, self.eos_id]
        decides += sorted(self.special_ids.items())
        self.digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "Tokenizer":
        """The tokenizer of a folder in the Hugging Face layout; see the class."""
        return cls(Path(folder))

    def require_embeddings(self, vocab_size: int, folder: Path) -> None:
        """UserError if the model in `folder` has fewer embeddings than this tokenizer has tokens."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {self.vocab_size} tokens, but config.json says vocab_size "
                f"{vocab_size}; the two must come from one model"
            )

    def encode(self, text: str, *, starts: bool = True) -> list[int]:
        """The ids of the text alone, without BOS or EOS; never one of `special_ids`.

        starts=False: the text goes on in a line, so sentencepiece's leading "▁" is not put before it.
        `decode` gives the text back, byte for byte.  Raises ValueError that names the first character which
        the vocabulary cannot express, or that a normalisation would change (Mistral and Llama have none).
        """
        ids = self._encode(text, starts)
        if ids is None:
            bad = next((c for c in text if self._encode(c, False) is None), text)
            raise ValueError(
                f"the tokenizer in {self.folder} cannot express {bad!r:.80} (U+{ord(bad[0]):04X})"
            )
        return ids

    def spell(self, text: str) -> list[int]:
        """The text byte by byte (or letter by letter): for what must not look like `encode` of the whole."""
        data = text.encode()
        if self._byte_ids.keys() >= set(data):
            return [self._byte_ids[byte] for byte in data]
        return [i for character in text for i in self._library(character, False)]

    def decode(self, ids: Iterable[int], *, starts: bool = True) -> str:
        """The text of the ids; control tokens have none, broken UTF-8 shows as U+FFFD.

        starts=True takes away the leading space that `encode` put there; False: the ids go on in a line.
        Raises ValueError for an id that no token owns.
        """
        return self._join(map(self._checked, ids), starts).decode("utf-8", "replace")

    def stream(self, *, starts: bool = True) -> "Stream":
        """A decoder that takes one id after the other."""
        return Stream(self, starts)

    def token_id(self, piece: str) -> int | None:
        """The id of a token in the vocabulary's writing, see `piece`."""
        return self._ids.get(piece)

    def piece(self, i: int) -> str:
        """The token as the vocabulary writes it ("▁Hallo", "ĠHallo", "<0x0A>", "</s>")."""
        return self._pieces[self._checked(i)]

    def save(self, folder: Path) -> None:
        """Write the files as they were read, and tokenizer_config.json with `chat_template` and `jinja`."""
        for name in self._files.keys() - {CONFIG}:
            with atomic_write(Path(folder) / name, "wb") as file:
                file.write(self._files[name])
        kind = "LlamaTokenizer" if MODEL in self._files else "PreTrainedTokenizerFast"
        config = {"tokenizer_class": kind, "add_bos_token": self.bos_id is not None, **self._ends}
        # transformers 5 takes a missing `legacy` for False, transformers 4 for True.
        config |= {"legacy": self.legacy} if self.prefix else {}
        config |= self._config | {"phoenix_chat_template": self.chat_template, "chat_template": self.jinja}
        write_json(Path(folder) / CONFIG, {key: value for key, value in config.items() if value is not None})

    def _encode(self, text: str, starts: bool) -> list[int] | None:
        """The ids, or None if they would not give the text back."""
        if re.search("[\ud800-\udfff]", text):  # lone surrogates, which JSON allows and UTF-8 does not
            return None
        ids = self._library(text, starts)
        if not self._faithful(ids, text, starts):
            ids = []
            for number, part in enumerate(self._cut.split(text)):
                ids += self.spell(part) if number % 2 else self._library(part, starts and not ids)
        return ids if self._faithful(ids, text, starts) else None

    def _faithful(self, ids: list[int], text: str, starts: bool) -> bool:
        """Nothing lost (libraries drop what has no token in silence); a control token has no text either."""
        return self._join(ids, starts) == text.encode()

    def _join(self, ids: Iterable[int], starts: bool) -> bytes:
        data = b"".join(map(self._texts.__getitem__, ids))
        return data[1:] if starts and self.prefix and data[:1] == b" " else data

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"id {i} lies outside the {self.vocab_size} tokens of {self.folder}")
        return int(i)

    def _read_sentencepiece(self, tables: dict[str, dict], names: dict[str, str | None]) -> tuple[str, bool]:
        """Set up the library, complete `names`; returns the vocabulary's identity and whether BOS is put."""
        data = self._files[MODEL]
        # Joined protobuf messages merge: the added bytes say normalizer_spec.add_dummy_prefix = false.
        protos = data, data + b"\x1a\x02\x18\x00"
        try:
            whole, inner = (sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in protos)
            pieces = whole.id_to_piece(list(range(whole.vocab_size())))
        except (RuntimeError, OSError):
            raise UserError(f"{self.folder / MODEL}: not a sentencepiece model; copy it again") from None
        self._library = lambda text, starts: (whole if starts else inner).encode(text)
        self.prefix, self.legacy = whole.normalize("a") != inner.normalize("a"), True
        self._set_pieces(pieces, byte_level=False)
        control = (i for i in range(len(pieces)) if whole.is_control(i) or whole.is_unknown(i))
        self.special_ids = {pieces[i]: i for i in control}
        ends = {"bos": whole.bos_id(), "eos": whole.eos_id()}
        names |= {end: names[end] or pieces[i] for end, i in ends.items() if i >= 0}
        return hashlib.sha256(data).hexdigest(), True

    def _read_json(self, tables: dict[str, dict], names: dict[str, str | None]) -> tuple[str, bool]:
        """As above.  Built without added tokens, so that none is parsed from text."""
        stored = tables[JSON]
        try:
            spec = {key: stored[key] for key in ("version", "model", "normalizer", "pre_tokenizer")}
            schemes, decoder = _take_prefix(spec), str(stored["decoder"])
            library = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
            vocabulary = library.get_vocab(with_added_tokens=False)
            pieces = [""] * (max(vocabulary.values()) + 1)
        except Exception as error:  # what tokenizers raises has no type of its own
            raise UserError(
                f"{self.folder / JSON}: not a usable tokenizer ({error!r}); copy it again"
            ) from None
        if "ByteLevel" not in decoder and SPACE not in decoder:
            raise UserError(
                f"{self.folder / JSON}: neither byte-level nor like sentencepiece; use another model"
            )
        for piece, i in vocabulary.items():
            pieces[i] = piece
        space = " " * bool(schemes)
        # A batch of one: the only form that leaves out the offsets, which are a quarter of the time.
        batch = library.encode_batch_fast
        self._library = lambda text, starts: batch([space * starts * bool(text) + text])[0].ids
        self.prefix, self.legacy = bool(schemes), "first" not in schemes
        self._set_pieces(pieces, byte_level="ByteLevel" in decoder)
        names["unk"] = spec["model"].get("unk_token") or names["unk"]
        self.special_ids = {}
        adds_bos = repr(names["bos"]) in str(stored.get("post_processor"))
        return hashlib.sha256(library.to_str().encode()).hexdigest(), adds_bos

    def _set_pieces(self, pieces: list[str], byte_level: bool) -> None:
        """The bytes of each piece, and each byte's own token ("Ċ" or "<0x0A>")."""
        # GPT-2 writes printable bytes as themselves, the others as the characters from 256 on.
        order = [*range(33, 127), *range(161, 173), *range(174, 256)]
        order += [byte for byte in range(256) if byte not in order]
        codes = dict(zip(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), order))
        if byte_level:
            texts = [bytes(codes[c] for c in p) if codes.keys() >= set(p) else p.encode() for p in pieces]
        else:
            bytewise = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
            texts = [bytewise.get(piece) or piece.replace(SPACE, " ").encode() for piece in pieces]
        self._pieces, self._texts, width = pieces, texts, 1 if byte_level else len("<0x0A>")
        single = (i for i, piece in enumerate(pieces) if len(piece) == width and len(texts[i]) == 1)
        self._byte_ids = {texts[i][0]: i for i in single}

    def _add_tokens(self, tables: dict[str, dict], names: dict[str, str | None]) -> None:
        """Add the tokens that the folder's JSON files state, beyond the library's vocabulary or within it."""
        try:
            added = {entry["id"]: entry["content"] for entry in tables.get(JSON, {}).get("added_tokens", [])}
            added |= {i: content for content, i in tables.get(ADDED, {}).items()}
            listed = self._config.get("added_tokens_decoder", {})
            added |= {int(i): _text(entry) for i, entry in listed.items()}
            if not all(0 <= i < MAX_ID and isinstance(content, str) for i, content in added.items()):
                raise ValueError(f"ids are numbers from 0 to {MAX_ID - 1}, contents are text")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            found = f"the added tokens are damaged ({error!r})"
            raise UserError(f"{self.folder}: {found}; copy the tokenizer files again") from None
        missing = max([len(self._pieces) - 1, *added]) + 1 - len(self._pieces)
        self._pieces, self._texts = self._pieces + [""] * missing, self._texts + [b""] * missing
        for i, content in added.items():
            if self._pieces[i] not in ("", content):
                found = f"the added token {content!r} has the id {i} of {self._pieces[i]!r}"
                raise UserError(f"{self.folder}: {found}; copy all tokenizer files from one model")
            self._pieces[i], self.special_ids[content] = content, i
        self._ids = {piece: i for i, piece in enumerate(self._pieces) if piece}
        self.special_ids |= {name: self._ids[name] for name in names.values() if name in self._ids}
        for i in self.special_ids.values():
            self._texts[i] = b""
        strings = sorted([SPACE, *self.special_ids], key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, strings))})")


class Stream:
    """Decoding one id at a time: whole characters come out, joined they equal `Tokenizer.decode` of all."""

    def __init__(self, tokenizer: Tokenizer, starts: bool):
        self._tokenizer, self._starts = tokenizer, starts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, i: int) -> str:
        """The characters that this id makes whole."""
        i = self._tokenizer._checked(i)
        data = self._tokenizer._join([i], self._starts)
        self._starts = self._starts and not self._tokenizer._texts[i]
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left of a character that never became whole."""
        return self._decoder.decode(b"", True)


def _take_prefix(spec: dict[str, Any]) -> list[str]:
    """Take out of a tokenizer.json dropout and what puts a space before a text; returns the kinds of that."""
    spec["model"] = spec["model"] | {"dropout": None}
    normalizers = _steps(spec["normalizer"], "normalizers")
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    schemes = ["always"] * (len(normalizers) - len(kept))
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never")
        schemes += [scheme] if scheme != "never" else []
        step |= {"add_prefix_space": False, "prepend_scheme": "never"}
    return schemes


def _steps(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return node.get(key, [node]) if node else []


def _text(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
