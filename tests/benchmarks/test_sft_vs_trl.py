"""The comparison with TRL: its rows, its choice of sides and its arithmetic, none of which needs TRL."""

import sys

import numpy as np
import pytest


@pytest.fixture
def bench(load_script):
    return load_script("sft_vs_trl")


def test_documents_have_the_stated_lengths(bench):
    documents = bench.make_documents(4000, 1000, 2048)
    lengths = np.array([len(tokens) for tokens in documents])
    assert lengths.min() >= 2 and lengths.max() == 2048
    assert abs(lengths.mean() - 350) < 15
    tokens = np.concatenate(documents)
    assert tokens.min() >= 3 and tokens.max() < 1000
    again = bench.make_documents(4000, 1000, 2048)
    assert all(np.array_equal(a, b) for a, b in zip(documents, again))


def test_short_documents_fit_short_rows(bench):
    lengths = [len(tokens) for tokens in bench.make_documents(500, 100, 16)]
    assert min(lengths) >= 2 and max(lengths) <= 16


def probed(**speeds):
    return {name: {"setting": {name: True}, "tokens_per_second": speed} for name, speed in speeds.items()}


def test_settings_that_beat_their_basis_are_joined(bench):
    basis = {bench.BASIS: {"setting": {}, "tokens_per_second": 100.0}}
    failed = {"broken": {"setting": {"broken": True}, "failed": "no"}}
    assert bench.join({**basis, **failed, **probed(default=200.0, a=110.0, b=101.0, c=104.0)}) == {
        "a": True,
        "c": True,
    }
    assert bench.join({**basis, **probed(a=110.0, b=99.0)}) is None, "one alone is known already"
    assert bench.join(probed(a=110.0, b=120.0)) is None, "nothing to compare with"
    exclusive = {
        name: {"setting": {"attention": name}, "tokens_per_second": speed}
        for name, speed in (("fast", 130.0), ("slow", 120.0))
    }
    assert bench.join({**basis, **exclusive}) == {"attention": "fast"}


def test_the_fastest_that_does_other_work_stands_beside_the_fastest_that_does_the_same(bench):
    trl = probed(default=10.0, b=12.0)
    trl["wrapped"] = {"setting": {"packing_strategy": "wrapped"}, "tokens_per_second": 15.0}
    trl["weights"] = {"setting": {"dtype": "bfloat16"}, "tokens_per_second": 14.0}
    trl["broken"] = {"setting": {}, "failed": "no"}
    chosen = bench.choose_sides({"phoenix": probed(default=30.0, compiled=29.0), "trl": trl})
    assert {side: name for side, (_, name, _) in chosen.items()} == {
        "phoenix default": "default",
        "phoenix best": "default",
        "trl default": "default",
        "trl best": "wrapped",
        "trl best of same work": "b",
    }


def turns(*repeats):
    """(tokens, seconds) of the steps of each repeat."""
    packing = {"peak_memory_gib": 2.0, "rows": 7, "fill_rate": 0.9}
    return [[{"tokens": t, "seconds": s, **packing} for t, s in steps] for steps in repeats]


def test_a_repeat_counts_all_its_tokens_over_all_its_seconds(bench):
    measured = {"trl best": turns([(100, 1.0), (300, 1.0)], [(100, 1.0), (100, 3.0)], [(400, 4.0)])}
    [side] = bench.summarise(measured, {"trl best": ("trl", "x", {"dtype": "bfloat16"})}).values()
    assert side["repeats"] == [200.0, 50.0, 100.0]
    assert side["tokens_per_second"] == 100.0 and side["spread"] == 1.5
    assert not side["same_work"] and side["peak_memory_gib"] == 2.0 and side["fill_rate"] == 0.9


def test_ratios_are_of_the_same_repeat(bench):
    def side(memory, *repeats):
        return {"repeats": list(repeats), "peak_memory_gib": memory}

    found = bench.ratios(
        {
            "phoenix default": side(2.0, 20.0, 10.0, 12.0),
            "phoenix best": side(3.0, 30.0, 10.0, 18.0),
            "trl default": side(4.0, 5.0, 5.0, 5.0),
            "trl best": side(5.0, 10.0, 2.0, 6.0),
            "trl best of same work": side(8.0, 10.0, 10.0, 1.0),
        }
    )
    assert found["phoenix_vs_trl_best"]["default"] == {"median": 2.0, "min": 2.0, "max": 5.0}
    assert found["phoenix_vs_trl_best"]["best"] == {"median": 3.0, "min": 3.0, "max": 5.0}
    assert found["phoenix_vs_trl_best_of_same_work"]["default"] == {"median": 2.0, "min": 1.0, "max": 12.0}
    assert found["phoenix_vs_trl_default"]["best"]["max"] == 6.0
    assert found["memory_vs_trl_best"] == {"default": 0.4, "best": 0.6}


def test_the_leanest_settings_come_from_the_probe(bench):
    found = {
        "phoenix": {"a": {"tokens_per_second": 1.0, "peak_memory_gib": 3.0}, "b": {"failed": "no"}},
        "trl": {
            name: {"tokens_per_second": 1.0, "peak_memory_gib": memory}
            for name, memory in zip("cd", (5.0, 4.0))
        },
    }
    lean = bench.leanest(found)
    assert (lean["phoenix"]["setting"], lean["trl"]["setting"], lean["ratio"]) == ("a", "d", 0.75)


def test_without_trl_one_sentence_says_what_to_do(bench, monkeypatch, capsys):
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", [bench.__file__, "--quick"])
    assert bench.main() == 2
    assert ".venv-peers" in capsys.readouterr().err
