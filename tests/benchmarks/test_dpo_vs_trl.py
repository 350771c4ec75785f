"""The comparison with TRL: its pairs, its whole sequences and its arithmetic, none of which needs TRL."""

import math
import sys

import numpy as np
import pytest
import torch

from phoenix.data.pairs import PairLoader
from phoenix.data.store import TokenStore
from phoenix.model.mistral import Mistral


@pytest.fixture
def bench(load_script):
    return load_script("dpo_vs_trl")


def test_pairs_have_the_stated_lengths(bench):
    pairs = bench.make_pairs(8, bench.LENGTHS, 1000)
    lengths = np.array([[len(part) for part in pair] for pair in pairs])
    assert lengths.shape == (8, 3)
    assert np.abs(lengths.mean(0) - bench.LENGTHS).max() < 1
    assert (lengths.max(0) > 2 * lengths.min(0)).all()
    tokens = np.concatenate([part for pair in pairs for part in pair])
    assert tokens.min() >= 3 and tokens.max() < 1000
    again = bench.make_pairs(8, bench.LENGTHS, 1000)
    assert all(np.array_equal(a, b) for pair, same in zip(pairs, again) for a, b in zip(pair, same))


def test_whole_sequences_have_the_log_probs_of_a_shared_prompt(bench, tmp_path):
    bench.write_store(tmp_path / "store", bench.make_pairs(6, (9, 6, 5), 256), 256)
    store = TokenStore.open(tmp_path / "store", kind="pairs")
    options = {"seed": 0, "global_batch_size": 6, "micro_batch_tokens": 80}
    shared, plain = PairLoader(store, **options), bench.PlainLoader(store, **options)
    model = Mistral(bench.TINY_MODEL, dtype=torch.float64).init_weights(torch.Generator().manual_seed(0))
    found = []
    for loader in (shared, plain):
        values = {}
        for rows in loader.cut(np.arange(6)):
            micro = loader.packed_batch(rows)
            assert micro.batch.tokens.numel() == loader.plan.row_tokens[rows].sum() <= 80
            with torch.no_grad():
                chosen, rejected = micro.logps(model(micro.batch))
            values |= {row: [*pair, *sizes] for row, *pair, sizes in
                       zip(rows, chosen.tolist(), rejected.tolist(), micro.lengths.tolist())}  # fmt: skip
        found.append(np.array([values[row] for row in range(6)]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    parts = np.array([[len(part) for part in pair] for pair in bench.make_pairs(6, (9, 6, 5), 256)])
    assert plain.plan.row_tokens.sum() == parts.sum() + parts[:, 0].sum()


def test_bf16_tries_both_ways_at_the_fastest_sizes_of_fp32(bench):
    speeds = {1: 3.0, 2: 5.0, 4: 4.0}
    found = {
        name: {"setting": setting, "pairs_per_second": speeds[setting["per_device_train_batch_size"]]}
        for name, setting in bench.settings("fp32", speeds).items()
    }
    found["8"] = {"setting": {"per_device_train_batch_size": 8}, "failed": "no"}
    assert bench.fastest_sizes(found, 2) == [2, 4]
    assert bench.settings("bf16", [2, 4]) == {
        f"{name}, {size} at once": {"per_device_train_batch_size": size, **given}
        for size in (2, 4)
        for name, given in (
            ("autocast", {}),
            ("bf16 weights", {"dtype": "bfloat16", "bf16": False}),
        )
    }


def turns(*seconds):
    """A side's (reference, step) in each repeat, of 8 pairs."""
    repeats = [tuple({"pairs": 8, "seconds": s, "peak_memory_gib": 2.0} for s in pair) for pair in seconds]
    return {"first": {"loss": 0.7}, "repeats": repeats}


def test_ratios_are_of_the_same_repeat(bench):
    sides = bench.summarise({"ours": turns((1, 2), (2, 4), (1, 8)), "theirs": turns((2, 8), (2, 8), (3, 8))})
    ours = sides["ours"]
    assert ours["training"]["repeats"] == [4.0, 2.0, 1.0] and ours["training"]["pairs_per_second"] == 2.0
    assert ours["training"]["spread"] == 1.5 and ours["reference"]["repeats"] == [8.0, 4.0, 8.0]
    assert bench.compare(ours, {**sides["theirs"], "peak_memory_gib": 4.0}) == {
        "training": {"median": 2.0, "min": 1.0, "max": 4.0},
        "reference": {"median": 2.0, "min": 1.0, "max": 3.0},
        "memory": 0.5,
    }


def test_checks_hold_the_first_losses_and_the_log_probs(bench):
    assert bench.largest_difference([[-1.0, -4.0]], [[-1.0, -5.0]]) == pytest.approx(0.2)

    def group(loss, difference):
        return {"sides": {"trl": {"first_loss": loss}}, "logps_relative_difference": difference}

    assert set(bench.check(group(math.log(2), 1e-6)).values()) == {True}
    assert not bench.check(group(0.7, 0.0))["first_losses_are_ln_2"]
    assert not bench.check(group(math.log(2), 1e-3))["logps_equal"]
    assert set(bench.check({}).values()) == {False}, "nothing was measured"


def test_without_trl_one_sentence_says_what_to_do(bench, monkeypatch, capsys):
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", [bench.__file__, "--quick"])
    assert bench.main() == 2
    assert ".venv-peers" in capsys.readouterr().err
