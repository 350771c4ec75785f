"""Model folders: byte-equal round trips with ourselves and transformers, and nothing hostile is believed."""

import errno
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from phoenix.files import UserError, sha256
from phoenix.model import pretrained
from phoenix.model.layout import AttentionLayout
from phoenix.model.mistral import Mistral
from phoenix.model.pretrained import (
    clean_name,
    load_model,
    load_weights,
    materialise,
    meta_model,
    read_config,
    save_model,
)
from phoenix.train.distributed import parallelize


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    save_model(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def names_of(model: Mistral) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 10_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_byte_equal(tiny_model, tmp_path, max_shard_bytes, dtype):
    model = tiny_model.to(dtype)
    save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    number = {5_000_000_000: 1, 1: len(names_of(model))}.get(max_shard_bytes, len(files))
    if number == 1:
        assert files == ["model.safetensors"]
    else:
        assert files == [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]
        index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == names_of(model) and set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    again = load_model(tmp_path / "model", dtype=dtype)
    assert again.config == model.config and not again.training
    for (name, parameter), other in zip(model.named_parameters(), again.parameters()):
        assert bits(parameter) == bits(other), name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_saving_is_reproducible_and_the_manifest_true(tiny_model, folder, tmp_path):
    save_model(load_model(folder), tmp_path / "again", texts={"README.md": "größer\n"})
    manifest = json.loads((tmp_path / "again" / "manifest.json").read_text())["files"]
    assert sorted(manifest) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    for name, entry in manifest.items():
        path = tmp_path / "again" / name
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}
        assert name == "README.md" or path.read_bytes() == (folder / name).read_bytes()


def test_files_have_the_mode_that_the_umask_gives(tiny_model, tmp_path):
    before = os.umask(0o027)
    try:
        save_model(tiny_model, tmp_path / "model", max_shard_bytes=10_000)
    finally:
        os.umask(before)
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "model").iterdir()}
    assert modes == {"0o640"}


def test_dtypes_are_converted_on_the_way(tiny_model, folder, tmp_path):
    for parameter, half in zip(
        tiny_model.parameters(), load_model(folder, dtype=torch.bfloat16).parameters()
    ):
        assert torch.equal(half, parameter.bfloat16())
    save_model(tiny_model, tmp_path / "half", dtype=torch.float16, generation_config={"eos_token_id": [2, 7]})
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    ends = json.loads((tmp_path / "half" / "generation_config.json").read_text())
    assert ends == {"bos_token_id": 1, "eos_token_id": [2, 7]}
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.float16}
    assert {p.dtype for p in tiny_model.parameters()} == {torch.float32}
    for parameter, other in zip(tiny_model.parameters(), load_model(tmp_path / "half").parameters()):
        assert torch.equal(other, parameter.half().float())


def test_a_tied_head_that_stands_twice_is_read_if_it_is_the_same(tiny_model, folder):
    tensors = tensors_of(folder)
    if not tiny_model.config.tie_word_embeddings:
        assert "lm_head.weight" in tensors
        return
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # written by old transformers
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load_model(folder).lm_head.weight, tiny_model.lm_head.weight)
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="ties head and embedding, but the two differ"):
        load_model(folder)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.norm.weight"), "lacks the tensor 'model.norm.weight'; config.json and weights"),
    (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "lacks the tensor .* and 8 more"),
    (lambda t: t.update(extra=torch.ones(2)), "has, beyond the model of config.json, the tensor 'extra'"),
    (lambda t: t.update({"model.norm.weight": torch.ones(33)}), r"has shape \[33\]; expected \[32\]"),
    (lambda t: t.update({"model.norm.weight": torch.ones(1, 32)}), r"has shape \[1, 32\]; expected \[32\]"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32).int()}), "stored as I32; expected F32, F16"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}), "stored as F8_E4M3"),
])  # fmt: skip
def test_tensors_that_do_not_fit_the_config(folder, change, message):
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_nothing_is_allocated_for_a_config_that_lies(folder):
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, "vocab_size": 10**12}))
    with pytest.raises(UserError, match=r"has shape \[512, 32\]; expected \[1000000000000, 32\]"):
        load_model(folder)


def raw(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(name="model.norm.weight", shape=(32,), begin=0, end=128) -> str:
    return json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}})[1:-1]


LIES = {
    "empty": b"",
    "shorter than a length": b"\x01\x00\x00",
    "header of 2^63 bytes": raw(b"{}", 2**63),
    "header of 2^64 - 1 bytes": raw(b"{}", 2**64 - 1),
    "header past the end": raw(b"{}", 1000),
    "header is no JSON": raw(b"{nope}"),
    "header is no UTF-8": raw(b'{"\xff": 1}'),
    "header is a list": raw(b"[]"),
    "offsets past the end": raw(f"{{{entry(end=1280)}}}".encode(), data=bytes(128)),
    "offsets reversed": raw(f"{{{entry(begin=128, end=0)}}}".encode(), data=bytes(128)),
    "offsets that do not fit the shape": raw(f"{{{entry(end=64)}}}".encode(), data=bytes(64)),
    "overlap": raw(f"{{{entry()}, {entry('b', begin=64, end=192)}}}".encode(), data=bytes(192)),
    "gap": raw(f"{{{entry()}, {entry('b', begin=256, end=384)}}}".encode(), data=bytes(384)),
    "bytes behind the last tensor": raw(f"{{{entry()}}}".encode(), data=bytes(256)),
    "shape whose product overflows": raw(
        f"{{{entry(shape=(2**33, 2**31 + 1, 4))}}}".encode(), data=bytes(128)
    ),
    "shape whose product of 4 bytes each wraps to 4": raw(
        f"{{{entry(shape=(3, (2**63 + 1) // 3), end=4)}}}".encode(), data=bytes(4)
    ),
    "shape whose product wraps to the right size": raw(
        f"{{{entry(shape=(2**62 + 8, 4))}}}".encode(), data=bytes(128)
    ),
    "shape above 64 bits": raw(f"{{{entry(shape=(2**64 + 32,))}}}".encode(), data=bytes(128)),
    "zero-size tensor inside another": raw(
        f"{{{entry()}, {entry('b', shape=(0,), begin=64, end=64)}}}".encode(), data=bytes(128)
    ),
    "name twice, other bytes": raw(
        f"{{{entry()}, {entry('b', begin=128, end=256)}, {entry('b')},"
        f" {entry(begin=128, end=256)}}}".encode(),
        data=bytes(256),
    ),
    "name twice, same bytes": raw(f"{{{entry()}, {entry()}}}".encode(), data=bytes(128)),
    "metadata twice": raw(
        f'{{"__metadata__": {{}}, "__metadata__": {{}}, {entry()}}}'.encode(), data=bytes(128)
    ),
    "dtype of another size": raw(f"{{{entry()}}}".replace("F32", "F64").encode(), data=bytes(128)),
    "dtype that does not exist": raw(f"{{{entry()}}}".replace("F32", "Q7").encode(), data=bytes(128)),
    "offset of three numbers": raw(f"{{{entry()}}}".replace("128]", "128, 128]").encode(), data=bytes(128)),
    "offset below 0": raw(f"{{{entry(begin=-1)}}}".encode(), data=bytes(128)),
    "offset with a fraction": raw(f"{{{entry(begin=0.5)}}}".encode(), data=bytes(128)),
    "metadata that is no text": raw(f'{{"__metadata__": {{"a": 1}}, {entry()}}}'.encode(), data=bytes(128)),
    "deep nesting": raw(b'{"a": ' + b"[" * 100_000),
    "negative shape": raw(f"{{{entry(shape=(-32,))}}}".encode(), data=bytes(128)),
    "a pickle": b"\x80\x04\x95" + bytes(100),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_named(folder, name):
    (folder / "model.safetensors").write_bytes(LIES[name])
    with pytest.raises(
        UserError, match=r"model\.safetensors: not a whole safetensors file .*; copy it again"
    ):
        load_model(folder)


def test_a_header_above_100_mb_is_refused(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    path.write_bytes(raw(content[8 : 8 + size] + b" " * (100_000_001 - size), data=content[8 + size :]))
    with pytest.raises(UserError, match=r"not a whole safetensors file .*header too large"):
        load_model(folder)


def test_a_zero_size_tensor_that_shares_an_offset_is_one_too_many(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = {
        **json.loads(content[8 : 8 + size]),
        "b": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }
    path.write_bytes(raw(json.dumps(header).encode(), data=content[8 + size :]))
    with pytest.raises(UserError, match=r"has, beyond the model of .*, the tensor 'b'"):
        load_model(folder)


@given(st.data())
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_any_change_of_a_header_gives_a_model_of_the_config_or_one_sentence(folder, data):
    path, expected = folder / "model.safetensors", tensors_of(folder)
    content = bytearray(path.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    changed = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, 7 + size), min_size=1, max_size=3)):
        changed[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789[]{},:"\\ '))
    path.write_bytes(changed)
    try:
        model = load_model(folder)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        assert shapes == {name: list(tensor.shape) for name, tensor in expected.items()}
    except UserError as error:
        assert str(folder) in str(error) and str(error).isprintable()
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_cut_file_is_named(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(folder)


@pytest.fixture
def sharded(tiny_model, tmp_path) -> Path:
    save_model(tiny_model, tmp_path / "sharded", max_shard_bytes=20_000)
    return tmp_path / "sharded"


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index) or index))


@pytest.mark.parametrize("name, message", [
    ("model-00009.safetensors", "index.json: names 'model-00009.safetensors', which is not in the folder"),
    ("../../x", "'../../x' is not the plain name of a file in this folder"),
    ("/etc/passwd", "'/etc/passwd' is not the plain name"),
    ("..", "'..' is not the plain name"),
    ("", "'' is not the plain name"),
    ("a\0b", r"'a\\x00b' is not the plain name"),
    ("a\nb", r"'a\\nb' is not the plain name"),
    ("CON", "names 'CON', which is not in the folder"),
    ("x" * 300, "is not the plain name"),
    (7, "has no 'weight_map' of tensor names to file names"),
    ("config.json", "config.json: not a whole safetensors file"),
])  # fmt: skip
def test_an_index_that_names_another_file(sharded, name, message):
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(UserError, match=message):
        load_model(sharded)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_a_map(sharded, index):
    edit_index(sharded, lambda _: index or {"metadata": {}})
    with pytest.raises(UserError, match="has no 'weight_map' of tensor names to file names; copy it again"):
        load_model(sharded)


def test_an_index_that_names_a_link_out_of_the_folder(sharded, tmp_path):
    first = sorted(sharded.glob("*.safetensors"))[0]
    shutil.move(first, tmp_path / "elsewhere.safetensors")
    first.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match=f"'{first.name}' is not the plain name of a file in this folder"):
        load_model(sharded)


def test_an_index_that_places_a_tensor_wrongly(sharded, tiny_model):
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": files[0]}))
    with pytest.raises(UserError, match=f"{files[0]}: lacks the tensor 'model.norm.weight' that"):
        load_model(sharded)


def test_a_tensor_in_two_files(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    name, tensor = next(iter(load_file(files[0]).items()))
    save_file({**load_file(files[1]), name: tensor}, files[1])
    with pytest.raises(UserError, match=f"the tensor '{name}' stands in another file too"):
        load_model(sharded)


def test_folders_without_weights(folder, tmp_path):
    with pytest.raises(UserError, match="there is no such folder; expected a model folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json: there is no such file; expected the config.json"):
        load_model(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights; expected model\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"holds only pytorch_model\.bin, a pickle, which is never opened"):
        load_model(folder)


def test_a_full_disk_leaves_nothing(tiny_model, folder, tmp_path, monkeypatch):
    """The n-th fsync fails; then every file may hold 30 kB at most, as the Rust side meets it."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def check():
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    for number in range(1, 4):
        calls, fsync = [], os.fsync

        def fails(handle, calls=calls, fsync=fsync, number=number):
            calls.append(handle)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            with pytest.raises(UserError, match=r"cannot write .*No space left"):
                save_model(tiny_model, folder)
        check()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*File too large"):
            save_model(tiny_model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check()


def load_sharded(world, folder: Path, activation_checkpointing: bool) -> dict[str, tuple]:
    """On each rank: name -> (rows asked of the file, the local part, rows of the whole)."""
    model = parallelize(
        meta_model(read_config(folder)), world, compute_dtype=torch.float32,
        activation_checkpointing=activation_checkpointing, compile=False,
    )  # fmt: skip
    materialise(model, "cpu")
    asked, whole = {}, pretrained.open_tensors

    class Spy:
        def __init__(self, name, inner):
            self.name, self.get_shape, self.get_dtype, self.inner = (
                name, inner.get_shape, inner.get_dtype, inner,
            )  # fmt: skip

        def __getitem__(self, rows):
            asked[self.name] = (rows.start, rows.stop)
            return self.inner[rows]

    def spied(folder):
        with whole(folder) as tensors:
            yield {name: Spy(name, inner) for name, inner in tensors.items()}

    pretrained.open_tensors = pretrained.contextlib.contextmanager(spied)
    try:
        load_weights(model, folder)
    finally:
        pretrained.open_tensors = whole
    parts = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    assert all(isinstance(part, DTensor) for part in parts.values())
    return {n: (asked.get(n), part.to_local().detach().numpy(), part.shape[0]) for n, part in parts.items()}


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_each_rank_reads_its_rows_alone(folder, two_ranks, activation_checkpointing):
    expected, ranks = tensors_of(folder), two_ranks(load_sharded, folder, activation_checkpointing)
    assert all(set(parts) == set(expected) for parts in ranks)
    for name, tensor in expected.items():
        start = 0
        for parts in ranks:
            rows, local, total = parts[name]
            assert rows == (start, start + len(local)) and total == len(tensor) and len(local) < total
            assert torch.equal(torch.from_numpy(local), tensor[start : start + len(local)]), name
            start += len(local)
        assert start == len(tensor)


def save_sharded(world, source: Path, target: Path) -> None:
    model = meta_model(read_config(source))
    parallelize(model, world, compute_dtype=torch.float32, activation_checkpointing=True, compile=False)
    materialise(model, "cpu")
    load_weights(model, source)
    save_model(model, target)


def test_a_sharded_model_saves_what_it_loaded(folder, two_ranks, tmp_path):
    two_ranks(save_sharded, folder, tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.peers
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
def test_transformers_reads_what_we_write(tiny_model, tmp_path, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    save_model(tiny_model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    found = dict(theirs.named_parameters())
    assert set(found) == names_of(tiny_model)
    for name, parameter in tiny_model.named_parameters():
        assert bits(parameter) == bits(found[name]), name
    tokens = torch.arange(20)
    logits, expected = tiny_model.logits(tokens, AttentionLayout.packed([20])), theirs(tokens[None]).logits[0]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.peers
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_read_what_transformers_writes(tiny_model, tmp_path, max_shard_size, dtype):
    transformers = pytest.importorskip("transformers")
    kind = tiny_model.config.model_type.capitalize()
    config = getattr(transformers, f"{kind}Config")(**tiny_model.config.to_dict())
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    ours = Mistral.from_pretrained(tmp_path / "theirs", dtype=dtype)
    assert ours.config == tiny_model.config
    found = dict(theirs.named_parameters())
    assert set(found) == names_of(ours)
    for name, parameter in ours.named_parameters():
        assert bits(parameter) == bits(found[name]), name
