"""Schedules and optimizers are the published ones: those of transformers and of torch."""

import math

import pytest
import torch
from torch import nn

from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.train.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate_factor

TINY = MistralConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.1,
)  # fmt: skip


def tiny_model(**changes) -> Mistral:
    return Mistral(TINY, **changes).init_weights(torch.Generator().manual_seed(0))


def published_factors(schedule: str, total_steps: int, warmup_steps: int, steps: int) -> list[float]:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    numbers = {"num_warmup_steps": warmup_steps}
    if schedule != "constant":
        numbers["num_training_steps"] = total_steps
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    scheduler, factors = make(optimizer, **numbers), []
    for _ in range(steps):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.peers
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total_steps, warmup_steps", [(1, 0), (20, 0), (20, 3), (7, 7), (5, 9), (228, 23)])
def test_schedules_equal_those_of_transformers(schedule, total_steps, warmup_steps):
    steps = max(total_steps, warmup_steps)
    ours = [learning_rate_factor(schedule, step, total_steps, warmup_steps) for step in range(steps)]
    assert ours == pytest.approx(published_factors(schedule, total_steps, warmup_steps, steps), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_stays_at_its_end(schedule):
    end = learning_rate_factor(schedule, 20, 20, 2)
    assert learning_rate_factor(schedule, 10_000, 20, 2) == end
    assert end == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-15)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_norms_do_not(optim, tied):
    model = Mistral(MistralConfig(**{**vars(TINY), "tie_word_embeddings": tied}))
    model.init_weights(torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, optim, learning_rate=0.5, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(stepped) == len(set(stepped)) == len(list(model.parameters()))  # a tied weight steps once
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.endswith("norm.weight"), name


def follow(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int) -> list[torch.Tensor]:
    path, generator = [], torch.Generator().manual_seed(1)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


def naive_adamw(start: torch.Tensor, steps: int, *, rate, beta1, beta2, eps, decay) -> list[torch.Tensor]:
    """Loshchilov and Hutter 2019, algorithm 2, in fp64."""
    generator, weight = torch.Generator().manual_seed(1), start.double()
    mean, square, path = torch.zeros_like(weight), torch.zeros_like(weight), []
    for t in range(1, steps + 1):
        gradient = torch.randn(start.shape, generator=generator).double()
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        update = (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + eps)
        weight = weight - rate * decay * weight - rate * update
        path.append(weight)
    return path


def naive_rmsprop(start: torch.Tensor, steps: int, *, rate, eps) -> list[torch.Tensor]:
    """Hinton's lecture 6e with torch's default alpha of 0.99, eps outside of the root, in fp64."""
    generator, weight, square, path = torch.Generator().manual_seed(1), start.double(), 0.0, []
    for _ in range(steps):
        gradient = torch.randn(start.shape, generator=generator).double()
        square = 0.99 * square + 0.01 * gradient**2
        weight = weight - rate * gradient / (square.sqrt() + eps)
        path.append(weight)
    return path


def test_adamw_and_rmsprop_follow_their_papers():
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}
    layer = nn.Linear(3, 5, bias=False)
    layer.weight.data.copy_(start)
    ours = follow(build_optimizer(layer, "adamw", **options), layer.weight, 6)
    naive = naive_adamw(start, 6, rate=0.02, beta1=0.8, beta2=0.9, eps=1e-3, decay=0.1)
    torch.testing.assert_close(torch.stack(ours), torch.stack(naive).float())

    layer.weight.data.copy_(start)
    ours = follow(build_optimizer(layer, "rmsprop", learning_rate=0.02, eps=1e-3), layer.weight, 6)
    torch.testing.assert_close(
        torch.stack(ours), torch.stack(naive_rmsprop(start, 6, rate=0.02, eps=1e-3)).float()
    )


def test_defaults_are_those_of_transformers():
    group = build_optimizer(tiny_model(), "adamw", learning_rate=1e-3).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)
    assert math.isclose(learning_rate_factor("cosine", 0, 10), 1.0)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_state_is_there_before_the_first_step(optim):
    def shapes(optimizer: torch.optim.Optimizer) -> list:
        return [{k: (v.shape, v.dtype) for k, v in state.items()} for state in optimizer.state.values()]

    model = tiny_model()
    optimizer = build_optimizer(model, optim, learning_rate=1e-3)
    before = shapes(optimizer)
    assert len(before) == len(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert shapes(optimizer) == before
