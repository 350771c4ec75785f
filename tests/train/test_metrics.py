"""What a run writes down is what happened: sums give means, FLOP are counted, each line is whole."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from phoenix.files import UserError, read_json_lines
from phoenix.model.layout import IGNORE_INDEX, AttentionLayout, PackedBatch
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.train import metrics

TINY = MistralConfig(
    vocab_size=61, hidden_size=16, intermediate_size=23, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, initializer_range=0.1,
)  # fmt: skip


def naive_flops(config: MistralConfig, lengths: list[int]) -> int:
    """A loop over rows and keys.  m x k times k x n is 2 m k n, its backward pass twice that."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width, narrow = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    total = 0
    for length in lengths:
        for row in range(length):
            for _ in range(config.num_hidden_layers):
                total += 2 * d * (width + 2 * narrow) + 2 * width * d + 3 * 2 * d * f
                for key in range(row + 1):
                    if config.sliding_window is None or row - key < config.sliding_window:
                        total += heads * (
                            2 * config.head_dim + 2 * config.head_dim
                        )  # scores, and their values
            total += 2 * d * config.vocab_size
    return 3 * total


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 7], [5, 3], [4], [12]])
def test_flops_equal_a_count_by_loops(window, lengths):
    config = replace(TINY, sliding_window=window)
    assert metrics.training_flops(config, torch.tensor(lengths)) == naive_flops(config, lengths)


def test_matrix_flops_are_those_of_a_real_step():
    """torch's own counter, without attention, which it does not see inside of an operator of ours."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Mistral(TINY).init_weights()
    tokens = torch.randint(TINY.vocab_size, (7,))
    with FlopCounterMode(display=False) as counter:
        # Every row has a label here: rows without one cost less in the head than training_flops counts.
        model(PackedBatch(tokens, tokens, AttentionLayout.packed([7]))).sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    matrices = sum(count for name, count in by_operator.items() if "mm" in str(name))
    assert matrices == 6 * TINY.num_parameters()[1] * 7


def test_parameters_in_products_are_all_but_embedding_and_norms():
    for tied in (False, True):
        config = replace(TINY, tie_word_embeddings=tied)
        named = dict(Mistral(config, device="meta").named_parameters())
        in_products = sum(p.numel() for name, p in named.items() if "_proj" in name) + 61 * 16
        assert config.num_parameters() == (sum(p.numel() for p in named.values()), in_products)


def test_sums_over_micro_batches_and_ranks_are_the_plain_mean():
    model = Mistral(TINY).init_weights(torch.Generator().manual_seed(0))
    generator, sums, losses, entropies, hits = (
        torch.Generator().manual_seed(1),
        torch.zeros(3).double(),
        [],
        [],
        [],
    )
    for lengths in ([5, 3], [1], [9]):
        tokens = torch.randint(TINY.vocab_size, (sum(lengths),), generator=generator)
        labels = tokens.roll(-1)
        labels[torch.rand(len(labels), generator=generator) < 0.4] = IGNORE_INDEX
        if lengths == [1]:
            labels[:] = IGNORE_INDEX
        layout = AttentionLayout.packed(lengths)
        stats = model(PackedBatch(tokens, labels, layout), stats=True)
        sums += metrics.sft_sums(stats)
        probs = model.logits(tokens, layout).detach().double().softmax(-1)
        for row, label in enumerate(labels.tolist()):
            if label != IGNORE_INDEX:
                losses.append(-math.log(probs[row, label]))
                entropies.append(-float((probs[row] * probs[row].log()).sum()))
                hits.append(float(probs[row].argmax() == label))
    found = metrics.sft_metrics(sums, len(losses))
    plain = {name: sum(values) / len(values) for name, values in
             (("loss", losses), ("entropy", entropies), ("mean_token_accuracy", hits))}  # fmt: skip
    assert found == pytest.approx(plain, rel=1e-5)
    assert not sums.requires_grad
    assert metrics.sft_metrics(sums, 1, prefix="eval_").keys() == {f"eval_{name}" for name in plain}


def log_steps(folder, first, last, *, step):
    log = metrics.MetricsLog(folder, step=step)
    for number in range(first, last + 1):
        log.log(number, loss=torch.tensor(number / 8), time=float(number))
    log.close()


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', '{"step": 4}', "\0\0\0\0"])
def test_a_log_is_cut_back_to_the_checkpoint(tmp_path, tail):
    log_steps(tmp_path, 0, 8, step=-1)
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    log_steps(tmp_path, 4, 8, step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


def test_a_run_without_a_checkpoint_begins_its_log_anew(tmp_path):
    log_steps(tmp_path, 0, 3, step=-1)
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    log_steps(tmp_path, 0, 3, step=-1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


def test_each_line_is_json_and_there_at_once(tmp_path):
    log = metrics.MetricsLog(tmp_path, step=-1)
    row = log.log(1, loss=torch.tensor(math.nan), grad_norm=math.inf, rows=["a.jsonl, line 3"], count=2)
    expected = {"step": 1, "loss": None, "grad_norm": None, "rows": ["a.jsonl, line 3"], "count": 2}
    assert row == expected

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == expected
    log.close()


def test_a_full_disk_is_one_sentence(tmp_path):
    log = metrics.MetricsLog(tmp_path, step=-1)
    log.file.close()
    log.file = open("/dev/full", "w")  # noqa: SIM115, every write to it finds the disk full
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left"):
        log.log(1, loss=1.0)


def test_other_ranks_write_nothing(tmp_path):
    log = metrics.MetricsLog(tmp_path, step=-1, write=False)
    assert log.log(1, loss=1.0) == {"step": 1, "loss": 1.0}
    log.close()
    metrics.write_samples(tmp_path / "samples.jsonl", 1, [{"step": 1}], write=False)
    assert list(tmp_path.iterdir()) == []


def test_samples_of_a_step_stand_once(tmp_path):
    path = tmp_path / "samples.jsonl"
    for step in (0, 2, 4, 2, 4):  # stopped behind 4, gone on from a checkpoint of 1
        metrics.write_samples(
            path, step, [{"step": step, "reply": "Grüße"}, {"step": step, "reply": "\u2028"}]
        )
    assert [row["step"] for row in read_json_lines(path)] == [0, 0, 2, 2, 4, 4]
    assert "Grüße" in path.read_text(encoding="utf-8")


def test_trackers_are_known_by_name():
    metrics.check_trackers(["tensorboard", "wandb"])
    with pytest.raises(UserError, match="report_to holds 'wandbb'; expected some of tensorboard, wandb"):
        metrics.check_trackers(["wandb", "wandbb"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=r"phoenix-lm\[tracking\]"):
        metrics.MetricsLog(tmp_path, step=-1, report_to=[name])


@pytest.mark.parametrize(
    "recent, loss, spikes",
    [([], 99.0, False), ([1.0] * 4, 99.0, False), ([1.0] * 5, 10.0, True), ([1.0] * 5, 9.99, False),
     ([1.0, 1.0, 1.0, 50.0, 50.0], 11.0, True), ([1.0] * 5, math.nan, False)],
)  # fmt: skip
def test_a_spike_is_ten_times_the_median_of_at_least_five_steps(recent, loss, spikes):
    assert metrics.is_spike(recent, loss) is spikes


def test_memory_grows_with_what_is_held():
    def estimate(shards=1, optim="adamw", tokens=1000, checkpointing=False, dtype=torch.float32) -> float:
        options = {"activation_checkpointing": checkpointing, "logits_memory": 2.0**30}
        return metrics.training_memory(TINY, dtype, shards, optim, micro_batch_tokens=tokens, **options)

    weights = 4 * TINY.num_parameters()[0]
    assert estimate(2) - estimate(4) == pytest.approx(weights)  # weights, gradients, two moments, halved
    assert estimate() - estimate(optim="rmsprop") == pytest.approx(weights)
    assert estimate(tokens=2000) > estimate() > estimate(checkpointing=True) > 4 * weights
    assert estimate(dtype=torch.bfloat16) < estimate()


@pytest.mark.parametrize("lengths", [[64], [5, 1, 90]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(lengths, dtype):
    """Unique storages between forward and backward, in two models that differ by one block."""

    def kept(layers: int) -> int:
        model = Mistral(replace(TINY, num_hidden_layers=layers), dtype=dtype).init_weights()
        tokens = torch.arange(sum(lengths)) % TINY.vocab_size
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(PackedBatch(tokens, tokens, AttentionLayout.packed(lengths)))
        return sum(storage.nbytes() for at, storage in storages.items() if at not in parameters)

    a_block, _ = metrics.activation_bytes(TINY, dtype)
    in_layout = 8 * 3 * len(lengths)  # lengths and key ranges, which are not a token's
    assert abs(kept(3) - kept(2) - sum(lengths) * a_block) <= in_layout


def test_the_bar_shows_a_step_without_a_loss(capsys):
    bar = metrics.progress_bar(3, 1, show=True)
    row = {"loss": None, "learning_rate": 1e-3, "tokens_per_second": 12.0, "mfu": 0.1}
    metrics.update_bar(bar, row)
    assert "loss nan, lr 1.00e-03" in str(bar) and bar.n == 2
    bar.close()


def test_a_product_is_measured():
    assert 0 < metrics.measure_gemm(torch.device("cpu"), torch.float32, size=64, repeats=1) < math.inf
    assert metrics.peak_memory_gib(torch.device("cpu")) > 0
