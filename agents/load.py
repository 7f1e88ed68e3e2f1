"""A policy from a model folder or Hub name: the engine, and the codec that fits its tokenizer.

A tokenizer with a ``<look>`` token speaks the starter policies' language; else a chat template is needed. Nothing else is
guessed. torch and transformers are imported when a model is loaded, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monologue.agents.chat import ChatCodec
from monologue.agents.codec import Codec, CodecError, TinyCodec, VisualTokens
from monologue.agents.policy import Policy
from monologue.backends.base import Backend, BackendError, Sampling
from monologue.backends.pictures import Eyes
from monologue.backends.places import short


def codec_for(tokenizer: Any, eyes: Eyes | None = None) -> Codec:
    """The codec that fits a tokenizer; ``eyes`` is its engine where that sees. Raises CodecError where none fits."""
    sees = eyes is not None and eyes.image_token_id is not None
    count: VisualTokens = (lambda picture: eyes.placeholders(picture.image).count) if eyes is not None and sees else None
    if tokenizer.convert_tokens_to_ids("<look>") not in (None, getattr(tokenizer, "unk_token_id", None)):
        return TinyCodec(tokenizer, count)
    if getattr(tokenizer, "chat_template", None):
        image = tokenizer.convert_ids_to_tokens(eyes.image_token_id) if eyes is not None and sees else None
        return ChatCodec(tokenizer, count, image)
    raise CodecError("the tokenizer has neither a <look> token (starter policies) nor a chat template; no codec fits it")


def check_role(backend: Backend, role: str) -> None:
    """Raises CodecError where an engine cannot take a seat."""
    if role == "answerer" and not backend.facts.sees:
        raise CodecError(f"the answerer must see, but {backend.facts.model!r} is a text-only model; seat a vision-language model")


def seat(backend: Backend, role: str, sampling: Sampling | None = None, policy_id: str = "", trainable: bool = True) -> Policy:
    """A policy of any engine that carries its ``tokenizer``; an answerer must see, and whoever thinks in states is not trained from traces.

    Raises CodecError.
    """
    tokenizer = getattr(backend, "tokenizer", None)
    if tokenizer is None:
        raise CodecError(f"the engine {backend.facts.engine!r} carries no tokenizer; build a Policy with a codec of your own")
    check_role(backend, role)
    eyes: Any = backend if backend.facts.sees else None
    trained = trainable and not backend.facts.extra.get("habit")
    return Policy(backend, codec_for(tokenizer, eyes), sampling or Sampling(), policy_id or backend.facts.model, trained)


def load_policy(
    source: str | Path,
    role: str,
    *,
    sampling: Sampling | None = None,
    policy_id: str = "",
    trainable: bool = True,
    **engine: Any,
) -> Policy:
    """A policy run in this process by transformers. ``engine`` options go to ``HFBackend``. Raises BackendError, CodecError."""
    try:
        from monologue.backends.hf import HFBackend
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "tokenizers", "safetensors"):
            raise
        raise BackendError(f"running a model in this process needs {error.name}; pip install 'monologue[train]'") from error

    return seat(HFBackend(source, **engine), role, sampling, policy_id or short(source), trainable)
