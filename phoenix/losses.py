"""Preference losses and the log-probabilities that go into them: pure functions of tensors, torch alone.

    from phoenix.losses import dpo_loss, sequence_logps

    logps = sequence_logps(model(tokens).logits, labels)            # [2n]: n chosen, then n rejected
    losses, chosen_rewards, rejected_rewards = dpo_loss(*logps.chunk(2), *reference_logps.chunk(2), beta=0.1)
    losses.mean().backward()

Every loss gives one value a pair; the caller reduces.  bf16 and fp16 are computed in fp32, fp64 stays.  A
log-prob of -inf counts as -1e9: the loss is finite and says so by its size, and that log-prob gets no
gradient.  Finite margins of any size give no NaN, neither in the value nor in the gradient.

**Losses that look across pairs** (`BATCH_COUPLED`: aot, aot_unpaired, bco_pair) must see the whole global
batch, or micro-batches and ranks change them.  A first pass without gradients collects the four log-probs
of all N pairs, then each micro-batch names its places in them:

    batch = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)   # each [N], detached
    losses, *_ = dpo_loss(..., loss_type="aot", batch=batch, index=places)           # places [n] int64
    (losses.sum() / N).backward()

Gradients added up over the micro-batches are then those of the loss on the whole batch.

A new loss is a function of `Pairs` and a line in `PREFERENCE_LOSSES` at the end of this file.

Legend: n answers or pairs, N pairs of the global batch, t tokens (rows of a stream), v vocab_size.  In the
formulas c and r are policy minus reference log-prob of the chosen and the rejected answer, m the margin
(c - r, unless an f-divergence says otherwise), b beta, e label_smoothing, S sigmoid, L log-sigmoid.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
IMPOSSIBLE = -1e9  # stands for -inf: its square and its multiples are still finite in fp32
LARGE = 1e18
EXO_SMOOTHING = 1e-3  # of exo_pair where none is given: ln 0 has no value


# Log-probs of answers


def sequence_logps(
    logits: Tensor, labels: Tensor, average: bool = False, ld_alpha: float | None = None
) -> Tensor:
    """Log-probability of each row's labels, summed over its tokens: [n, t, v], [n, t] -> [n], fp32 or fp64.

    labels are **not** yet shifted: position i is predicted by the logits of i - 1; -100 is not counted,
    token id 0 is.  average: the mean over the counted tokens.  A row without a counted token gives 0.

    ld_alpha in [0, 1]: LD-DPO (arXiv 2409.06411), for rows of n/2 chosen, then n/2 rejected answers: of the
    longer answer of a pair, the tokens beyond the length of the shorter one count ld_alpha.  Use it for the
    reference as well.  Raises ValueError for other shapes and dtypes.
    """
    token_logps, labels = _label_logps(logits, labels)
    n, t = labels.shape
    cu_seqlens = torch.arange(n + 1, device=labels.device) * t
    partner = torch.arange(n, device=labels.device).roll(n // 2)
    return _segments(token_logps.flatten(), labels.flatten(), cu_seqlens, average, ld_alpha, partner)


def segment_logps(
    label_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    average: bool = False,
    ld_alpha: float | None = None,
) -> Tensor:
    """The same from a flat stream of label log-probs, as a model makes them for a packed batch -> [n].

    label_logps [t]; labels [t], **already shifted** (what row i predicts, -100 for nothing).
    cu_seqlens [n + 1]: segment i owns the rows cu_seqlens[i] : cu_seqlens[i + 1], [0, 3, 5] for 0 1 2 | 3 4.
    Sums are taken in fp64, so they do not depend on how a batch is packed.  For ld_alpha the segments are
    chosen and rejected answers in turns, as `AttentionLayout.shared_prefix` lays them.
    """
    if label_logps.ndim != 1 or label_logps.shape != labels.shape or cu_seqlens.ndim != 1:
        shapes = [list(x.shape) for x in (label_logps, labels, cu_seqlens)]
        raise ValueError(f"label_logps, labels and cu_seqlens must be [t], [t] and [n + 1], got {shapes}")
    partner = torch.arange(len(cu_seqlens) - 1, device=labels.device) ^ 1
    return _segments(_wide(label_logps), labels, cu_seqlens, average, ld_alpha, partner)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-prob of all counted labels: [n, t, v], [n, t] -> scalar; 0 if none is counted.

    labels are not yet shifted, as in `sequence_logps`.  The mean is over tokens: for a step of several
    micro-batches add up sums and divide once (`-sequence_logps(...).sum()` over the tokens of the step).
    """
    token_logps, labels = _label_logps(logits, labels)
    return -token_logps.sum() / labels.ne(IGNORE_INDEX).sum().clamp(min=1)


def _label_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [n, t - 1] of the shifted labels, 0 where they are not counted, and those labels."""
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        shapes = list(logits.shape), list(labels.shape)
        raise ValueError("logits must be [n, t, v] and labels [n, t], got {} and {}".format(*shapes))
    if not logits.is_floating_point() or labels.is_floating_point():
        raise ValueError(
            f"logits must be floating-point, labels of an integer dtype, got {logits.dtype}, {labels.dtype}"
        )
    labels = labels[:, 1:].long()
    logits = _wide(logits[:, :-1]).flatten(0, 1)
    nll = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -nll.view_as(labels), labels


def _segments(
    values: Tensor, labels: Tensor, cu_seqlens: Tensor, average: bool, ld_alpha: float | None, partner: Tensor
) -> Tensor:
    """Sums or means [n] of values [t] over segments; the answer of segment i competes with partner[i]'s."""
    home = values.device
    if home.type == "mps":  # which has neither fp64 nor segment_reduce
        values, labels, cu_seqlens, partner = (x.cpu() for x in (values, labels, cu_seqlens, partner))
    offsets, counted = cu_seqlens.long(), labels.ne(IGNORE_INDEX)

    def total(x: Tensor) -> Tensor:
        return torch.segment_reduce(x.double(), "sum", offsets=offsets, initial=0, unsafe=True)

    count = total(counted)
    if ld_alpha is not None:
        _check_number("ld_alpha", ld_alpha, lambda x: 0 <= x <= 1, "from 0 to 1")
        if average or len(partner) % 2:
            what = "average=True" if average else f"{len(partner)} answers"
            raise ValueError(f"ld_alpha weighs the sums of an even number of answers, got {what}")
        rows = torch.arange(len(values), device=values.device)
        segment = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        before = count.cumsum(0) - count
        place = counted.cumsum(0) - before[segment]  # 1, 2, ... for the counted tokens of an answer
        shared = torch.minimum(count, count[partner])[segment]
        values = torch.where(place <= shared, values, ld_alpha * values if ld_alpha else 0.0)
    sums = total(torch.where(counted, values, 0.0))
    return (sums / count.clamp(min=1) if average else sums).to(values.dtype).to(home)


# The family of DPO


@dataclass(frozen=True)
class Pairs:
    """What the losses of the table at the end are functions of: log-probs [n], and settings."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    beta: float
    label_smoothing: float
    f_divergence_type: str
    f_alpha: float
    discopop_tau: float
    chosen_nll: Tensor | None
    reward_mean: Tensor | float | None
    batch: Pairs | None  # the whole global batch, detached; these pairs stand in it at `index`
    index: Tensor | None

    @property
    def chosen(self) -> Tensor:  # c
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected(self) -> Tensor:  # r
        return self.policy_rejected - self.reference_rejected

    @property
    def policy_gap(self) -> Tensor:
        return self.policy_chosen - self.policy_rejected

    @property
    def reference_gap(self) -> Tensor:
        return self.reference_chosen - self.reference_rejected

    @property
    def margin(self) -> Tensor:  # m
        return F_DIVERGENCES[self.f_divergence_type](self)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str | dict[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    f_divergence_type: str = "reverse_kl",
    f_alpha: float = 1.0,
    discopop_tau: float = 0.05,
    rpo_alpha: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    reward_mean: Tensor | float | None = None,
    batch: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of n preference pairs and rewards of their answers: (losses, chosen_rewards, rejected_rewards).

    The four log-probs are [n], sums over the tokens of an answer; so are the three results.  Rewards are
    beta * (policy - reference) of the log-probs as given, detached, whatever the loss.

    loss_type: a name of `LOSS_TYPES`, or {name: weight} for a weighted sum; formulas and sources stand with
    the functions below.  beta > 0.
    label_smoothing: from 0 to less than 0.5, the share of pairs believed to be labelled the wrong way round;
    for sigmoid (cDPO), sigmoid_norm, robust, exo_pair, aot and aot_unpaired.
    reference_free: the losses take every reference log-prob as 0; the rewards do not.
    f_divergence_type: "reverse_kl", "js_divergence" or "alpha_divergence" with its f_alpha > 0 (arXiv
    2309.16240, as TRL 0.28 defines them); for sigmoid, robust, exo_pair, hinge, ipo and discopop.
    discopop_tau: above 0 and at most 1, for discopop.
    rpo_alpha: adds rpo_alpha * chosen_nll (arXiv 2404.19733), as {loss_type: 1, "sft": rpo_alpha} does.
    chosen_lengths, rejected_lengths: [n] counted tokens, by which ipo and sigmoid_norm divide log-probs.
    Without them these two take the values as given: pass means.
    chosen_nll: [n] or scalar, mean negative log-prob of the chosen answers, for sft and rpo_alpha.  For a
    mean over the tokens of a step, not over answers, pass each answer's sum times N / tokens of the step.
    batch, index: for aot, aot_unpaired and bco_pair in micro-batches, see the head of this module; without
    them a call is a whole batch.  Places in index are from 0 to N - 1: this is not checked, as it would wait
    for the device.
    reward_mean: for bco_pair in place of batch, the mean of beta * (policy - reference) over both answers of
    all pairs.

    Raises ValueError for shapes, dtypes and settings that have no meaning.
    """
    weights = {loss_type: 1.0} if isinstance(loss_type, str) else loss_type
    _check_losses(weights, label_smoothing, f_divergence_type, chosen_lengths is not None)
    _above_0("beta", beta)
    _above_0("f_alpha", f_alpha)
    _check_number("discopop_tau", discopop_tau, lambda x: 0 < x <= 1, "above 0 and at most 1")
    _at_least_0("rpo_alpha", 0 if rpo_alpha is None else rpo_alpha)
    logps = _logps(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    nll = _check_nll(chosen_nll, logps[0], "sft" in weights or rpo_alpha is not None, "sft and rpo_alpha")
    rewards = [beta * (policy - reference).detach() for policy, reference in zip(logps[:2], logps[2:])]

    settings = (beta, label_smoothing, f_divergence_type, f_alpha, discopop_tau, nll, reward_mean)
    whole = _whole_batch(batch, index, logps[0])
    if reference_free:
        logps, whole = _without_reference(logps), whole and _without_reference(whole)
    pairs = Pairs(*logps, *settings, batch=whole and Pairs(*whole, *settings, None, None), index=index)
    losses = torch.zeros_like(logps[0])
    for name, weight in weights.items():
        loss = PREFERENCE_LOSSES[name]
        per_token = "lengths" in loss.takes and (chosen_lengths is not None or rejected_lengths is not None)
        shown = _per_token(pairs, chosen_lengths, rejected_lengths) if per_token else pairs
        losses = losses + weight * loss.compute(shown)
    if rpo_alpha is not None:
        losses = losses + rpo_alpha * nll
    return losses, rewards[0], rewards[1]


def sigmoid_loss(x: Pairs) -> Tensor:
    """-(1-e) L(bm) - e L(-bm).  DPO, arXiv 2305.18290 eq. 7; e > 0: conservative DPO."""
    return _logistic(x.beta * x.margin, x.label_smoothing)


def hinge_loss(x: Pairs) -> Tensor:
    """max(0, 1 - bm).  SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657."""
    return torch.relu(1 - x.beta * x.margin)


def ipo_loss(x: Pairs) -> Tensor:
    """(m - 1/(2b))^2, arXiv 2310.12036 eq. 17; m of log-probs a token, as its authors say."""
    margin = x.margin.clamp(-LARGE, LARGE)  # beyond it the square is infinite, and inf * 0 a gradient of NaN
    return (margin - 1 / (2 * x.beta)) ** 2


def robust_loss(x: Pairs) -> Tensor:
    """[-(1-e) L(bm) + e L(-bm)] / (1-2e), arXiv 2403.00409.  Unbiased under label noise e; may be < 0."""
    m, e = x.beta * x.margin, x.label_smoothing
    return (e * F.logsigmoid(-m) - (1 - e) * F.logsigmoid(m)) / (1 - 2 * e)


def exo_pair_loss(x: Pairs) -> Tensor:
    """S(bm) [L(bm) - ln(1-e)] + S(-bm) [L(-bm) - ln e], arXiv 2402.00856 eq. 16.  e = 0 is taken as 1e-3."""
    m, e = x.beta * x.margin, x.label_smoothing or EXO_SMOOTHING
    chosen = torch.sigmoid(m) * (F.logsigmoid(m) - math.log(1 - e))
    return chosen + torch.sigmoid(-m) * (F.logsigmoid(-m) - math.log(e))


def nca_pair_loss(x: Pairs) -> Tensor:
    """-L(bc) - L(-bc)/2 - L(-br)/2, arXiv 2402.05369."""
    c, r = x.beta * x.chosen, x.beta * x.rejected
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_pair_loss(x: Pairs) -> Tensor:
    """-L(bc - D) - L(D - br), arXiv 2404.04656.  D: mean reward of the whole batch, detached."""
    mean = x.reward_mean
    if mean is None:
        source = x.batch or x
        mean = (x.beta * torch.cat([source.chosen, source.rejected])).mean()
    mean = torch.as_tensor(mean, dtype=x.chosen.dtype, device=x.chosen.device).detach()
    return -F.logsigmoid(x.beta * x.chosen - mean) - F.logsigmoid(mean - x.beta * x.rejected)


def sppo_hard_loss(x: Pairs) -> Tensor:
    """(c - 1/(2b))^2 + (r + 1/(2b))^2, arXiv 2405.00675 eq. 4.7 with hard labels.  Grows with 1/b."""
    return (x.chosen - 0.5 / x.beta) ** 2 + (x.rejected + 0.5 / x.beta) ** 2


def aot_loss(x: Pairs) -> Tensor:
    """Sigmoid loss of sort(policy gaps) - sort(reference gaps), arXiv 2406.05882, over the whole batch.

    Value i is that of rank i; with `batch`, that of pair i, whose gap meets the reference gap of its own
    rank.
    """
    if x.batch is None:
        gap = x.policy_gap.sort().values - x.reference_gap.sort().values
    else:
        gap = x.policy_gap - _of_same_rank(x.batch.policy_gap, x.batch.reference_gap, x.index)
    return _logistic(x.beta * gap, x.label_smoothing)


def aot_unpaired_loss(x: Pairs) -> Tensor:
    """Sigmoid loss of sort(c) - sort(r), arXiv 2406.05882, over the whole batch.

    Value i is that of rank i.  With `batch`, c of pair i meets the r of its rank and r the c of its rank,
    both out of the whole batch: each term appears twice, so its value counts half and its gradient once.
    """
    if x.batch is None:
        return _logistic(x.beta * (x.chosen.sort().values - x.rejected.sort().values), x.label_smoothing)
    chosen_gap = x.chosen - _of_same_rank(x.batch.chosen, x.batch.rejected, x.index)
    rejected_gap = _of_same_rank(x.batch.rejected, x.batch.chosen, x.index) - x.rejected
    both = sum(_logistic(x.beta * gap, x.label_smoothing) for gap in (chosen_gap, rejected_gap))
    return both - both.detach() / 2


def apo_zero_loss(x: Pairs) -> Tensor:
    """1 - S(bc) + S(br), arXiv 2408.06266 eq. 7: chosen answers are better than the model's own."""
    return torch.sigmoid(-x.beta * x.chosen) + torch.sigmoid(x.beta * x.rejected)


def apo_down_loss(x: Pairs) -> Tensor:
    """S(bc) + 1 - S(b(c - r)), arXiv 2408.06266 eq. 8: chosen answers are worse than the model's own."""
    return torch.sigmoid(x.beta * x.chosen) + torch.sigmoid(-x.beta * (x.chosen - x.rejected))


def discopop_loss(x: Pairs) -> Tensor:
    """(1-k)(-L(bm)) + k exp(-bm) with k = S(bm / tau), arXiv 2406.08414 eq. 5.  Not monotone: rises at m = 0.

    The second term is exp(L(bm/tau) - bm): the product itself is 0 * inf below bm = -88.7.
    """
    m = x.beta * x.margin
    exponential = torch.exp(F.logsigmoid(m / x.discopop_tau) - m)
    return torch.sigmoid(-m / x.discopop_tau) * -F.logsigmoid(m) + exponential


def sft_loss(x: Pairs) -> Tensor:
    """Mean negative log-prob of the chosen answer; with sigmoid: RPO, arXiv 2404.19733."""
    return x.chosen_nll


def _logistic(margin: Tensor, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)


def _of_same_rank(values: Tensor, others: Tensor, index: Tensor) -> Tensor:
    """For values[index], those of `others` that have the same rank: [3 1 2], [7 9 8], [0, 1] -> [9 7]."""
    rank = values.argsort().argsort()
    return others.sort().values[rank[index]]


# Margins m under an f-divergence, u = exp(log-ratio): f'(u_chosen) - f'(u_rejected)


def _reverse_kl(x: Pairs) -> Tensor:
    return x.policy_gap - x.reference_gap  # in this order, as all other code: rounding then agrees


def _js(x: Pairs) -> Tensor:
    """ln(2u / (1 + u)) = ln 2 + L(log-ratio)."""
    return F.logsigmoid(x.chosen) - F.logsigmoid(x.rejected)


def _alpha(x: Pairs) -> Tensor:
    """(1 - u^-a) / a, exponents cut where the power leaves the dtype's range (88.7228 in fp32 for a >= 1)."""
    a, largest = x.f_alpha, math.log(torch.finfo(x.chosen.dtype).max)
    cap = math.floor(largest * 1e4) / 1e4 + min(0.0, math.log(a))
    return (torch.exp((-a * x.rejected).clamp(max=cap)) - torch.exp((-a * x.chosen).clamp(max=cap))) / a


# Relatives: without a reference model, or without pairs


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.6,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-L(b (p_c - p_r) - gamma), arXiv 2405.14734 eq. 6 -> losses and rewards (beta * p, detached), each [n].

    Log-probs [n] are **means** over tokens: sequence_logps(..., average=True).  Defaults are its authors' for
    Mistral-Base.  gamma >= 0; label_smoothing as in `dpo_loss`.
    """
    _above_0("beta", beta)
    _at_least_0("gamma", gamma)
    _check_smoothing(label_smoothing)
    chosen, rejected = _policy(policy_chosen_logps, policy_rejected_logps)
    losses = _logistic(beta * (chosen - rejected) - gamma, label_smoothing)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-L(b (s_c - s_r)) + cpo_alpha * chosen_nll, arXiv 2401.08417 -> losses, rewards beta * s, each [n].

    Log-probs [n] are sums over tokens.  chosen_nll [n] or scalar, mean negative log-prob a token, may be left
    out for cpo_alpha = 0 only.
    """
    _above_0("beta", beta)
    _at_least_0("cpo_alpha", cpo_alpha)
    _check_smoothing(label_smoothing)
    chosen, rejected = _policy(policy_chosen_logps, policy_rejected_logps)
    nll = _check_nll(chosen_nll, chosen, cpo_alpha > 0, "cpo_alpha > 0")
    losses = _logistic(beta * (chosen - rejected), label_smoothing)
    return (
        (losses + cpo_alpha * nll if cpo_alpha else losses),
        beta * chosen.detach(),
        beta * rejected.detach(),
    )


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    *,
    beta: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """chosen_nll - b L(log odds ratio), arXiv 2403.07691 eq. 6, 7 -> losses, rewards beta * p, each [n].

    Log-probs p [n] are **means** over tokens and below 0; odds = e^p / (1 - e^p).  chosen_nll [n] or scalar
    is -p of the chosen answer where it is left out.  A p nearer to 0 than the dtype's eps counts as -eps.
    """
    _above_0("beta", beta)
    chosen, rejected = _policy(policy_chosen_logps, policy_rejected_logps)
    nll = -chosen if chosen_nll is None else _check_nll(chosen_nll, chosen, True, "orpo_loss")
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return nll - beta * F.logsigmoid(log_odds), beta * chosen.detach(), beta * rejected.detach()


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """KTO, arXiv 2402.01306 eq. 8, of n single answers, each good or bad -> (losses, rewards), each [n].

    w (1 - S(b (ratio - z))) for desirable answers, w (1 - S(b (z - ratio))) for the others, z = max(0,
    mean(kl)). Log-probs [n] are sums, desirable [n] is bool.  kl: policy minus reference log-prob of
    answers that belong to *other* prompts, [k] or their mean, **of the whole global batch**, from a first
    pass without gradients; then micro-batches do not change the loss.  It is detached.
    """
    _above_0("beta", beta)
    for name, weight in ("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight):
        _at_least_0(name, weight)
    policy, reference = _logps(policy_logps=policy_logps, reference_logps=reference_logps)
    if desirable.dtype != torch.bool or desirable.shape != policy.shape:
        got = f"{desirable.dtype} {list(desirable.shape)}"
        raise ValueError(f"desirable must be bool {list(policy.shape)}, got {got}")
    z = torch.as_tensor(kl, dtype=policy.dtype, device=policy.device).detach().mean().clamp(min=0)
    ratio = policy - reference
    sign = torch.where(desirable, 1.0, -1.0).to(ratio.dtype)
    weight = torch.full_like(ratio, undesirable_weight).masked_fill(desirable, desirable_weight)
    return weight * torch.sigmoid(-sign * beta * (ratio - z)), beta * ratio.detach()


def _log1mexp(p: Tensor) -> Tensor:
    """ln(1 - e^p) for p < 0, exact near 0 and far below it; each side is kept off the other's bad values."""
    p = p.clamp(max=-torch.finfo(p.dtype).eps)
    near = p > -math.log(2)
    small, large = torch.where(near, p, -1.0), torch.where(near, -1.0, p)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


# Checks: one sentence each


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logps(**named: Tensor) -> list[Tensor]:
    """Log-probs [n] in one dtype, fp32 or fp64, -inf made finite."""
    first, shape = next((name, x.shape) for name, x in named.items())
    for name, x in named.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating-point log-probs, got {x.dtype}")
        if x.ndim != 1 or x.shape != shape:
            expected = list(shape) if len(shape) == 1 else "[n]"
            raise ValueError(f"{name} is {list(x.shape)}, expected {expected}, one value each as {first}")
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in named.values()) else torch.float32
    return [x.to(dtype).clamp(min=IMPOSSIBLE) for x in named.values()]


def _policy(chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    return _logps(policy_chosen_logps=chosen, policy_rejected_logps=rejected)


def _check_losses(weights: dict[str, float], e: float, f_divergence_type: str, has_lengths: bool) -> None:
    if not isinstance(weights, dict) or not weights:
        raise ValueError(
            f"loss_type is {weights!r}; expected {{name: weight}}, or one of {', '.join(LOSS_TYPES)}"
        )
    for name, weight in weights.items():
        _check_name("loss_type", name, LOSS_TYPES)
        _at_least_0(f"the weight of {name}", weight)
    _check_smoothing(e)
    _check_name("f_divergence_type", f_divergence_type, tuple(F_DIVERGENCES))
    for name in weights:
        takes = PREFERENCE_LOSSES[name].takes
        if e and "label_smoothing" not in takes:
            raise ValueError(f"label_smoothing is not defined for {name}, got {e}; set it to 0")
        if f_divergence_type != "reverse_kl" and "f_divergence" not in takes:
            raise ValueError(f"f_divergence_type is not defined for {name}, got {f_divergence_type!r}")
    per_token = [name for name in weights if "lengths" in PREFERENCE_LOSSES[name].takes]
    others = [name for name in weights if name not in per_token and name != "sft"]
    if per_token and others and not has_lengths:
        raise ValueError(
            f"{per_token[0]} takes log-probs a token and {others[0]} takes sums: "
            "pass sums with chosen_lengths and rejected_lengths"
        )


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1, cutoff=0.0)[0]
        raise ValueError(f"unknown {what} {name!r}; did you mean {near!r}? Known: {', '.join(known)}")


def _check_number(name: str, value: float, is_good: Callable[[float], bool], expected: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not is_good(value) or value == math.inf:
        raise ValueError(f"{name} must be a number {expected}, got {value!r}")


def _above_0(name: str, value: float) -> None:
    _check_number(name, value, lambda x: x > 0, "above 0")


def _at_least_0(name: str, value: float) -> None:
    _check_number(name, value, lambda x: x >= 0, "of at least 0")


def _check_smoothing(e: float) -> None:
    _check_number("label_smoothing", e, lambda x: 0 <= x < 0.5, "from 0 to less than 0.5")


def _check_nll(nll: Tensor | None, like: Tensor, is_needed: bool, user: str) -> Tensor | None:
    """chosen_nll [n], spread out if it is a scalar."""
    if nll is None:
        if is_needed:
            raise ValueError(f"{user} needs chosen_nll, the mean negative log-prob of chosen answers, [n]")
        return None
    if not nll.is_floating_point() or nll.shape not in (like.shape, ()):
        raise ValueError(
            f"chosen_nll must be floats {list(like.shape)} or a scalar, got {nll.dtype} {list(nll.shape)}"
        )
    return nll.to(like.dtype).expand(like.shape)


def _whole_batch(batch, index, like: Tensor) -> list[Tensor] | None:
    if batch is None and index is None:
        return None
    if batch is None or index is None or len(batch) != 4:
        raise ValueError("batch (the four log-probs of all pairs) and index (places in it) belong together")
    if index.dtype not in (torch.int32, torch.int64) or index.shape != like.shape:
        raise ValueError(f"index must be {list(like.shape)} integers, got {index.dtype} {list(index.shape)}")
    whole = _logps(**{f"batch[{place}]": x for place, x in enumerate(batch)})
    return [x.detach().to(like.device, like.dtype) for x in whole]


def _without_reference(logps: list[Tensor]) -> list[Tensor]:
    return [*logps[:2], *(torch.zeros_like(x) for x in logps[2:])]


def _per_token(x: Pairs, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None) -> Pairs:
    """The same pairs with means in place of sums."""
    values = {}
    for side, length in ("chosen", chosen_lengths), ("rejected", rejected_lengths):
        if length is None or length.shape != x.policy_chosen.shape:
            got = None if length is None else list(length.shape)
            raise ValueError(f"{side}_lengths must be {list(x.policy_chosen.shape)} counts, got {got}")
        for name in f"policy_{side}", f"reference_{side}":
            values[name] = getattr(x, name) / length.clamp(min=1)
    return dataclasses.replace(x, **values)


class Loss(NamedTuple):
    """takes: label_smoothing, f_divergence, lengths (log-probs a token), batch (looks across pairs)."""

    compute: Callable[[Pairs], Tensor]
    takes: tuple[str, ...] = ()


F_DIVERGENCES = {"reverse_kl": _reverse_kl, "js_divergence": _js, "alpha_divergence": _alpha}

PREFERENCE_LOSSES = {
    "sigmoid": Loss(sigmoid_loss, takes=("label_smoothing", "f_divergence")),
    "hinge": Loss(hinge_loss, takes=("f_divergence",)),
    "ipo": Loss(ipo_loss, takes=("f_divergence", "lengths")),
    "robust": Loss(robust_loss, takes=("label_smoothing", "f_divergence")),
    "exo_pair": Loss(exo_pair_loss, takes=("label_smoothing", "f_divergence")),
    "nca_pair": Loss(nca_pair_loss),
    "bco_pair": Loss(bco_pair_loss, takes=("batch",)),
    "sppo_hard": Loss(sppo_hard_loss),
    "aot": Loss(aot_loss, takes=("label_smoothing", "batch")),
    "aot_unpaired": Loss(aot_unpaired_loss, takes=("label_smoothing", "batch")),
    "aot_pair": Loss(aot_unpaired_loss, takes=("label_smoothing", "batch")),  # its name in TRL before 0.28
    "apo_zero": Loss(apo_zero_loss),
    "apo_down": Loss(apo_down_loss),
    "discopop": Loss(discopop_loss, takes=("f_divergence",)),
    "sft": Loss(sft_loss, takes=("label_smoothing", "f_divergence")),  # changed by neither: may be mixed in
    "sigmoid_norm": Loss(sigmoid_loss, takes=("label_smoothing", "lengths")),  # Tulu 3, arXiv 2411.15124
}
LOSS_TYPES = tuple(PREFERENCE_LOSSES)
BATCH_COUPLED = tuple(name for name, loss in PREFERENCE_LOSSES.items() if "batch" in loss.takes)
