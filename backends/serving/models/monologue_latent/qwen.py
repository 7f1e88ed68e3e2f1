"""Text models of the Qwen classes that take latent steps (``steps``): Coconut, the last hidden state is the next input."""

import torch
from monologue_latent.steps import Latent
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM


class _Thinks(Latent):
    def __init__(self, config, *given, **more):
        super().__init__(config, *given, **more)
        if self.pp_group.world_size > 1:
            raise NotImplementedError("latent steps need the whole model on one pipeline rank")
        self.prepare(config, config.vocab_size)

    def forward(self, input_ids, positions, forward_batch, input_embeds=None, get_embedding=False, pp_proxy_tensors=None):
        if input_embeds is not None or get_embedding:
            raise NotImplementedError("latent steps take ids and give logits")
        words, nowhere = self.get_input_embeddings()(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
        hidden = self.think(input_ids, words, nowhere, forward_batch, lambda fed: self.model(input_ids, positions, forward_batch, fed))
        return self.say(input_ids, hidden, forward_batch)

    def load_weights(self, weights):
        return super().load_weights(self.padded(weights))


class LatentQwen2ForCausalLM(_Thinks, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class LatentQwen3ForCausalLM(_Thinks, Qwen3ForCausalLM):
    """Qwen3."""


EntryClass = [LatentQwen2ForCausalLM, LatentQwen3ForCausalLM]
