"""A small store of random documents, and the documents themselves to compare with."""

import numpy as np
import pytest

from phoenix.data.store import FORMAT_VERSION, MANIFEST, StoreWriter, TokenStore
from phoenix.files import write_json


@pytest.fixture
def make_store(tmp_path):
    """make_store(lengths) -> (store, documents as (tokens, loss_mask)); document i comes from line i + 1."""

    def make(lengths, shard_tokens=50, vocab_size=500, kind="documents", seed=0):
        random = np.random.default_rng(seed)
        documents = []
        for length in lengths:
            mask = random.random(length) < 0.5
            mask[-1] = True
            documents.append((random.integers(0, vocab_size, length), mask))
        writer = StoreWriter(tmp_path, "train", vocab_size, shard_tokens)
        for line, document in enumerate(documents, 1):
            writer.add([document], (0, line))
        inputs = [{"path": "rows.jsonl"}]
        splits = {"train": writer.close()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "tokenizer_digest": "abc",
            "chat_template": "chatml",
            "splits": splits,
        }
        write_json(tmp_path / MANIFEST, {**manifest, "inputs": inputs})
        return TokenStore.open(tmp_path, kind=kind), documents

    return make
