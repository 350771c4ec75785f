"""The objective of a preference run: each loss by its fields, what it refuses, what it takes for a start."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from phoenix.data.pairs import PairLoader
from phoenix.data.store import FORMAT_VERSION, MANIFEST, StoreWriter, TokenStore
from phoenix.files import UserError, write_json
from phoenix.losses import LOSS_TYPES, kto_loss, orpo_loss, sequence_logps, simpo_loss
from phoenix.model.layout import AttentionLayout
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.train.distributed import World
from phoenix.train.preference import LossConfig, Objective
from phoenix.train.reference import ReferenceCache

VOCAB = 40
SIZES = [(5, 6, 3), (1, 1, 4), (7, 2, 2), (3, 8, 1), (4, 3, 5)]  # of prompt, chosen, rejected


@pytest.fixture
def store(tmp_path) -> TokenStore:
    random, folder = np.random.default_rng(3), tmp_path / "store"
    folder.mkdir()
    writer = StoreWriter(folder, "train", VOCAB, 60)
    for line, sizes in enumerate(SIZES, 1):
        parts = [(random.integers(0, VOCAB, n), np.full(n, place > 0)) for place, n in enumerate(sizes)]
        writer.add(parts, (0, line))
    manifest = {"format_version": FORMAT_VERSION, "kind": "pairs", "chat_template": "chatml"}
    manifest |= {"inputs": [{"path": "rows.jsonl"}], "splits": {"train": writer.close()}}
    write_json(folder / MANIFEST, manifest)
    return TokenStore.open(folder, kind="pairs")


def make_model(folder: Path, seed: int) -> Mistral:
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, sliding_window=6, initializer_range=0.3,
    )  # fmt: skip
    model = Mistral(config).init_weights(torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    return model


def naive_logps(model: Mistral, store: TokenStore, prompt: int, answers: int, **options) -> torch.Tensor:
    """[2]: the prompt of one pair with the chosen and the rejected answer of another (or its own), padded."""
    start = torch.from_numpy(store.document(3 * prompt)[0].astype(np.int64))
    both = [torch.from_numpy(store.document(3 * answers + part)[0].astype(np.int64)) for part in (1, 2)]
    size = len(start) + max(map(len, both))
    tokens, labels = torch.zeros(2, size, dtype=torch.int64), torch.full((2, size), -100)
    for row, answer in enumerate(both):
        end = len(start) + len(answer)
        tokens[row, :end] = torch.cat([start, answer])
        labels[row, len(start) : end] = answer
    logits = model.logits(tokens.flatten(), AttentionLayout.packed([size, size])).view(2, size, -1)
    return sequence_logps(logits, labels, **options)


def run(tmp_path: Path, store: TokenStore, micro_batch_tokens: int = 64, **fields) -> tuple:
    """Loss a pair, gradients and metrics' sums of a policy against the reference, through the objective."""
    reference, policy = make_model(tmp_path / "reference", 1), make_model(tmp_path / "policy", 2)
    config = LossConfig(**fields)
    config.check()
    loader = PairLoader(
        store, seed=0, global_batch_size=99, micro_batch_tokens=micro_batch_tokens, ld_alpha=config.ld_alpha
    )
    objective = Objective(config, loader)
    cache = ReferenceCache(tmp_path / "cache", tmp_path / "reference", torch.float32, World())
    objective.ask_reference(cache, reference, 1)
    whole, total = objective.first_pass(policy, 0, World()), 0.0
    for _, micro in loader.global_batch(0).share(0, 1):
        loss, _ = objective.loss(micro, policy(micro.batch, stats=True), whole)
        loss.backward()
        total += loss.item()
    return total / len(SIZES), [parameter.grad for parameter in policy.parameters()], reference, policy


def assert_close(found: float, gradients: list, expected: torch.Tensor, policy: Mistral) -> None:
    assert found == pytest.approx(expected.item(), rel=1e-5)
    wanted = torch.autograd.grad(expected * len(SIZES), list(policy.parameters()))
    for gradient, one in zip(gradients, wanted):
        torch.testing.assert_close(gradient, one, rtol=0, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("micro_batch_tokens", [20, 64])
def test_kto_estimates_its_kl_on_answers_to_other_prompts(tmp_path, store, micro_batch_tokens):
    """Against all rows alone: both answers are examples, and z0 is that of the next pair's answers."""
    fields = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    found, gradients, reference, policy = run(
        tmp_path, store, micro_batch_tokens, loss_type=("kto",), **fields
    )
    number = len(SIZES)
    logps = torch.stack([naive_logps(policy, store, pair, pair) for pair in range(number)])
    with torch.no_grad():
        kept = torch.stack([naive_logps(reference, store, pair, pair) for pair in range(number)])
        kl = torch.stack([
            naive_logps(policy, store, pair, (pair + 1) % number)
            - naive_logps(reference, store, pair, (pair + 1) % number)
            for pair in range(number)
        ])  # fmt: skip
    desirable = torch.tensor([True, False]).expand(number, 2)
    expected, _ = kto_loss(logps.flatten(), kept.flatten(), desirable.flatten(), kl=kl.flatten(), **fields)
    assert kl.mean() > 0, "or the clamp would hide the estimate"
    assert_close(found, gradients, expected.mean(), policy)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_of_means_need_no_reference(tmp_path, store, name):
    found, gradients, _, policy = run(tmp_path, store, loss_type=(name,), beta=0.5, simpo_gamma=0.3)
    means = torch.stack([naive_logps(policy, store, pair, pair, average=True) for pair in range(len(SIZES))])
    loss = orpo_loss(*means.T, beta=0.5) if name == "orpo" else simpo_loss(*means.T, beta=0.5, gamma=0.3)
    assert_close(found, gradients, loss[0].mean(), policy)
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "nobody asked for a reference"


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_ld_dpo_is_that_of_padded_rows(tmp_path, store, ld_alpha):
    found, gradients, reference, policy = run(tmp_path, store, 20, ld_alpha=ld_alpha)
    values = [
        torch.stack([naive_logps(m, store, pair, pair, ld_alpha=ld_alpha) for pair in range(len(SIZES))])
        for m in (policy, reference)
    ]
    ratios = values[0] - values[1].detach()
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    assert_close(found, gradients, expected, policy)


def test_ld_dpo_has_log_probs_of_its_own_in_the_cache(store):
    sizes = {"seed": 0, "global_batch_size": 9, "micro_batch_tokens": 64}
    plain, half, other = (PairLoader(store, **sizes, ld_alpha=alpha).digests for alpha in (None, 0.5, 0.25))
    assert not {d for pair in plain for d in pair} & {d for pair in half for d in pair}
    assert half[0][0] != other[0][0], "the chosen answer is the longer one"


def test_mean_logits_are_those_of_the_answers(tmp_path, store):
    policy = make_model(tmp_path / "policy", 2)
    loader = PairLoader(store, seed=0, global_batch_size=99, micro_batch_tokens=99)
    micro = loader.packed_batch(np.array([0]))
    chosen, rejected = micro.sums(policy(micro.batch, stats=True).mean_logits)
    for part, found in ((1, chosen), (2, rejected)):
        prompt, answer = store.document(0)[0], store.document(part)[0]
        ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
        logits = policy.logits(ids, AttentionLayout.packed([len(ids)]))
        asked = logits[len(prompt) - 1 : len(ids) - 1].mean(-1).sum()
        assert found.item() == pytest.approx(asked.item(), abs=1e-5)


CACHE = SimpleNamespace(dtype=torch.bfloat16, folder="cache")
ASKED = [name for name in LOSS_TYPES if name != "sft"]


def first_step(config: LossConfig, policy: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    lengths = torch.full((2, policy.shape[1]), 200)
    losses, chosen, rejected = config.losses(*policy, *reference, lengths=tuple(lengths))
    values = {"loss": losses.mean(), "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    sizes = {"chosen_length": 200.0, "rejected_length": 200.0}
    return {**{name: value.item() for name, value in values.items()}, **sizes}


@pytest.mark.parametrize("name", ASKED)
def test_noise_of_two_computations_is_no_other_reference(name):
    """Sums of log-probs that differ as bf16 differs pass for every loss, also for those with a steep start;
    another model's do not."""
    config, generator = LossConfig(loss_type=(name,)), torch.Generator().manual_seed(0)
    objective = Objective.__new__(Objective)
    objective.config = config
    reference = torch.full((2, 8), -300.0)
    noise = 0.3 * torch.randn(2, 8, generator=generator)
    objective.check_first_loss(first_step(config, reference + noise, reference), CACHE)
    with pytest.raises(
        UserError, match=r"the loss of the first step is .*; remove cache to compute it again"
    ):
        objective.check_first_loss(
            first_step(config, reference + torch.tensor([[20.0], [-10.0]]), reference), CACHE
        )


def test_a_first_loss_that_is_not_finite_is_not_the_caches_fault():
    objective = Objective.__new__(Objective)
    objective.config = LossConfig()
    nothing = {"loss": math.nan, "rewards/chosen": math.nan, "rewards/rejected": math.nan}
    objective.check_first_loss({**nothing, "chosen_length": 9.0, "rejected_length": 9.0}, CACHE)


BAD = {
    "twice": ({"loss_type": ("sigmoid", "sigmoid")}, "expected different names"),
    "none": ({"loss_type": ()}, "at least one"),
    "mixed": ({"loss_type": ("kto", "sft")}, "kto is not mixed"),
    "weighted": ({"loss_type": ("simpo",), "loss_weights": (0.5,)}, "simpo is not mixed .* has no weight"),
    "weights": ({"loss_weights": (1.0, 2.0)}, "2 loss_weights for 1 of loss_type"),
    "unknown": ({"loss_type": ("sigmiod",)}, "did you mean 'sigmoid'"),
    "smoothing": ({"label_smoothing": 0.5}, "label_smoothing must be a number from 0 to less than 0.5"),
    "divergence": ({"loss_type": ("aot",), "f_divergence_type": "js_divergence"}, "not defined for aot"),
    "means": ({"loss_type": ("ipo",), "ld_alpha": 0.5}, "ld_alpha weighs sums .* ipo takes means"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_without_a_meaning_are_refused(name):
    fields, sentence = BAD[name]
    with pytest.raises(UserError, match=sentence):
        LossConfig(**fields).check()


def test_one_loss_keeps_its_weight():
    logps, lengths = torch.tensor([[-3.0], [-4.0], [-5.0], [-6.0]]), (torch.ones(1), torch.ones(1))
    whole, half = (LossConfig(loss_weights=weights) for weights in ((), (0.5,)))
    assert half.losses(*logps, lengths=lengths)[0] == 0.5 * whole.losses(*logps, lengths=lengths)[0]


def test_every_field_is_part_of_what_a_checkpoint_shares():
    assert set(LossConfig().settings) == {field.name for field in dataclasses.fields(LossConfig)}
    assert LossConfig().settings["loss_type"] == ["sigmoid"], "as JSON gives it back"


@pytest.mark.parametrize("global_batch_size", [2, 3, 99])
def test_the_trial_of_the_memory_is_as_large_as_any_micro_batch(store, global_batch_size):
    for room in range(15, 60):
        loader = PairLoader(store, seed=0, global_batch_size=global_batch_size, micro_batch_tokens=room)
        trial = loader.largest_micro_batch().layout.num_tokens
        largest = max(
            loader.plan.row_tokens[rows].sum()
            for step in range(40 * loader.steps_per_epoch)
            for rows in loader.global_batch(step).micro_batches
        )
        assert trial >= largest - loader.plan.row_tokens.min() and trial <= room
