"""TRL's own GRPO loss on tensors that another program has drawn; prints loss and gradient. Knows nothing of monologue.

python trl_loss.py TENSORS.json
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import GRPOTrainer

given = json.loads(Path(sys.argv[1]).read_text())
t = {name: torch.tensor(values, dtype=torch.float64) for name, values in given["tables"].items()}
new = t["new"].requires_grad_(True)
one = SimpleNamespace(
    gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, process_index=0, sync_gradients=True
)
trainer = SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
    model=SimpleNamespace(training=True),
    args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    accelerator=one,
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=given["delta"],
    importance_sampling_level="token",
    beta=given["kl"],
    loss_type="dapo",
    epsilon_low=given["low"],
    epsilon_high=given["high"],
    use_vllm=True,
    vllm_importance_sampling_correction=True,
    current_gradient_accumulation_steps=1,
    _entropy_bonus_enabled=False,
    _metrics={"train": defaultdict(list)},
)
ids = torch.zeros_like(new, dtype=torch.long)
inputs = {
    **{"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": t["mask"]},
    **{"advantages": t["advantage"][:, 0], "old_per_token_logps": t["old"], "ref_per_token_logps": t["reference"]},
    "sampling_per_token_logps": t["behaviour"],
    "importance_sampling_ratio": (t["old"] - t["behaviour"]).exp().clamp(max=given["cap"]),
    "num_items_in_batch": t["mask"].sum(),
}
loss = GRPOTrainer._compute_loss(trainer, None, inputs)
loss.backward()
print(json.dumps({"loss": loss.item(), "gradient": new.grad.tolist()}))
