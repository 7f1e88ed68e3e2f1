"""Models of the Qwen-VL classes that take latent steps (``steps``) and read places of their pictures again (IVT-LR).

The server gives a picture's places ids far behind the vocabulary; that is how they are told from words. Positions of thoughts and patches
go on by one after the prompt, as for words.
"""

from monologue_latent.steps import Latent
from sglang.srt.managers.mm_utils import general_mm_embed_routine
from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from sglang.srt.models.qwen2_vl import Qwen2VLForConditionalGeneration
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor


class _Looks(Latent):
    def __init__(self, config, *given, **more):
        super().__init__(config, *given, **more)
        self.prepare(config, self.model.embed_tokens.org_vocab_size)

    def forward(self, input_ids, positions, forward_batch, input_embeds=None, get_embedding=False, pp_proxy_tensors=None):
        if input_embeds is not None or get_embedding:
            raise NotImplementedError("latent steps take ids and give logits")
        ids = input_ids.clone()  # the routine below cuts pictures' ids to the vocabulary, in place
        places = forward_batch.mrope_positions if self.is_mrope_enabled else positions
        reader = _Reader(self, ids, places)
        hidden = general_mm_embed_routine(input_ids, forward_batch, language_model=reader, multimodal_model=self)
        return self.say(input_ids, hidden, forward_batch)

    def load_weights(self, weights):
        return super().load_weights(self.padded(weights))


class _Reader:
    """Stands for the language model while SGLang puts pictures among words."""

    def __init__(self, owner, ids, positions):
        self._owner, self._ids, self._positions = owner, ids, positions

    def get_input_embeddings(self):
        return self._owner.model.get_input_embeddings()

    def __call__(self, input_ids, forward_batch, input_embeds):
        owner, pictures = self._owner, self._ids >= self._owner.vocabulary
        return owner.think(
            self._ids, input_embeds, pictures, forward_batch, lambda fed: owner.model(None, self._positions, forward_batch, fed)
        )


class LatentQwen2VLForConditionalGeneration(_Looks, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class LatentQwen2_5_VLForConditionalGeneration(_Looks, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class LatentQwenVLImageProcessor(QwenVLImageProcessor):
    """Pictures as before."""

    models = (LatentQwen2VLForConditionalGeneration, LatentQwen2_5_VLForConditionalGeneration)


EntryClass = [LatentQwen2VLForConditionalGeneration, LatentQwen2_5_VLForConditionalGeneration]
