"""TRL's own DPOTrainer.dpo_loss (up to 0.28 a method that takes log-probs), and the inputs it is asked about.

    python tests/oracle/trl_dpo.py      writes dpo_loss.json, which tests/test_losses.py reads without TRL

Inputs are multiples of 1/64, so that differences of them are exact in fp32 and a deviation is the loss's own.
The file holds TRL's results in fp32, and those in fp64 where the former are off by more than 1e-6 (few are,
by cancellation); a NaN of TRL's and what is beyond 1e30 is null.
"""

import json
import types
from pathlib import Path

import torch
import trl
from torch import Tensor
from trl.trainer.dpo_config import FDivergenceConstants, FDivergenceType
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import RunningMoments

GOLDEN = Path(__file__).with_name("dpo_loss.json")
RESULTS = ("losses", "chosen_rewards", "rejected_rewards", "chosen_grad", "rejected_grad")
LOSS_TYPES = """sigmoid hinge ipo robust exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero
    apo_down discopop sft""".split()
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
DIVERGENT = ("sigmoid", "robust", "exo_pair", "hinge", "ipo")
# exo_pair with 1e-3 stands for no smoothing: TRL sets that itself
SETTINGS = [
    *[{"loss_type": name, "beta": beta} for name in LOSS_TYPES for beta in (0.1, 0.5)],
    *[{"loss_type": name, "beta": 0.1, "label_smoothing": e} for name in SMOOTHED for e in (0.1, 0.4)],
    *[{"loss_type": n, "beta": 0.1, "f_divergence_type": "js_divergence"} for n in DIVERGENT],
    *[
        {"loss_type": n, "beta": 0.1, "f_divergence_type": "alpha_divergence", "f_alpha": alpha}
        for n in DIVERGENT
        for alpha in (1.0, 0.5)
    ],
    *[{"loss_type": n, "beta": 0.1, "reference_free": True} for n in ("sigmoid", "hinge", "apo_zero")],
    {"loss_type": "discopop", "beta": 0.1, "discopop_tau": 0.5},
]


def make_inputs(n: int, seed: int) -> dict[str, list[Tensor]]:
    """Policy chosen and rejected, reference chosen and rejected, each [n], by kind."""
    generator = torch.Generator().manual_seed(seed)
    reference = -100 - 300 * torch.rand(2, n, generator=generator)
    policy = reference + 12 * torch.randn(2, n, generator=generator)
    reference, policy = ((64 * x).round() / 64 for x in (reference, policy))
    far = torch.tensor([-1e4, -2500, -900, -120, 0, 120, 900, 2500, 1e4])
    return {
        "random": [*policy.unbind(), *reference.unbind()],
        "extreme": [x.flatten() for x in (*torch.meshgrid(far, far, indexing="ij"), *torch.zeros(2, 81))],
        "zero": [-30 * torch.arange(1.0, 4.0)] * 4,
    }


def trainer(keywords: dict) -> types.SimpleNamespace:
    """What dpo_loss reads of a trainer.  The divergence is the enum: by name it is silently ignored."""
    return types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), use_distributed=False),
        running=RunningMoments(accelerator=types.SimpleNamespace(use_distributed=False)),
        beta=keywords["beta"],
        label_smoothing=keywords.get("label_smoothing", 0.0),
        reference_free=keywords.get("reference_free", False),
        f_divergence_type=FDivergenceType(keywords.get("f_divergence_type", "reverse_kl")),
        f_divergence_params={FDivergenceConstants.ALPHA_DIVERGENCE_COEF_KEY: keywords.get("f_alpha", 1.0)},
        args=types.SimpleNamespace(discopop_tau=keywords.get("discopop_tau", 0.05)),
        loss_type=[keywords["loss_type"]],
    )


def trl_loss(
    inputs: list[Tensor], keywords: dict, of: types.SimpleNamespace | None = None
) -> dict[str, Tensor]:
    """Losses, rewards, and gradients of the summed losses with respect to the policy."""
    policy = [x.clone().requires_grad_() for x in inputs[:2]]
    loss_type = keywords["loss_type"]
    output = {"nll_loss": keywords.get("chosen_nll")}
    results = DPOTrainer.dpo_loss(of or trainer(keywords), *policy, *inputs[2:], loss_type, output)
    slopes = (
        torch.autograd.grad(results[0].sum(), policy, allow_unused=True)
        if loss_type != "sft"
        else (None,) * 2
    )
    slopes = [torch.zeros_like(x) if slope is None else slope for x, slope in zip(policy, slopes)]
    return dict(zip(RESULTS, [x.detach() for x in (*results, *slopes)]))


def exact_where_rounded(inputs: list[Tensor], keywords: dict) -> dict[str, Tensor]:
    """As the file has them.  alpha_divergence cuts exponents by dtype: its fp64 is another function."""
    results, wide = trl_loss(inputs, keywords), trl_loss([x.double() for x in inputs], keywords)
    if keywords.get("f_divergence_type") == "alpha_divergence":
        return results
    return {name: torch.where(is_off(x, wide[name]), wide[name], x) for name, x in results.items()}


def is_off(x: Tensor, exact: Tensor) -> Tensor:
    return ~((x - exact).abs() <= 1e-6 * exact.abs()) & ~(x == exact)


def numbers(values: Tensor) -> list[float | None]:
    return [float(f"{x:.9g}") if abs(x) < 1e30 else None for x in values.tolist()]


def write() -> None:
    """Smaller than what test_trl_dpo.py runs: 4 pairs of each kind, one beta."""
    inputs = make_inputs(4, seed=0)
    some = [4, 8, 15, 20, 36, 44, 60, 72, 80]
    inputs["extreme"] = [x[some] for x in inputs["extreme"]]
    cases = []
    for keywords in [x for x in SETTINGS if x["loss_type"] != "sft" and x["beta"] == 0.1]:
        for kind, values in inputs.items():
            name = "-".join(str(x) for x in keywords.values()) + "-" + kind
            results = {name: numbers(x) for name, x in exact_where_rounded(values, keywords).items()}
            cases.append({"name": name, "inputs": kind, "keywords": keywords, **results})
    head = {
        "trl": trl.__version__,
        "inputs": {kind: [numbers(x) for x in four] for kind, four in inputs.items()},
    }
    lines = ",\n".join(json.dumps(case) for case in cases)
    GOLDEN.write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    write()
