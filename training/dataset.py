"""A run as a Hugging Face ``datasets`` data set: one example a row, ids and log-probs exact, pictures decoded when they are looked at.

Rows stream from the run into an Arrow file that is memory-mapped, so neither making nor reading it takes memory in proportion to the run.
Pictures stay where they are, in the run's ``images/``: the Arrow file holds their paths. The cache is named after the run and the size of
its files, so a run that has grown since is read anew and never answered from an old cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monologue.traces.store import RunReader
from monologue.training.rows import plain_row, read_rows

if TYPE_CHECKING:
    import datasets


class MissingExtra(ImportError):
    """A library that this needs is not installed."""


def as_dataset(run: str | Path, roles: Iterable[str] | None = None, cache_dir: str | Path | None = None) -> datasets.Dataset:
    """The run's rows (fields of ``plain_row``; ``images`` are pictures, ``image_sha256`` their names). Raises RunError, MissingExtra."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra("a data set of a run needs the library 'datasets'; pip install 'monologue[datasets]'") from error
    reader = RunReader(run)
    wanted = None if roles is None else sorted(set(roles))
    return datasets.Dataset.from_generator(
        _examples,
        features=_features(datasets),
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={"run": str(Path(run).resolve()), "roles": wanted},
        fingerprint=_fingerprint(reader, wanted),
    )


def _examples(run: str, roles: list[str] | None) -> Iterator[dict[str, Any]]:
    for row in read_rows(run, roles):
        plain = plain_row(row)
        names = plain.pop("images")
        rewards = plain.pop("rewards")
        paths = [str(Path(run) / "images" / f"{name}.png") for name in names]
        rewarded = {"reward_names": list(rewards), "reward_values": list(rewards.values())}
        yield {**plain, **rewarded, "image_sha256": names, "images": paths}


def _features(datasets: Any) -> Any:
    def many(kind: str) -> Any:
        return datasets.List(datasets.Value(kind))

    texts = ("episode_id", "group_id", "role", "stream", "policy_id", "task", "family")
    return datasets.Features(
        {
            **{name: datasets.Value("string") for name in texts},
            "sample_index": datasets.Value("int32"),
            "row": datasets.Value("int32"),
            "ids": many("int32"),
            "mask": many("int8"),
            "logprobs": many("float32"),
            "spans": many("string"),
            "weights_versions": many("string"),
            "reward_names": many("string"),
            "reward_values": many("float64"),
            "image_sha256": many("string"),
            "images": datasets.List(datasets.Image()),
        }
    )


def _fingerprint(reader: RunReader, roles: list[str] | None) -> str:
    sizes = sorted((file.name, file.stat().st_size) for part in ("spans", "annotations") for file in (reader.path / part).glob("*.jsonl"))
    return hashlib.sha256(f"{reader.info['run_id']} {sizes} {roles}".encode()).hexdigest()[:32]
