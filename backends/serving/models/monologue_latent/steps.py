"""Latent steps inside an SGLang server: what every model class of this folder shares.

A configuration says ``latent = {"id", "after", "steps", "patches", "order", "room", "think"}``. Whenever a sequence reaches the ids
``after``, one behind the other, by prompt or by sampling, ``steps`` latent steps are forced on it with log-prob 0: a step is one thought,
the id ``id``, read not as a word but as the hidden state of the place that decided the step, and K = ``patches`` places of the picture
before or behind it (``order``), read as those places were. The j-th place of the sequence's pictures has the id ``id + 1 + j``, so what
was chosen stands in the ids. None of these ids is a word: they are never sampled elsewhere, and may lie behind the model's vocabulary,
which is padded to hold them. With ``think`` (the word by which a state says that it has not finished) the model stops by itself, after
``steps`` steps at the latest.

A step's patches are those that the place which decides it, the last of ``after`` or the last place of the step before, attends to most:
the mean over heads and layers of one attention row, patches of this span left out that were taken already. That row is computed beside
the server's own attention, from its queries and its cached keys. A sequence whose pictures hold fewer than ``steps`` x K places is not
made to think, so that its client can see that it was not.

What makes this safe under prefix reuse, chunked prefill, retraction and flushing: whatever a later place needs to know of an earlier one,
its id, its state, its count within the thoughts, which patch it was, what it chose, is kept beside its keys and values, under the same
slot, and lives exactly as long as they do. Nothing is remembered by request. Where thoughts must be read again, since their slots are
gone, states are computed anew in order: with m of them in what is read, the m + 1st pass has all of them right, because each needs only
what comes before it. That costs m more passes, on that rare path only. Patches need no second choice then: they stand in the ids.

Memory: a vector of the model's width a slot, two with patches; for a 7B model an eighth of what keys and values take, each. Refused:
pipeline parallelism (the state is on another rank), several GPUs for one model with patches or ``think`` (heads and words are shared out),
embeddings given by the caller, speculative decoding, DP attention, and caches that move keys and values (hierarchical, PD split). Runs in
the server's Python, which has no ``monologue``; hence this folder, which our own code never imports.

Shapes: T tokens of a forward, B requests, S slots, D width, V vocabulary, W = K + 1 places a step, Q tokens that decide, L places of the
longest.
"""

from dataclasses import dataclass

import torch
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.runtime_context import get_parallel, get_server_args

NEVER = -1e9
"""Logit of what must not be sampled; finite, for JSON."""


class Words(LogitsProcessor):
    """Never says what is not a word, in what is sampled and in what is scored."""

    def __init__(self, config, silent):
        super().__init__(config)
        self.silent = silent

    def _get_logits(self, *given, **more):
        logits = self.every(*given, **more)
        logits[:, self.silent] = NEVER
        return logits

    def every(self, *given, **more):
        """Of all ids."""
        return super()._get_logits(*given, **more)


class Places:
    """Where the tokens of a forward stand in their sequences."""

    def __init__(self, forward_batch):
        self.table, self.requests = get_req_to_token_pool().req_to_token, forward_batch.req_pool_indices.long()  # (R, context), (B,)
        lanes = torch.arange(len(self.requests), device=self.requests.device)
        if forward_batch.forward_mode.is_decode():
            self.prefixes = forward_batch.seq_lens.long() - 1  # (B,) places before what is read
            self.first = self.last = self.lane = lanes  # (B,), (B,) first and last token of each request; (T,) request of each token
        else:
            self.prefixes, lengths = forward_batch.extend_prefix_lens.long(), forward_batch.extend_seq_lens.long()
            self.last = lengths.cumsum(0) - 1
            self.first, self.lane = self.last - lengths + 1, torch.repeat_interleave(lanes, lengths)
        self.token = torch.arange(len(self.lane), device=lanes.device)  # (T,)
        self.place = self.prefixes[self.lane] + self.token - self.first[self.lane]  # (T,)

    def slots(self, lanes, places):
        """Of places (...) in the sequences of ``lanes`` (...); of a place before the beginning, any."""
        return self.table[self.requests[lanes], places.clamp(min=0)].long()

    def held(self, kept):
        """(B,) what is kept of the last place before what is read; 0 where there is none."""
        lanes = torch.arange(len(self.requests), device=kept.device)
        return torch.where(self.prefixes > 0, kept[self.slots(lanes, self.prefixes - 1)], 0)


@dataclass
class Row:
    """Attention of some tokens, summed over layers as the model runs."""

    tokens: torch.Tensor  # (Q,)
    slots: torch.Tensor  # (Q, L)
    visible: torch.Tensor  # (Q, L)
    weights: torch.Tensor | float = 0.0  # (Q, L)

    def see(self, layer, query):
        one = query.view(len(query), layer.tp_q_head_num, layer.head_dim)[self.tokens]  # (Q, H, d)
        keys = get_token_to_kv_pool().get_key_buffer(layer.layer_id)[self.slots].to(one.dtype)  # (Q, L, G, d)
        scores = torch.einsum("qghd,qlgd->qghl", one.view(len(one), keys.shape[2], -1, one.shape[-1]), keys) * layer.scaling
        scores = scores.masked_fill(~self.visible[:, None, None], -torch.inf)
        self.weights = self.weights + scores.softmax(-1, dtype=torch.float32).mean((1, 2))


class Latent:
    """Mixed into a causal model of SGLang's, whose ``forward`` calls ``think`` and ``say``."""

    def prepare(self, config, vocabulary):
        """Called when the model is built; ``vocabulary`` is V with what is not a word."""
        facts = config.latent
        self.id, self.after, self.steps = facts["id"], facts["after"], facts["steps"]
        self.patches, self.room, self.word = facts.get("patches", 0), facts.get("room", 0), facts.get("think")
        self.early = facts.get("order", "state-first") == "patches-first"
        self.width, self.vocabulary = self.patches + 1, vocabulary
        server = get_server_args()
        if (self.patches or self.word is not None) and get_parallel().tp_size > 1:
            raise NotImplementedError("patches and a learned stop need the whole model on one GPU")
        if server.enable_hierarchical_cache or server.disaggregation_mode != "null" or server.enable_dp_attention:
            raise NotImplementedError(
                "what stands beside keys and values does not move with them: no hierarchical cache, PD split or DP attention"
            )
        if not isinstance(self.after, list) or not self.after:
            raise ValueError(f"expected a list of ids after which thoughts follow, got {self.after!r}")
        if self.id + self.room >= vocabulary:
            raise ValueError(f"expected thoughts within {vocabulary} ids, got {self.id} and {self.room} behind it")
        silent = [*range(self.id, self.id + 1 + self.room), *([] if self.word is None else [self.word])]
        self.logits_processor = Words(config, silent)
        pads = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        self.banned = [pad for pad in pads if pad is not None]
        self._counts = self._row = None
        if self.patches:
            for module in self.modules():
                if isinstance(module, RadixAttention):
                    module.register_forward_hook(self._watch)

    @torch.no_grad()
    def think(self, ids, words, pictures, forward_batch, read):
        """Hidden states (T, D) of what stands for ``ids`` (T,): ``words`` (T, D) or, where they are thoughts, states and patches.
        ``pictures`` (T,) bool: places of pictures. ``read(embeddings)`` runs the model.
        """
        if forward_batch.spec_info is not None:
            raise NotImplementedError("latent steps are not decoded speculatively")
        self._make_room(words)
        at, here = Places(forward_batch), forward_batch.out_cache_loc.long()
        thought, patch = ids == self.id, (ids > self.id) & (ids <= self.id + self.room)
        counts = self._count(thought | patch, at)
        self._ids[here], self._counts[here], self._taken[here] = ids, counts, torch.where(patch, ids - self.id - 1, -1)
        if self.patches:
            seen = pictures.long().cumsum(0)
            self._seen[here] = seen - (seen - pictures.long())[at.first][at.lane] + at.held(self._seen)[at.lane]
            self._pictures[here[pictures]] = words[pictures]
            if bool(patch.any()):
                words = words.clone()
                words[patch] = self._looked(at, patch, ids[patch] - self.id)
        origins = at.slots(at.lane, at.place - 1 - (counts - 1).clamp(min=0) % self.width)  # (T,)
        decides = self._decides(at, counts, here)
        for _ in range(self._passes(thought, forward_batch)):
            self._row = self._asks(at, decides)
            hidden = read(torch.where(thought[:, None], self._states[origins], words))
            self._states[here] = hidden
        if self._row is not None:
            self._choose(at, self._row)
            self._row = None
        goes_on = (counts % self.width > 0) | decides  # (T,) a thought follows, unless the model stops
        self._last = at, counts, goes_on[at.last]
        return hidden

    def say(self, ids, hidden, forward_batch):
        """What the server samples from."""
        out = self.logits_processor(ids, hidden, self.lm_head, forward_batch)
        if out.next_token_logits is not None:
            self._force(out.next_token_logits, hidden, forward_batch)
        return out

    def padded(self, weights):
        """Weights as they are loaded, with room for ids that are no words."""
        for name, value in weights:
            missing = self.vocabulary - len(value) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 0
            yield name, torch.nn.functional.pad(value, (0, 0, 0, missing)) if missing > 0 else value

    def _make_room(self, words):
        """For each slot of keys and values: id, state, count within thoughts, which patch it is, pictures' places so far, what it chose."""
        pool = get_token_to_kv_pool()
        slots = pool.size + pool.page_size
        if self._counts is None or len(self._counts) != slots:
            self._states = words.new_zeros(slots, words.shape[-1])  # (S, D)
            whole = torch.zeros(4, slots, dtype=torch.long, device=words.device)
            self._ids, self._counts, self._taken, self._seen = whole.unbind()  # (S,)
            if self.patches:
                self._pictures = torch.zeros_like(self._states)  # (S, D)
                self._chosen = torch.zeros(slots, self.patches, dtype=torch.long, device=words.device)  # (S, K)

    def _count(self, latent, at):
        """(T,) which place of its span each is, from 1; 0 for words."""
        words = torch.where(latent, -1, at.token).cummax(0).values  # (T,) the last word so far
        beyond = words < at.first[at.lane]
        reached = at.token - at.first[at.lane] + 1 + at.held(self._counts)[at.lane]
        return torch.where(latent, torch.where(beyond, reached, at.token - words), 0)

    def _looked(self, at, patch, numbers):
        """Embeddings of the pictures' places with these ``numbers`` from 1."""
        lanes, places = at.lane[patch], at.place[patch]
        before = torch.arange(int(places.max()), device=places.device)
        slots = at.slots(lanes[:, None], before.expand(len(lanes), -1))  # (N, L)
        found = (self._seen[slots] >= numbers[:, None]) & (before < places[:, None])
        return self._pictures[slots.gather(1, found.int().argmax(1, keepdim=True))[:, 0]]

    def _decides(self, at, counts, here):
        """(T,) places before a step that is still allowed: which patches it reads is decided there."""
        inside = (counts > 0) & (counts < self.steps * self.width) & (counts % self.width == 0)
        begins = (counts == 0) & self._reached(at) & (self.steps > 0)
        enough = self._seen[here] >= self.steps * self.patches
        return (inside | begins) & enough

    def _reached(self, at):
        """(T,) places at which ``after`` ends."""
        found = at.place >= len(self.after) - 1
        for back, token in enumerate(reversed(self.after)):
            found = found & (self._ids[at.slots(at.lane, at.place - back)] == token)
        return found

    def _asks(self, at, decides):
        """The attention of those who decide."""
        tokens = at.token[decides] if self.patches else at.token[:0]
        if not len(tokens):
            return None
        ends = at.place[tokens]  # (Q,)
        before = torch.arange(int(ends.max()) + 1, device=ends.device)
        slots = at.slots(at.lane[tokens][:, None], before.expand(len(tokens), -1))
        return Row(tokens, slots, before <= ends[:, None])

    def _watch(self, layer, given, out):
        if self._row is not None:
            self._row.see(layer, given[0])

    def _choose(self, at, row):
        """Keeps what each decides, in the order of the picture."""
        lanes, ends = at.lane[row.tokens], at.place[row.tokens]  # (Q,)
        seen = self._seen[row.slots]  # (Q, L) pictures' places so far
        pictures = seen > torch.nn.functional.pad(seen[:, :-1], (1, 0))
        span = torch.arange(self.steps * self.width, device=ends.device)
        slots = at.slots(lanes[:, None], ends[:, None] - span)  # (Q, n W)
        within = span < self._counts[at.slots(lanes, ends)][:, None]
        taken = torch.where(within, self._taken[slots], -1)
        free = pictures & row.visible & ~(seen[:, :, None] - 1 == taken[:, None]).any(-1)
        already = self._said(at, lanes, ends)  # (Q, W) what the ids hold of this step, ascending
        known = (seen[:, :, None] - 1 == already[:, None]).any(-1)
        free &= known | (seen - 1 > already.amax(1, keepdim=True))
        best = (
            row.weights.masked_fill(~free, -torch.inf).masked_fill(free & known, torch.inf).topk(self.patches, dim=1).indices.sort(1).values
        )  # (Q, K)
        self._chosen[at.slots(lanes, ends)] = seen.gather(1, best) - 1

    def _said(self, at, lanes, ends):
        """(Q, W) patches of the step behind each deciding place that are there already, since it is read again; -1 for none."""
        behind = torch.arange(1, self.width + 1, device=ends.device)
        places = ends[:, None] + behind
        slots = at.slots(lanes[:, None], places)
        there = (places <= at.place[at.last][lanes][:, None]) & (
            self._counts[slots] == self._counts[at.slots(lanes, ends)][:, None] + behind
        )
        return torch.where(there, self._taken[slots], -1)

    def _passes(self, thought, forward_batch):
        """One, and one more for each thought of the request with most of them in what is read."""
        if forward_batch.forward_mode.is_decode():
            return 1
        parts = thought.long().split(forward_batch.extend_seq_lens_cpu)
        return 1 + max((int(part.sum()) for part in parts), default=0)

    def _force(self, logits, hidden, forward_batch):
        """Leaves one id alone where a thought must follow."""
        at, counts, thinks = self._last
        step = counts[at.last] % self.width  # (B,) places of the present step
        if self.word is not None:
            metadata = LogitsMetadata.from_forward_batch(forward_batch)
            every = self.logits_processor.every(hidden[at.last], self.lm_head, metadata, use_logits_buffer=False)
            every[:, [*self.banned, *range(self.id, self.id + 1 + self.room)]] = -torch.inf
            thinks = thinks & ((step > 0) | (every.softmax(-1)[:, self.word] >= 0.5))
        wanted = torch.full_like(step, self.id)
        if self.patches:
            number = step if self.early else step - 1
            chosen = self._chosen[at.slots(at.lane[at.last], at.place[at.last] - step)]  # (B, K)
            patch = chosen.gather(1, number.clamp(0, self.patches - 1)[:, None])[:, 0] + self.id + 1
            wanted = torch.where((number >= 0) & (number < self.patches), patch, wanted)
        alone = torch.full_like(logits, NEVER).scatter(1, wanted[:, None], 0.0)
        logits.copy_(torch.where(thinks[:, None], alone, logits))
