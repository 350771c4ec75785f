"""What a preference run minimises: its fields, its reference, and the loss of a micro-batch of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phoenix.config import option
from phoenix.data.loader import GlobalBatch
from phoenix.data.pairs import PairBatch, PairLoader
from phoenix.files import UserError
from phoenix.kernels.linear_logps import LabelStats
from phoenix.losses import BATCH_COUPLED, F_DIVERGENCES, cpo_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss
from phoenix.model.mistral import Mistral
from phoenix.train.distributed import World
from phoenix.train.metrics import dpo_metrics, dpo_sums, dpo_zeros
from phoenix.train.reference import TOLERANCE, ReferenceCache

WITHOUT_REFERENCE = ("simpo", "cpo", "orpo")
ALONE = (*WITHOUT_REFERENCE, "kto")  # relatives of DPO, not mixed with others


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The fields of a recipe that say what is minimised; formulas stand in phoenix/losses.py."""

    loss_type: tuple[str, ...] = option(
        f"of LOSS_TYPES, several are added; or {', '.join(ALONE)}", ("sigmoid",)
    )
    loss_weights: tuple[float, ...] = option("a weight for each; none: all 1", ())
    beta: float = option("how strongly the policy is held to the reference", 0.1, bounds="above 0")
    label_smoothing: float = option("share of labels taken for wrong, below 0.5", 0.0, bounds="of at least 0")
    reference_free: bool = option("take the reference for uniform", False)
    f_divergence_type: str = option("what keeps the policy near", "reverse_kl", tuple(F_DIVERGENCES))
    f_alpha: float = option("of alpha_divergence", 1.0, bounds="above 0")
    discopop_tau: float = option("of discopop", 0.05, bounds="above 0, at most 1")
    ld_alpha: float | None = option(
        "LD-DPO: what a longer answer's excess counts", None, bounds="from 0 to 1"
    )
    simpo_gamma: float = option("of simpo: the margin asked, in rewards", 0.5, bounds="of at least 0")
    cpo_alpha: float = option("of cpo: weight of the chosen answers' loss", 1.0, bounds="of at least 0")
    desirable_weight: float = option("of kto: of chosen answers", 1.0, bounds="of at least 0")
    undesirable_weight: float = option("of kto: of rejected answers", 1.0, bounds="of at least 0")
    last_turn_only: bool = option("of several turns of an answer only the last has a loss", False)

    def check(self) -> None:
        """UserError for settings that have no meaning, alone or together."""
        names, weights = self.loss_type, self.loss_weights
        if weights and len(weights) != len(names):
            raise UserError(f"{len(weights)} loss_weights for {len(names)} of loss_type")
        if len(set(names)) < len(names) or not names:
            raise UserError(f"loss_type is {list(names)}; expected different names, at least one")
        alone = [name for name in names if name in ALONE]
        if alone and (len(names) > 1 or weights):
            raise UserError(f"{alone[0]} is not mixed with others and has no weight; name it alone")
        if self.ld_alpha is not None and set(names) & {"ipo", "sigmoid_norm", "simpo", "orpo"}:
            raise UserError(f"ld_alpha weighs sums of log-probs, and {names[0]} takes means; leave it out")
        one = torch.ones(1)
        try:
            self.losses(*torch.full((4, 1), -1.0), lengths=(one, one), kl=0.0)
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def settings(self) -> dict[str, Any]:
        """The fields above by name: what a run must share with its checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(LossConfig)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def has_reference(self) -> bool:
        return self.loss_type[0] not in WITHOUT_REFERENCE

    def losses(
        self, chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
        *, lengths: tuple[Tensor, Tensor], kl: Tensor | float = 0.0, **batch: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(losses, chosen rewards, rejected rewards) [n] of sums of log-probs [n] and their lengths [n].

        kl: for kto; batch: `batch` and `index` of dpo_loss.
        """
        name, beta = self.loss_type[0], self.beta
        means = chosen / lengths[0].clamp(min=1), rejected / lengths[1].clamp(min=1)
        if name == "simpo":
            return simpo_loss(*means, beta=beta, gamma=self.simpo_gamma, label_smoothing=self.label_smoothing)
        if name == "orpo":
            return orpo_loss(*means, beta=beta)
        if name == "cpo":
            more = {"cpo_alpha": self.cpo_alpha, "label_smoothing": self.label_smoothing}
            return cpo_loss(chosen, rejected, -means[0], beta=beta, **more)
        if name == "kto":
            return self._kto(chosen, rejected, reference_chosen, reference_rejected, kl)
        weights = dict(zip(self.loss_type, self.loss_weights or (1.0,) * len(self.loss_type)))
        return dpo_loss(
            chosen, rejected, reference_chosen, reference_rejected, beta=beta, loss_type=weights,
            label_smoothing=self.label_smoothing, reference_free=self.reference_free,
            f_divergence_type=self.f_divergence_type, f_alpha=self.f_alpha, discopop_tau=self.discopop_tau,
            chosen_lengths=lengths[0], rejected_lengths=lengths[1], chosen_nll=-means[0], **batch,
        )  # fmt: skip

    def _kto(
        self, chosen: Tensor, rejected: Tensor, *references_and_kl: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both answers as examples of their own, one good and one bad; the loss of a pair is their mean."""
        *references, kl = references_and_kl
        policy = torch.cat([chosen, rejected])
        losses, rewards = kto_loss(
            policy, torch.cat(references), torch.arange(len(policy), device=policy.device) < len(chosen),
            kl=kl, beta=self.beta, desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )  # fmt: skip
        return losses.view(2, -1).mean(0), *rewards.chunk(2)


class Whole(NamedTuple):
    """What a loss across pairs knows of its global batch: log-probs [4, N], pair -> its place there; kl."""

    batch: Tensor | None = None
    places: dict[int, int] | None = None
    kl: float = 0.0


class Objective:
    """The loss of a loader's pairs against their reference; all ranks use it alike.

    Losses across pairs (`BATCH_COUPLED`, and kto, whose KL is estimated on answers to other prompts) need
    `first_pass` on a global batch, then any number of micro-batches gives the same loss.
    """

    def __init__(self, config: LossConfig, loader: PairLoader) -> None:
        self.config, self.loader = config, loader
        self.others = loader.mismatched() if config.loss_type[0] == "kto" else None
        self.reference = self.other_reference = np.full((len(loader.plan), 2), np.nan, np.float32)

    def ask_reference(self, cache: ReferenceCache, model: Mistral, steps: int) -> None:
        """Log-probs of all pairs that the first so many steps see."""
        if self.config.has_reference:
            rows = self.loader.rows_of(steps)
            self.reference = cache.logps(model, self.loader, rows)
            if self.others:
                self.other_reference = cache.logps(model, self.others, rows)

    @torch.no_grad()
    def first_pass(self, model: Mistral, step: int, world: World) -> Whole:
        """For losses across pairs: a pass over the global batch of a step; nothing for all others."""
        if self.others:
            found = _logps(model, self.others.global_batch(step), world)
            ratios = [np.array(logps) - self.other_reference[pair] for pair, logps in found.items()]
            return Whole(kl=float(np.mean(ratios)))
        if not set(self.config.loss_type) & set(BATCH_COUPLED):
            return Whole()
        found = _logps(model, self.loader.global_batch(step), world)
        table = [[*logps, *self.reference[pair].tolist()] for pair, logps in found.items()]
        places = {pair: place for place, pair in enumerate(found)}
        return Whole(torch.tensor(table, device=world.device).T, places)

    def loss(self, micro: PairBatch, stats: LabelStats, whole: Whole) -> tuple[Tensor, Tensor]:
        """The sum of the pairs' losses, and the sums of `metrics.dpo_sums`; stats of the stream, [t] each."""
        chosen, rejected = micro.logps(stats.logps)
        kept = torch.from_numpy(self.reference[micro.pairs]).to(chosen)
        lengths, batch = micro.lengths.unbind(1), {}
        if whole.places is not None:
            places = torch.tensor([whole.places[pair] for pair in micro.pairs.tolist()], dtype=torch.int64)
            batch = {"batch": whole.batch.unbind(0), "index": places.to(chosen.device)}
        losses, *rewards = self.config.losses(
            chosen, rejected, *kept.unbind(1), lengths=lengths, kl=whole.kl, **batch
        )
        logits = micro.sums(stats.mean_logits)
        return losses.sum(), dpo_sums(losses, rewards, (chosen, rejected), kept[:, 0], lengths, logits)

    @torch.no_grad()
    def evaluate(self, model: Mistral, world: World) -> dict[str, float]:
        """`metrics.dpo_metrics` (prefix eval_) of the loader's first global batch, on all ranks alike."""
        sums, batch = dpo_zeros(world.device), self.loader.global_batch(0)
        whole = self.first_pass(model, 0, world)
        for _, micro in batch.share(world.rank, world.world_size):
            micro = micro.to(world.device)
            sums += self.loss(micro, model(micro.batch, stats=True), whole)[1]
        return dpo_metrics(world.sum(sums).tolist(), len(batch.rows), prefix="eval_")

    def check_first_loss(self, values: dict[str, float], cache: ReferenceCache) -> None:
        """Before the first step the policy is the reference, so the mean loss is its value at zero margin.

        values: `metrics.dpo_metrics` of the first step.  Raises UserError if the loss is off by more than
        1e-5 in fp32, 5e-3 in bf16, and the log-probs by more a token than two computations of one can be.  A
        loss without such a value (reference_free, sft, kto, the reference-free ones) passes.
        """
        config, dtype = self.config, cache.dtype
        if config.reference_free or not config.has_reference or {"sft", "kto"} & set(config.loss_type):
            return
        one = torch.ones(1)
        expected = float(config.losses(*torch.zeros(4, 1), lengths=(one, one))[0])
        tolerance = (1e-5 if dtype == torch.float32 else 5e-3) * max(1.0, abs(expected))
        off = abs(values["loss"] - expected)
        drift = max(
            abs(values[f"rewards/{side}"]) / config.beta / max(8.0, values[f"{side}_length"])
            for side in ("chosen", "rejected")
        )
        if math.isfinite(off) and off > tolerance and drift > TOLERANCE[dtype]:
            raise UserError(
                f"the loss of the first step is {values['loss']:.6f}; expected {expected:.6f}, since the "
                f"policy is still the reference; remove {cache.folder} to compute it again"
            )


def _logps(model: Mistral, batch: GlobalBatch, world: World) -> dict[int, list[float]]:
    """pair -> log-probs of its two answers, of a global batch, ascending, on all ranks alike."""
    found = {}
    for _, micro in batch.share(world.rank, world.world_size):
        micro = micro.to(world.device)
        values = torch.stack(micro.logps(model(micro.batch)), 1).tolist()
        found |= dict(zip(micro.pairs.tolist(), values))
    everywhere = {pair: values for part in world.gather(found) for pair, values in part.items()}
    return dict(sorted(everywhere.items()))
