"""From the log-probs of a micro-batch of pairs to its loss; what a loss across pairs knows of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from phoenix.data.loader import GlobalBatch
from phoenix.data.pairs import PairBatch
from phoenix.files import UserError
from phoenix.losses import BATCH_COUPLED, dpo_loss
from phoenix.model.mistral import Mistral
from phoenix.train.distributed import World
from phoenix.train.metrics import dpo_sums

Whole = dict[str, Any]  # the keyword `batch` of dpo_loss, and `places`: pair -> its place there; or nothing


def preference_loss(
    micro: PairBatch, label_logps: Tensor, reference: np.ndarray, whole: Whole, **options: Any
) -> tuple[Tensor, Tensor]:
    """The sum of the pairs' losses, and the sums [9] of `metrics.dpo_sums`.

    label_logps [t] of the micro-batch's stream; reference [pairs of the store, 2]; options: keywords of
    `dpo_loss`.
    """
    chosen, rejected = micro.logps(label_logps)
    kept = torch.from_numpy(reference[micro.pairs]).to(chosen)
    sizes = micro.lengths.unbind(1)
    if whole:
        places = torch.tensor([whole["places"][pair] for pair in micro.pairs.tolist()], dtype=torch.int64)
        options = {**options, "batch": whole["batch"], "index": places.to(chosen.device)}
    losses, *rewards = dpo_loss(
        chosen, rejected, *kept.unbind(1), chosen_lengths=sizes[0], rejected_lengths=sizes[1],
        chosen_nll=-chosen / sizes[0], **options,
    )  # fmt: skip
    return losses.sum(), dpo_sums(losses, *rewards, chosen, rejected, kept[:, 0], *sizes)


@torch.no_grad()
def whole_batch(
    model: Mistral, batch: GlobalBatch, reference: np.ndarray, world: World, loss_type: str | dict[str, float]
) -> Whole:
    """A first pass over a global batch, on all ranks alike; nothing for losses that look at one pair."""
    names = {loss_type} if isinstance(loss_type, str) else set(loss_type)
    if not names & set(BATCH_COUPLED):
        return {}
    found = {}
    for _, micro in batch.share(world.rank, world.world_size):
        micro = micro.to(world.device)
        values = torch.stack(micro.logps(model(micro.batch)), 1).tolist()
        found |= dict(zip(micro.pairs.tolist(), values))
    found = {pair: values for part in world.gather(found) for pair, values in part.items()}
    pairs = sorted(found)
    table = torch.tensor([[*found[pair], *reference[pair].tolist()] for pair in pairs], device=world.device)
    return {"batch": table.unbind(1), "places": {pair: place for place, pair in enumerate(pairs)}}


def check_options(**options: Any) -> None:
    """UserError if `dpo_loss` does not take them."""
    one = torch.ones(1)
    try:
        dpo_loss(*torch.zeros(4, 1), chosen_nll=one, chosen_lengths=one, rejected_lengths=one, **options)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_first_loss(loss: float, dtype: torch.dtype, **options: Any) -> None:
    """Before the first step the policy is the reference, so the mean loss is its value at zero margin.

    options: keywords of `dpo_loss`.  Raises UserError if it is not, within 1e-5 in fp32 and 5e-3 in bf16; a
    loss that has no such value (reference_free, sft) passes.
    """
    if options.get("reference_free") or "sft" in options["loss_type"]:
        return
    one = torch.ones(1)
    expected = float(dpo_loss(*torch.zeros(4, 1), chosen_lengths=one, rejected_lengths=one, **options)[0])
    tolerance = (1e-5 if dtype == torch.float32 else 5e-3) * max(1.0, abs(expected))
    if not abs(loss - expected) <= tolerance:
        raise UserError(
            f"the loss of the first step is {loss:.6f}; expected {expected:.6f}, since the policy is still "
            "the reference; remove the folder of reference_cache to compute it again"
        )
