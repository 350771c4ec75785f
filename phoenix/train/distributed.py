"""Processes, devices and sharding: what a recipe applies to a model from outside.

Gradients are summed over ranks, never averaged: a loss is divided once, by the count of the whole global
batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from phoenix.files import UserError
from phoenix.model.layout import PackedBatch
from phoenix.model.mistral import Mistral
from phoenix.model.pretrained import load_weights, materialise, meta_model, read_config


@dataclass
class World:
    """This process among all: rank, world_size, device; `stop` is set when a signal asks to end.

    dp_replicate: how often the sharded model stands in this world; each copy has world_size / dp_replicate
    neighbouring ranks.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop: bool = False
    dp_replicate: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place: one collective for all values of a step."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def say(self, text: str) -> None:
        """Print on rank 0 alone; a reader that has gone (`| head`) does not end the run."""
        if self.is_main:
            with contextlib.suppress(BrokenPipeError):
                print(text, flush=True)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: object) -> object:
        """The value of rank 0, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, work: Callable[[], object]) -> None:
        """Do it on rank 0 while the others wait; its UserError is raised on all ranks alike."""
        problem = ""
        if self.is_main:
            try:
                work()
            except UserError as error:
                problem = str(error)
        if problem := self.broadcast(problem):
            raise UserError(str(problem))

    def gather(self, value: object) -> list:
        """The values of all ranks, on every rank."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values


def seed_step(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch for one micro-batch: its noise depends on no rank, and on nothing that ran before."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + micro_batch) % 2**63)  # torch takes 64 bits


@contextlib.contextmanager
def start_world(dp_replicate: int = 1) -> Iterator[World]:
    """Join the processes of torchrun (RANK, WORLD_SIZE, LOCAL_RANK), or be alone; SIGTERM and SIGINT set
    `stop`.  dp_replicate: copies of the sharded model, see World.

    Restores signal handlers at the end, and destroys only a process group that it made.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, world_size, dp_replicate=dp_replicate)
    free_memory()  # of a run before this one
    keep_freed_memory()
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(
                f"{processes} processes, but this machine has {gpus} GPUs; lower --nproc-per-node"
            )
        world.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(world.device)
    makes_group = world.world_size > 1 and not dist.is_initialized()
    if makes_group:
        dist.init_process_group("cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo")

    def ask_to_stop(_signal: int, _frame: object) -> None:
        world.stop = True

    handlers = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield world
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if makes_group:
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones: mallopt, for this process.

    By default each large tensor is mapped anew and its pages are zeroed when they are first touched: 80,000
    page faults in a step of 2,048 tokens (55M parameters, fp32), and 10 % of its time.
    """
    if _has_glibc():
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never give the end of the heap back
        mallopt(m_mmap_max, 0)  # take everything from the heap


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def free_memory() -> None:
    """Give back what no name holds any more: sharded models are cycles, caches and the heap keep them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; "auto": bfloat16 where the device computes with it faster than with fp32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags = torch.cpu.get_capabilities()
    fast = any(value is True and ("bf16" in key) for key, value in flags.items())
    return torch.bfloat16 if fast else torch.float32


def load_model(
    folder: Path, world: World, *, compute_dtype: torch.dtype, logits_memory: int, **parts: Any
) -> Mistral:
    """A model in fp32, sharded over the ranks, with the weights of a folder; each rank reads its own rows.

    logits_memory: of Mistral; parts: activation_checkpointing and compile, of `parallelize`.
    """
    model = meta_model(read_config(folder)).float()
    model.logits_memory = logits_memory
    materialise(parallelize(model, world, compute_dtype=compute_dtype, **parts), world.device)
    load_weights(model, folder)
    return model


def parallelize(
    model: Mistral, world: World, *, compute_dtype: torch.dtype, activation_checkpointing: bool, compile: bool
) -> Mistral:
    """Checkpointing of blocks, then compiling of blocks, then FSDP2 over all ranks, or HSDP where
    world.dp_replicate is above 1: sharded within a copy, gradients summed over copies.  A lone process is not
    sharded.

    `model` may be on the meta device: materialise it afterwards.  A tied embedding, the norm and the head
    form one group, since they share a parameter.
    """
    model.compute_dtype = compute_dtype
    layers = model.model.layers
    for index, block in enumerate(layers):
        if activation_checkpointing:
            layers[index] = checkpoint_wrapper(block)
        if compile:
            layers[index].compile(dynamic=True)
    if world.world_size > 1:
        _shard(model, world, compute_dtype)
    return model


def _shard(model: Mistral, world: World, compute_dtype: torch.dtype) -> None:
    copies, shards = world.dp_replicate, world.world_size // world.dp_replicate
    names, sizes = ("dp_replicate", "dp_shard"), (copies, shards)
    first = 0 if copies > 1 else 1  # one copy: a mesh of the shards alone, plain FSDP
    mesh = init_device_mesh(world.device.type, sizes[first:], mesh_dim_names=names[first:])
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if model.config.tie_word_embeddings:
        groups: list = [[model.model.embed_tokens, model.model.norm, model.lm_head]]
    else:
        groups = [model.model.embed_tokens, [model.model.norm, model.lm_head]]
    for group in [*groups, *model.model.layers, model]:
        fully_shard(group, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo refuses a factor otherwise
            module.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(model, "logits")


def local_parameters(model: nn.Module) -> list[Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


def try_memory(model: Mistral, batch: PackedBatch, world: World) -> None:
    """Forward and backward of the largest micro-batch: too little memory shows now and not after hours.

    Leaves no gradient behind.  Raises UserError if the memory of a GPU does not suffice.
    """
    model.train()
    try:
        (model(batch.to(world.device)).sum() * 0).backward()
    except torch.OutOfMemoryError:
        raise UserError(
            "the largest micro-batch does not fit into memory; lower micro_batch_tokens, or set "
            "activation_checkpointing=true"
        ) from None
    model.zero_grad()


def reduce_gradients(model: nn.Module, world: World, extra: Tensor) -> tuple[float, Tensor]:
    """The norm of the whole gradient, and `extra` [m] summed over ranks: the one collective and the one read
    of a step.

    Whatever all ranks must agree on (sums of a loss, a stop signal) rides along in `extra`.
    """
    norms = torch._foreach_norm(_gradients(model))
    total = torch.stack([norm.double().square() for norm in norms]).sum() if norms else torch.zeros(())
    total = total.double() / world.dp_replicate  # every copy adds the same shards
    values = world.sum(torch.cat([total.reshape(1).to(extra.device), extra.double()]))
    return float(values[0].sqrt()), values[1:].cpu()


def scale_gradients(model: nn.Module, grad_norm: float, max_grad_norm: float) -> None:
    """Clip: scale the gradient to `max_grad_norm` if its norm is larger (torch's clip_grad_norm_, its 1e-6
    included).
    """
    factor = max_grad_norm / (grad_norm + 1e-6)
    if factor < 1:
        torch._foreach_mul_(_gradients(model), factor)


def _gradients(model: nn.Module) -> list[Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return [g for g in local if g.numel()]


def check_world(world: World, micro_batches: int) -> None:
    """UserError if the copies of the model do not divide the ranks, or if there are more ranks than
    micro-batches in a global batch: some would never have work."""
    if world.world_size % world.dp_replicate:
        raise UserError(
            f"{world.world_size} processes cannot hold dp_replicate={world.dp_replicate} equal copies of the "
            "model; set it to a divisor of the number of processes"
        )
    if world.world_size > micro_batches:
        raise UserError(
            f"{world.world_size} processes, but a global batch has only {micro_batches} micro-batches; raise "
            "global_batch_size, lower micro_batch_tokens, or start fewer processes"
        )
