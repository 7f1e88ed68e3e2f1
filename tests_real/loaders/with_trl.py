"""One optimizer step of TRL's SFTTrainer on an exported parquet; prints what its collator gave the model. Knows nothing of monologue.

python with_trl.py FILE.parquet CHECKPOINT SCRATCH [--sees]
"""

import json
import sys

import datasets
import torch
from seeing import processor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from trl import SFTConfig, SFTTrainer

file, checkpoint, scratch, *rest = sys.argv[1:]
data = datasets.load_dataset("parquet", data_files=file, cache_dir=scratch)["train"]
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
kind = AutoModelForImageTextToText if rest else AutoModelForCausalLM
model = kind.from_pretrained(checkpoint, dtype=torch.float32)
config = SFTConfig(
    output_dir=scratch,
    max_length=None,
    assistant_only_loss=bool(rest),
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
trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=processor(tokenizer) if rest else tokenizer)
rows = []
for row in trainer.train_dataset:
    batch = trainer.data_collator([dict(row)])
    pictures = list(batch["pixel_values"].shape) if rest else None
    rows.append({"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist(), "pictures": pictures})
before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
trainer.train()
moved = sum(not torch.equal(before[name], weight) for name, weight in model.named_parameters())
losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
print("\n" + json.dumps({"rows": rows, "steps": trainer.state.global_step, "losses": losses, "moved": moved, "weights": len(before)}))
