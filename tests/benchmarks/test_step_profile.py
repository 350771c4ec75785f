"""The profile of a step counts the products that a step really has."""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import step_profile


def test_products_have_the_flops_of_the_linear_layers_of_a_step():
    config = step_profile.TINY_MODEL
    model = step_profile.Mistral(config).init_weights()
    batch = step_profile.make_batch(config.vocab_size, 64)
    products = step_profile.make_products(model, batch, torch.float32)
    with FlopCounterMode(display=False) as counter:
        products()
    _, in_products = config.num_parameters()
    head = config.vocab_size * config.hidden_size
    targets = int((batch.labels >= 0).sum())
    assert counter.get_total_flops() == 6 * ((in_products - head) * 64 + head * targets)
    with FlopCounterMode(display=False) as counter:
        step_profile.make_step(model, batch)()
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 6 * (
        (in_products - head) * 64 + head * targets
    )
