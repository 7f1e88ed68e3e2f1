"""Latent steps with pictures inside a real server choose the same patches and say the same as in process: the shipped thinker, which stops
by itself, and a random model of the other Qwen-VL class, whose prompts are read in pieces of 16; together, in a second turn, where
thoughts must be read again, and where requests are taken from their batch in the midst of them.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from monologue.backends.base import BackendError, Picture, Prompt, RequestRefused, Sampling
from monologue.backends.checkpoints import open_config
from monologue.backends.hf import HFBackend
from monologue.backends.latent import Habit
from monologue.backends.perception.modes import Mode
from monologue.backends.sampling import log_distribution
from monologue.backends.serving.latent import Thinking, environment
from monologue.backends.serving.launch import Server
from monologue.backends.sglang import SGLangBackend
from monologue.seating import starter
from monologue.tasks.hops import Hops
from monologue.training.starter.models import build_tokenizer
from tests import tiny_models as tiny
from tests_real.served.kit import CLOSE, Start, flush, post

PLAIN = Sampling(temperature=1.0)
NOTHING: Mapping[str, str] = {}
Reply = tuple[list[int], list[float]]


@dataclass
class Served:
    """A model on a server, and in process."""

    server: Server
    client: SGLangBackend
    engine: HFBackend
    thinking: Thinking
    prompts: list[Prompt]

    @property
    def model(self) -> Any:
        """By plain attention, which gives its maps."""
        self.engine._model.set_attn_implementation("eager")
        return self.engine._model

    def say(self, prompt: Prompt, ids: Sequence[int] = (), words: int = 30, temperature: float = 1.0, **more: Any) -> tuple[Reply, Any]:
        """What the server says after the prompt and ``ids``, and what it tells beside."""
        images = self.client._requests.admit(prompt, 1, PLAIN)
        sampling = Sampling(temperature=temperature, max_tokens=words)
        body = {**self.client._requests.generation(replace(prompt, ids=(*prompt.ids, *ids)), images, sampling), **more}
        meta = post(self.server.url, "/generate", body)["meta_info"]
        rows = meta["output_token_logprobs"]
        return ([row[1] for row in rows], [row[0] for row in rows]), meta

    def together(self, prompts: list[Prompt], ids: list[list[int]], **more: Any) -> list[tuple[Reply, Any]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt, before: self.say(prompt, before, **more), prompts, ids))

    @torch.no_grad()
    def proven(self, prompt: Prompt, ids: list[int], first: int, values: list[float]) -> int:
        """Reads prompt and ``ids`` place by place with nothing kept; holds every choice, every stop, and from place ``first`` on every
        log-prob against what the server did. Returns how many steps it proved.
        """
        whole, how = [*prompt.ids, *ids], self.thinking
        pixels, grid = self.engine._inputs.pixels([picture.image for picture in prompt.pictures])
        model = self.model
        pool = torch.cat(list(model.model.get_image_features(pixels, image_grid_thw=grid, return_dict=True).pooler_output))  # (J, D)
        spots = [place for place, token in enumerate(whole) if token == model.config.image_token_id]
        embed, places = model.get_input_embeddings(), self.engine._inputs.positions(tuple(whole), grid)
        given, hidden, maps = list[Tensor](), torch.zeros(0), torch.zeros(0)
        span, decides, steps = 0, 0, 0

        def read() -> tuple[Tensor, Tensor]:
            out = model.model.language_model(
                inputs_embeds=torch.stack(given)[None], position_ids=places[:, None, : len(given)], output_attentions=True
            )
            return out.last_hidden_state[0], torch.stack(out.attentions)[:, 0].mean((0, 1))  # (T, D), (T, T)

        for place, token in enumerate(whole):
            span = span + 1 if token >= how.id else 0
            if span and (span - 1) % (how.patches + 1) == 0:  # a step begins
                hidden, maps = read()
                decides, steps = place - 1, steps + 1
                step = [one - how.id - 1 for one in whole[place : place + how.patches + 1] if one > how.id]
                taken = {one - how.id - 1 for one in whole[place - span + 1 : place] if one > how.id}
                row = maps[decides, spots].masked_fill(torch.tensor([number in taken for number in range(len(spots))]), -1)
                best = sorted(row.topk(how.patches).indices.tolist())
                assert step == best[: len(step)], (place, step, best)
            if token == how.id:
                given.append(hidden[decides])
            elif token > how.id:
                given.append(pool[token - how.id - 1])
            elif token == model.config.image_token_id:
                given.append(pool[spots.index(place)])
            else:
                given.append(embed(torch.tensor(token)))
        for place in range(first - 1, len(whole) - 1):  # thoughts stand behind the whole of what they follow and nowhere else
            if how.think is None and whole[place] < how.id:
                assert (whole[place + 1] >= how.id) == (tuple(whole[: place + 1][-len(how.after) :]) == how.after), place
        hidden, _ = read()
        banned = [model.config.image_token_id, model.config.video_token_id]
        logits = model.lm_head(hidden)[:-1]
        if how.think is not None:
            chances = log_distribution(logits, [PLAIN], banned)[:, how.think].exp()
            ends = [
                place for place, one in enumerate(whole[:-1]) if one == how.id or tuple(whole[: place + 1][-len(how.after) :]) == how.after
            ]
            assert all(
                (float(chances[place]) >= 0.5) == (whole[place + 1] >= how.id) for place in ends if _length(whole, place, how) < how.steps
            )
        table = log_distribution(logits, [PLAIN], banned if how.think is None else [*banned, how.think])
        wanted = [0.0 if token >= how.id else float(line[token]) for token, line in zip(whole[1:], table, strict=True)]
        assert max(abs(one - other) for one, other in zip(values, wanted[first - 1 :], strict=True)) < CLOSE
        return steps


def _length(whole: list[int], place: int, how: Thinking) -> int:
    """Steps of the span that ends at a place."""
    before = next((back for back in range(place, -1, -1) if whole[back] < how.id), -1)
    return (place - before) // (how.patches + 1)


@pytest.fixture(scope="module")
def thinker(start: Start) -> Iterator[Served]:
    folder = starter("thinker")
    engine = HFBackend(folder, habit=Habit.load(folder))
    tokenizer, prompts = engine.tokenizer, list[Prompt]()
    for problem in Hops().problems("validation", 12):
        choices = " ".join(f"<choice> {choice}" for choice in problem.choices)
        asked = f"<bos> <user> <|vision_start|> {'<|image_pad|> ' * 12}<|vision_end|> {problem.question} {choices} <assistant>"
        prompts.append(Prompt(tuple(tokenizer(asked).input_ids), (Picture("", problem.pictures[0]()),)))
    after = tokenizer.convert_tokens_to_ids("<assistant>")
    yield from _served(start, folder, engine, Thinking.of(Habit.load(folder), open_config(str(folder)), (after,), room=12), prompts)


@pytest.fixture(scope="module")
def random_model(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tiny.save_vision_model(tmp_path_factory.mktemp("random") / "qwen2_5", "qwen2_5")
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.decoder = build_tokenizer().backend_tokenizer.decoder  # without blanks around pictures
    words.save(str(folder / "tokenizer.json"))
    engine = HFBackend(folder)
    prompts = []
    for number, size in enumerate([(56, 84), (112, 56), (84, 84)]):
        image = Image.effect_noise(size, 90).convert("RGB")
        count = engine.placeholders(image).count
        ids = (9, 10 + number, tiny.START, *[tiny.IMAGE] * count, tiny.END, *range(20, 20 + 3 * number), 7, 8, 7, 7, 8, 7, 9, 7)
        prompts.append(Prompt(ids, (Picture("", image),)))
    habit = Habit(Mode(order="state-first", k=3), 2)
    habit.save(folder)
    thinking = Thinking.of(habit, open_config(str(folder)), after=(7, 9, 7), room=16)
    yield from _served(start, folder, engine, thinking, prompts, "--chunked-prefill-size=16")


@pytest.fixture(scope="module")
def interrupted(start: Start, random_model: Served) -> Iterator[Served]:
    """The random model on a server that takes requests from their batch and begins them again, as if its memory were full, all the time."""
    often, folder = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "3"}, Path(random_model.engine.facts.model)
    yield from _served(start, folder, random_model.engine, random_model.thinking, random_model.prompts, extra=often)


def _served(
    start: Start,
    folder: Path,
    engine: HFBackend,
    thinking: Thinking,
    prompts: list[Prompt],
    *flags: str,
    extra: Mapping[str, str] = NOTHING,
) -> Iterator[Served]:
    config = open_config(str(folder))
    server = start(str(folder), *thinking.flags(config), *flags, extra={**environment(config), **extra})
    client = SGLangBackend(server.url)
    yield Served(server, client, engine, thinking, prompts)
    asyncio.run(client.aclose())


@pytest.fixture(params=["thinker", "random_model"])
def served(request: pytest.FixtureRequest) -> Served:
    found: Served = request.getfixturevalue(request.param)
    return found


def test_prompts_are_thought_about_together_as_in_process(served: Served) -> None:
    nothing: list[list[int]] = [[] for _ in served.prompts]
    for prompt, ((ids, values), _) in zip(served.prompts, served.together(served.prompts, nothing), strict=True):
        assert served.proven(prompt, ids, len(prompt.ids), values) >= 2
        assert any(token < served.thinking.id for token in ids)


def test_requests_that_were_taken_from_the_batch_think_as_if_they_had_not_been(interrupted: Served) -> None:
    prompts, retracted = interrupted.prompts * 4, 0
    for _ in range(10):  # a busy machine may deal with requests one after another, and one alone is never taken out
        for prompt, ((ids, values), meta) in zip(prompts, interrupted.together(prompts, [[] for _ in prompts]), strict=True):
            assert interrupted.proven(prompt, ids, len(prompt.ids), values) >= 2
            retracted += meta["num_retractions"]
        if retracted:
            return
    raise AssertionError("nobody was taken from the batch")


@pytest.mark.parametrize("kept", [True, False])
def test_a_second_turn_is_right_over_kept_thoughts_and_over_thoughts_read_again(served: Served, kept: bool) -> None:
    flush(served.server.url)
    prompts, nothing = served.prompts[:3], [list[int]() for _ in range(3)]
    first = [[*ids[:24], 9, *served.thinking.after] for (ids, _), _ in served.together(prompts, nothing, temperature=0.0)]
    if not kept:
        flush(served.server.url)
    for prompt, before, ((ids, values), meta) in zip(prompts, first, served.together(prompts, first), strict=True):
        assert (meta["cached_tokens"] > len(prompt.ids)) == kept
        assert served.proven(prompt, [*before, *ids], len(prompt.ids) + len(before), values) >= 3


def test_a_part_of_what_thoughts_follow_starts_none(random_model: Served) -> None:
    prompt, begun = random_model.prompts[0], [12, 13, 9, 7]
    (reply, _), _ = random_model.say(prompt, temperature=0.0, words=8)
    before = [*reply, *begun]
    (words, values), _ = random_model.say(prompt, before, temperature=0.0, words=4)
    assert words[0] < random_model.thinking.id
    assert random_model.proven(prompt, [*before, *words], len(prompt.ids) + len(before), values) == 2
    before += [9, 7]
    (thoughts, values), _ = random_model.say(prompt, before, temperature=0.0, words=12)
    assert thoughts[0] == random_model.thinking.id
    assert random_model.proven(prompt, [*before, *thoughts], len(prompt.ids) + len(before), values) == 4


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_thoughts_that_were_cut_anywhere_go_on_as_they_would_have(served: Served, cut: int) -> None:
    prompt = served.prompts[2]
    (ids, values), _ = served.say(prompt, temperature=0.0)
    for kept in (True, False):
        if not kept:
            flush(served.server.url)
        (rest, further), meta = served.say(prompt, ids[:cut], temperature=0.0, words=30 - cut)
        assert rest == ids[cut:] and (meta["cached_tokens"] > 1) == kept
        assert max(abs(one - other) for one, other in zip(further, values[cut:], strict=True)) < CLOSE


def test_a_recorded_reply_is_scored_as_it_was_sampled(served: Served) -> None:
    prompt = served.prompts[1]
    (ids, values), _ = served.say(prompt)
    while ids[-1] == served.engine._model.config.vision_start_token_id:  # SGLang fails on a prompt that ends where a picture opens
        ids, values = ids[:-1], values[:-1]
    flush(served.server.url)
    more = {
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "logprob_start_len": 0,
        "token_ids_logprob": list(served.engine._inputs.banned),
    }
    _, meta = served.say(prompt, ids, **more)
    scored = [row[0] for row in meta["input_token_logprobs"]][len(prompt.ids) :]
    taken = [sum(float(torch.tensor(one[0]).exp()) for one in row) for row in meta["input_token_ids_logprobs"][-len(ids) :]]
    for token, value, score, mass in zip(ids, values, scored, taken, strict=True):
        assert token >= served.thinking.id or abs(value - (score - float(torch.tensor(-mass).log1p()))) < CLOSE


def test_who_sees_too_little_is_not_made_to_think(served: Served) -> None:
    words = tuple(token for token in served.prompts[0].ids if token != served.engine.image_token_id)
    (ids, _), _ = served.say(Prompt(words))
    assert all(token < served.thinking.id for token in ids)


def test_the_client_tells_thoughts_from_words_as_the_engine_in_process_does(thinker: Served) -> None:
    greedy = Sampling(temperature=0.0, max_tokens=4, stop_ids=(thinker.engine.tokenizer.eos_token_id,))

    prompts, ours, theirs = thinker.prompts, thinker.engine, thinker.client

    async def both() -> list[tuple[Any, ...]]:
        mine = await asyncio.gather(*(ours.generate(prompt, greedy) for prompt in prompts))
        told = await asyncio.gather(*(theirs.generate(prompt, greedy) for prompt in prompts))
        chosen = [tuple(thought.chosen for thought in one.thoughts) for one in told]
        known = [(replace(prompt, chosen=steps), one.ids) for prompt, steps, one in zip(prompts, chosen, told, strict=True)]
        scores = [await asyncio.gather(*(engine.score(prompt, ids, PLAIN) for prompt, ids in known)) for engine in (ours, theirs)]
        return list(zip(mine, told, *scores, strict=True))

    for one, other, score, theirs_score in asyncio.run(both()):
        assert one.ids == other.ids and one.finish_reason == other.finish_reason == "stop"
        assert [thought.chosen for thought in one.thoughts] == [thought.chosen for thought in other.thoughts]
        for values, wanted in ((other.logprobs, one.logprobs), (theirs_score, score)):
            assert max(abs(a - b) for a, b in zip(values, wanted, strict=True)) < CLOSE
    short = asyncio.run(theirs.generate(prompts[0], replace(greedy, max_tokens=1)))
    assert len(short.ids) == len(short.logprobs or ()) == 1 and short.finish_reason == "length" and len(short.thoughts) == 2
    assert thinker.client.facts.extra["habit"] == thinker.engine.facts.extra["habit"]


def test_the_client_refuses_what_a_server_would_think_about_otherwise(thinker: Served, random_model: Served, tmp_path: Path) -> None:
    [prompt, *_], blind = thinker.prompts, tuple(token for token in thinker.prompts[0].ids if token != thinker.engine.image_token_id)
    for wrong, reason in (
        (replace(prompt, ids=(*prompt.ids, 9)), "ends with them"),
        (Prompt(blind), r"10 \(steps x patches\) to 12 places"),
    ):
        with pytest.raises(RequestRefused, match=reason):
            asyncio.run(thinker.client.generate(wrong, PLAIN))
    with pytest.raises(RequestRefused, match="chooses patches by itself"):
        asyncio.run(thinker.client.generate(replace(prompt, chosen=((1, 2),)), PLAIN))
    for chosen, reason in (
        (None, "after thoughts that are given"),
        (((1, 12),), "patches below 12"),
        (((1,),), "5 steps of 2 patches"),
        (((1, 2),) * 6, "5 steps"),
    ):
        with pytest.raises(RequestRefused, match=reason):
            asyncio.run(thinker.client.score(replace(prompt, chosen=chosen), (20,), PLAIN))
    folder = tmp_path / "taught-otherwise"
    shutil.copytree(random_model.engine.facts.model, folder)
    Habit(Mode(order="state-first", k=3), 3).save(folder)
    with pytest.raises(BackendError, match="was taught to as"):
        SGLangBackend(random_model.server.url, source=str(folder))
