"""One optimizer step of TRL's SFTTrainer on an exported parquet; prints what its collator gave the model. Knows nothing of monologue.

    python with_trl.py FILE.parquet CHECKPOINT SCRATCH
"""

import json
import sys

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

file, checkpoint, scratch = sys.argv[1:]
data = datasets.load_dataset("parquet", data_files=file, cache_dir=scratch)["train"]
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
config = SFTConfig(
    output_dir=scratch,
    max_length=None,
    max_steps=1,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    warmup_steps=0,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    save_strategy="no",
    logging_steps=1,
)
trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(checkpoint))
batches = [trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")}]) for row in trainer.train_dataset]
rows = [{"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()} for batch in batches]
before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
trainer.train()
moved = sum(not torch.equal(before[name], weight) for name, weight in model.named_parameters())
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps({"rows": rows, "steps": trainer.state.global_step, "losses": losses, "moved": moved, "weights": len(before)}))
