"""Online iterations of TRL's GRPOTrainer on given prompts; prints seconds and sampled ids of each step. Knows nothing of monologue.

python trl_iteration.py CHECKPOINT PROMPTS.json SCRATCH

With ``pictures``, files one a prompt, each stands before the text of a user's message.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import datasets
import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, TrainerCallback
from transformers.models.qwen2_vl.processing_qwen2_vl import ProcessorMixin, Qwen2VLProcessor
from trl import GRPOConfig, GRPOTrainer

checkpoint, file, scratch = sys.argv[1:]
given = json.loads(Path(file).read_text())
torch.set_num_threads(1)
sampled, ends = [], []


def odd(completions, completion_ids, **_):
    """Share of odd ids."""
    sampled.append(sum(map(len, completion_ids)))
    return [sum(token % 2 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class Processor(Qwen2VLProcessor):
    """Pictures only: the class itself wants torchvision for its films."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


TEMPLATE = (
    "<bos> <user>{% for part in messages[0].content %}"
    "{{ ' ' + part.text if part.type == 'text' else ' <|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %} <assistant>"
)


def seen():
    """Model, processor and data of a model that is shown pictures."""
    words = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")  # where TRL itself pads prompts
    eyes = Processor(AutoImageProcessor.from_pretrained(checkpoint), words, TEMPLATE)
    asked = [[{"role": "user", "content": prompt}] for prompt in given["prompts"]]
    data = datasets.Dataset.from_dict({"prompt": asked, "image": given["pictures"]}).cast_column("image", datasets.Image())
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32), eyes, data


def read():
    """The same of a model of words."""
    data = datasets.Dataset.from_dict({"prompt": given["prompts"]})
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), AutoTokenizer.from_pretrained(checkpoint), data


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
model, processing, data = seen() if given.get("pictures") else read()
trainer = GRPOTrainer(model=model, reward_funcs=odd, args=config, train_dataset=data, processing_class=processing, callbacks=[Clock()])
trainer.train()
steps = [after - before for before, after in itertools.pairwise(ends)]
print(json.dumps([{"seconds": seconds, "sampled": count} for seconds, count in zip(steps, sampled, strict=True)]))
