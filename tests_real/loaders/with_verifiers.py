"""Reads exported traces with verifiers' own class; prints every branch as a trainer would get it. Knows nothing of monologue.

python with_verifiers.py traces.jsonl
"""

import json
import sys
from pathlib import Path

from verifiers.v1.trace import WireTrace

found = []
for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    trace = WireTrace.model_validate_json(line)
    again = WireTrace.model_validate(trace.to_record(float_decimals=None))
    branches = [
        {
            "ids": branch.token_ids,
            "mask": branch.sampled_mask,
            "logprobs": branch.logprobs,
            "pictures": branch.mm_token_type_ids,
            "trainable": branch.trainable,
        }
        for branch in trace.branches
    ]
    assert [(one.token_ids, one.logprobs) for one in again.branches] == [(one.token_ids, one.logprobs) for one in trace.branches]
    rewards = {name: [reward.score, reward.weight] for name, reward in trace.rewards.items()}
    counts = {"turns": trace.num_turns, "generated": trace.num_output_tokens, "fed": trace.num_input_tokens}
    found.append({"id": trace.id, "branches": branches, "rewards": rewards, "reward": trace.reward, "role": trace.agent.name, **counts})
print(json.dumps(found))
