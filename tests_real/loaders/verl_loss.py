"""verl's own losses and advantages on tensors that another program has drawn; prints them. Knows nothing of monologue.

python verl_loss.py TENSORS.json
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from verl.trainer.ppo import core_algos as verl
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

given = json.loads(Path(sys.argv[1]).read_text())
t = {name: torch.tensor(values, dtype=torch.float64) for name, values in given["tables"].items()}
new, now = t["new"].requires_grad_(True), t["value_now"].requires_grad_(True)
policy, _, _, _ = verl.compute_policy_loss(
    t["old"], new, t["advantage"], t["mask"], cliprange=0.2, cliprange_low=given["low"], cliprange_high=given["high"], clip_ratio_c=3.0
)
policy.backward()
critic, _ = verl.compute_value_loss(now, t["reward"], t["value"], t["mask"], cliprange_value=0.2)
critic.backward()
advantages, returns = verl.compute_gae_advantage_return(t["reward"], t["value"], t["mask"], torch.tensor(0.97), torch.tensor(0.9))
alone, _ = verl.compute_rloo_outcome_advantage(t["reward"].clone(), t["mask"], np.array(given["groups"]))
weights, facts = compute_rollout_correction_weights((t["old"] - t["behaviour"]), t["mask"], "token", given["cap"])
controller = verl.AdaptiveKLController(init_kl_coef=0.2, target_kl=6.0, horizon=10_000)
prices = []
for divergence in given["divergences"]:
    controller.update(divergence, 64)
    prices.append(controller.value)
tables = {
    "gradient": new.grad,
    "critic gradient": now.grad,
    "advantages": advantages,
    "returns": returns,
    "alone": alone,
    "weights": weights,
}
numbers = {"policy": policy.item(), "critic": critic.item(), "effective": float(facts["rollout_is_eff_sample_size"]), "prices": prices}
k3 = verl.kl_penalty_forward(new.detach(), t["reference"], "k3")
print(json.dumps({**numbers, **{name: values.tolist() for name, values in {**tables, "k3": k3}.items()}}))
