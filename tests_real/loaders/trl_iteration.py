"""Online iterations of TRL's GRPOTrainer on given prompts; prints seconds and sampled ids of each step. Knows nothing of monologue.

python trl_iteration.py CHECKPOINT PROMPTS.json SCRATCH
"""

import itertools
import json
import sys
import time
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

checkpoint, file, scratch = sys.argv[1:]
given = json.loads(Path(file).read_text())
torch.set_num_threads(1)
sampled, ends = [], []


def odd(completions, completion_ids, **_):
    """Share of odd ids."""
    sampled.append(sum(map(len, completion_ids)))
    return [sum(token % 2 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class Clock(TrainerCallback):
    def on_train_begin(self, *_, **__):
        ends.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        ends.append(time.perf_counter())


config = GRPOConfig(
    output_dir=scratch,
    per_device_train_batch_size=given["episodes"],
    num_generations=given["samples"],
    max_completion_length=given["tokens"],
    max_steps=given["iterations"],
    learning_rate=given["lr"],
    beta=0.0,
    scale_rewards="none",
    temperature=1.0,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
)
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
    reward_funcs=odd,
    args=config,
    train_dataset=datasets.Dataset.from_dict({"prompt": given["prompts"]}),
    processing_class=AutoTokenizer.from_pretrained(checkpoint),
    callbacks=[Clock()],
)
trainer.train()
steps = [after - before for before, after in itertools.pairwise(ends)]
print(json.dumps([{"seconds": seconds, "sampled": count} for seconds, count in zip(steps, sampled, strict=True)]))
