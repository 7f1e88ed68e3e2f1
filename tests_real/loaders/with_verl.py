"""Loads exported parquets with verl's data sets; prints what they hold. Knows nothing of monologue.

python with_verl.py rl|sft FILE.parquet TOKENIZER SCRATCH [--sees]
"""

import json
import sys

from omegaconf import OmegaConf
from seeing import TEMPLATE, processor
from transformers import AutoTokenizer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

kind, file, checkpoint, scratch, *rest = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
tokenizer.chat_template = TEMPLATE
sees = processor(tokenizer) if rest else None
if kind == "rl":
    config = OmegaConf.create({"cache_dir": scratch, "filter_overlong_prompts_workers": 1, "max_prompt_length": 512})
    data = RLHFDataset(file, tokenizer, config, sees)
    rows = [data[index] for index in range(len(data))]
    assert len(collate_fn(rows)["raw_prompt"]) == len(rows)
    told = [{name: row[name] for name in ("data_source", "ability", "reward_model", "extra_info", "index")} for row in rows]
    for one, row in zip(told, rows, strict=True):
        one["prompt"] = json.loads(json.dumps(row["raw_prompt"], default=lambda picture: list(picture.size)))
else:
    data = MultiTurnSFTDataset(file, tokenizer, OmegaConf.create({"max_length": 512, "pad_mode": "no_padding"}), sees)
    rows = [data[index] for index in range(len(data))]
    told = [
        {
            "ids": len(row["input_ids"]),
            "trained": tokenizer.decode(row["input_ids"][row["loss_mask"].bool()]),
            "pictures": list(row["multi_modal_inputs"]["pixel_values"].shape) if rest else None,
        }
        for row in rows
    ]
print("\n" + json.dumps(told))
