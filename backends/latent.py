"""The in-process engine's other way to answer: latent steps first (``perception.ivtlr``), then words, sampled as ever.

``Habit`` is how a checkpoint was taught to think; it lies beside the weights as ``latent.json``. ``Thinker`` stands in for the engine's
``Decoder``, so batching, sampling, log-probs and replay are those of every other policy: thoughts follow from prompt, pictures and chosen
patches, so a recorded call is scored by thinking again.

A thinker never takes up what an earlier call of its stream has read: the thoughts between would be missing. It reads the whole prompt and
thinks anew, which is what training did. Lanes that are done stay in their batch until all are, since answers after thoughts are short.

Shapes: B lanes, n steps, K patches a step, D width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monologue.backends.base import BackendError, ImageFacts, RequestRefused, Thought
from monologue.backends.decoding import Lane
from monologue.backends.perception.ivtlr import LatentReasoner, Thoughts
from monologue.backends.perception.modes import Mode
from monologue.backends.perception.prompts import Asked, prompts
from monologue.backends.places import HABIT
from monologue.backends.sampling import draw, log_distribution

NEAREST = 3
"""Words told of each state."""


@dataclass(frozen=True, slots=True)
class Habit:
    """How a checkpoint thinks."""

    mode: Mode
    """How a step is made."""
    steps: int
    """Latent steps; at most, where it stops by itself."""
    think: int | None = None
    """Id by which a state says that it has not finished; None: the number of steps is fixed."""

    def save(self, folder: str | Path) -> None:
        """Beside the weights."""
        (Path(folder) / HABIT).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def told(self) -> str:
        """For a trace, as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def heard(cls, text: str) -> Habit:
        """What ``told`` gave. Raises ValueError, TypeError, KeyError."""
        facts = json.loads(text)
        found = cls(**{**facts, "mode": Mode(**facts["mode"])})
        for name, value in (("steps", found.steps), ("think", found.think)):
            if not (type(value) is int and value >= 0) and (name, value) != ("think", None):
                raise ValueError(f"{name} must be a whole number from 0, got {value!r}")
        return found

    @classmethod
    def load(cls, folder: str | Path) -> Habit:
        """Raises BackendError for a checkpoint that was never taught to think."""
        file = Path(folder) / HABIT
        if not file.is_file():
            raise BackendError(f"expected {HABIT} in {str(folder)!r}: it was not taught to think; see 'monologue train latent'")
        try:
            return cls.heard(file.read_text())
        except (ValueError, TypeError, KeyError) as error:
            raise BackendError(f"{str(file)!r} does not say how to think: {error}") from error

    @property
    def places(self) -> int:
        """Most places that thoughts take between prompt and reply."""
        return self.steps * ((self.mode.thought != "none") + (self.mode.k if self.mode.patches != "none" else 0))

    def check(self, words: int) -> None:
        """Raises BackendError where ``think`` is none of a model's ``words`` ids."""
        if self.think is not None and self.think >= words:
            raise BackendError(f"expected a 'think' in {HABIT} from 0 to {words - 1}, an id of the model's vocabulary, got {self.think!r}")

    def admit(self, images: Sequence[ImageFacts]) -> None:
        """Raises RequestRefused for a prompt over which this habit cannot be followed, before it is in a batch with others."""
        seen, wanted = sum(image.placeholder_count for image in images), self.steps * self.mode.k
        if self.mode.arrangement == "released" and len(images) != 1:
            raise RequestRefused(f"expected one picture a prompt, as the released code does, got {len(images)}; use another mode")
        if self.mode.scarce == "refuse" and self.mode.patches != "none" and not self.mode.reuse and seen < wanted:
            raise RequestRefused(f"expected pictures with {wanted} patches (steps x k) or more, got {seen}; lower k, or scarce='fewer'")

    def halt(self, reasoner: LatentReasoner, banned: Sequence[int] = ()) -> Callable[[int, Tensor], Tensor] | None:
        """For ``LatentReasoner.think``: lanes whose state (B, D) says that it has finished, ``banned`` ids left out as in training."""
        if self.think is None:
            return None
        word, silent = self.think, torch.tensor(banned, dtype=torch.long)

        def finished(step: int, states: Tensor) -> Tensor:
            logits = reasoner.say(states).index_fill(-1, silent.to(states.device), -torch.inf)  # (B, V)
            return logits.softmax(-1)[:, word] < 0.5

        return finished


class Thinker:
    """Runs lanes through a model that thinks first."""

    def __init__(self, model: Any, banned: Sequence[int], habit: Habit, tokenizer: Any) -> None:
        if habit.mode.patches == "random":
            raise BackendError("a policy with random patches is a control and cannot be replayed; seat one that chooses")
        habit.check(int(model.get_input_embeddings().num_embeddings))
        self._banned, self._habit, self._tokenizer = tuple(banned), habit, tokenizer
        self._silent = self._banned if habit.think is None else (*self._banned, habit.think)
        self._reasoner = LatentReasoner(model, habit.mode)
        self._model = model

    @torch.inference_mode()
    def generate(self, lanes: list[Lane], dropped: Callable[[Lane], bool]) -> Iterator[Lane]:
        """Yields each lane when it is done; lanes that are ``dropped`` end without a word."""
        for some in _apart(lanes):
            yield from self._generate(some, dropped)

    def _generate(self, lanes: list[Lane], dropped: Callable[[Lane], bool]) -> Iterator[Lane]:
        thoughts = self._think(lanes)
        for lane, told in zip(lanes, self._told(thoughts), strict=True):
            lane.thoughts = told
        logits = self._reasoner.say(thoughts.last)  # (B, V)
        going = torch.ones(len(lanes), dtype=torch.bool, device=logits.device)
        while True:
            self._sample(lanes, logits, going)
            yield from [lane for lane, on in zip(lanes, going.tolist(), strict=True) if on and lane.done]
            going = torch.tensor([not lane.done and not dropped(lane) for lane in lanes], device=logits.device)
            if not bool(going.any()):
                return
            said = torch.tensor([lane.sampled[-1] for lane in lanes], device=going.device)
            logits = self._reasoner.hear(thoughts, said, going)

    @torch.inference_mode()
    def score(self, lanes: list[Lane], counts: list[int]) -> list[tuple[float, ...]]:
        """Log-probs of the last ``count`` ids of each lane, said after thoughts that follow what stands before them."""
        wanted = {id(lane): count for lane, count in zip(lanes, counts, strict=True)}
        found: dict[int, tuple[float, ...]] = {}
        for some in _apart(lanes):
            scores = self._score(some, [wanted[id(lane)] for lane in some])
            found |= {id(lane): score for lane, score in zip(some, scores, strict=True)}
        return [found[id(lane)] for lane in lanes]

    def _score(self, lanes: list[Lane], counts: list[int]) -> list[tuple[float, ...]]:
        cut = [(lane.ids[: len(lane.ids) - count], lane.ids[len(lane.ids) - count :]) for lane, count in zip(lanes, counts, strict=True)]
        thoughts = self._think(lanes, [before for before, _ in cut])
        longest = max(counts)
        ids = torch.tensor([[*said, *[0] * (longest - len(said))] for _, said in cut], device=thoughts.last.device)
        valid = torch.arange(longest, device=ids.device) < torch.tensor(counts, device=ids.device)[:, None]
        logits = self._reasoner.read(thoughts, ids, valid)  # (B, T, V)
        found = []
        for lane, row, line, count in zip(lanes, logits, ids, counts, strict=True):
            log_probs = log_distribution(row[:count], [lane.sampling], self._silent)
            found.append(tuple(log_probs.gather(-1, line[:count, None]).squeeze(-1).tolist()))
        return found

    def _think(self, lanes: list[Lane], ids: Sequence[tuple[int, ...]] | None = None) -> Thoughts:
        starts = [lane.ids for lane in lanes] if ids is None else ids
        asked = [Asked(start, lane.pixels, lane.grids, lane.positions[:, : len(start)]) for lane, start in zip(lanes, starts, strict=True)]
        given, known = prompts(self._model, asked), [lane.chosen for lane in lanes if lane.chosen is not None]
        if not known:
            return self._reasoner.think(given, self._habit.steps, halt=self._habit.halt(self._reasoner, self._banned))
        return self._reasoner.think(given, [len(one) for one in known], chosen=self._forced(known))

    def _forced(self, known: Sequence[tuple[tuple[int, ...], ...]]) -> Tensor | None:
        """(B, n, K) patches as they were chosen: a near-tie may fall otherwise in another batch. None where there are none to choose."""
        if self._habit.mode.patches == "none":
            return None
        k, most = self._habit.mode.k, max(map(len, known))
        lines = [[[*step, *[-1] * k][:k] for step in (*one, *[()] * most)][:most] for one in known]
        return torch.tensor(lines, device=self._model.device).view(len(known), most, k)

    def _told(self, thoughts: Thoughts) -> list[tuple[Thought, ...]]:
        """Each lane's latent steps as plain values."""
        logits = self._reasoner.say(thoughts.states)  # (B, n, V), of what could be said
        silent = torch.tensor(self._silent, dtype=torch.long, device=logits.device)
        chances, ids = logits.index_fill(-1, silent, -torch.inf).softmax(-1).topk(NEAREST, dim=-1)  # (B, n, 3)
        norms = thoughts.states.norm(dim=-1)
        return [
            tuple(
                Thought(
                    chosen=tuple(place for place in thoughts.chosen[lane, step].tolist() if place >= 0),
                    norm=float(norms[lane, step]),
                    words=tuple(self._tokenizer.decode([word]) for word in ids[lane, step].tolist()),
                    chances=tuple(chances[lane, step].tolist()),
                )
                for step in range(count)
            )
            for lane, count in enumerate(thoughts.steps.tolist())
        ]

    def _sample(self, lanes: list[Lane], logits: Tensor, going: Tensor) -> None:
        samplings = [lane.sampling for lane in lanes]
        log_probs = log_distribution(logits, samplings, self._silent)  # (B, V)
        tokens = draw(log_probs, samplings, [lane.dice.random() for lane in lanes])
        values = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
        entropies = torch.special.entr(log_probs.exp()).sum(-1).tolist()
        for place, lane in enumerate(lanes):
            if going[place]:
                lane.sampled.append(int(tokens[place]))
                lane.logprobs.append(values[place])
                lane.entropies.append(entropies[place])


def _apart(lanes: list[Lane]) -> list[list[Lane]]:
    """Those whose patches are given, and those that choose: neither may be taken for the other."""
    known = [lane for lane in lanes if lane.chosen is not None], [lane for lane in lanes if lane.chosen is None]
    return [some for some in known if some]
