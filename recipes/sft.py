"""Supervised fine-tuning, section 3.2 of the paper: a base model and a token store -> a chat model.

    torchrun recipes/sft.py                                   the shipped German sample, on this machine
    torchrun --nproc-per-node=8 recipes/sft.py recipes/configs/phoenix_sft.toml learning_rate=1e-5

Writes a run folder: metrics.jsonl, samples.jsonl, checkpoints/, model/ (Hugging Face layout), report.html.
SIGTERM or Ctrl-C saves a checkpoint and exits with 75; the same command goes on.  --help lists every field.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import import_gguf
import prepare
import torch

from phoenix import chat
from phoenix.config import check_bounds, load_config, option, run_recipe
from phoenix.data.loader import GlobalBatch, Loader
from phoenix.data.packing import PACKING, Plan, make_plan
from phoenix.data.store import TokenStore
from phoenix.files import Interrupted, UserError, read_json_lines, verify_folder
from phoenix.generation import generate
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.model.pretrained import read_config, save_model
from phoenix.report import training_report
from phoenix.tokenizer import Tokenizer
from phoenix.train import checkpoint, distributed, metrics
from phoenix.train.distributed import World
from phoenix.train.optim import OPTIMIZERS, SCHEDULES, build_optimizer, learning_rate_factor
from phoenix.train.run import model_card, record_start, run_folder

CONFIGS = Path(__file__).parent / "configs"
QUICKSTART = CONFIGS / "smollm2_de.toml"


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning of a Mistral or Llama model on a token store."""

    model_name_or_path: Path = option("folder of the model to start from (Hugging Face layout)")
    store: Path = option("token store written by recipes/prepare.py")
    output_dir: Path = option("run folder to write; a run that stands there is continued")
    max_length: int = option("tokens of a packed row", default=2048, bounds="above 0")
    packing_strategy: str = option("whole documents, isolated; or the stream cut", "bfd", tuple(PACKING))
    assistant_only_loss: bool = option("train on the assistant's turns alone, not on every token", True)
    global_batch_size: int = option("packed rows a step, over all ranks", 512, bounds="above 0")
    micro_batch_tokens: int = option("tokens a rank holds at once, at least max_length; for memory", 2048)
    num_train_epochs: float = option("passes over the data", 1.0, bounds="above 0")
    max_steps: int | None = option("so many steps, whatever num_train_epochs says", None, bounds="above 0")
    learning_rate: float = option("peak learning rate", 2e-5, bounds="above 0")
    lr_scheduler_type: str = option("shape of the schedule", "cosine", tuple(SCHEDULES))
    warmup_ratio: float = option("share of the steps over which the rate rises", 0.0, bounds="from 0 to 1")
    schedule_steps: int | None = option("plan the schedule for so many steps", None, bounds="above 0")
    optim: str = option("optimizer", "adamw", tuple(OPTIMIZERS))
    adam_beta1: float = option("AdamW's first beta", 0.9, bounds="of at least 0 and below 1")
    adam_beta2: float = option("AdamW's second beta", 0.999, bounds="of at least 0 and below 1")
    adam_epsilon: float = option("epsilon of the optimizer", 1e-8, bounds="of at least 0")
    weight_decay: float = option("decay of matrices; norms never decay", 0.0, bounds="of at least 0")
    max_grad_norm: float = option("clip the gradient to this norm", 1.0, bounds="above 0 (inf: no limit)")
    neftune_noise_alpha: float = option("NEFTune noise; its paper used 5", 0.0, bounds="of at least 0")
    dtype: str = option("of the computation; weights are fp32", "auto", ("auto", "bfloat16", "float32"))
    save_dtype: str = option("of the written model", "bfloat16", ("bfloat16", "float16", "float32"))
    activation_checkpointing: bool = option("compute blocks twice, hold less", False)
    compile: bool = option("torch.compile the blocks", False)
    logits_memory: float = option("GiB of logits kept for the backward pass", 1.0, bounds="of at least 0")
    seed: int = option("of the order of rows and of noise", 42, bounds="of at least 0")
    eval_steps: int = option("steps between evaluations; one more at the end", 100, bounds="above 0")
    dp_replicate: int = option("copies of the model, each sharded over its ranks (HSDP)", 1, bounds="above 0")
    save_steps: int = option("steps between checkpoints; one more at the end", 100, bounds="above 0")
    save_total_limit: int = option("checkpoints to keep", 2, bounds="above 0")
    max_skipped_steps: int = option("end after so many non-finite gradients on end", 5, bounds="above 0")
    sample_prompts: tuple[str, ...] = option("prompts answered at each evaluation", ())
    sample_max_new_tokens: int = option("tokens of such an answer at most", 128, bounds="above 0")
    report_to: tuple[str, ...] = option("further views of the metrics: tensorboard, wandb", ())


def main(config: SFTConfig) -> Path:
    """Train; returns the folder of the trained model.  Raises UserError, or Interrupted after a signal."""
    check(config)
    with (
        distributed.start_world(config.dp_replicate) as world,
        run_folder(config.output_dir, world) as at_end,
    ):
        world.on_main(lambda: make_or_verify(config, world))
        model_config = read_config(config.model_name_or_path)
        tokenizer = Tokenizer.from_pretrained(config.model_name_or_path)
        tokenizer.require_embeddings(model_config.vocab_size, config.model_name_or_path)
        store = TokenStore.open(config.store, "train")
        store.require_tokenizer(tokenizer.digest)
        store.require_template(chat.template_digest(store.manifest["chat_template"]))
        chat.apply_template(tokenizer, store.manifest["chat_template"])
        plan = make_plan(store, config.max_length, config.packing_strategy, config.assistant_only_loss)
        batching = {"seed": config.seed, "micro_batch_tokens": config.micro_batch_tokens}
        loader = Loader(store, plan, global_batch_size=config.global_batch_size, **batching)
        total_steps = config.max_steps or loader.total_steps(config.num_train_epochs)
        distributed.check_world(world, loader.num_micro_batches)

        dtype = distributed.resolve_dtype(config.dtype, world.device)
        peak = metrics.peak_flops(world.device, dtype)
        announce(config, model_config, plan, world, total_steps=total_steps, dtype=dtype, peak_flops=peak)
        model = distributed.load_model(
            config.model_name_or_path, world, compute_dtype=dtype, compile=config.compile,
            activation_checkpointing=config.activation_checkpointing,
            logits_memory=int(config.logits_memory * 2**30),
        )  # fmt: skip
        model.neftune_noise_alpha = config.neftune_noise_alpha
        optimizer = build_optimizer(
            model, config.optim, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        )  # fmt: skip

        counts = dict.fromkeys(("step", "num_tokens", "skipped_steps", "skipped_in_a_row"), 0)
        state = {**counts, "recent_losses": [], **identity(config, store)}
        checkpoints = config.output_dir / "checkpoints"
        if saved := checkpoint.find_checkpoints(checkpoints):
            state = checkpoint.load_checkpoint(saved[-1], model, optimizer, world, identity(config, store))
            world.say(f"going on at step {state['step']} from {saved[-1]}")
        record_start(config.output_dir, config, world)
        saver = checkpoint.CheckpointWriter(checkpoints, model, optimizer, world, config.save_total_limit)
        at_end.callback(saver.close)
        views = {"report_to": config.report_to, "write": world.is_main}
        log = metrics.MetricsLog(config.output_dir, step=state["step"] if saved else -1, **views)
        distributed.try_memory(model, loader.largest_micro_batch(), world)
        warmup_steps = math.ceil(config.warmup_ratio * total_steps)
        if state["step"] == 0:
            evaluate(config, model, tokenizer, log, 0, world)
        bar = metrics.progress_bar(total_steps, state["step"], show=world.is_main)

        for step in range(state["step"], total_steps):
            start, batch = time.perf_counter(), loader.global_batch(step)
            sums, losses, flops = torch.zeros(3, dtype=torch.float64, device=world.device), {}, 0.0
            model.train()
            for index, micro in batch.share(world.rank, world.world_size):
                distributed.seed_step(config.seed, step, index)
                stats = model(micro.to(world.device), stats=True)
                (-stats.logps.sum() / batch.num_target_tokens).backward()
                losses[index] = metrics.sft_sums(stats)
                sums += losses[index]
                flops += metrics.training_flops(model_config, micro.layout.q_length)
            extra = torch.tensor([flops, world.stop, saver.busy], dtype=torch.float64, device=world.device)
            grad_norm, (*sums, flops, stop, saving) = distributed.reduce_gradients(
                model, world, torch.cat([sums, extra])
            )

            learning_rate = config.learning_rate * learning_rate_factor(
                config.lr_scheduler_type, step, config.schedule_steps or total_steps, warmup_steps
            )
            values, flags = metrics.sft_metrics(sums, batch.num_target_tokens), {}
            if math.isfinite(grad_norm):
                if metrics.is_spike(state["recent_losses"], values["loss"]):
                    flags = {"loss_spike": True}
                    saver.save(state)  # what was before it
                distributed.scale_gradients(model, grad_norm, config.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
                state["skipped_in_a_row"] = 0
                state["recent_losses"] = [*state["recent_losses"], values["loss"]][-metrics.SPIKE_WINDOW :]
            else:  # on all ranks alike, since all have the same norm
                state["skipped_steps"] += 1
                state["skipped_in_a_row"] += 1
                flags = {"skipped_rows": bad_rows(losses, batch, world)}
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
                evaluate(config, model, tokenizer, log, step + 1, world)
            if last or stop or (step + 1) % config.save_steps == 0:
                saver.save(state, wait=last or stop)
            if stop and not last:
                raise Interrupted(f"stopped at step {step + 1} of {total_steps}; start again to go on")

        bar.close()
        log.close()
        folder = config.output_dir / "model"
        export(config, model, tokenizer, store, folder)
        if world.is_main:
            world.say(f"wrote {folder} and {training_report(config.output_dir)}")
        return folder


def check(config: SFTConfig) -> None:
    """Everything cheap, before anything expensive."""
    metrics.check_trackers(config.report_to)
    if config.micro_batch_tokens < config.max_length:
        sizes = f"micro_batch_tokens is {config.micro_batch_tokens}, below max_length {config.max_length}"
        raise UserError(f"{sizes}: no row would fit; raise it, or lower max_length")
    check_bounds(config)


def make_or_verify(config: SFTConfig, world: World) -> None:
    """What the quickstart needs and does not find is made here; what is there is hashed."""
    base = import_gguf.BASE_MODEL
    if config.model_name_or_path == base and not base.exists():
        world.say(f"{base} is missing: importing it")
        import_gguf.main(import_gguf.ImportConfig())
    preparation = load_config(prepare.PrepareConfig, [], prepare.QUICKSTART)
    if config.store == preparation.output and not config.store.exists():
        world.say(f"{config.store} is missing: preparing it from the shipped sample")
        prepare.main(preparation)
    verify_folder(config.model_name_or_path)
    TokenStore.open(config.store, "train", verify=True)


def identity(config: SFTConfig, store: TokenStore) -> dict:
    """What a checkpoint must share with this run for the run to be the same."""
    names = "max_length packing_strategy assistant_only_loss global_batch_size micro_batch_tokens seed optim"
    fields = {name: getattr(config, name) for name in names.split()}
    return {"model_name_or_path": str(config.model_name_or_path), "store": store.digest, **fields}


def announce(
    config: SFTConfig, model: MistralConfig, plan: Plan, world: World,
    *, total_steps: int, dtype: torch.dtype, peak_flops: float,
) -> None:  # fmt: skip
    """The first lines say what will happen, before anything is loaded."""
    parameters, in_products = model.num_parameters()
    tokens = plan.num_tokens / len(plan) * min(config.global_batch_size, len(plan))
    memory = metrics.training_memory(
        model, dtype, world.world_size // world.dp_replicate, config.optim,
        micro_batch_tokens=config.micro_batch_tokens, logits_memory=config.logits_memory * 2**30,
        activation_checkpointing=config.activation_checkpointing,
    )  # fmt: skip
    hours = total_steps * tokens * 6 * in_products / (0.5 * peak_flops * world.world_size) / 3600
    world.say(
        f"{parameters / 1e6:.1f}M parameters, {dtype} on {world.world_size} x {world.device}\n"
        f"{len(plan)} rows of up to {config.max_length} tokens, {plan.fill_rate:.1%} filled; "
        f"{total_steps} steps of about {tokens:.0f} tokens\n"
        f"memory a rank: about {memory / 2**30:.1f} GiB; time: about {hours:.2g} h at half of the measured "
        f"{peak_flops / 1e9:.0f} GFLOP/s\nrun folder: {config.output_dir}"
    )


def evaluate(
    config: SFTConfig, model: Mistral, tokenizer: Tokenizer, log: metrics.MetricsLog, step: int, world: World
) -> None:
    """Loss on the held-out split and answers to fixed prompts, on all ranks alike."""
    model.eval()
    if TokenStore.has_split(config.store, "eval"):
        store = TokenStore.open(config.store, "eval")
        plan = make_plan(store, config.max_length, "bfd", config.assistant_only_loss)
        sizes = {"global_batch_size": len(plan), "micro_batch_tokens": config.micro_batch_tokens}
        loader = Loader(store, plan, seed=0, **sizes)
        batch, sums = loader.global_batch(0), torch.zeros(3, dtype=torch.float64, device=world.device)
        with torch.no_grad():
            for _, micro in batch.share(world.rank, world.world_size):
                sums += metrics.sft_sums(model(micro.to(world.device), stats=True))
        values = metrics.sft_metrics(world.sum(sums).tolist(), batch.num_target_tokens, prefix="eval_")
        log.log(step, **values)
        world.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    write_replies(config, model, tokenizer, step, world)


def write_replies(config: SFTConfig, model: Mistral, tokenizer: Tokenizer, step: int, world: World) -> None:
    """Answers to `sample_prompts` into samples.jsonl."""
    prompts = [[{"role": "user", "content": prompt}] for prompt in config.sample_prompts]
    try:
        replies = generate(model, tokenizer, prompts, max_new_tokens=config.sample_max_new_tokens)
    except ValueError as error:  # too long, or a character that the vocabulary cannot express
        raise UserError(f"sample_prompts: {error}; change them, or sample_max_new_tokens") from None
    rows = [{"step": step, "prompt": p, "reply": r} for p, r in zip(config.sample_prompts, replies)]
    metrics.write_samples(config.output_dir / "samples.jsonl", step, rows, write=world.is_main)


def bad_rows(losses: dict[int, torch.Tensor], batch: GlobalBatch, world: World) -> list[str]:
    """File and line of the rows in micro-batches whose loss is not finite; if all are, of the whole step."""
    mine = [index for index, loss in losses.items() if not bool(torch.isfinite(loss).all())]
    found = world.gather(mine)
    return batch.origins(sorted(index for indices in found for index in indices) or None)


def export(config: SFTConfig, model: Mistral, tokenizer: Tokenizer, store: TokenStore, folder: Path) -> None:
    """The trained model in Hugging Face layout, with template, stop tokens and a card of what really ran."""
    card = model_card(config, read_json_lines(config.output_dir / "metrics.jsonl"), store.manifest)
    stops = {"eos_token_id": chat.stop_ids(tokenizer, store.manifest["chat_template"])}
    dtype = getattr(torch, config.save_dtype)
    save_model(model, folder, tokenizer, dtype=dtype, generation_config=stops, texts={"README.md": card})


if __name__ == "__main__":
    run_recipe(main, SFTConfig, QUICKSTART)
