"""What is sent to a server, and what is refused before it is sent, since the server would die of it, hang, or drop it in silence.

    an id outside the vocabulary          kills the whole server; a negative one is never answered
    expanded placeholders and a picture   the request hangs
    more placeholders than pictures       500; fewer: the picture is dropped and nobody told
    a picture that is not framed          the server decodes the ids and looks in the *text* for ``<|vision_start|>``, placeholders,
                                          ``<|vision_end|>`` or the words ``<image>``, so we look with the same eyes
    a placeholder that was sampled        stands in the next prompt without a picture; it is banned by a logit bias

What the server is told, and why:

    one placeholder a picture     it expands them itself; the expanded ids stay in the trace and go to the trainer
    pictures resized already      SGLang 0.5.21 puts limits of its own in the place of a Qwen2-VL checkpoint's, and may resize by another
                                  library; a picture that has the processor's size passes through both as it is
    the sampling mask             with top-p or top-k its plain log-probs are those before truncation; the mask gives the truncated ones
    ignore_eos without stop ids   with some, the server stops at the model's own end of text too
    no seed                       it only honours one in deterministic mode; else none is recorded
"""

from __future__ import annotations

import base64
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL.Image import Image

from monologue.backends.base import ImageFacts, Prompt, RequestRefused, Sampling
from monologue.backends.inputs import Eyes
from monologue.backends.pictures import locate
from monologue.backends.serving.answers import truncated
from monologue.traces.png import png_bytes

NEVER = -1e9
"""Logit bias of what must not be sampled."""
LARGEST_MASK = 4096
"""Largest top_k for which the server returns the support that it sampled from."""
PLACE = re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>")
"""Where SGLang's Qwen-VL processors see a picture in the decoded prompt (``multimodal/processors/qwen_vl.py``)."""
KEPT = 256
"""Pictures whose encoding is kept for the turns that follow."""


class Requests:
    """Bodies of ``/generate`` for one model."""

    def __init__(self, eyes: Eyes, tokenizer: Any, vocabulary: int, context_length: int, *, own_limits: bool = False) -> None:
        """``own_limits``: the server resizes within limits of its own, as it does for Qwen2-VL, and not within the checkpoint's."""
        self.eyes, self.vocabulary, self.context_length = eyes, vocabulary, context_length
        self._tokenizer, self._own_limits = tokenizer, own_limits
        self._encoded: OrderedDict[int, tuple[Image, str]] = OrderedDict()

    def admit(self, prompt: Prompt, room: int, sampling: Sampling) -> tuple[ImageFacts, ...]:
        """Where the pictures sit in the prompt, which leaves ``room`` for so many ids. Raises RequestRefused."""
        if not prompt.ids:
            raise RequestRefused("expected at least one prompt id, got none")
        if len(prompt.ids) + room > self.context_length:
            raise RequestRefused(f"expected prompt and reply within {self.context_length} tokens, got {len(prompt.ids)} + {room}")
        if strange := [token for token in (*prompt.ids, *sampling.stop_ids) if not 0 <= token < self.vocabulary]:
            raise RequestRefused(f"expected ids from 0 to {self.vocabulary - 1}, got {strange[0]!r}")
        if unseen := [token for token in prompt.ids if token in self.eyes.banned and token != self.eyes.image_token_id]:
            raise RequestRefused(f"expected no video placeholder, got id {unseen[0]!r}: this engine takes pictures only")
        rooms = tuple(self.eyes.placeholders(picture.image) for picture in prompt.pictures)
        return locate(prompt, rooms, self.eyes.image_token_id, self.eyes.processor_hash) if self.eyes.sees else ()

    def generation(self, prompt: Prompt, images: Sequence[ImageFacts], sampling: Sampling, thoughts: int = 0) -> dict[str, Any]:
        """A request to sample, with so many places for thoughts beside the words. Raises RequestRefused."""
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "max_new_tokens": min(sampling.max_tokens + thoughts, self.context_length - len(prompt.ids)),
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": not sampling.stop_ids,
            "skip_special_tokens": False,
            **({"logit_bias": {str(token): NEVER for token in self.eyes.banned}} if self.eyes.banned else {}),
        }
        body = {**self._ids_and_pictures(prompt, images), "sampling_params": parameters, "return_logprob": True}
        if not truncated(sampling):
            return body
        return {**body, "return_sampling_mask": True, "sampling_params": {**parameters, "top_k": self._mask_size(sampling)}}

    def scores(self, prompt: Prompt, ids: tuple[int, ...], images: Sequence[ImageFacts]) -> dict[str, Any]:
        """A request for the log-probs of ``ids`` after the prompt, untempered and untruncated. Raises RequestRefused."""
        if strange := [token for token in ids if not 0 <= token < self.vocabulary or token in self.eyes.banned]:
            raise RequestRefused(f"expected ids that this model can sample, got {strange[0]!r}")
        return {
            **self._ids_and_pictures(replace(prompt, ids=prompt.ids + ids), images),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            **({"token_ids_logprob": list(self.eyes.banned)} if self.eyes.banned else {}),
        }

    def _ids_and_pictures(self, prompt: Prompt, images: Sequence[ImageFacts]) -> dict[str, Any]:
        ids, last = list[int](), 0
        for image in images:
            ids += prompt.ids[last : image.placeholder_start + 1]
            last = image.placeholder_start + image.placeholder_count
        ids += prompt.ids[last:]
        if not images:
            return {"input_ids": ids}
        self._check_places(ids, len(images))
        pictures = [self._encode(picture.image) for picture in prompt.pictures]
        return {"input_ids": ids, "image_data": pictures, "return_prompt_token_ids": True}

    def _check_places(self, ids: list[int], pictures: int) -> None:
        text = self._tokenizer.decode(ids)
        if (found := len(PLACE.findall(text))) != pictures:
            raise RequestRefused(
                f"the server finds a picture by <|vision_start|><|image_pad|><|vision_end|> (or <image>) in the decoded prompt; "
                f"expected {pictures} of them, got {found} in {text[:200]!r}; frame each picture so, leave <image> out of the text, and "
                "use a tokenizer whose decoder puts nothing between the three"
            )

    def _encode(self, image: Image) -> str:
        """Base64 PNG. Kept with the picture, whose identity is the key: a hash beside it may be somebody's mistake."""
        if id(image) not in self._encoded:
            fitted = self.eyes.fitted(image)
            stays = self._own_limits or self.eyes.placeholders(fitted) == self.eyes.placeholders(image)
            self._encoded[id(image)] = image, base64.b64encode(png_bytes(fitted if stays else image)).decode()
            if len(self._encoded) > KEPT:
                self._encoded.popitem(last=False)
        return self._encoded[id(image)][1]

    def _mask_size(self, sampling: Sampling) -> int:
        """The top_k with which the server tells the truncated distribution: it does so for finite ones only. Raises RequestRefused."""
        top_k = sampling.top_k or self.vocabulary
        if top_k > LARGEST_MASK:
            raise RequestRefused(
                f"the server gives log-probs of a truncated distribution for top_k up to {LARGEST_MASK} only, got {sampling!r}; "
                f"set top_k={LARGEST_MASK} or lower, or sample without truncation"
            )
        return top_k
