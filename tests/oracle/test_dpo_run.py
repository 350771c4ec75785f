"""A whole run of recipes/dpo.py beside TRL 0.28's DPOTrainer: same rows, tokens, order and rates."""

import json
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from inputs import Inputs, dpo, reproducible

from phoenix.data.loader import row_order
from phoenix.data.store import TokenStore

STEPS, BATCH, PAIRS = 10, 8, 64
NAMES = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    """A tokenizer of 256 bytes and three control tokens."""
    folder = tmp_path_factory.mktemp("dpo_run")
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*control, *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.add_special_tokens(control)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    (folder / "tokenizer").mkdir()
    made.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": control[1], "eos_token": control[2],
        "unk_token": control[0], "add_bos_token": False, "phoenix_chat_template": "chatml",
    }  # fmt: skip
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return Inputs(folder, folder / "tokenizer")


def trl_history(inputs: Inputs, config: dpo.DPOConfig, folder) -> list[dict]:
    """What TRL logs at each step."""
    import datasets
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # tokens already: TRL would tokenise prompt and answer apart

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    store = TokenStore.open(config.store, kind="pairs")
    number = len(store) // 3
    steps_per_epoch = -(-number // BATCH)
    order = [int(row) for epoch in range(-(-STEPS // steps_per_epoch))
             for row in row_order(number, config.seed, epoch)]  # fmt: skip
    names = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    rows = [
        {name: store.document(3 * row + part)[0].tolist() for part, name in enumerate(names)}
        for row in order[: STEPS * BATCH]
    ]
    # The newline behind the stop token is a part of the template without a loss; TRL learns all of an answer.
    for row in rows:
        for name in names[1:]:
            row[name] = row[name][:-1]
    arguments = trl.DPOConfig(
        output_dir=str(folder), beta=config.beta, loss_type=["sigmoid"], learning_rate=config.learning_rate,
        lr_scheduler_type="linear", warmup_ratio=0.0, max_steps=STEPS, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1, max_grad_norm=config.max_grad_norm, weight_decay=0.0,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False, max_length=None,
        max_prompt_length=None, gradient_checkpointing=False, disable_tqdm=True, remove_unused_columns=False,
        optim="adamw_torch",
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model_name_or_path)
    tokenizer.pad_token = tokenizer.eos_token
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (load(config.model_name_or_path, dtype=torch.float32) for _ in range(2))
    trainer = Trainer(
        policy, reference, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_every_step_equals_trls(inputs, tmp_path):
    config = inputs.dpo_config(
        tmp_path / "ours", store=inputs.pairs("pairs", rows=PAIRS, eval_fraction=0.0, max_length=256),
        max_steps=STEPS, micro_batch_tokens=1024, eval_steps=STEPS, save_steps=STEPS, sample_prompts=(),
        learning_rate=2e-3,
    )  # fmt: skip
    dpo.main(config)
    ours = [row for row in reproducible(config.output_dir) if "loss" in row]
    theirs = trl_history(inputs, config, tmp_path / "theirs")
    assert len(ours) == len(theirs) == STEPS and max(row["rewards/margins"] for row in ours) > 0.5
    worst = 0.0
    for step, (mine, wanted) in enumerate(zip(ours, theirs), 1):
        for name in NAMES:
            difference = abs(mine[name] - wanted[name]) / max(1.0, abs(wanted[name]))
            worst = max(worst, difference)
            assert difference <= 1e-4, (step, name, mine[name], wanted[name])
    print(f"largest difference from TRL over {STEPS} steps: {worst:.1e}")
