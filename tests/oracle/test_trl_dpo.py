"""Our losses beside TRL 0.28's own code, and where TRL's code is wrong.

Ours may differ by 1e-6 of the value, by the rounding of a sigmoid near 1, or where TRL's fp32 is further from
its own fp64 than ours is.
"""

import json
import math
import types

import pytest
import torch
import trl
import trl_dpo
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer

from phoenix.losses import dpo_loss, sequence_logps

ROUNDING = 1e-7  # of 1 - sigmoid, in values that are as large as 1 elsewhere
INPUTS = trl_dpo.make_inputs(64, seed=1)


def name(keywords: dict) -> str:
    return "-".join(str(value) for value in keywords.values())


def with_nll(keywords: dict, n: int) -> dict:
    """sft with TRL's mean over the batch, a scalar."""
    return keywords | ({"chosen_nll": torch.tensor(1.25)} if keywords["loss_type"] == "sft" else {})


def our_loss(inputs: list[Tensor], keywords: dict) -> dict[str, Tensor]:
    policy = [x.clone().requires_grad_() for x in inputs[:2]]
    losses, *rewards = dpo_loss(*policy, *inputs[2:], **keywords)
    uses_policy = keywords["loss_type"] != "sft"
    slopes = torch.autograd.grad(losses.sum(), policy) if uses_policy else map(torch.zeros_like, policy)
    return dict(zip(trl_dpo.RESULTS, [losses.detach(), *rewards, *slopes]))


def deviation(got: Tensor, theirs: Tensor, exact: Tensor, rounding: float) -> float:
    """Largest |ours - TRL's| / |TRL's| beyond rounding; values where TRL is further off count 0."""
    theirs_is_worse = ~((theirs - exact).abs() <= (got - exact).abs())
    difference = (got - theirs).abs() - rounding
    relative = torch.where((got == theirs) | theirs_is_worse, 0.0, difference / theirs.abs())
    return relative.nan_to_num(posinf=math.inf).max().item()


@pytest.mark.parametrize("keywords", trl_dpo.SETTINGS, ids=name)
@pytest.mark.parametrize("kind", INPUTS)
def test_equal_to_trl_in_fp32(keywords, kind):
    inputs = INPUTS[kind]
    keywords = with_nll(keywords, len(inputs[0]))
    ours, theirs = our_loss(inputs, keywords), trl_dpo.trl_loss(inputs, keywords)
    exact = our_loss([x.double() for x in inputs], keywords)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    trl_exact = trl_dpo.trl_loss([x.double() for x in inputs], wide)
    for key, got in ours.items():
        if keywords.get("f_divergence_type") == "alpha_divergence":  # exponents are cut by dtype
            exact[key] = trl_exact[key] = theirs[key]
            usable = (theirs["losses"] < 1e18) & theirs[key].isfinite()
        else:
            usable = ~trl_exact[key].isnan()
        got, their, truth = (x[usable] for x in (got, theirs[key], trl_exact[key]))
        assert not got.isnan().any()
        off = deviation(got, their, truth, ROUNDING * (slope(keywords) if "grad" in key else 1))
        assert off <= 1e-6, f"{key} differs by {off:.1e}"
        # TRL's softplus is cut at 20, so it is off by e^-20 = 2e-9 times a slope.
        torch.testing.assert_close(exact[key][usable], trl_exact[key][usable], rtol=1e-9, atol=1e-7)


def slope(keywords: dict) -> float:
    """How steep a loss is where its margin is small."""
    if keywords["loss_type"] in ("ipo", "sppo_hard"):
        return 1 / keywords["beta"]
    is_steep = keywords["loss_type"] == "discopop"
    return keywords["beta"] / (keywords.get("discopop_tau", 0.05) if is_steep else 1)


@pytest.mark.parametrize("keywords", trl_dpo.SETTINGS, ids=name)
@pytest.mark.parametrize("kind", INPUTS)
def test_bf16_equals_trl_in_fp32_of_the_same_numbers(keywords, kind):
    """TRL in bf16 differs by up to 1 nat: the spacing of bf16 between 256 and 512 is 2."""
    inputs = [x.bfloat16() for x in INPUTS[kind]]
    keywords = with_nll(keywords, len(inputs[0]))
    ours, low = our_loss(inputs, keywords), trl_dpo.trl_loss(inputs, keywords)
    theirs = our_loss([x.float() for x in inputs], keywords)
    for key, got in ours.items():
        expected = theirs[key].to(got.dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert ours["losses"].dtype == torch.float32
    assert low["chosen_rewards"].dtype == torch.bfloat16
    if kind == "random" and keywords.get("f_divergence_type", "reverse_kl") == "reverse_kl":
        for key in "losses", "chosen_rewards", "rejected_rewards":
            scale = theirs[key].abs().max().clamp(min=1.0)
            assert ((ours[key] - low[key].float()).abs() <= 0.2 * scale).all()


def test_the_golden_file_is_what_trl_gives_here():
    golden = json.loads(trl_dpo.GOLDEN.read_text())
    assert golden["trl"] == trl.__version__ == "0.28.0"
    for case in golden["cases"]:
        inputs = [torch.tensor(x) for x in golden["inputs"][case["inputs"]]]
        results = trl_dpo.exact_where_rounded(inputs, case["keywords"])
        for key in trl_dpo.RESULTS:
            for got, kept in zip(trl_dpo.numbers(results[key]), case[key], strict=True):
                assert got == kept or got == pytest.approx(kept, rel=1e-6, abs=1e-9)


# Where TRL 0.28 is wrong


def some(n: int = 6) -> list[Tensor]:
    return [x[:n] for x in INPUTS["random"]]


def test_trl_keeps_the_label_smoothing_of_exo_pair():
    trainer, keywords = (
        trl_dpo.trainer({"beta": 0.1, "loss_type": "exo_pair"}),
        {"beta": 0.1, "loss_type": "sigmoid"},
    )
    before = trl_dpo.trl_loss(some(), keywords, trainer)["losses"]
    trl_dpo.trl_loss(some(), keywords | {"loss_type": "exo_pair"}, trainer)
    assert trainer.label_smoothing == 1e-3
    assert not torch.allclose(trl_dpo.trl_loss(some(), keywords, trainer)["losses"], before, rtol=1e-4)
    dpo_loss(*some(), loss_type="exo_pair")
    torch.testing.assert_close(dpo_loss(*some())[0], before)


@pytest.mark.parametrize(
    "loss_type", ["bco_pair", "sppo_hard", "nca_pair", "aot", "aot_unpaired", "discopop"]
)
def test_trl_keeps_the_reference_where_there_is_none(loss_type):
    keywords = {"beta": 0.1, "loss_type": loss_type}
    with_reference = trl_dpo.trl_loss(some(), keywords)["losses"]
    trls = trl_dpo.trl_loss(some(), keywords | {"reference_free": True})["losses"]
    torch.testing.assert_close(trls, with_reference, rtol=0, atol=0)
    ours, *_ = dpo_loss(*some(), reference_free=True, **keywords)
    assert not torch.allclose(ours, with_reference)
    zero = torch.zeros(6)
    torch.testing.assert_close(ours, trl_dpo.trl_loss([*some()[:2], zero, zero], keywords)["losses"])


def test_trl_ignores_a_divergence_with_losses_that_have_none():
    keywords = {"beta": 0.1, "loss_type": "nca_pair"}
    trls = trl_dpo.trl_loss(some(), keywords | {"f_divergence_type": "js_divergence"})["losses"]
    torch.testing.assert_close(trls, trl_dpo.trl_loss(some(), keywords)["losses"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="not defined for nca_pair"):
        dpo_loss(*some(), f_divergence_type="js_divergence", **keywords)


def test_trl_gives_nan_far_out():
    far = [torch.tensor([x]) for x in (-1e4, 0.0, 0.0, 0.0)]
    keywords = {"beta": 0.1, "loss_type": "discopop"}
    assert trl_dpo.trl_loss(far, keywords)["losses"].isnan().all()
    assert our_loss(far, keywords)["losses"].item() == pytest.approx(1000)
    infinite = [torch.tensor([x]) for x in (-1.0, -math.inf, -1.0, -1.0)]
    keywords["loss_type"] = "sigmoid"
    assert trl_dpo.trl_loss(infinite, keywords)["losses"].isnan().all()
    assert our_loss(infinite, keywords)["losses"].item() == 0
    assert our_loss(infinite, keywords)["rejected_grad"].item() == 0


def test_trl_moves_the_mean_of_bco_pair_with_every_call():
    trainer, keywords = (
        trl_dpo.trainer({"beta": 0.1, "loss_type": "bco_pair"}),
        {"beta": 0.1, "loss_type": "bco_pair"},
    )
    first = trl_dpo.trl_loss(some(), keywords, trainer)["losses"]
    trl_dpo.trl_loss([x + i for i, x in enumerate(some())], keywords, trainer)  # an evaluation, say
    assert not torch.allclose(trl_dpo.trl_loss(some(), keywords, trainer)["losses"], first)
    torch.testing.assert_close(dpo_loss(*some(), loss_type="bco_pair")[0], first)


def test_trl_sorts_a_micro_batch_where_aot_means_the_batch():
    whole = some(8)
    halves = [[x[rows] for x in whole] for rows in (slice(4), slice(4, None))]
    keywords = {"beta": 0.1, "loss_type": "aot"}
    trls = [trl_dpo.trl_loss(half, keywords)["losses"] for half in halves]
    expected = trl_dpo.trl_loss(whole, keywords)["losses"].sum()
    assert abs(torch.cat(trls).sum() - expected) > 1e-3
    places = torch.arange(8).chunk(2)
    ours = [dpo_loss(*half, loss_type="aot", batch=whole, index=i)[0] for half, i in zip(halves, places)]
    torch.testing.assert_close(torch.cat(ours).sum(), expected)


# The forward pass around it


class Logits(torch.nn.Module):
    """A model whose logits are given: rows of [prompt, answer, padding], chosen before rejected."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, **_):
        return types.SimpleNamespace(logits=self.logits)


def forward(
    prompt: list[int],
    answers: list[list[int]],
    ld_alpha: float | None = None,
    is_ref: bool = False,
    **attributes,
):
    """TRL's concatenated_forward of one pair, and sequence_logps of the same logits."""
    generator = torch.Generator().manual_seed(4)
    length = max(map(len, answers))
    trainer = trl_dpo.trainer({"beta": 0.1, "loss_type": "sigmoid"})
    defaults = {
        "pad_token_id": 0, "is_encoder_decoder": False, "aux_loss_enabled": False, "max_length": None,
        "use_logits_to_keep": False, "padding_free": False, "use_weighting": False,
        "concatenated_inputs": DPOTrainer.concatenated_inputs,
    }  # fmt: skip
    vars(trainer).update(defaults | attributes)
    vars(trainer.args).update(rpo_alpha=None, ld_alpha=ld_alpha)
    pad = lambda rows: torch.tensor([row + [0] * (length - len(row)) for row in rows])  # noqa: E731
    mask = pad([[1] * len(answer) for answer in answers])
    batch = {
        "prompt_input_ids": torch.tensor([prompt]),
        "prompt_attention_mask": torch.ones(1, len(prompt)).long(),
    }
    for side, ids, kept in zip(("chosen", "rejected"), pad(answers), mask):
        batch |= {f"{side}_input_ids": ids[None], f"{side}_attention_mask": kept[None]}
    logits = torch.randn(2, len(prompt) + length, 9, generator=generator)
    output = DPOTrainer.concatenated_forward(trainer, Logits(logits), batch, is_ref)
    labels = torch.cat([torch.full((2, len(prompt)), -100), pad(answers).masked_fill(mask == 0, -100)], 1)
    return output, logits, labels


def test_log_probs_equal_trls():
    for trl_type, average in ("sigmoid", False), ("ipo", True):
        output, logits, labels = forward([3, 4, 5], [[1, 2, 6, 7], [8, 2]], loss_type=[trl_type])
        theirs = torch.cat([output["chosen_logps"], output["rejected_logps"]])
        torch.testing.assert_close(sequence_logps(logits, labels, average), theirs)


def test_trl_counts_the_positions_of_ld_alpha_from_the_start_of_the_prompt():
    """So a prompt longer than the answer leaves log-probs of 0."""
    output, logits, labels = forward([3] * 9, [[1, 2, 6, 7], [8, 2]], ld_alpha=0.5)
    assert output["chosen_logps"].item() == output["rejected_logps"].item() == 0
    ours, plain = sequence_logps(logits, labels, ld_alpha=0.5), sequence_logps(logits, labels)
    rest = sequence_logps(logits, labels.clone().index_fill_(1, torch.tensor([9, 10]), -100))
    torch.testing.assert_close(ours, torch.stack([plain[0] - 0.5 * rest[0], plain[1]]))


def test_trl_leaves_the_reference_out_of_ld_alpha():
    """So margins do not begin at zero."""
    plain, with_alpha = (
        forward([3], [[1, 2, 6, 7], [8]], ld_alpha=alpha, is_ref=True)[0] for alpha in (None, 0.5)
    )
    assert plain["chosen_logps"] == with_alpha["chosen_logps"]


def test_trl_adds_up_the_rewards_of_several_losses():
    pc, pr, rc, rr = some()
    trainer = trl_dpo.trainer({"beta": 0.1, "loss_type": "sigmoid"})
    trainer.loss_type, trainer.loss_weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    trainer.use_weighting = trainer.aux_loss_enabled = False
    trainer.accelerator.gather_for_metrics = lambda x: x
    vars(trainer.args).update(use_liger_kernel=False, rpo_alpha=None)
    zero, nll = torch.zeros(()), torch.tensor(1.25)
    output = {"chosen_logps": pc, "rejected_logps": pr, "nll_loss": nll}
    output |= {"mean_chosen_logits": zero, "mean_rejected_logits": zero}
    trainer.concatenated_forward = lambda model, batch: output
    trainer.dpo_loss = lambda *arguments: DPOTrainer.dpo_loss(trainer, *arguments)
    batch = {"ref_chosen_logps": rc, "ref_rejected_logps": rr}
    loss, metrics = DPOTrainer.get_batch_loss_metrics(trainer, None, batch)
    weights = dict(zip(trainer.loss_type, trainer.loss_weights))
    losses, chosen, _ = dpo_loss(pc, pr, rc, rr, loss_type=weights, chosen_nll=nll)
    torch.testing.assert_close(loss, losses.mean())
    assert metrics["rewards/chosen"] == pytest.approx(2 * chosen.mean().item())


def test_trls_sft_term_leaves_out_token_0():
    output, logits, labels = forward([3, 4, 5], [[1, 0, 6, 7], [8, 2]], loss_type=["sft"])
    without = -sequence_logps(logits, labels.masked_fill(labels == 0, -100), average=True)[0]
    torch.testing.assert_close(output["nll_loss"], without)
    assert -sequence_logps(logits, labels, average=True)[0] != pytest.approx(without.item(), rel=1e-3)
