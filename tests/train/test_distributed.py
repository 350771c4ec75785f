"""Any number of ranks computes what one process computes: gradients are summed, and scaled once."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from phoenix.files import UserError
from phoenix.model.layout import IGNORE_INDEX, AttentionLayout, PackedBatch
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.model.pretrained import load_weights, materialise, meta_model, read_config, save_model
from phoenix.train.distributed import (
    World,
    check_world,
    local_parameters,
    parallelize,
    reduce_gradients,
    resolve_dtype,
    scale_gradients,
    seed_step,
    start_world,
)  # fmt: skip
from phoenix.train.optim import build_optimizer

# 97 and 33 are odd, so that two ranks hold unequal parts.
TINY = MistralConfig(
    vocab_size=97, hidden_size=32, intermediate_size=33, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=5, initializer_range=0.1,
)  # fmt: skip
LENGTHS = [[5, 3], [9], [1, 6]]  # three micro-batches: the second rank gets one token that asks for nothing


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory) -> Path:
    model = Mistral(replace(TINY, tie_word_embeddings=request.param))
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(model.init_weights(torch.Generator().manual_seed(0)), path)
    return path


def micro_batch(lengths: list[int], seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TINY.vocab_size, (sum(lengths),), generator=generator)
    labels = torch.cat([tokens[1:], torch.tensor([IGNORE_INDEX])])
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
    return PackedBatch(tokens, labels, AttentionLayout.packed(lengths))


def shared(world: World, step: int) -> list[PackedBatch]:
    """The micro-batches of one rank, as many on each."""
    nothing = PackedBatch(torch.tensor([0]), torch.tensor([IGNORE_INDEX]), AttentionLayout.packed([1]))
    batches = [micro_batch(lengths, 10 * step + index) for index, lengths in enumerate(LENGTHS)]
    batches += [nothing] * (-len(batches) % world.world_size)
    return batches[world.rank :: world.world_size]


NUM_TARGETS = sum(length - 1 for lengths in LENGTHS for length in lengths)


def build(world: World, folder: Path, **options) -> Mistral:
    model = meta_model(read_config(folder)).float()
    defaults = {"compute_dtype": torch.float32, "activation_checkpointing": False, "compile": False}
    materialise(parallelize(model, world, **{**defaults, **options}), world.device)
    load_weights(model, folder)
    return model.train()


def backward(model: Mistral, world: World, step: int) -> torch.Tensor:
    total = torch.zeros(1, dtype=torch.float64)
    for batch in shared(world, step):
        loss = -model(batch).sum()
        (loss / NUM_TARGETS).backward()
        total += loss.detach() / NUM_TARGETS
    return total


def train(world: World, folder: Path, steps: int, **options) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    model = build(world, folder, **options)
    optimizer, rows = build_optimizer(model, "adamw", learning_rate=3e-3, weight_decay=0.1), []
    for step in range(steps):
        grad_norm, (loss,) = reduce_gradients(model, world, backward(model, world, step))
        scale_gradients(model, grad_norm, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rows.append((float(loss), float(grad_norm)))
    return rows


def train_copies(world: World, folder: Path, steps: int) -> list[tuple[float, float]]:
    return train(replace(world, dp_replicate=2), folder, steps)


def test_two_copies_of_two_shards_give_the_losses_of_one_process(folder, four_ranks):
    alone = torch.tensor(train(World(), folder, 20), dtype=torch.float64)
    for rank in four_ranks(train_copies, folder, 20):
        torch.testing.assert_close(torch.tensor(rank, dtype=torch.float64), alone, rtol=1e-5, atol=0)


def sizes_of_copies(world: World, folder: Path) -> list[tuple[int, int]]:
    return [pair[1:] for pair in local_sizes(replace(world, dp_replicate=2), folder)[0]]


def test_each_copy_is_sharded_over_its_own_ranks(folder, four_ranks):
    first, second, *other_copy = four_ranks(sizes_of_copies, folder)
    assert other_copy == [first, second]
    assert all(here + there == size for (size, here), (_, there) in zip(first, second))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(world: World, folder: Path) -> dict[str, torch.Tensor]:
    model = build(world, folder)
    backward(model, world, 0)
    return {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def test_two_ranks_give_the_losses_of_one_process(folder, two_ranks):
    alone = torch.tensor(train(World(), folder, 20), dtype=torch.float64)
    for rank in two_ranks(train, folder, 20):
        torch.testing.assert_close(torch.tensor(rank, dtype=torch.float64), alone, rtol=1e-5, atol=0)


def test_gradients_are_summed_over_ranks(folder, two_ranks):
    alone = gradients(World(), folder)
    for rank in two_ranks(gradients, folder):
        assert rank.keys() == alone.keys()
        for name, gradient in rank.items():
            torch.testing.assert_close(
                gradient, alone[name], rtol=0, atol=1e-6 * float(alone[name].abs().max())
            )


def local_sizes(world: World, folder: Path) -> tuple[list[tuple[str, int, int]], list[bool]]:
    """Whole and local size of each parameter; whether each block is gathered by itself."""
    model = build(world, folder)
    named = zip(model.named_parameters(), local_parameters(model))
    sizes = [(name, parameter.numel(), local.numel()) for (name, parameter), local in named]
    return sizes, [isinstance(block, FSDPModule) for block in model.model.layers]


def test_parameters_are_sharded(folder, two_ranks):
    (first, groups), (second, _) = two_ranks(local_sizes, folder)
    assert groups == [True] * TINY.num_hidden_layers
    for (name, size, here), (_, _, there) in zip(first, second):
        assert here + there == size and abs(here - there) <= max(32, size // 97), name
    assert all(size == local for _, size, local in local_sizes(World(), folder)[0])


def loaded_weights(world: World, folder: Path) -> dict[str, torch.Tensor]:
    return {name: full(p.detach()) for name, p in build(world, folder).named_parameters()}


def test_each_rank_reads_its_slice_of_the_weights(folder, two_ranks):
    saved = Mistral.from_pretrained(folder).state_dict()
    for rank in two_ranks(loaded_weights, folder):
        for name, tensor in rank.items():
            assert torch.equal(tensor, saved[name]), name


def clipped(
    world: World, folder: Path, max_grad_norm: float
) -> tuple[float, list[float], list[torch.Tensor]]:
    model = build(world, folder)
    backward(model, world, 0)
    extra = torch.tensor([1.5, world.rank + 1.0], dtype=torch.float64)
    grad_norm, sums = reduce_gradients(model, world, extra)
    scale_gradients(model, grad_norm, max_grad_norm)
    return float(grad_norm), [float(x) for x in sums], [full(p.grad) for p in model.parameters()]


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e4])
def test_the_norm_and_the_clipping_are_those_of_torch(folder, two_ranks, max_grad_norm):
    model = build(World(), folder)
    backward(model, World(), 0)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    expected = [parameter.grad for parameter in model.parameters()]
    alone, *ranks = clipped(World(), folder, max_grad_norm), *two_ranks(clipped, folder, max_grad_norm)
    assert alone[1] == [1.5, 1.0]
    assert [rank[1] for rank in ranks] == [[3.0, 3.0]] * 2  # what rides along is summed over ranks
    for ours, _, found in (alone, *ranks):
        assert ours == pytest.approx(norm, rel=1e-6)
        for gradient, wanted in zip(found, expected):
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def poisoned(world: World, folder: Path, value: float) -> float:
    """The gradient norm if the loss of one micro-batch of rank 0 is not finite."""
    model = build(world, folder)
    for index, batch in enumerate(shared(world, 0)):
        (-model(batch).sum() * (value if world.is_main and index == 1 else 1.0)).backward()
    grad_norm, _ = reduce_gradients(model, world, torch.zeros(1, dtype=torch.float64))
    return float(grad_norm)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_on_one_rank_is_seen_by_all(folder, two_ranks, value):
    for grad_norm in (poisoned(World(), folder, value), *two_ranks(poisoned, folder, value)):
        assert not math.isfinite(grad_norm)


def same_everywhere(world: World) -> tuple[object, list, float]:
    world.barrier()
    total = world.sum(torch.tensor([world.rank + 1.0]))
    return world.broadcast({"from": world.rank}), world.gather(f"rank {world.rank}"), float(total)


def test_a_world_of_one_or_two(two_ranks):
    assert same_everywhere(World()) == ({"from": 0}, ["rank 0"], 1.0)
    assert two_ranks(same_everywhere) == [({"from": 0}, ["rank 0", "rank 1"], 3.0)] * 2


def test_activation_checkpointing_changes_nothing(folder, two_ranks):
    plain = train(World(), folder, 3)
    assert train(World(), folder, 3, activation_checkpointing=True) == plain
    sharded = two_ranks(train_with_checkpointing, folder)
    torch.testing.assert_close(torch.tensor(sharded[0]), torch.tensor(plain), rtol=1e-5, atol=0)


def train_with_checkpointing(world: World, folder: Path) -> list[tuple[float, float]]:
    return train(world, folder, 3, activation_checkpointing=True)


@pytest.mark.slow  # a minute for the compiler
def test_compiling_changes_rounding_alone(folder):
    plain = torch.tensor(train(World(), folder, 5))
    compiled = torch.tensor(train(World(), folder, 5, compile=True))
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)


def masters(world: World, folder: Path) -> tuple[set, float, float]:
    """dtypes of parameters and gradients, and the greatest step and least distance of bf16 numbers."""
    model = build(world, folder, compute_dtype=torch.bfloat16)
    before = [full(p.detach()).clone() for p in model.parameters()]
    backward(model, world, 0)
    dtypes = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}
    optimizer = build_optimizer(model, "adamw", learning_rate=1e-6)
    optimizer.step()
    moved = [(full(p.detach()) - old).abs() for p, old in zip(model.parameters(), before)]
    lost = [
        (full(p.detach()).bfloat16() == old.bfloat16()).float().mean()
        for p, old in zip(model.parameters(), before)
    ]
    return dtypes, float(torch.stack([m.max() for m in moved]).max()), float(torch.stack(lost).min())


def test_masters_stay_fp32_and_take_steps_that_bf16_would_lose(folder, two_ranks):
    for dtypes, step, lost in (masters(World(), folder), *two_ranks(masters, folder)):
        assert dtypes == {torch.float32}
        assert 0 < step <= 1.1e-6 and lost > 0.9


def test_the_noise_of_a_micro_batch_depends_on_nothing_that_ran_before():
    def draw(*place):
        seed_step(*place)
        return torch.rand(4)

    first = draw(42, 3, 1)
    torch.rand(1000)
    assert torch.equal(draw(42, 3, 1), first)
    others = [draw(42, 3, 2), draw(42, 4, 1), draw(43, 3, 1), draw(20_240_131, 3, 1), draw(2**70, 3, 1)]
    assert not any(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_to_stop_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with start_world() as world:
        assert not world.stop
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a second one while the first is acted upon does no harm
        assert world.stop
    assert signal.getsignal(number) is before


def group_of_others(world: World) -> tuple[int, int, bool]:
    with start_world() as inner:
        found = inner.rank, inner.world_size
    return *found, dist.is_initialized()


def test_a_group_made_by_others_stays(two_ranks):
    assert two_ranks(group_of_others) == [(0, 2, True), (1, 2, True)]


def test_a_group_of_our_own_goes(monkeypatch, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with start_world() as world:
        assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
    assert not dist.is_initialized()


def test_more_ranks_than_micro_batches_are_refused():
    check_world(World(0, 4, dp_replicate=2), 4)
    with pytest.raises(UserError, match=r"4 processes cannot hold dp_replicate=3 equal copies .* a divisor"):
        check_world(World(0, 4, dp_replicate=3), 4)
    with pytest.raises(UserError, match="5 processes, but a global batch has only 4 micro-batches; raise"):
        check_world(World(0, 5), 4)


def test_dtype_by_name():
    cpu = torch.device("cpu")
    assert resolve_dtype("float32", cpu) is torch.float32 and resolve_dtype("bfloat16", cpu) is torch.bfloat16
    assert resolve_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
