"""A model folder, or the name of a model on the Hub, opened with care.

Safetensors only, no code from the checkpoint, and every weight accounted for: transformers loads a checkpoint whose names do
not fit without a word and leaves those weights random, so missing or misshapen ones are an error here. Whatever goes wrong is
one sentence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from monologue.backends.base import BackendError
from monologue.backends.patches import multiply_patches
from monologue.backends.places import UNKNOWN, fingerprint, place, portable

_logging: Any = transformers_logging
_image_processors: Any = AutoImageProcessor
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a model folder holds."""

    source: str
    """The folder or Hub name it came from."""
    model: Any
    """The ``PreTrainedModel``, in evaluation mode."""
    tokenizer: PreTrainedTokenizerFast
    """Its tokenizer, chat template included."""
    image_processor: Any | None
    """Its image processor (PIL, so that every machine computes the same pixels); None for a text-only model."""
    version: str = UNKNOWN
    """Version of the weights, by content."""


def open_checkpoint(source: str, *, device: str, dtype: torch.dtype, local_files_only: bool = False) -> Checkpoint:
    """Model, tokenizer and image processor. Raises BackendError."""
    model = open_model(source, device=device, dtype=dtype, local_files_only=local_files_only)
    tokenizer, processor = open_processors(source, model.config, local_files_only=local_files_only)
    if processor is not None:
        _check_sight(source, model, processor)
    return Checkpoint(portable(source), model, tokenizer, processor, fingerprint(source, model.config))


def open_processors(source: str, config: Any, *, local_files_only: bool = False) -> tuple[PreTrainedTokenizerFast, Any | None]:
    """Tokenizer, and image processor where the model sees; no weights. Raises BackendError."""
    source, where = place(source), {"trust_remote_code": False, "local_files_only": local_files_only}
    with _one_sentence(source, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BackendError(f"expected a fast tokenizer (tokenizer.json) in {source!r}, got {type(tokenizer).__name__}")
    processor = None
    if getattr(config, "vision_config", None) is not None:
        with _one_sentence(source, "an image processor"):
            processor = _image_processors.from_pretrained(source, backend="pil", **where)
    return tokenizer, processor


def open_config(source: str, *, local_files_only: bool = False) -> Any:
    """The model's configuration alone. Raises BackendError."""
    source = place(source)
    _check_place(source)
    with _one_sentence(source, "a model configuration"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local_files_only)


def open_model(source: str, *, device: str, dtype: torch.dtype, local_files_only: bool = False) -> Any:
    """The model alone, every weight found."""
    source = place(source)
    _check_place(source)
    _check_device(device)
    where = {"trust_remote_code": False, "local_files_only": local_files_only}
    with _one_sentence(source, "a model with safetensors weights"):
        config = AutoConfig.from_pretrained(source, **where)
        family: Any = AutoModelForImageTextToText if type(config) in AutoModelForImageTextToText._model_mapping else AutoModelForCausalLM
        model, found = family.from_pretrained(source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where)
    lost = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if lost:
        raise BackendError(f"expected weights for all of the model in {source!r}, {len(lost)} are missing, such as {lost[0]!r}")
    return multiply_patches(model).to(device).eval().requires_grad_(False)


def take_weights(model: Any, source: str) -> None:
    """Copies the weights of another checkpoint of the same shape into ``model``; on an error the old weights stay whole.

    A file that names its weights as the model does is read straight into it; others are opened as a model of their own first.
    """
    if _read_straight(model, source):
        return
    other = open_model(source, device="cpu", dtype=model.dtype, local_files_only=True)
    if type(other) is not type(model) or _plain(other.config.to_dict()) != _plain(model.config.to_dict()):
        raise BackendError(f"expected weights for the same {type(model).__name__} configuration in {source!r}, got another one")
    model.load_state_dict(other.state_dict(), strict=True)


def _read_straight(model: Any, source: str) -> bool:
    """Whether the folder's weights could be copied name by name; nothing is copied where they could not."""
    file, config = Path(source) / "model.safetensors", Path(source) / "config.json"
    if not (file.is_file() and config.is_file()):
        return False
    own = model.state_dict()
    tied = {name: next(other for other in own if own[other].data_ptr() == value.data_ptr()) for name, value in own.items()}
    same = _plain(open_config(source, local_files_only=True).to_dict()) == _plain(model.config.to_dict())
    with _one_sentence(source, "safetensors weights"), safe_open(file, "pt") as found:
        names = set(found.keys())
        shaped = all(name in own and list(own[name].shape) == found.get_slice(name).get_shape() for name in names)
        if not same or not shaped or {tied[name] for name in own} != {tied[name] for name in names}:
            return False
        with torch.no_grad():
            for name in names:
                own[name].copy_(found.get_tensor(name))
    return True


def save_checkpoint(
    checkpoint: Checkpoint, folder: str | Path, model: Any | None = None, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """A folder with all that a policy needs, and no pickle in it. ``model`` stands in where the trained one is another object, ``weights``
    where what is to be saved is not what the model holds.
    """
    with quiet():
        (checkpoint.model if model is None else model).save_pretrained(folder, state_dict=weights)
    checkpoint.tokenizer.save_pretrained(folder)
    if checkpoint.image_processor is not None:
        checkpoint.image_processor.save_pretrained(folder)


def processor_hash(processor: Any | None) -> str:
    """SHA-256 of the image processor's settings; of the empty text where there is none."""
    facts = {} if processor is None else _plain(json.loads(processor.to_json_string()))
    facts.pop("processor_class", None)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() if facts else b"").hexdigest()


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Settings without what a save and a load may change."""
    return {name: _plain(value) if isinstance(value, dict) else value for name, value in facts.items() if name not in _VOLATILE}


def _check_place(source: str) -> None:
    folder = Path(source)
    if len(source) > 255 and "/" not in source:
        raise BackendError(f"expected a model folder or the name of a model on the Hub, got a name of {len(source)} characters")
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise BackendError(f"expected full weights in {source!r}, got an adapter; merge it into its model first")
        if not (folder / "config.json").is_file():
            raise BackendError(f"expected a model folder (config.json, *.safetensors, tokenizer.json), got {source!r} without config.json")
    elif folder.exists() or not _HUB_NAME.fullmatch(source):
        raise BackendError(f"expected a model folder or the name of a model on the Hub, got {source!r}, which is neither")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise BackendError(f"expected a device that this machine has, such as 'cpu', got device={device!r}: {first}") from error


def _check_sight(source: str, model: Any, processor: Any) -> None:
    grids = "image_grid_thw" in getattr(processor, "model_input_names", ())
    if not grids or not hasattr(model.model, "get_rope_index") or getattr(model.config, "image_token_id", None) is None:
        raise BackendError(f"expected a vision-language model of the Qwen-VL kind in {source!r}, got {type(model).__name__}")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers."""
    bars, level = _logging.is_progress_bar_enabled(), _logging.get_verbosity()
    _logging.disable_progress_bar()
    _logging.set_verbosity_error()
    try:
        yield
    finally:
        _logging.set_verbosity(level)
        if bars:
            _logging.enable_progress_bar()


@contextmanager
def _one_sentence(source: str, wanted: str) -> Iterator[None]:
    """Tells a failure to load in one sentence."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackendError(f"expected {wanted} in {source!r}, but loading failed: {first}") from error
