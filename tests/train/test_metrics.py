"""What a run writes down is what happened: sums give means, FLOP are counted, each line is whole."""

import json
import math
import sys
import types
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
    itself = metrics.training_flops(config, torch.tensor(lengths), torch.tensor(lengths))
    assert itself == naive_flops(config, lengths)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("prefix, answers", [(1, [1]), (5, [3]), (5, [1, 3]), (2, [4, 1, 9]), (12, [2, 2])])
def test_flops_of_a_shared_prefix_count_its_keys(window, prefix, answers):
    """The keys of a layout, row by row: the rejected answer attends to the prompt too."""
    config = replace(TINY, sliding_window=window)
    layout = AttentionLayout.shared_prefix(prefix, answers)
    found = metrics.training_flops(config, layout.q_length, layout.k_length.sum(1))
    seen = 0
    for queries, keys in zip(layout.q_length.tolist(), layout.k_length.sum(1).tolist()):
        for row in range(queries):
            last = keys - queries + row
            seen += sum(window is None or last - key < window for key in range(last + 1))
    alone = replace(config, sliding_window=1)  # one key a query: the products, and that one
    width = config.num_attention_heads * config.head_dim
    one_key = 3 * 4 * width * config.num_hidden_layers
    assert found == naive_flops(alone, [1] * layout.num_tokens) + one_key * (seen - layout.num_tokens)


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


def test_sums_of_pairs_over_micro_batches_are_the_plain_mean():
    """A loop over pairs, one number a line; a reward or log-prob that is equal is neither above nor below."""
    generator = torch.Generator().manual_seed(2)
    sums, pairs = metrics.dpo_zeros(torch.device("cpu")), []
    for number in (3, 1, 0, 4):
        losses, chosen, rejected, chosen_logps, rejected_logps, reference = torch.randn(
            6, number, generator=generator, requires_grad=True
        ).unbind()
        lengths = torch.randint(1, 9, (2, number), generator=generator)
        logits = torch.randn(2, number, generator=generator)
        rejected = torch.cat([chosen[:1], rejected[1:]])
        reference = torch.cat([reference[:-1], chosen_logps[-1:]])
        columns = (losses, chosen, rejected, chosen_logps, rejected_logps, reference, *lengths, *logits)
        logps = chosen_logps, rejected_logps
        sums += metrics.dpo_sums(losses, (chosen, rejected), logps, reference, lengths, logits)
        pairs += [[column[pair].item() for column in columns] for pair in range(number)]
    count = len(pairs)
    plain = dict.fromkeys(("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies"), 0.0)
    plain |= dict.fromkeys(("rewards/margins", "logps/chosen", "logps/rejected", "chosen_fall"), 0.0)
    plain |= {"chosen_length": 0.0, "rejected_length": 0.0}
    for loss, chosen, rejected, chosen_logps, rejected_logps, reference, longer, other, *_ in pairs:
        plain["loss"] += loss / count
        plain["rewards/chosen"] += chosen / count
        plain["rewards/rejected"] += rejected / count
        plain["rewards/accuracies"] += (1 if chosen > rejected else 0) / count
        plain["rewards/margins"] += (chosen - rejected) / count
        plain["logps/chosen"] += chosen_logps / count
        plain["logps/rejected"] += rejected_logps / count
        plain["chosen_fall"] += (1 if chosen_logps < reference else 0) / count
        plain["chosen_length"] += longer / count
        plain["rejected_length"] += other / count
    plain["nll_loss"] = -sum(pair[3] for pair in pairs) / sum(pair[6] for pair in pairs)
    plain["logits/chosen"] = sum(pair[8] for pair in pairs) / sum(pair[6] for pair in pairs)
    plain["logits/rejected"] = sum(pair[9] for pair in pairs) / sum(pair[7] for pair in pairs)
    assert metrics.dpo_metrics(sums, count) == pytest.approx(plain, rel=1e-6)
    assert sums.dtype == torch.float64 and not sums.requires_grad
    one, nothing = torch.ones(1), torch.full((1,), torch.nan)
    unknown = metrics.dpo_sums(one, (one, one), (one, one), nothing, (one, one), (one, one))
    assert math.isnan(metrics.dpo_metrics(unknown, 1)["chosen_fall"]), "there is no reference"
    assert metrics.dpo_metrics(sums, 1, prefix="eval_").keys() == {f"eval_{name}" for name in plain}


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


def test_trackers_are_known_by_name(monkeypatch):
    for name in metrics.TRACKERS:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # as if it were installed
    metrics.check_trackers(["tensorboard", "wandb"])
    with pytest.raises(UserError, match="report_to holds 'wandbb'; expected some of tensorboard, wandb"):
        metrics.check_trackers(["wandb", "wandbb"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=r"phoenix-lm\[tracking\]"):
        metrics.MetricsLog(tmp_path, step=-1, report_to=[name])
    with pytest.raises(UserError, match=rf"'{name}' is not usable here .*phoenix-lm\[tracking\]"):
        metrics.check_trackers([name])


def test_a_run_that_goes_on_has_one_id_in_wandb(tmp_path, monkeypatch):
    begun = []

    class Run:
        log = staticmethod(lambda row, step: None)

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: begun.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder, step in (("one", -1), ("one", 3), ("two", -1)):
        (tmp_path / folder).mkdir(exist_ok=True)
        log = metrics.MetricsLog(tmp_path / folder, step=step, report_to=["wandb"])
        log.log(step + 1, loss=1.0)
        log.close()
    first, again, other = (options["id"] for options in begun)
    assert first == again != other
    assert all(options["resume"] == "allow" and options["id"].isalnum() for options in begun)


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
    metrics.update_bar(bar, {**row, "loss": 0.0})
    assert "loss 0.0000, lr" in str(bar)
    metrics.update_bar(bar, {**row, "loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75})
    assert "loss 0.5000, margins 0.2500, accuracies 0.7500, lr" in str(bar)
    bar.close()


def test_a_product_is_measured():
    assert 0 < metrics.measure_gemm(torch.device("cpu"), torch.float32, size=64, repeats=1) < math.inf
    assert metrics.peak_memory_gib(torch.device("cpu")) > 0
