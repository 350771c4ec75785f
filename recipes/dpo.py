"""Direct preference optimisation, section 3.3 of the paper: a chat model and pairs -> a better one.

    torchrun recipes/dpo.py                                   the shipped German pairs, after recipes/sft.py
    torchrun --nproc-per-node=8 recipes/dpo.py recipes/configs/phoenix_dpo.toml

The reference's log-probs are computed once, before the first step, and kept on disk: no second model is in
memory.  Writes a run folder as recipes/sft.py does.  SIGTERM or Ctrl-C saves a checkpoint and exits with 75;
the same command goes on.  --help lists every field.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import prepare
import sft
import torch

from phoenix import chat
from phoenix.config import check_bounds, load_config, option, run_recipe
from phoenix.data.pairs import PairLoader, require_pairs
from phoenix.data.store import TokenStore
from phoenix.files import Interrupted, UserError, verify_folder
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.model.pretrained import read_config
from phoenix.report import training_report
from phoenix.tokenizer import Tokenizer
from phoenix.train import checkpoint, distributed, metrics
from phoenix.train.distributed import World
from phoenix.train.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate_factor
from phoenix.train.preference import LossConfig, Objective
from phoenix.train.reference import ReferenceCache
from phoenix.train.run import record_start, run_folder

QUICKSTART = sft.CONFIGS / "smollm2_de_dpo.toml"
PAIRS = sft.CONFIGS / "quickstart_prepare_dpo.toml"


@dataclass(frozen=True, kw_only=True)
class DPOConfig(LossConfig):
    """Preference training of a Mistral or Llama model on a token store of pairs."""

    model_name_or_path: Path = option("folder of the model to start from (Hugging Face layout)")
    store: Path = option("token store of pairs, written by recipes/prepare.py with kind=pairs")
    output_dir: Path = option("run folder to write; a run that stands there is continued")
    reference_model: Path | None = option("another reference than the starting policy", None)
    reference_cache: Path | None = option("its log-probs; none: beside the store", None)
    global_batch_size: int = option("pairs a step, over all ranks", 64, bounds="above 0")
    micro_batch_tokens: int = option("tokens a rank holds at once; for memory", 4096, bounds="above 0")
    num_train_epochs: float = option("passes over the data", 1.0, bounds="above 0")
    max_steps: int | None = option("so many steps, whatever num_train_epochs says", None, bounds="above 0")
    learning_rate: float = option("peak learning rate", 5e-7, bounds="above 0")
    lr_scheduler_type: str = option("shape of the schedule", "linear", tuple(SCHEDULES))
    warmup_ratio: float = option("share of the steps over which the rate rises", 0.1, bounds="from 0 to 1")
    optim: str = option("optimizer", "adamw", tuple(OPTIMIZERS))
    adam_beta1: float = option("AdamW's first beta", 0.9, bounds="of at least 0 and below 1")
    adam_beta2: float = option("AdamW's second beta", 0.999, bounds="of at least 0 and below 1")
    adam_epsilon: float = option("epsilon of the optimizer", 1e-8, bounds="of at least 0")
    weight_decay: float = option("decay of matrices; norms never decay", 0.0, bounds="of at least 0")
    max_grad_norm: float = option("clip the gradient to this norm", 1.0, bounds="above 0 (inf: no limit)")
    dtype: str = option("of the computation; weights are fp32", "auto", ("auto", "bfloat16", "float32"))
    save_dtype: str = option("of the written model", "bfloat16", ("bfloat16", "float16", "float32"))
    activation_checkpointing: bool = option("compute blocks twice, hold less", False)
    compile: bool = option("torch.compile the blocks", False)
    logits_memory: float = option("GiB of logits kept for the backward pass", 1.0, bounds="of at least 0")
    seed: int = option("of the order of pairs", 42, bounds="of at least 0")
    eval_steps: int = option("steps between evaluations; one more at the end", 100, bounds="above 0")
    dp_replicate: int = option("copies of the model, each sharded over its ranks (HSDP)", 1, bounds="above 0")
    save_steps: int = option("steps between checkpoints; one more at the end", 100, bounds="above 0")
    save_total_limit: int = option("checkpoints to keep", 2, bounds="above 0")
    max_skipped_steps: int = option("end after so many non-finite gradients on end", 5, bounds="above 0")
    sample_prompts: tuple[str, ...] = option("prompts answered at each evaluation", ())
    sample_max_new_tokens: int = option("tokens of such an answer at most", 128, bounds="above 0")
    report_to: tuple[str, ...] = option("further views of the metrics: tensorboard, wandb", ())


def main(config: DPOConfig) -> Path:
    """Train; returns the folder of the trained model.  Raises UserError, or Interrupted after a signal."""
    check(config)
    with (
        distributed.start_world(config.dp_replicate) as world,
        run_folder(config.output_dir, world) as at_end,
    ):
        make_what_is_missing(config, world)
        world.on_main(lambda: verify(config))
        loader = open_pairs(config, "train", config.global_batch_size)
        require_pairs(config.store, loader)
        store = loader.store
        model_config, tokenizer = open_model(config.model_name_or_path, store)
        if config.reference_model:
            open_model(config.reference_model, store)
        held_out = open_pairs(config, "eval") if TokenStore.has_split(config.store, "eval") else None
        objective, held_out = Objective(config, loader), held_out and Objective(config, held_out)
        total_steps = config.max_steps or loader.total_steps(config.num_train_epochs)
        distributed.check_world(world, loader.num_micro_batches)

        dtype = distributed.resolve_dtype(config.dtype, world.device)
        peak = metrics.peak_flops(world.device, dtype)
        announce(config, model_config, loader, world, total_steps=total_steps, dtype=dtype)
        start_folder = config.reference_model or config.model_name_or_path
        root = config.reference_cache or config.store.with_name(f"{config.store.name}-reference")
        cache = ReferenceCache(root, start_folder, dtype, world)
        parts = {
            "logits_memory": int(config.logits_memory * 2**30), "compile": config.compile,
            "activation_checkpointing": config.activation_checkpointing, "compute_dtype": dtype,
        }  # fmt: skip
        model = distributed.load_model(start_folder, world, **parts)
        objective.ask_reference(cache, model, total_steps)
        if held_out:
            held_out.ask_reference(cache, model, 1)
        if config.reference_model:  # freed before the policy is there: only one of them is ever in memory
            del model
            distributed.free_memory()
            model = distributed.load_model(config.model_name_or_path, world, **parts)
        optimizer = build_optimizer(
            model, config.optim, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        )  # fmt: skip

        same = identity(config, store, cache)
        state = {**dict.fromkeys(("step", "num_tokens", "skipped_steps", "skipped_in_a_row"), 0), **same}
        checkpoints = config.output_dir / "checkpoints"
        if saved := checkpoint.find_checkpoints(checkpoints):
            state = checkpoint.load_checkpoint(saved[-1], model, optimizer, world, same)
            world.say(f"going on at step {state['step']} from {saved[-1]}")
        record_start(config.output_dir, config, world)
        saver = checkpoint.CheckpointWriter(checkpoints, model, optimizer, world, config.save_total_limit)
        at_end.callback(saver.close)
        views = {"report_to": config.report_to, "write": world.is_main}
        log = metrics.MetricsLog(config.output_dir, step=state["step"] if saved else -1, **views)
        distributed.try_memory(model, loader.largest_micro_batch(), world)
        warmup_steps = math.ceil(config.warmup_ratio * total_steps)
        if state["step"] == 0:
            evaluate(config, model, tokenizer, log, 0, world, held_out)
        bar = metrics.progress_bar(total_steps, state["step"], show=world.is_main)

        for step in range(state["step"], total_steps):
            start, batch = time.perf_counter(), loader.global_batch(step)
            sums, losses, flops = metrics.dpo_zeros(world.device), {}, 0.0
            model.train()
            whole = objective.first_pass(model, step, world)
            for index, micro in batch.share(world.rank, world.world_size):
                micro = micro.to(world.device)
                loss, values = objective.loss(micro, model(micro.batch, stats=True), whole)
                (loss / len(batch.rows)).backward()
                losses[index] = values
                sums += values
                layout = micro.batch.layout
                flops += metrics.training_flops(model_config, layout.q_length, layout.k_length.sum(1))
            extra = torch.tensor([flops, world.stop, saver.busy], dtype=torch.float64, device=world.device)
            grad_norm, (*sums, flops, stop, saving) = distributed.reduce_gradients(
                model, world, torch.cat([sums, extra])
            )

            learning_rate = config.learning_rate * learning_rate_factor(
                config.lr_scheduler_type, step, total_steps, warmup_steps
            )
            values, flags = metrics.dpo_metrics(sums, len(batch.rows)), {}
            if step == 0 and not config.reference_model:
                objective.check_first_loss(values, cache)
            if math.isfinite(grad_norm):
                distributed.scale_gradients(model, grad_norm, config.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
                state["skipped_in_a_row"] = 0
            else:  # on all ranks alike, since all have the same norm
                state["skipped_steps"] += 1
                state["skipped_in_a_row"] += 1
                flags = {"skipped_rows": sft.bad_rows(losses, batch, world)}
            optimizer.zero_grad()
            state["step"], state["num_tokens"] = step + 1, state["num_tokens"] + batch.num_tokens

            seconds = time.perf_counter() - start
            row = log.log(
                step + 1, **values, grad_norm=grad_norm, learning_rate=learning_rate, epoch=batch.epoch,
                num_tokens=state["num_tokens"], skipped_steps=state["skipped_steps"], **flags,
                step_seconds=seconds, tokens_per_second=batch.num_tokens / seconds, time=time.time(),
                mfu=float(flops) / seconds / peak / world.world_size,
                peak_memory_gib=metrics.peak_memory_gib(world.device),
            )  # fmt: skip
            metrics.update_bar(bar, row)
            if not saving:
                saver.finish()  # all ranks have written: the checkpoint gets its name
            if state["skipped_in_a_row"] >= config.max_skipped_steps:
                saver.finish()
                raise metrics.not_finite(config.max_skipped_steps, step, flags["skipped_rows"])
            last = step + 1 == total_steps
            if last or (step + 1) % config.eval_steps == 0:
                evaluate(config, model, tokenizer, log, step + 1, world, held_out)
            if last or stop or (step + 1) % config.save_steps == 0:
                saver.save(state, wait=last or stop)
            if stop and not last:
                raise Interrupted(f"stopped at step {step + 1} of {total_steps}; start again to go on")

        bar.close()
        log.close()
        folder = config.output_dir / "model"
        sft.export(config, model, tokenizer, store, folder)
        if world.is_main:
            world.say(f"wrote {folder} and {training_report(config.output_dir)}")
        return folder


def check(config: DPOConfig) -> None:
    """Everything cheap, before anything expensive."""
    metrics.check_trackers(config.report_to)
    check_bounds(config)
    config.check()


def open_model(folder: Path, store: TokenStore) -> tuple[MistralConfig, Tokenizer]:
    """Shape and tokenizer of a model, held against the store that it is to be trained on."""
    model_config, tokenizer = read_config(folder), Tokenizer.from_pretrained(folder)
    tokenizer.require_embeddings(model_config.vocab_size, folder)
    store.require_tokenizer(tokenizer.digest)
    template = store.manifest["chat_template"]
    if tokenizer.chat_template not in (None, template):
        raise UserError(
            f"{folder}: was tuned with the chat template {tokenizer.chat_template!r}, but the store has "
            f"{template!r}; prepare the store with chat_template={tokenizer.chat_template}"
        )
    store.require_template(chat.template_digest(template))
    chat.apply_template(tokenizer, template)
    return model_config, tokenizer


def open_pairs(config: DPOConfig, split: str, global_batch_size: int | None = None) -> PairLoader:
    store = TokenStore.open(config.store, split, kind="pairs")
    return PairLoader(
        store, seed=config.seed, global_batch_size=global_batch_size or len(store),
        micro_batch_tokens=config.micro_batch_tokens, last_turn_only=config.last_turn_only,
        ld_alpha=config.ld_alpha,
    )  # fmt: skip


def make_what_is_missing(config: DPOConfig, world: World) -> None:
    """The stages before, where they are the quickstart's: base model, fine-tuned model, store of pairs."""
    training = load_config(sft.SFTConfig, [], sft.QUICKSTART)
    if config.model_name_or_path == training.output_dir / "model" and not world.broadcast(
        config.model_name_or_path.exists()
    ):
        world.say(f"{config.model_name_or_path} is missing: running recipes/sft.py")
        sft.main(training)
    preparation = load_config(prepare.PrepareConfig, [], PAIRS)
    if config.store == preparation.output and config.model_name_or_path.exists():
        world.on_main(lambda: config.store.exists() or prepare.main(preparation))


def verify(config: DPOConfig) -> None:
    """Hash the models and the store."""
    for folder in filter(None, (config.model_name_or_path, config.reference_model)):
        read_config(folder)
        verify_folder(folder)
    for split in ("train", "eval")[: 1 + TokenStore.has_split(config.store, "eval")]:
        TokenStore.open(config.store, split, kind="pairs", verify=True)


def identity(config: DPOConfig, store: TokenStore, cache: ReferenceCache) -> dict:
    """What a checkpoint must share with this run for the run to be the same."""
    names = "global_batch_size micro_batch_tokens seed optim"
    fields = {**config.settings, **{name: getattr(config, name) for name in names.split()}}
    paths = {"model_name_or_path": str(config.model_name_or_path), "reference": cache.key["model"]}
    return {**paths, "store": store.digest, **fields}


def announce(
    config: DPOConfig, model: MistralConfig, loader: PairLoader, world: World,
    *, total_steps: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """The first lines say what will happen, before anything is loaded."""
    plan, options = loader.plan, {"activation_checkpointing": config.activation_checkpointing}
    memory = metrics.training_memory(
        model, dtype, world.world_size // world.dp_replicate, config.optim, **options,
        micro_batch_tokens=config.micro_batch_tokens, logits_memory=config.logits_memory * 2**30,
    )  # fmt: skip
    world.say(
        f"{model.num_parameters()[0] / 1e6:.1f}M parameters, {dtype} on {world.world_size} x {world.device}\n"
        f"{len(plan)} pairs, {plan.num_tokens} tokens ({loader.prefix.sum()} shared); {total_steps} steps\n"
        f"{' + '.join(config.loss_type)}, beta {config.beta}, learning rate {config.learning_rate}\n"
        f"memory a rank: about {memory / 2**30:.1f} GiB\nrun folder: {config.output_dir}"
    )


def evaluate(
    config: DPOConfig, model: Mistral, tokenizer: Tokenizer, log: metrics.MetricsLog, step: int, world: World,
    held_out: Objective | None,
) -> None:  # fmt: skip
    """Loss and rewards on the held-out pairs and answers to fixed prompts, on all ranks alike."""
    model.eval()
    if held_out:
        values = held_out.evaluate(model, world)
        log.log(step, **values)
        shown = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
        world.say(f"step {step}: " + ", ".join(f"{name} {values[name]:.4f}" for name in shown))
    sft.write_replies(config, model, tokenizer, step, world)


if __name__ == "__main__":
    run_recipe(main, DPOConfig, QUICKSTART)
