"""A tiny processor of Qwen's kind and a chat template, around the tokenizer of a starter policy."""

CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<eos>"
)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{% generation %}" + CONTENT + "{% endgeneration %}"
    "{% else %}{{ '<tool>' if m.role == 'tool' else '<user>' }}" + CONTENT + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def processor(tokenizer):
    """Pictures of the shapes world take nine ids, as they do for the starter policies."""
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

    class TextAndPictures(Qwen2VLProcessor):
        """Without films, whose processor needs torchvision."""

        def __init__(self, image_processor, tokenizer, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    pictures = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=7056, max_pixels=7056)
    return TextAndPictures(pictures, tokenizer, chat_template=TEMPLATE)
