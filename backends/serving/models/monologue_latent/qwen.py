"""Latent steps inside an SGLang server (Coconut: the last hidden state is the next input), for text models of the Qwen classes.

A server started with this folder on its path and ``SGLANG_EXTERNAL_MODEL_PACKAGE=monologue_latent`` knows two more architectures; their
configuration says ``latent = {"id": ..., "after": ..., "steps": n}``. Whenever a sequence reaches the id ``after``, by prompt or by
sampling, the next n ids are forced to be ``id`` (log-prob 0), and each is read not as a word but as the hidden state of the place before.
Everywhere else ``id`` is never sampled.

What makes this safe under prefix reuse, chunked prefill, retraction and flushing: the state of every place is kept beside its keys and
values, under the same slot, so it lives exactly as long as they do. Nothing is remembered by request. Where a latent span must be read
again, since its slots are gone, the states are computed anew in order: with m latent ids in what is read, the m + 1st pass over it has
all of them right, because each needs only what comes before it. That costs m more passes, on that rare path only.

Memory: one vector of the model's width a slot; for a 7B model an eighth of what keys and values take. Not supported, and refused:
pipeline parallelism (the state is on another rank), embeddings given by the caller, speculative decoding. Runs in the server's Python,
which has no ``monologue``; hence this folder, which our own code never imports.

Shapes: T tokens of a forward, B requests, S slots, D width, V vocabulary.
"""

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM

NEVER = -1e9
"""Logit of what must not be sampled; finite, for JSON."""


class _Words(LogitsProcessor):
    """Never says the latent id, in what is sampled and in what is scored."""

    def __init__(self, config, latent):
        super().__init__(config)
        self.latent = latent

    def _get_logits(self, *given, **more):
        logits = super()._get_logits(*given, **more)
        logits[:, self.latent] = NEVER
        return logits


class _Latent:
    """Mixed into a causal model of SGLang's."""

    def __init__(self, config, *given, **more):
        super().__init__(config, *given, **more)
        if self.pp_group.world_size > 1:
            raise NotImplementedError("latent steps need the whole model on one pipeline rank")
        facts = config.latent
        self.latent, self.after, self.steps = facts["id"], facts["after"], facts["steps"]
        self.logits_processor = _Words(config, self.latent)
        self._states = self._counts = None

    @torch.no_grad()
    def forward(self, input_ids, positions, forward_batch, input_embeds=None, get_embedding=False, pp_proxy_tensors=None):
        if input_embeds is not None or get_embedding or forward_batch.spec_info is not None:
            raise NotImplementedError("latent steps take ids, give logits, and are not decoded speculatively")
        words, latent, here = self.get_input_embeddings()(input_ids), input_ids == self.latent, forward_batch.out_cache_loc
        self._make_room(words)
        before = _before(forward_batch)
        self._counts[here] = 0
        for _ in range(_passes(latent, forward_batch)):
            fed = torch.where(latent[:, None], self._states[before], words)  # (T, D)
            hidden = self.model(input_ids, positions, forward_batch, fed)
            self._states[here] = hidden
            self._counts[here] = torch.where(latent, self._counts[before] + 1, 0)  # (T,) how many thoughts end here
        out = self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)
        if out.next_token_logits is not None:
            self._force(out.next_token_logits, input_ids, here, forward_batch)
        return out

    def _make_room(self, words):
        """A state and a count for each slot of keys and values."""
        pool = get_token_to_kv_pool()
        slots = pool.size + pool.page_size
        if self._states is None or len(self._states) != slots:
            self._states = words.new_zeros(slots, words.shape[-1])  # (S, D)
            self._counts = torch.zeros(slots, dtype=torch.long, device=words.device)  # (S,)

    def _force(self, logits, input_ids, here, forward_batch):
        """Leaves the latent id alone where a thought must follow."""
        last = slice(None) if forward_batch.forward_mode.is_decode() else forward_batch.extend_seq_lens.cumsum(0) - 1
        ids, counts = input_ids[last], self._counts[here[last]]
        begins, goes_on = ids == self.after, (ids == self.latent) & (counts < self.steps)
        thinks = (begins & (self.steps > 0)) | goes_on  # (B,)
        thought = torch.full_like(logits[:1], NEVER)
        thought[:, self.latent] = 0.0
        logits.copy_(torch.where(thinks[:, None], thought, logits))


def _before(forward_batch):
    """(T,) the slot of the place before each token; of a sequence's first token, any."""
    places = get_req_to_token_pool().req_to_token
    requests = forward_batch.req_pool_indices
    if forward_batch.forward_mode.is_decode():
        return places[requests, (forward_batch.seq_lens - 2).clamp(min=0)].long()
    before = forward_batch.out_cache_loc.roll(1).long()
    firsts = forward_batch.extend_seq_lens.cumsum(0) - forward_batch.extend_seq_lens
    before[firsts] = places[requests, (forward_batch.extend_prefix_lens - 1).clamp(min=0)].long()
    return before


def _passes(latent, forward_batch):
    """One, and one more for each latent id of the request with most of them in what is read."""
    if forward_batch.forward_mode.is_decode():
        return 1
    parts = latent.long().split(forward_batch.extend_seq_lens_cpu)
    return 1 + max((int(part.sum()) for part in parts), default=0)


class LatentQwen2ForCausalLM(_Latent, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class LatentQwen3ForCausalLM(_Latent, Qwen3ForCausalLM):
    """Qwen3."""


EntryClass = [LatentQwen2ForCausalLM, LatentQwen3ForCausalLM]
