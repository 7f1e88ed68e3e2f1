"""Loads exported parquets with verl's data sets; prints what they hold. Knows nothing of monologue.

python with_verl.py rl|sft FILE.parquet TOKENIZER SCRATCH [--sees]
"""

import json
import sys

from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{% elif m.role == 'tool' %}<tool>{% else %}<user>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def seeing(tokenizer):
    """A processor of Qwen's kind around the tokenizer."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    pictures = Qwen2VLImageProcessor(patch_size=14, merge_size=2, min_pixels=784, max_pixels=7056)
    processor = Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    return processor


kind, file, checkpoint, scratch, *rest = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
tokenizer.chat_template = TEMPLATE
processor = seeing(tokenizer) if rest else None
if kind == "rl":
    config = OmegaConf.create({"cache_dir": scratch, "filter_overlong_prompts_workers": 1, "max_prompt_length": 512})
    data = RLHFDataset(file, tokenizer, config, processor)
    rows = [data[index] for index in range(len(data))]
    assert len(collate_fn(rows)["raw_prompt"]) == len(rows)
    told = [{name: row[name] for name in ("data_source", "ability", "reward_model", "extra_info", "index")} for row in rows]
    for one, row in zip(told, rows, strict=True):
        one["prompt"] = json.loads(json.dumps(row["raw_prompt"], default=lambda picture: list(picture.size)))
else:
    data = MultiTurnSFTDataset(file, tokenizer, OmegaConf.create({"max_length": 512, "pad_mode": "no_padding"}), processor)
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
