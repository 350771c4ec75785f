"""Losses: each against its formula written out with `math`, the identities between them, and the far ends.

What TRL 0.28 gives for the same input stands in oracle/dpo_loss.json; oracle/ makes that file and runs TRL.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from phoenix import losses
from phoenix.losses import (
    BATCH_COUPLED,
    LOSS_TYPES,
    cpo_loss,
    cross_entropy,
    dpo_loss,
    kto_loss,
    orpo_loss,
    segment_logps,
    sequence_logps,
    simpo_loss,
)
from phoenix.model.layout import AttentionLayout

ROOT = Path(__file__).parents[1]
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "sigmoid_norm")
DIVERGENT = ("sigmoid", "robust", "exo_pair", "hinge", "ipo", "discopop")
LOG_2 = math.log(2)


def vector(*values: float, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def random_logps(n: int, seed: int = 0, dtype=torch.float64, scale: float = 20) -> list[torch.Tensor]:
    """Policy chosen, policy rejected, reference chosen, reference rejected, each [n]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (-300 + scale * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(4)
    ]


def settings(loss_type: str, n: int, dtype=torch.float64) -> dict:
    """Keywords that this loss cannot do without."""
    nll = torch.linspace(0.5, 2.5, n, dtype=dtype)
    return {"loss_type": loss_type, "chosen_nll": nll} if loss_type == "sft" else {"loss_type": loss_type}


def gradients(inputs: list[torch.Tensor], **keywords) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses, and gradients of their sum with respect to the two policy log-probs."""
    policy = [x.clone().requires_grad_() for x in inputs[:2]]
    values = dpo_loss(*policy, *inputs[2:], **keywords)[0]
    return values.detach(), list(torch.autograd.grad(values.sum(), policy))


# Formulas, for one pair: c and r log-ratios, b beta, e label smoothing


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def smoothed(m: float, e: float) -> float:
    return -(1 - e) * log_sigmoid(m) - e * log_sigmoid(-m)


def exo(m: float, e: float) -> float:
    e = e or 1e-3
    chosen = sigmoid(m) * (log_sigmoid(m) - math.log(1 - e))
    return chosen + sigmoid(-m) * (log_sigmoid(-m) - math.log(e))


def discopop(m: float, tau: float = 0.05) -> float:
    k = sigmoid(m / tau)
    return (1 - k) * -log_sigmoid(m) + k * math.exp(-m)


FORMULAS = {
    "sigmoid": lambda c, r, b, e: smoothed(b * (c - r), e),
    "sigmoid_norm": lambda c, r, b, e: smoothed(b * (c - r), e),
    "hinge": lambda c, r, b, e: max(0.0, 1 - b * (c - r)),
    "ipo": lambda c, r, b, e: (c - r - 1 / (2 * b)) ** 2,
    "robust": lambda c, r, b, e: (
        (-(1 - e) * log_sigmoid(b * (c - r)) + e * log_sigmoid(-b * (c - r))) / (1 - 2 * e)
    ),
    "exo_pair": lambda c, r, b, e: exo(b * (c - r), e),
    "nca_pair": lambda c, r, b, e: -log_sigmoid(b * c) - log_sigmoid(-b * c) / 2 - log_sigmoid(-b * r) / 2,
    "sppo_hard": lambda c, r, b, e: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda c, r, b, e: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, b, e: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "discopop": lambda c, r, b, e: discopop(b * (c - r)),
}


@pytest.mark.parametrize("loss_type", FORMULAS)
@pytest.mark.parametrize("beta", [0.1, 0.6])
@pytest.mark.parametrize("e", [0.0, 0.1, 0.45])
def test_a_loss_is_its_formula(loss_type, beta, e):
    if e and loss_type not in SMOOTHED:
        return
    pairs = random_logps(7, scale=10)
    values, chosen, rejected = dpo_loss(*pairs, beta=beta, label_smoothing=e, **settings(loss_type, 7))
    for i, (pc, pr, rc, rr) in enumerate(zip(*[x.tolist() for x in pairs])):
        assert values[i].item() == pytest.approx(FORMULAS[loss_type](pc - rc, pr - rr, beta, e), rel=1e-9)
        assert (chosen[i].item(), rejected[i].item()) == (beta * (pc - rc), beta * (pr - rr))


def test_every_loss_has_a_reference_here():
    assert set(LOSS_TYPES) == {*FORMULAS, "sft", "bco_pair", "aot", "aot_unpaired", "aot_pair"}


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_aot_sorts_the_batch(e):
    pc, pr, rc, rr = random_logps(9)
    lists = [sorted((a - b).tolist()) for a, b in ((pc, pr), (rc, rr), (pc, rc), (pr, rr))]
    paired = [smoothed(0.1 * (a - b), e) for a, b in zip(lists[0], lists[1])]
    unpaired = [smoothed(0.1 * (a - b), e) for a, b in zip(lists[2], lists[3])]
    for name, expected in ("aot", paired), ("aot_unpaired", unpaired), ("aot_pair", unpaired):
        values, *_ = dpo_loss(pc, pr, rc, rr, loss_type=name, label_smoothing=e)
        torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_bco_pair_moves_by_the_mean_reward():
    pc, pr, rc, rr = random_logps(5)
    rewards = [0.1 * x for x in [*(pc - rc).tolist(), *(pr - rr).tolist()]]
    mean = sum(rewards) / 10
    expected = [-log_sigmoid(c - mean) - log_sigmoid(mean - r) for c, r in zip(rewards[:5], rewards[5:])]
    for keywords in {}, {"reward_mean": mean}, {"reward_mean": torch.tensor(mean, dtype=torch.float64)}:
        values, *_ = dpo_loss(pc, pr, rc, rr, loss_type="bco_pair", **keywords)
        torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    at_zero, *_ = dpo_loss(pc, pr, rc, rr, loss_type="bco_pair", reward_mean=0.0)  # TRL from 0.29 on
    torch.testing.assert_close(at_zero, -logsigmoid(0.1 * (pc - rc)) - logsigmoid(-0.1 * (pr - rr)))


# Known values

# name: value, gradient of chosen, of rejected, at a margin of zero and beta 0.1, by hand from the formulas
AT_ZERO = {
    "sigmoid": (LOG_2, -0.05, 0.05),
    "sigmoid_norm": (LOG_2, -0.05, 0.05),
    "robust": (LOG_2, -0.05, 0.05),
    "aot": (LOG_2, -0.05, 0.05),
    "aot_unpaired": (LOG_2, -0.05, 0.05),
    "exo_pair": (-LOG_2 - math.log(1e-3 * 0.999) / 2, -0.025 * math.log(999), 0.025 * math.log(999)),
    "hinge": (1.0, -0.1, 0.1),
    "ipo": (25.0, -10.0, 10.0),
    "bco_pair": (2 * LOG_2, -0.05, 0.05),
    "sppo_hard": (50.0, -10.0, 10.0),
    "nca_pair": (2 * LOG_2, -0.025, 0.025),
    "apo_zero": (1.0, -0.025, 0.025),
    "apo_down": (1.0, 0.0, 0.025),
    "discopop": ((LOG_2 + 1) / 2, 0.1 * (20 * (1 - LOG_2) / 4 - 0.75), -0.1 * (20 * (1 - LOG_2) / 4 - 0.75)),
}


@pytest.mark.parametrize("loss_type", AT_ZERO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_at_zero(loss_type, dtype):
    logps = vector(-40.0, -7.5, -300.0, dtype=dtype)
    values, (chosen, rejected) = gradients([logps] * 4, loss_type=loss_type)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # gradients come back in the input's dtype
    for got, expected in zip((values, chosen, rejected), AT_ZERO[loss_type]):
        assert got.tolist() == pytest.approx([expected] * 3, rel=tolerance, abs=1e-7)


@pytest.mark.parametrize("e", [0.1, 0.4])
def test_label_smoothing_at_zero(e):
    expected = {  # value, gradient of chosen in units of that without smoothing
        "sigmoid": (LOG_2, 1 - 2 * e),
        "sigmoid_norm": (LOG_2, 1 - 2 * e),
        "aot": (LOG_2, 1 - 2 * e),
        "aot_unpaired": (LOG_2, 1 - 2 * e),
        "robust": (LOG_2, 1 / (1 - 2 * e)),
        "exo_pair": (-LOG_2 - math.log(e * (1 - e)) / 2, math.log((1 - e) / e) / math.log(999)),
    }
    assert set(expected) == set(SMOOTHED)
    for name, (value, factor) in expected.items():
        found, slopes = gradients([vector(-40.0, dtype=torch.float64)] * 4, loss_type=name, label_smoothing=e)
        slope = AT_ZERO[name][1] * factor
        assert [x.item() for x in (found, *slopes)] == pytest.approx([value, slope, -slope], rel=1e-12), name


@pytest.mark.parametrize("loss_type", AT_ZERO)
def test_gradients_at_zero_grow_with_beta_or_shrink(loss_type):
    logps = [vector(-40.0, dtype=torch.float64)] * 4
    factor = 1 / 5 if loss_type in ("ipo", "sppo_hard") else 5
    for slope, at_5 in zip(*[gradients(logps, loss_type=loss_type, beta=beta)[1] for beta in (0.1, 0.5)]):
        torch.testing.assert_close(at_5, factor * slope, rtol=1e-12, atol=0)


GOLDEN = json.loads((ROOT / "tests/oracle/dpo_loss.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_what_trl_0_28_gives(case):
    """To 1e-6.  Null is a NaN of TRL's, or a value beyond 1e30; ours is finite."""
    inputs = [torch.tensor(x) for x in GOLDEN["inputs"][case["inputs"]]]
    values, (chosen, rejected) = gradients(inputs, **case["keywords"])
    _, *rewards = dpo_loss(*inputs, **case["keywords"])
    results = {"losses": values, "chosen_grad": chosen, "rejected_grad": rejected}
    results |= dict(zip(("chosen_rewards", "rejected_rewards"), rewards))
    for name, got in results.items():
        assert got.isfinite().all()
        rounding = 1e-7 * (case["keywords"]["beta"] if "grad" in name else 1)  # of a sigmoid near 1
        for x, expected in zip(got.tolist(), case[name]):
            assert expected is None or x == pytest.approx(expected, rel=1e-6, abs=rounding), name


# Identities


def test_identities():
    pairs = random_logps(40, scale=15)
    swapped = [pairs[1], pairs[0], pairs[3], pairs[2]]

    def of(loss_type: str, e: float = 0.0, inputs=pairs, **keywords) -> torch.Tensor:
        return dpo_loss(*inputs, loss_type=loss_type, label_smoothing=e, **keywords)[0]

    f, f_swapped = of("sigmoid"), of("sigmoid", inputs=swapped)
    torch.testing.assert_close(of("robust"), f)
    for e in 0.1, 0.3:
        torch.testing.assert_close(of("sigmoid", e), (1 - e) * f + e * f_swapped)
        torch.testing.assert_close(of("robust", e), ((1 - e) * f - e * f_swapped) / (1 - 2 * e))
        torch.testing.assert_close((1 - e) * of("robust", e) + e * of("robust", e, swapped), f)
        assert (of("exo_pair", e) > 0).all()
        margin = math.log((1 - e) / e) / 0.1
        at_minimum = [vector(x, dtype=torch.float64) for x in (margin, 0, 0, 0)]
        assert of("exo_pair", e, at_minimum).item() == pytest.approx(0, abs=1e-12)
    assert ((of("apo_zero") > 0) & (of("apo_zero") < 2)).all()
    for i, name in itertools.product(range(4), ("aot", "aot_unpaired")):
        alone = [x[i : i + 1] for x in pairs]
        torch.testing.assert_close(of(name, inputs=alone), f[i : i + 1])


def test_swapped_answers_have_the_negative_margin_and_each_others_rewards():
    pairs = random_logps(9, scale=10)
    swapped = [pairs[1], pairs[0], pairs[3], pairs[2]]
    for name in DIVERGENT:
        negative = dpo_loss(*[-x for x in pairs], loss_type=name)[0]
        torch.testing.assert_close(dpo_loss(*swapped, loss_type=name)[0], negative)
    (_, chosen, rejected), (_, *found) = dpo_loss(*pairs), dpo_loss(*swapped)
    torch.testing.assert_close(found, [rejected, chosen], rtol=0, atol=0)


def test_rewards_have_no_gradient():
    pairs = [(x / 100).requires_grad_() for x in random_logps(4)]
    good = torch.tensor([True, False, True, False])
    results = [
        dpo_loss(*pairs),
        simpo_loss(*pairs[:2]),
        cpo_loss(*pairs[:2], pairs[0]),
        orpo_loss(*pairs[:2]),
    ]
    for values, *rewards in [*results, kto_loss(*pairs[::2], good, kl=pairs[1])]:
        assert values.requires_grad and not any(reward.requires_grad for reward in rewards)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_constant_on_both_models_changes_nothing(loss_type):
    pairs = random_logps(6)
    shifted = [pairs[0] + 37, pairs[1], pairs[2] + 37, pairs[3]]
    keywords = settings(loss_type, 6)
    if loss_type == "aot":  # its gaps are sorted model by model, so the constant must be everybody's
        shifted = [pairs[0] + 37, pairs[1] + 37, pairs[2], pairs[3]]
    for got, expected in zip(dpo_loss(*shifted, **keywords)[:1], dpo_loss(*pairs, **keywords)[:1]):
        torch.testing.assert_close(got, expected)


def test_relatives_meet_dpo_and_each_other():
    chosen, rejected = (x / 100 for x in random_logps(8)[:2])
    zero = torch.zeros_like(chosen)
    plain, *_ = simpo_loss(chosen, rejected, beta=2.0, gamma=0.0)
    torch.testing.assert_close(plain, dpo_loss(chosen, rejected, zero, zero, beta=2.0)[0])
    torch.testing.assert_close(plain, cpo_loss(chosen, rejected, beta=2.0, cpo_alpha=0.0)[0])
    far = [chosen - 60, rejected - 60]  # odds -> probabilities
    torch.testing.assert_close(orpo_loss(*far, zero)[0], -0.1 * logsigmoid(chosen - rejected))
    torch.testing.assert_close(dpo_loss(chosen, rejected, chosen, rejected)[0], zero + LOG_2)


def test_simpo_cpo_and_orpo_are_their_formulas():
    chosen, rejected = vector(-0.4, -2.0, -1e-3), vector(-1.1, -0.7, -9.0)
    nll = vector(0.5, 1.5, 2.5)
    results = {
        "simpo": simpo_loss(chosen, rejected, beta=2.5, gamma=0.7, label_smoothing=0.1),
        "cpo": cpo_loss(chosen, rejected, nll, beta=0.3, cpo_alpha=0.5),
        "orpo": orpo_loss(chosen, rejected, nll, beta=0.2),
    }
    for i, (c, r, x) in enumerate(zip(chosen.tolist(), rejected.tolist(), nll.tolist())):
        odds = [math.exp(p) / (1 - math.exp(p)) for p in (c, r)]
        expected = {
            "simpo": (smoothed(2.5 * (c - r) - 0.7, 0.1), 2.5 * c, 2.5 * r),
            "cpo": (-log_sigmoid(0.3 * (c - r)) + 0.5 * x, 0.3 * c, 0.3 * r),
            "orpo": (x - 0.2 * log_sigmoid(math.log(odds[0] / odds[1])), 0.2 * c, 0.2 * r),
        }
        for name, values in results.items():
            assert [v[i].item() for v in values] == pytest.approx(expected[name], rel=1e-5), name
    torch.testing.assert_close(orpo_loss(chosen, rejected)[0], orpo_loss(chosen, rejected, -chosen)[0])
    scalar = cpo_loss(chosen, rejected, torch.tensor(1.5))[0]
    torch.testing.assert_close(scalar, cpo_loss(chosen, rejected, torch.full((3,), 1.5))[0])


@pytest.mark.parametrize("kl", [[0.5, 3.0, -0.2], [-4.0, 1.0], [2.5]])
def test_kto_is_its_formula(kl):
    policy, _, reference, _ = random_logps(6)
    good = torch.tensor([True, False, True, True, False, False])
    z = max(0.0, sum(kl) / len(kl))
    keywords = {"beta": 0.2, "desirable_weight": 1.33, "undesirable_weight": 0.8}
    got, rewards = kto_loss(policy, reference, good, kl=vector(*kl, dtype=torch.float64), **keywords)
    mean, _ = kto_loss(policy, reference, good, kl=sum(kl) / len(kl), **keywords)
    for i, ratio in enumerate((policy - reference).tolist()):
        term = 1.33 * (1 - sigmoid(0.2 * (ratio - z))) if good[i] else 0.8 * (1 - sigmoid(0.2 * (z - ratio)))
        assert (got[i].item(), mean[i].item()) == pytest.approx((term, term), rel=1e-10)
        assert rewards[i].item() == pytest.approx(0.2 * ratio)
    assert kto_loss(policy, policy, good, kl=-1.0)[0].tolist() == [0.5] * 6


# Keywords


@pytest.mark.parametrize("loss_type", DIVERGENT)
@pytest.mark.parametrize("f_alpha", [0.3, 1.0, 2.0])
def test_f_divergences(loss_type, f_alpha):
    """A divergence replaces the margin by f'(u_chosen) - f'(u_rejected)."""
    pc, pr, rc, rr = pairs = [x / 20 for x in random_logps(6)]
    zero = torch.zeros_like(pc)
    u_chosen, u_rejected = torch.exp(pc - rc), torch.exp(pr - rr)
    margins = {
        "js_divergence": (2 * u_chosen / (1 + u_chosen)).log() - (2 * u_rejected / (1 + u_rejected)).log(),
        "alpha_divergence": (u_rejected**-f_alpha - u_chosen**-f_alpha) / f_alpha,
    }  # fmt: skip
    for name, margin in margins.items():
        got, *_ = dpo_loss(*pairs, loss_type=loss_type, f_divergence_type=name, f_alpha=f_alpha)
        torch.testing.assert_close(got, dpo_loss(margin, zero, zero, zero, loss_type=loss_type)[0])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_reference_free_is_a_reference_of_zero(loss_type):
    """In every loss.  TRL 0.28 keeps the reference in bco_pair, sppo_hard, nca_pair, aot and discopop."""
    pairs = [x / 10 for x in random_logps(6)]
    zero, keywords = torch.zeros_like(pairs[0]), settings(loss_type, 6)
    got, *rewards = dpo_loss(*pairs, reference_free=True, **keywords)
    torch.testing.assert_close(got, dpo_loss(*pairs[:2], zero, zero, **keywords)[0])
    torch.testing.assert_close(rewards, list(dpo_loss(*pairs, **keywords)[1:]))


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_lengths_make_means_of_sums(loss_type):
    pc, pr, rc, rr = pairs = random_logps(4)
    chosen, rejected = torch.tensor([3, 40, 1, 17]), torch.tensor([5, 2, 1, 90])
    lengths = {"chosen_lengths": chosen, "rejected_lengths": rejected}
    means = [pc / chosen, pr / rejected, rc / chosen, rr / rejected]
    got, *rewards = dpo_loss(*pairs, loss_type=loss_type, **lengths)
    torch.testing.assert_close(got, dpo_loss(*means, loss_type=loss_type)[0])
    torch.testing.assert_close(rewards, [0.1 * (pc - rc), 0.1 * (pr - rr)])
    torch.testing.assert_close(dpo_loss(*pairs, **lengths), dpo_loss(*pairs))  # the others take sums


def test_a_mixture_is_the_weighted_sum_with_plain_rewards():
    """TRL 0.28 adds up the rewards times the weights, so [0.8, 0.2, 1.0] doubles them."""
    pairs, nll = random_logps(5), torch.linspace(1, 2, 5, dtype=torch.float64)
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    got, *rewards = dpo_loss(*pairs, loss_type=weights, chosen_nll=nll)
    parts = [w * dpo_loss(*pairs, loss_type=name, chosen_nll=nll)[0] for name, w in weights.items()]
    torch.testing.assert_close(got, sum(parts))
    torch.testing.assert_close(rewards, list(dpo_loss(*pairs)[1:]))
    lengths = {"chosen_lengths": torch.full((5,), 9), "rejected_lengths": torch.full((5,), 7)}
    got, *_ = dpo_loss(*pairs, loss_type={"ipo": 0.5, "hinge": 2.0}, **lengths)
    parts = [
        0.5 * dpo_loss(*pairs, loss_type="ipo", **lengths)[0],
        2 * dpo_loss(*pairs, loss_type="hinge")[0],
    ]
    torch.testing.assert_close(got, sum(parts))


@pytest.mark.parametrize("nll", [torch.tensor(1.7), torch.linspace(0.2, 2, 5)])
def test_rpo_alpha_adds_the_nll(nll):
    pairs = random_logps(5, dtype=torch.float32)
    nll.requires_grad_()
    got, *_ = dpo_loss(*pairs, rpo_alpha=0.4, chosen_nll=nll)
    torch.testing.assert_close(got, dpo_loss(*pairs)[0] + 0.4 * nll)
    mixed, *_ = dpo_loss(*pairs, loss_type={"sigmoid": 1, "sft": 0.4}, chosen_nll=nll)
    torch.testing.assert_close(got, mixed)
    [slope] = torch.autograd.grad(got.mean(), nll)
    torch.testing.assert_close(slope.sum(), torch.tensor(0.4))


def test_exo_pair_leaves_nothing_behind():
    """TRL 0.28 sets the label smoothing of all later losses to 1e-3."""
    pairs = random_logps(5)
    before = dpo_loss(*pairs)[0]
    dpo_loss(*pairs, loss_type="exo_pair")
    both, *_ = dpo_loss(*pairs, loss_type={"exo_pair": 1.0, "sigmoid": 1.0})
    torch.testing.assert_close(both, dpo_loss(*pairs, loss_type="exo_pair")[0] + before, rtol=0, atol=0)


# Losses that look across pairs


@pytest.mark.parametrize(
    "loss_type", [*BATCH_COUPLED, "sigmoid", {"aot": 0.7, "bco_pair": 0.3, "hinge": 1.0}]
)
@pytest.mark.parametrize(
    "plan", [[[0, 1, 2, 3, 4, 5, 6]], [[5], [2, 0, 6], [1, 3, 4]], [[i] for i in range(7)]]
)
@pytest.mark.parametrize("reference_free", [False, True])
def test_micro_batches_equal_the_whole_batch(loss_type, plan, reference_free):
    pairs = random_logps(7)
    pairs[0][3], pairs[2][3] = pairs[0][1], pairs[2][1]  # equal values have no order
    keywords = {"loss_type": loss_type, "reference_free": reference_free}
    values, expected = gradients(pairs, **keywords)
    total, got = 0.0, [torch.zeros_like(x) for x in pairs[:2]]
    for places in map(torch.tensor, plan):
        micro, parts = gradients([x[places] for x in pairs], batch=tuple(pairs), index=places, **keywords)
        total += micro.sum()
        for whole, part in zip(got, parts):
            whole[places] += part
    torch.testing.assert_close(total, values.sum())
    torch.testing.assert_close(got, expected)


def test_without_the_batch_micro_batches_would_differ():
    pairs = random_logps(6)
    for loss_type in BATCH_COUPLED:
        halves = [dpo_loss(*[x[i : i + 3] for x in pairs], loss_type=loss_type)[0].sum() for i in (0, 3)]
        whole = dpo_loss(*pairs, loss_type=loss_type)[0].sum()
        assert abs(sum(halves) - whole) > 1e-3 * abs(whole)


def test_a_reward_mean_serves_in_place_of_the_batch():
    pairs = random_logps(6)
    places = torch.tensor([4, 1])
    mean = (0.1 * torch.cat([pairs[0] - pairs[2], pairs[1] - pairs[3]])).mean()
    micro = [x[places] for x in pairs]
    by_mean = gradients(micro, loss_type="bco_pair", reward_mean=mean)
    torch.testing.assert_close(by_mean, gradients(micro, loss_type="bco_pair", batch=pairs, index=places))


# Far out, dtypes, gradients, compile

FAR = [-1e4, -3e3, -100.0, -88.0, -20.0, -1.0, 0.0, 1.0, 20.0, 88.0, 100.0, 3e3, 1e4]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_margins_equal_fp64_and_give_no_nan(loss_type, dtype):
    grid = torch.tensor(list(itertools.product(FAR, FAR)), dtype=torch.float64).to(dtype)
    pairs = [grid[:, 0], grid[:, 1], torch.zeros_like(grid[:, 0]), torch.zeros_like(grid[:, 0])]
    exact = [x.double() for x in pairs]
    for e in [0.0, 0.1] if loss_type in SMOOTHED else [0.0]:
        for beta in 0.1, 5.0:
            keywords = settings(loss_type, len(grid)) | {"beta": beta, "label_smoothing": e}
            values, slopes = gradients(pairs, **keywords) if loss_type != "sft" else (pairs[0], pairs[:2])
            if loss_type == "discopop" and beta == 5.0:
                keywords["discopop_tau"] = 1.0
            assert values.isfinite().all() and all(x.isfinite().all() for x in slopes)
            wanted = dpo_loss(*exact, **keywords)[0]
            got = dpo_loss(*pairs, **keywords)[0]
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", DIVERGENT)
def test_far_margins_under_a_divergence_give_no_nan(loss_type, divergence):
    grid = torch.tensor(list(itertools.product(FAR, FAR)))
    zero = torch.zeros(len(grid))
    for f_alpha in 0.5, 1.0, 3.0:
        keywords = {"loss_type": loss_type, "f_divergence_type": divergence, "f_alpha": f_alpha}
        values, slopes = gradients([grid[:, 0], grid[:, 1], zero, zero], **keywords)
        assert not any(x.isnan().any() for x in (values, *slopes))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("where", [[0], [1], [2], [3], [0, 1], [0, 2], [1, 3], [0, 1, 2, 3]])
def test_minus_infinity_is_a_very_small_number(loss_type, where):
    """TRL 0.28 gives NaN as soon as two infinities meet, and for sigmoid when the rejected one is -inf."""
    pairs = random_logps(3, dtype=torch.float32)
    for i in where:
        pairs[i][1] = -math.inf
    keywords = settings(loss_type, 3, torch.float32)
    if loss_type == "sft":
        assert dpo_loss(*pairs, **keywords)[0].tolist() == keywords["chosen_nll"].tolist()
        return
    values, slopes = gradients(pairs, **keywords)
    assert values.isfinite().all() and all(x.isfinite().all() for x in slopes)
    assert all(x[1] == 0 for i, x in enumerate(slopes) if i in where)
    if loss_type in ("sigmoid", "robust", "hinge"):
        assert (values[1] > 1e6) == (where in ([0], [3])) and values[[0, 2]].max() < 100


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_are_exact(loss_type):
    pairs = [x.requires_grad_() for x in random_logps(4, scale=5)]
    keywords = settings(loss_type, 4)
    if loss_type == "sft":
        pairs = [keywords.pop("chosen_nll").requires_grad_()]
        assert torch.autograd.gradcheck(
            lambda x: dpo_loss(*random_logps(4), chosen_nll=x, **keywords)[0], pairs
        )
        return
    if loss_type == "bco_pair":  # its mean is detached, as in TRL
        keywords["reward_mean"] = 0.2
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, **keywords)[0], pairs)
    if loss_type in SMOOTHED:
        assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, label_smoothing=0.2, **keywords)[0], pairs)


def test_gradients_of_the_others_are_exact():
    check = torch.autograd.gradcheck
    chosen, rejected = (-x.abs().requires_grad_() for x in torch.randn(2, 5, dtype=torch.float64))
    nll = torch.rand(5, dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, False, True, False, False])
    inputs = [x.detach().clone().requires_grad_() for x in (chosen, rejected)]
    for divergence in "js_divergence", "alpha_divergence":
        assert check(lambda *x: dpo_loss(*x, *inputs, f_divergence_type=divergence)[0], [chosen, rejected])  # noqa: B023
    assert check(lambda *x: simpo_loss(*x)[0], inputs)
    assert check(lambda *x: cpo_loss(*x)[0], [*inputs, nll])
    assert check(lambda *x: orpo_loss(*x)[0], [*inputs, nll])
    assert check(lambda *x: kto_loss(*x, good, kl=0.3)[0], inputs)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 3], [-100, 4, 0, -100]])
    for keywords in {}, {"average": True}, {"ld_alpha": 0.3}:
        assert check(lambda x: sequence_logps(x, labels, **keywords), [logits])  # noqa: B023
    assert check(lambda x: cross_entropy(x, labels), [logits])


def test_relatives_far_out_give_no_nan():
    far = [*FAR[:6], -1e-3, -1e-8, -1e-30, 0.0, -math.inf]
    grid = torch.tensor(list(itertools.product(far, far)))
    good = torch.arange(len(grid)) % 2 == 0
    for function in (
        lambda c, r: simpo_loss(c, r)[0],
        lambda c, r: cpo_loss(c, r, torch.tensor(1.0))[0],
        lambda c, r: orpo_loss(c, r)[0],
        lambda c, r: kto_loss(c, r, good, kl=0.5)[0],
    ):
        for dtype in torch.float32, torch.bfloat16:
            policy = [x.to(dtype).requires_grad_() for x in grid.unbind(1)]
            values = function(*policy)
            slopes = torch.autograd.grad(values.sum(), policy)
            assert values.dtype == torch.float32 and values.isfinite().all()
            assert all(x.isfinite().all() for x in slopes)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_half_precision_is_computed_in_fp32(loss_type):
    for dtype in torch.bfloat16, torch.float16:
        pairs = random_logps(6, dtype=dtype)
        keywords = settings(loss_type, 6, torch.float32)
        results = dpo_loss(*pairs, **keywords)
        torch.testing.assert_close(results, dpo_loss(*[x.float() for x in pairs], **keywords), rtol=0, atol=0)
    assert all(x.dtype == torch.float64 for x in dpo_loss(*random_logps(6), **settings(loss_type, 6)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_are_one_graph(loss_type):
    pairs = random_logps(6, dtype=torch.float32)
    keywords = settings(loss_type, 6, torch.float32)
    if loss_type in BATCH_COUPLED:
        keywords |= {"batch": tuple(pairs), "index": torch.arange(6)}
    torch.compiler.reset()
    graph = torch.compile(dpo_loss, backend="aot_eager", fullgraph=True)
    policy = [x.clone().requires_grad_() for x in pairs[:2]]
    for got, expected in zip(graph(*policy, *pairs[2:], **keywords), dpo_loss(*pairs, **keywords)):
        torch.testing.assert_close(got, expected)


def test_torch_compile_gives_the_same():
    torch.compiler.reset()
    pairs = random_logps(6, dtype=torch.float32)
    keywords = {"loss_type": {"sigmoid": 1.0, "discopop": 0.5}, "f_divergence_type": "js_divergence"}

    def slopes(function):
        policy = [x.clone().requires_grad_() for x in pairs[:2]]
        return torch.autograd.grad(function(*policy, *pairs[2:], **keywords)[0].sum(), policy)

    torch.testing.assert_close(slopes(torch.compile(dpo_loss, fullgraph=True)), slopes(dpo_loss))


# Log-probs of answers


def naive_logps(logits: torch.Tensor, labels: torch.Tensor) -> list[list[float]]:
    """Of each row, the log-probs of its counted labels, the first position left out."""
    return [
        [
            (logits[i, j - 1].double().softmax(0)[labels[i, j]]).log().item()
            for j in range(1, labels.shape[1])
            if labels[i, j] != -100
        ]
        for i in range(len(labels))
    ]


LABELS = torch.tensor(
    [
        [-100, -100, 3, 1, 0, 2, -100],  # token 0 counts, which TRL's sft loss leaves out
        [5, 4, 3, 2, 1, 0, 6],  # the first label has nothing that predicts it
        [-100, -100, -100, -100, -100, 4, 4],
        [-100, -100, -100, -100, -100, -100, -100],
    ]
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sequence_logps_sum_the_counted_tokens(dtype):
    logits = (3 * torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(1))).to(dtype)
    rows = naive_logps(logits, LABELS)
    sums, means = sequence_logps(logits, LABELS), sequence_logps(logits, LABELS, average=True)
    assert sums.dtype == means.dtype == torch.promote_types(dtype, torch.float32)
    assert sums.tolist() == pytest.approx([sum(row) for row in rows], rel=1e-5)
    assert means.tolist() == pytest.approx([sum(row) / max(len(row), 1) for row in rows], rel=1e-5)
    everything = [x for row in rows for x in row]
    assert cross_entropy(logits, LABELS).item() == pytest.approx(-sum(everything) / len(everything), rel=1e-5)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_ld_alpha_weighs_what_the_other_answer_lacks(ld_alpha):
    """Whatever the length of the prompt: TRL 0.28 counts from the start of the row and would give 0 here."""
    logits = torch.randn(4, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = naive_logps(logits, LABELS)
    expected = []
    for i, row in enumerate(rows):
        shared = min(len(row), len(rows[(i + 2) % 4]))
        expected.append(sum(row[:shared]) + ld_alpha * sum(row[shared:]))
    assert sequence_logps(logits, LABELS, ld_alpha=ld_alpha).tolist() == pytest.approx(expected)
    chosen_rejected = [0, 2, 1, 3]  # as neighbours: the order of a packed stream
    flat = torch.tensor([x for i in chosen_rejected for x in rows[i]], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(len(rows[i]) for i in chosen_rejected)])
    got = segment_logps(flat, torch.ones_like(flat).long(), cu_seqlens, ld_alpha=ld_alpha)
    assert got.tolist() == pytest.approx([expected[i] for i in chosen_rejected])


@pytest.mark.parametrize("average", [False, True])
def test_segments_of_a_shared_prefix_equal_padded_rows(average):
    """A prompt of 4 tokens with answers of 3, 1 and 2: as one stream, and as padded rows."""
    answers = [[1, 2, 3], [5], [0, 4]]
    layout = AttentionLayout.shared_prefix(4, [len(answer) for answer in answers])
    labels = torch.full((layout.num_tokens,), -100)
    starts = [3, *layout.cu_seqlens_q[1:-1].tolist()]  # the row that predicts an answer's first token
    for start, answer in zip(starts, answers):
        labels[start : start + len(answer)] = torch.tensor(answer)
    scores = torch.randn(
        layout.num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    stream = torch.where(
        labels >= 0, scores.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0], 0.0
    )
    rows, targets = torch.zeros(3, 7, 8, dtype=torch.float64), torch.full((3, 7), -100)
    for i, (start, answer) in enumerate(zip(starts, answers)):
        rows[i, 3 : 3 + len(answer)] = scores[start : start + len(answer)]
        targets[i, 4 : 4 + len(answer)] = torch.tensor(answer)
    got = segment_logps(stream, labels, layout.cu_seqlens_q, average)
    torch.testing.assert_close(got, sequence_logps(rows, targets, average))


def test_the_smallest_inputs():
    one = torch.zeros(1, 1, 4)
    assert sequence_logps(one, torch.tensor([[2]])).tolist() == [0.0]
    assert cross_entropy(one, torch.tensor([[2]])).item() == 0.0
    assert segment_logps(vector(-1.5), torch.tensor([3]), torch.tensor([0, 1])).tolist() == [-1.5]
    assert sequence_logps(torch.zeros(2, 2, 4), torch.tensor([[0, 0], [1, -100]])).tolist() == pytest.approx(
        [-math.log(4), 0.0]
    )
    masked = torch.tensor([[[0.0, -math.inf], [0.0, 0.0]]])
    assert sequence_logps(masked, torch.tensor([[0, 1]])).tolist() == [-math.inf]
    for values in dpo_loss(*[torch.zeros(0)] * 4):
        assert values.shape == (0,)


# Bad input

FOUR = [torch.zeros(3)] * 4
LENGTHS = {"chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(3)}


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"loss_type": "sigmod"}, "unknown loss_type 'sigmod'; did you mean 'sigmoid'"),
        ({"loss_type": "kto_pair"}, "unknown loss_type 'kto_pair'"),
        ({"loss_type": {}}, "loss_type is {}"),
        ({"loss_type": ["sigmoid", "sft"]}, "expected {name: weight}"),
        ({"loss_type": {"sigmoid": -1.0}}, "the weight of sigmoid must be a number of at least 0, got -1.0"),
        ({"loss_type": {"ipo": 1, "sigmoid": 1}}, "ipo takes log-probs a token and sigmoid takes sums"),
        ({"loss_type": {"sigmoid_norm": 1, "aot": 1}}, "pass sums with chosen_lengths"),
        ({"beta": 0}, "beta must be a number above 0, got 0"),
        ({"beta": -0.1}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"beta": "0.1"}, "beta must be a number above 0, got '0.1'"),
        ({"beta": True}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing must be a number from 0 to less than 0.5, got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing is not defined for hinge, got 0.1"),
        ({"label_smoothing": 0.1, "loss_type": {"sigmoid": 1, "bco_pair": 1}}, "not defined for bco_pair"),
        ({"f_divergence_type": "forward_kl"}, "unknown f_divergence_type 'forward_kl'"),
        ({"f_divergence_type": "js_divergence", "loss_type": "aot"}, "not defined for aot"),
        ({"f_alpha": 0.0}, "f_alpha"),
        ({"discopop_tau": 1.5}, "discopop_tau must be a number above 0 and at most 1, got 1.5"),
        ({"rpo_alpha": -1.0, "chosen_nll": torch.ones(3)}, "rpo_alpha"),
        ({"rpo_alpha": 1.0}, "sft and rpo_alpha needs? chosen_nll"),
        ({"loss_type": "sft"}, "needs? chosen_nll"),
        ({"loss_type": "sft", "chosen_nll": torch.ones(2)}, r"chosen_nll must be floats \[3\] or a scalar"),
        ({"loss_type": "sft", "chosen_nll": torch.ones(3).long()}, "got torch.int64"),
        ({"loss_type": "ipo", "chosen_lengths": torch.ones(3)}, "rejected_lengths must be"),
        ({"loss_type": "ipo", **LENGTHS, "chosen_lengths": torch.ones(2)}, r"chosen_lengths must be \[3\]"),
        ({"loss_type": "aot", "batch": FOUR}, "batch .* and index .* belong together"),
        ({"loss_type": "aot", "index": torch.arange(3)}, "belong together"),
        ({"batch": FOUR[:2], "index": torch.arange(3)}, "belong together"),
        ({"batch": FOUR, "index": torch.arange(2)}, r"index must be \[3\] integers"),
        ({"batch": FOUR, "index": torch.zeros(3)}, "index must be"),
        ({"batch": [*FOUR[:3], torch.ones(2)], "index": torch.arange(3)}, r"batch\[3\] is \[2\]"),
    ],
)  # fmt: skip
def test_dpo_loss_refuses(keywords, words):
    with pytest.raises(ValueError, match=words) as caught:
        dpo_loss(*FOUR, **keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", range(4))
def test_dpo_loss_refuses_log_probs_that_do_not_fit(place):
    name = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")[place] + "_logps"
    for bad, words in (
        (torch.zeros(5), r"is \[(5|3)\], expected \[(3|5)\]"),
        (torch.zeros(3, 1), rf"{name} is \[3, 1\], expected|expected \[n\]"),
        (torch.zeros(()), rf"{name} is \[\], expected|expected \[n\]"),
        (torch.zeros(3, dtype=torch.int64), f"{name} must be floating-point log-probs, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=words):
            dpo_loss(*FOUR[:place], bad, *FOUR[place + 1 :])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: simpo_loss(torch.zeros(3), torch.zeros(4)), r"rejected_logps is \[4\], expected \[3\]"),
        (lambda: simpo_loss(*FOUR[:2], gamma=-1.0), "gamma must be a number of at least 0"),
        (lambda: simpo_loss(*FOUR[:2], label_smoothing=0.7), "label_smoothing"),
        (lambda: cpo_loss(*FOUR[:2]), "cpo_alpha > 0 needs chosen_nll"),
        (lambda: cpo_loss(*FOUR[:2], cpo_alpha=-0.5), "cpo_alpha"),
        (lambda: cpo_loss(*FOUR[:2], beta=0.0, cpo_alpha=0.0), "beta"),
        (lambda: orpo_loss(torch.zeros(3).long(), torch.zeros(3)), "floating-point"),
        (lambda: orpo_loss(*FOUR[:2], torch.ones(4)), "chosen_nll must be"),
        (lambda: kto_loss(*FOUR[:2], torch.ones(3), kl=0.0), r"desirable must be bool \[3\]"),
        (lambda: kto_loss(*FOUR[:2], torch.ones(2) > 0, kl=0.0), "desirable"),
        (lambda: kto_loss(*FOUR[:2], torch.ones(3) > 0, kl=0, undesirable_weight=-1), "undesirable"),
        (lambda: sequence_logps(torch.zeros(2, 3, 4), torch.zeros(2, 4).long()), r"\[2, 3, 4\] and \[2, 4\]"),
        (lambda: sequence_logps(torch.zeros(2, 3, 4), torch.zeros(2, 3)), "labels of an integer dtype"),
        (lambda: sequence_logps(torch.zeros(2, 3, 4).long(), torch.zeros(2, 3).long()), "floating-point"),
        (lambda: cross_entropy(torch.zeros(3, 4), torch.zeros(3).long()), r"\[n, t, v\]"),
        (lambda: sequence_logps(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), ld_alpha=1.5), "ld_alpha"),
        (lambda: sequence_logps(torch.zeros(3, 3, 4), torch.zeros(3, 3).long(), ld_alpha=0.5), "3 answers"),
        (lambda: sequence_logps(torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), True, 0.5), "average=True"),
        (lambda: segment_logps(torch.zeros(4), torch.zeros(3).long(), torch.tensor([0, 3])), r"\[4\], \[3\]"),
    ],
)  # fmt: skip
def test_the_others_refuse(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_import_loads_torch_alone():
    script = """if True:
        import sys, torch
        before = set(sys.modules)
        import phoenix.losses
        new = set(sys.modules) - before
        new = {name for name in new if name.split(".")[0] not in sys.stdlib_module_names}
        assert new == {"phoenix", "phoenix.losses"}, new
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_say_what_they_take():
    assert set(BATCH_COUPLED) == {"aot", "aot_unpaired", "aot_pair", "bco_pair"}
    for name, loss in losses.PREFERENCE_LOSSES.items():
        assert ("label_smoothing" in loss.takes) == (name in (*SMOOTHED, "aot_pair", "sft"))
