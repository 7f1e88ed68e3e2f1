"""Starts a server whose model takes latent steps (``models/monologue_latent``), and says which of its ids are thoughts.

    launch(model, flags=thinking.flags("Qwen3ForCausalLM"), extra=ENVIRONMENT, ...)

The server samples a thought's id with log-prob 0 wherever one must stand; a client counts these ids as positions, not as words. The same
model in process is ``perception.ivtlr`` with ``patches="none"``, and both give the same log-probs (tests_real/served).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parent / "models"
ENVIRONMENT = {"PYTHONPATH": str(MODELS), "SGLANG_EXTERNAL_MODEL_PACKAGE": "monologue_latent"}
KNOWN = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where a served model takes latent steps."""

    id: int
    """Stands for a thought; never a word."""
    after: int
    """Thoughts follow this id, in a prompt or sampled."""
    steps: int
    """How many."""

    def flags(self, architecture: str) -> tuple[str, ...]:
        """Of the server, for a checkpoint of this architecture. Raises ValueError for one that has no latent twin."""
        if architecture not in KNOWN:
            raise ValueError(f"expected one of {', '.join(KNOWN)}, got {architecture!r}: its latent steps run in process only")
        facts = {"id": self.id, "after": self.after, "steps": self.steps}
        return "--json-model-override-args", json.dumps({"architectures": [f"Latent{architecture}"], "latent": facts})
