"""The page on scaling is what its script gives today, and its formulas are those of a count by hand."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

from phoenix.model.mistral import MistralConfig  # noqa: E402
from phoenix.model.pretrained import meta_model  # noqa: E402

MISTRAL, LLAMA = scaling.MISTRAL_7B, scaling.LLAMA_70B


def naive_flops_a_token(config: MistralConfig, lengths: list[int]) -> float:
    """2 m k n a product, thrice with its backward pass; attention counts the keys that each query sees."""
    d, f = config.hidden_size, config.intermediate_size
    heads, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    a_layer = 2 * d * heads + 2 * 2 * d * narrow + 2 * heads * d + 3 * 2 * d * f
    flops = 0
    for length in lengths:
        keys = sum(min(row + 1, config.sliding_window or length) for row in range(length))
        flops += length * (config.num_hidden_layers * a_layer + 2 * d * config.vocab_size)
        flops += config.num_hidden_layers * keys * (2 * heads + 2 * heads)  # scores, and their values
    return 3 * flops / sum(lengths)


def test_the_page_is_what_the_script_gives_today():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert page == scaling.page(scaling.read_results()), "run python benchmarks/scaling.py"


def test_a_profile_of_a_step_gives_rows():
    results = {**scaling.read_results(), "step_profile": {"bf16": {"matmul_share": 0.5}, "date": "today"}}
    rows = [line for line in scaling.page(results).splitlines() if "step_profile.json" in line]
    assert len(rows) == 4 and all(" 39.5% " in row for row in rows)  # 79 % of 50 %, two GPUs, two models


@pytest.mark.parametrize("model", [MISTRAL, LLAMA], ids=["7B", "70B"])
def test_parameters_are_those_of_the_model(model):
    parameters = dict(meta_model(model).named_parameters())
    count = sum(parameter.numel() for parameter in parameters.values())
    assert model.num_parameters()[0] == count
    block = sum(p.numel() for name, p in parameters.items() if name.startswith("model.layers.0."))
    training = scaling.Training("", model, gpus=8, shards=8, micro_batch_tokens=2048)
    memory = scaling.memory(training)
    assert memory["state"] == count * (4 + 4 + 4 + 4) / 8
    # two gathered groups and a gradient of 2 bytes, a gradient of 4
    assert memory["weights"] == (2 + 2 + 2 + 4) * max(block, parameters["lm_head.weight"].numel())
    assert scaling.checkpoint(training, scaling.MACHINES[0], 1e9)["bytes"] == 12 * count


def test_known_figures():
    assert MISTRAL.num_parameters()[0] == pytest.approx(7.242e9, rel=1e-4)
    state = scaling.memory(scaling.PAPER)["state"]
    assert 8 * state == pytest.approx(116e9, rel=3e-3) and state == pytest.approx(14.5e9, rel=3e-3)
    assert LLAMA.num_parameters()[0] == pytest.approx(69e9, rel=1e-3)  # "70B"
    without = dataclasses.replace(MISTRAL, sliding_window=None)
    for length, gflops in ((512, 43.1), (2048, 44.3), (8192, 49.1)):
        assert scaling.flops_a_token(without, [length]) / 1e9 == pytest.approx(gflops, abs=0.06)


@pytest.mark.parametrize("lengths", [[1], [2048], [4096], [5000], [512, 3, 9000, 1]])
@pytest.mark.parametrize("model", [MISTRAL, LLAMA], ids=["7B", "70B"])
def test_flops_are_those_of_a_loop_over_documents(model, lengths):
    assert scaling.flops_a_token(model, lengths) == pytest.approx(naive_flops_a_token(model, lengths))


def test_time_follows_from_flops():
    """Mistral-7B, 8 H100 at 50 %: 45 minutes; 8 A100: 141 minutes, by hand from 44.3 GFLOP a token."""
    for machine, minutes in zip(scaling.MACHINES, (141, 45)):
        seconds = 228 * scaling.step_seconds(scaling.PAPER, machine, 0.5)
        assert seconds == pytest.approx(228 * 512 * 2048 * 44.3e9 / (8 * 0.5 * machine.flops), rel=2e-3)
        assert seconds / 60 == pytest.approx(minutes, rel=0.01)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_traffic_is_what_rings_send(shards):
    """A ring passes every other part on once to gather and once to reduce; an all-reduce is both."""
    training = scaling.Training("", MISTRAL, gpus=8, shards=shards, micro_batch_tokens=2048)
    parameters, copies = MISTRAL.num_parameters()[0], 8 // shards
    gather = sum(2 * parameters / shards for _ in range(shards - 1))
    reduction = sum(4 * parameters / shards for _ in range(shards - 1))
    own = 4 * parameters / shards  # bytes of gradients that all copies sum
    over_copies = sum(own / copies for _ in range(copies - 1)) * 2
    found = scaling.traffic(training)
    assert found["gathers"] == pytest.approx(2 * gather)
    assert found["reduction"] == pytest.approx(reduction)
    assert found["copies"] == pytest.approx(over_copies)


def test_which_sharding_of_70b_fits():
    """1.1 TB of state over 8 GPUs, and over 16, exceed 80 GB; over 32 and 64 they fit."""
    for shards, answer in ((8, False), (16, False), (32, True), (64, True)):
        training = dataclasses.replace(scaling.LARGE, shards=shards, micro_batch_tokens=8192)
        assert scaling.fits(training) is answer
        assert training.copies * training.shards == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_formula_holds_where_it_is_measured(dtype, checkpointing):
    shape = scaling.Shape(32, 112, 3, 4, 2, tokens=1024, documents=4)
    model = scaling.build(shape.config, dtype, activation_checkpointing=checkpointing)
    kept = scaling.kept_bytes(model, shape.batch())
    expected = scaling.expected_kept(shape.config, dtype, shape.tokens, checkpointing=checkpointing)
    assert kept == pytest.approx(expected, rel=0.03)
    held = kept + 4 * shape.tokens * 1000 // (4 // dtype.itemsize)  # and the logits
    assert scaling.peak_bytes(model, shape.batch()) > held


def test_the_committed_measurement_is_near_the_formula():
    rows = scaling.read_results()["scaling"]["activations"]
    assert {(row["dtype"], row["activation_checkpointing"]) for row in rows} == {
        (dtype, on) for dtype in ("float32", "bfloat16") for on in (False, True)
    }
    for row in rows:
        shape = scaling.Shape(**row["shape"])
        formula = scaling.expected_kept(
            shape.config, getattr(torch, row["dtype"]), shape.tokens,
            checkpointing=row["activation_checkpointing"],
        )  # fmt: skip
        assert row["kept_formula"] == formula, "run python benchmarks/scaling.py --measure"
        assert row["kept_bytes"] == pytest.approx(formula, rel=0.01)
        assert 0.75 < row["peak_ratio"] < 1.1
