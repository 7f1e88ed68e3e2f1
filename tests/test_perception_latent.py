"""Latent steps on tiny random models in float64: what is kept, batched or replayed gives the numbers of what is read alone and anew."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from monologue.backends.base import BackendError, RequestRefused
from monologue.backends.checkpoints import open_checkpoint
from monologue.backends.inputs import Inputs
from monologue.backends.perception.ivtlr import OURS, PAPER, REFERENCE, Asked, Edits, LatentReasoner, Mode, Prompts, Thoughts, prompts
from monologue.backends.perception.prompts import positions
from monologue.backends.perception.reading import decoder
from monologue.tasks.shapes import Shapes
from tests import tiny_models as tiny

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import latent_reference
import released_ivtlr

FAMILIES = ["qwen2", "qwen2_5", "llava"]
MODES = {
    "ours": OURS,
    "paper": PAPER,
    "reference": REFERENCE,
    "state selects": replace(OURS, selects="state", order="state-first"),
    "placed, nothing but patches": replace(OURS, positions="placed", bottleneck="picture"),
    "no state, picture hidden": replace(OURS, thought="none", bottleneck="question"),
    "random, reused": replace(OURS, patches="random", reuse=True),
    "state only": replace(OURS, patches="none"),
    "pause": replace(OURS, thought="pause", pause_id=9, patches="none"),
}
MODES = {name: replace(mode, k=1 if name == "reference" else 2) for name, mode in MODES.items()}
SAID = torch.tensor([[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]])
SEEDS = [5, 6, 7]
CLOSE = 1e-9


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    return {family: tiny.exact(tiny.seeing_model(family)).requires_grad_(False) for family in FAMILIES}


def asked(family: str, words: int, sides: tuple[tuple[int, int], ...], seed: int) -> Asked:
    """A prompt of ``words`` words after pictures of so many visual tokens high and wide (LLaVA's have always 4 x 4)."""
    dice = torch.Generator().manual_seed(seed)
    ids: list[int] = [6]
    pixels, grids = [], []
    for high, wide in sides:
        count = 16 if family == "llava" else high * wide
        ids += [tiny.START, *[tiny.IMAGE] * count, tiny.END]
        size = (1, 3, 28, 28) if family == "llava" else (4 * count, 3 * 2 * 14 * 14)
        pixels.append(torch.randn(size, generator=dice, dtype=torch.float64))
        grids.append([1, 2 * high, 2 * wide])
    ids += torch.randint(6, tiny.SIZE, (words,), generator=dice).tolist()
    shown = torch.cat(pixels) if pixels else None
    return Asked(tuple(ids), shown, None if family == "llava" or not grids else torch.tensor(grids))


def ragged(family: str, *, one_each: bool = False) -> list[Asked]:
    """Three prompts: a picture; more words and two pictures; fewer patches than three steps want (or, not for the released code, none)."""
    second, third = (((2, 3),), ((2, 4),)) if one_each else (((3, 1), (2, 2)), ())
    return [asked(family, 3, ((3, 3),), 0), asked(family, 6, second, 1), asked(family, 2, third, 2)]


def run(model: Any, mode: Mode, given: list[Asked], steps: Any, **more: Any) -> tuple[Thoughts, Tensor]:
    reasoner = LatentReasoner(model, mode)
    thoughts = reasoner.think(prompts(model, given), steps, **more)
    return thoughts, reasoner.read(thoughts, SAID[: len(given)])


def close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=0, atol=CLOSE))


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_and_batched_steps_are_those_read_anew_and_alone(models: dict[str, Any], family: str, name: str) -> None:
    given, steps = ragged(family, one_each=name == "reference"), [3, 1, 2]
    thoughts, logits = run(models[family], MODES[name], given, steps, seeds=SEEDS)
    anew, same = run(models[family], MODES[name], given, steps, seeds=SEEDS, cached=False)
    assert torch.equal(thoughts.chosen, anew.chosen) and thoughts.steps.tolist() == steps
    assert close(logits, same) and close(thoughts.states[0], anew.states[0])
    for lane, count in enumerate(steps):
        reasoner = LatentReasoner(models[family], MODES[name])
        alone = reasoner.think(prompts(models[family], [given[lane]]), count, seeds=[SEEDS[lane]])
        assert torch.equal(alone.chosen[0], thoughts.chosen[lane, :count])
        assert close(alone.states[0], thoughts.states[lane, :count])
        assert close(reasoner.read(alone, SAID[lane : lane + 1])[0], logits[lane])


@pytest.mark.parametrize("family", FAMILIES)
def test_words_fed_one_by_one_are_predicted_as_those_read_at_once(models: dict[str, Any], family: str) -> None:
    for mode in (MODES["ours"], MODES["no state, picture hidden"]):
        reasoner = LatentReasoner(models[family], mode)
        thoughts, logits = run(models[family], mode, ragged(family), 2)
        again = reasoner.think(prompts(models[family], ragged(family)), 2, chosen=thoughts.chosen)
        assert torch.equal(again.states, thoughts.states)
        assert close(reasoner.say(again.last), logits[:, 0])
        for place in range(3):
            assert close(reasoner.hear(again, SAID[:, place]), logits[:, place + 1])


def test_the_last_layer_computes_the_ends_of_blocks_and_words_alone(models: dict[str, Any]) -> None:
    rows, layers = list[tuple[int, int]](), decoder(models["qwen2"]).layers
    counting = [layer.mlp.gate_proj.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[:2])) for layer in layers]
    run(models["qwen2"], MODES["ours"], ragged("qwen2"), 2)
    for hook in counting:
        hook.remove()
    *_, (_, words) = rows
    assert [length for _, length in rows[len(layers) - 1 :: len(layers)]] == [1, 1, 1, words]
    assert all(length > 1 for _, length in rows[:: len(layers)])
    assert not any(layer.mlp._forward_hooks or layer.mlp._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Phi", "Glm4", "Olmo2", "Starcoder2", "Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_text_models_of_other_families_say_the_same_where_work_is_spared(name: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # what a family has no use for
        config = getattr(transformers, f"{name}Config")(**sizes, **more, max_position_embeddings=128, moe_intermediate_size=16)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    mixture = "experts" in repr(model)  # such models know no float64
    model = model if mixture else model.double()
    given = [Asked(tuple(range(3, 3 + length))) for length in (9, 6, 4)]
    mode = replace(MODES["ours"], patches="none")
    (spared, said), (plain, same) = (run(model, mode, given, [2, 1, 2], cached=cached) for cached in (True, False))
    far = 1e-5 if mixture else CLOSE
    assert float((said - same).abs().max()) < far and float((spared.states[0] - plain.states[0]).abs().max()) < far


@pytest.mark.parametrize("inference", [True, False])
def test_what_is_kept_is_not_copied_for_every_word_and_can_be_read_on_with_gradients(inference: bool) -> None:
    model = tiny.exact(tiny.seeing_model("qwen2"))
    reasoner, given = LatentReasoner(model, MODES["ours"]), prompts(model, ragged("qwen2"))
    said = torch.cat([SAID, SAID[:, 3:], SAID[:, :1]], dim=1)
    wanted = reasoner.read(reasoner.think(given, 2), said)
    with torch.inference_mode(inference), torch.no_grad():
        thoughts = reasoner.think(prompts(model, ragged("qwen2")), 2)
        places = set()
        for place in range(2):
            reasoner.hear(thoughts, SAID[:, place])
            places.add(thoughts.reader.cache.layers[0].keys.data_ptr())
        assert len(places) == 1
        logits = reasoner.hear(thoughts, SAID[:, 2])
    assert close(logits, wanted[:, 3])
    if not inference:  # what was made for inference alone takes no part in a graph
        kept = thoughts.reader.cache.layers[0].keys.clone()
        (logits := reasoner.hear(thoughts, SAID[:, 3])).sum().backward()  # type: ignore[no-untyped-call]
        assert any(weight.grad is not None and bool(weight.grad.any()) for weight in decoder(model).layers[0].parameters())
        assert torch.equal(thoughts.reader.cache.layers[0].keys[:, :, :-1], kept)
        with torch.no_grad():
            assert close(logits, wanted[:, 4]) and close(reasoner.hear(thoughts, SAID[:, 3]), wanted[:, 5])


def test_lanes_that_have_ended_stay_as_they_are_while_others_go_on(models: dict[str, Any]) -> None:
    reasoner = LatentReasoner(models["qwen2"], MODES["ours"])
    _, logits = run(models["qwen2"], MODES["ours"], ragged("qwen2"), 1)
    again = reasoner.think(prompts(models["qwen2"], ragged("qwen2")), 1)
    reasoner.hear(again, SAID[:, 0], torch.tensor([True, False, True]))
    assert close(reasoner.say(again.last)[1], logits[1, 0])
    assert close(reasoner.hear(again, SAID[:, 1] * torch.tensor([1, 0, 1]) + SAID[:, 0] * torch.tensor([0, 1, 0]))[1], logits[1, 1])


def test_steps_that_a_state_refuses_are_steps_never_taken(models: dict[str, Any]) -> None:
    given = ragged("qwen2")
    halted, logits = run(models["qwen2"], MODES["ours"], given, 3, halt=lambda step, states: torch.tensor([step >= 2, step >= 0, False]))
    told, same = run(models["qwen2"], MODES["ours"], given, [2, 0, 3])
    assert halted.steps.tolist() == told.steps.tolist() == [2, 0, 3]
    assert torch.equal(logits, same)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_one_row_is_that_of_the_whole_attention_maps(models: dict[str, Any], family: str) -> None:
    model, one = tiny.seeing_model(family).double().eval(), asked(family, 5, ((2, 3),), 3)
    model.set_attn_implementation("eager")
    given = prompts(model, [one])
    with torch.no_grad():
        thoughts = LatentReasoner(model, MODES["ours"]).think(given, 1)
        out = decoder(model)(inputs_embeds=given.embeds, position_ids=given.positions.squeeze(0), output_attentions=True)
    whole = torch.cat(out.attentions, dim=1).mean(1)[0, -1]  # (L)
    assert thoughts.scores is not None
    assert close(thoughts.scores[0, 0], whole[given.spots[0]])


def loss_of(model: Any, mode: Mode, given: list[Asked], **more: Any) -> Tensor:
    _, logits = run(model, mode, given, 2, **more)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), SAID[: len(given)].flatten())


@pytest.mark.parametrize("gradients", ["full", "detached"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_differences_where_full_and_are_not_where_detached(family: str, gradients: Any) -> None:
    model, given = tiny.exact(tiny.seeing_model(family)), ragged(family)[:2]
    mode = replace(MODES["ours"], gradients=gradients)
    weights = [weight for name, weight in model.named_parameters() if weight.requires_grad]
    chosen = run(model, mode, given, 2)[0].chosen
    found = torch.autograd.grad(loss_of(model, mode, given, chosen=chosen), weights, allow_unused=True)
    anew = torch.autograd.grad(loss_of(model, mode, given, chosen=chosen, cached=False), weights, allow_unused=True)
    assert all(close(one, other) for one, other in zip(found, anew, strict=True) if one is not None and other is not None)
    dice = torch.Generator().manual_seed(0)
    ways = [torch.randn(weight.shape, generator=dice, dtype=torch.float64) for weight in weights]
    slope = sum(float((grad * way).sum()) for grad, way in zip(found, ways, strict=True) if grad is not None)
    measured = slope_of(lambda: float(loss_of(model, mode, given, chosen=chosen)), weights, ways)
    assert (abs(slope - measured) < 1e-6 * abs(measured)) == (gradients == "full")


@torch.no_grad()
def slope_of(loss: Callable[[], float], weights: list[Tensor], ways: list[Tensor], size: float = 1e-7) -> float:
    ends = []
    for sign in (1, -2):
        for weight, way in zip(weights, ways, strict=True):
            weight += sign * size * way
        ends.append(loss())
    for weight, way in zip(weights, ways, strict=True):
        weight += size * way
    return (ends[0] - ends[1]) / (2 * size)


@pytest.mark.parametrize("cached", [True, False])
def test_no_gradient_reaches_the_states_of_earlier_passes_in_reference_mode(cached: bool) -> None:
    model, given = tiny.exact(tiny.seeing_model("qwen2")), ragged("qwen2", one_each=True)
    states: list[Tensor] = []
    decoder(model).norm.register_forward_hook(lambda _, __, out: states.append(out) if out.requires_grad else None)
    for mode, reached in ((MODES["reference"], False), (replace(MODES["reference"], gradients="full"), True)):
        states.clear()
        loss = loss_of(model, mode, given, cached=cached)
        grads = torch.autograd.grad(loss, states[:2], allow_unused=True, materialize_grads=True)
        assert all((float(grad.abs().max()) > 0) == reached for grad in grads)


def test_an_anchor_on_a_state_trains_what_made_it_even_where_states_are_detached() -> None:
    model = tiny.exact(tiny.seeing_model("qwen2"))
    thoughts, _ = run(model, replace(MODES["ours"], gradients="detached"), ragged("qwen2"), 2)
    assert not thoughts.fed.requires_grad
    (grad,) = torch.autograd.grad(thoughts.states[:, 1].square().sum(), [decoder(model).layers[0].self_attn.v_proj.weight])
    assert float(grad.abs().max()) > 0


@pytest.mark.parametrize("name", ["ours", "state selects"])
def test_a_straight_through_choice_feeds_the_same_and_teaches_attention_what_a_mixture_would(name: str) -> None:
    model, given, mode = tiny.exact(tiny.seeing_model("qwen2")), ragged("qwen2")[:2], MODES[name]
    weights, found = [decoder(model).layers[0].self_attn.q_proj.weight, decoder(model).layers[1].self_attn.k_proj.weight], {}
    for choice in ("hard", "through"):
        fed: list[Tensor] = []
        kept = Edits(patches=lambda step, patches, fed=fed: fed.append(patches.requires_grad_()) or patches)  # type: ignore[misc]
        reasoner = LatentReasoner(model, replace(mode, choice=choice))
        thoughts = reasoner.think(prompts(model, given), 1, edits=kept)
        logits = reasoner.read(thoughts, SAID[:2])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), SAID[:2].flatten())
        assert thoughts.scores is not None and thoughts.scores.requires_grad == (choice == "through")
        grads = torch.autograd.grad(loss, [*weights, fed[0]], retain_graph=True)
        shares = thoughts.scores[:, 0] / thoughts.scores[:, 0].sum(1, keepdim=True)
        found[choice] = logits, grads, (shares.unsqueeze(1) @ prompts(model, given).pool.detach())
    blind = [*given, asked("qwen2", 2, (), 2)]
    with torch.no_grad():
        _, both = run(model, replace(mode, choice="through"), blind, 1)
    assert bool(both.isfinite().all()), "who has no picture has nothing to mix"
    (hard, plain, _), (soft, taught, mixed) = found["hard"], found["through"]
    assert torch.equal(hard, soft)
    wanted = torch.autograd.grad((taught[2] * mixed).sum(), weights)
    for one, other, more in zip(taught, plain, wanted, strict=False):
        assert close(one, other + more) and float(more.abs().max()) > 1e-6


def test_patches_are_taken_once_unless_they_may_be_reused(models: dict[str, Any]) -> None:
    given = [asked("qwen2", 3, ((3, 3),), 0)]
    once = run(models["qwen2"], replace(OURS, k=3), given, 3)[0].chosen[0].flatten().tolist()
    assert sorted(once) == list(range(9))
    again = run(models["qwen2"], replace(OURS, k=9, reuse=True), given, 3)[0].chosen[0].tolist()
    assert again == [list(range(9))] * 3


def test_where_patches_run_out_a_step_takes_those_left_and_a_prompt_without_picture_thinks_in_states(models: dict[str, Any]) -> None:
    mode = replace(OURS, k=5)
    few, bare = asked("qwen2", 3, ((2, 3),), 0), asked("qwen2", 3, (), 1)
    thoughts, logits = run(models["qwen2"], mode, [few, bare], 3)
    assert [(step >= 0).sum().item() for step in thoughts.chosen[0]] == [5, 1, 0]
    assert bool((thoughts.chosen[1] == -1).all())
    assert close(logits[1], run(models["qwen2"], replace(mode, patches="none"), [few, bare], 3)[1][1])


def test_text_models_think_as_coconut_does() -> None:
    torch.manual_seed(0)
    model = tiny.exact(Qwen3ForCausalLM(Qwen3Config(**tiny.text_size()))).requires_grad_(False)
    thoughts, logits = run(model, OURS, [asked("qwen2", 4, (), 0)], 2)
    embeds = model.get_input_embeddings()(torch.tensor([asked("qwen2", 4, (), 0).ids]))
    for _ in range(2):
        embeds = torch.cat([embeds, model.model(inputs_embeds=embeds).last_hidden_state[:, -1:]], dim=1)
    assert close(thoughts.fed, embeds[:, -2:])
    assert close(logits[:, 0], model(inputs_embeds=embeds).logits[:, -1])


@pytest.mark.parametrize(
    ("given", "mode", "told"),
    [
        ([asked("qwen2", 3, ((2, 2), (2, 2)), 0)], MODES["reference"], "one picture a prompt"),
        ([asked("qwen2", 3, (), 0)], MODES["reference"], "one picture a prompt"),
        ([asked("qwen2", 3, ((2, 2),), 0)], replace(REFERENCE, k=5), "5 free patches a lane at step 0, got 4"),
        ([asked("qwen2", 3, ((2, 2),), 0)], replace(REFERENCE, k=3), "3 free patches a lane at step 1, got 1"),
        ([replace(asked("qwen2", 3, ((2, 2),), 0), pixels=None)], OURS, "pictures for 4 placeholders, got none"),
        ([replace(asked("qwen2", 3, ((2, 2),), 0), ids=(6, tiny.IMAGE, 7))], OURS, "4 placeholders"),
        ([Asked(())], OURS, "at least one id"),
    ],
)
def test_what_cannot_be_done_is_refused(models: dict[str, Any], given: list[Asked], mode: Mode, told: str) -> None:
    with pytest.raises(RequestRefused, match=told):
        run(models["qwen2"], mode, given, 3)


@pytest.mark.parametrize("wrong", [[[4]], [[-2]]])
def test_patches_that_are_not_there_cannot_be_replayed(models: dict[str, Any], wrong: list[list[int]]) -> None:
    with pytest.raises(RequestRefused, match="below"):
        run(models["qwen2"], MODES["ours"], [asked("qwen2", 3, ((2, 2),), 0)], 1, chosen=torch.tensor([wrong]))


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "state-last"},
        {"k": 0},
        {"selects": "state", "order": "patches-first"},
        {"choice": "through", "patches": "random"},
        {"selects": "state", "thought": "none"},
        {"thought": "pause"},
        {"pause_id": 3},
    ],
)
def test_a_mode_that_contradicts_itself_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got|needs"):
        Mode(**settings)


def test_steps_and_seeds_must_fit_the_batch(models: dict[str, Any]) -> None:
    for more in ({"steps": [1, 2]}, {"steps": -1}, {"steps": 1, "seeds": [1]}, {"steps": 1, "chosen": torch.zeros(3, 0, 2)}):
        with pytest.raises(ValueError, match=r"expected|seed"):
            run(models["qwen2"], MODES["random, reused"], ragged("qwen2"), **more)


def otherwise(given: Prompts, patches: list[int]) -> Prompts:
    """The same prompt with other embeddings at some patches."""
    embeds = given.embeds.clone()
    embeds[0, given.spots[0, patches]] += 1.0
    return replace(given, embeds=embeds)


def test_behind_the_bottleneck_only_chosen_patches_are_seen(models: dict[str, Any]) -> None:
    model, one = models["qwen2"], asked("qwen2", 3, ((3, 3),), 0)
    given, chosen = prompts(model, [one]), torch.tensor([[[1, 4], [7, -1]]])
    seen, unseen = [4], [0, 2, 3, 5, 6, 8]
    changed = {}
    for bottleneck, patches in itertools.product(("off", "question", "picture"), (seen, unseen)):
        reasoner = LatentReasoner(model, replace(MODES["ours"], bottleneck=bottleneck))  # type: ignore[arg-type]
        ways = [reasoner.read(reasoner.think(each, 2, chosen=chosen), SAID[:1]) for each in (given, otherwise(given, patches))]
        changed[bottleneck, len(patches)] = not close(*ways)
    assert changed == {
        **{("off", 1): True, ("off", 6): True},
        **{("question", 1): True, ("question", 6): True},  # what the prompt has read of the picture is still there
        **{("picture", 1): True, ("picture", 6): False},
    }
    blind = LatentReasoner(model, replace(MODES["ours"], bottleneck="question", thought="pause", pause_id=9))
    first = blind.think(given, 1, chosen=chosen).fed
    assert torch.equal(first, blind.think(otherwise(given, unseen), 1, chosen=chosen).fed)


def test_attention_that_chooses_looks_past_the_bottleneck(models: dict[str, Any]) -> None:
    for selects in ("row", "state"):
        mode = replace(MODES["ours"], order="state-first", bottleneck="picture", selects=selects)  # type: ignore[arg-type]
        thoughts = run(models["qwen2"], mode, [asked("qwen2", 3, ((3, 3),), 0)], 2)[0]
        assert thoughts.scores is not None and bool((thoughts.scores > 0).all())


@pytest.mark.parametrize("bottleneck", ["off", "picture"])
def test_patched_thoughts_carry_another_pictures_answer_where_nothing_else_sees_it(models: dict[str, Any], bottleneck: Any) -> None:
    model, mode = models["qwen2"], replace(MODES["ours"], bottleneck=bottleneck)
    here, there = (replace(asked("qwen2", 3, ((3, 3),), seed), ids=asked("qwen2", 3, ((3, 3),), 0).ids) for seed in (0, 1))
    theirs, answer = run(model, mode, [there], 2)
    edits = Edits(states=lambda step, _: theirs.fed[:, step], patches=lambda step, _: theirs.patches[:, step])
    _, patched = run(model, mode, [here], 2, chosen=theirs.chosen, edits=edits)
    if bottleneck == "off":
        assert not close(patched, answer)
        return
    reasoner = LatentReasoner(model, mode)
    after = reasoner.think(prompts(model, [here]), 2, chosen=theirs.chosen, edits=edits)
    assert close(after.last, theirs.last) and close(patched, answer)


def test_edits_are_what_is_fed_and_what_is_told(models: dict[str, Any]) -> None:
    mean, other = torch.full((1, 32), 0.5, dtype=torch.float64), torch.tensor([[0, 8]])
    edits = Edits(states=lambda step, states: mean.expand_as(states), chosen=lambda step, chosen: other)
    thoughts, logits = run(models["qwen2"], replace(MODES["ours"], reuse=True), [asked("qwen2", 3, ((3, 3),), 0)], 2, edits=edits)
    assert torch.equal(thoughts.fed, mean.expand(1, 2, -1)) and thoughts.chosen.tolist() == [[[0, 8]] * 2]
    assert not close(logits, run(models["qwen2"], replace(MODES["ours"], reuse=True), [asked("qwen2", 3, ((3, 3),), 0)], 2)[1])


def test_a_placed_patch_keeps_its_place_in_the_picture(models: dict[str, Any]) -> None:
    given = [asked("qwen2", 3, ((3, 3),), 0)]
    read: list[Tensor] = []
    hook = decoder(models["qwen2"]).register_forward_pre_hook(lambda _, __, more: read.append(more["position_ids"]), with_kwargs=True)
    run(models["qwen2"], replace(MODES["ours"], positions="placed"), given, 1, chosen=torch.tensor([[[2, 3]]]))
    hook.remove()
    prompt, step, words = read
    after = int(prompt.max()) + 1
    assert torch.equal(step[:, 0, 2], torch.tensor([after] * 3))
    assert torch.equal(step[:, 0, :2], prompt[:, 0, [2 + 2, 2 + 3]])
    assert words[:, 0].tolist() == [[after + 1, after + 2, after + 3]] * 3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_is_refused_where_it_would_drop_what_was_read_and_right_elsewhere() -> None:
    model, given = tiny.exact(tiny.seeing_model("qwen2")), ragged("qwen2")
    wanted = torch.autograd.grad(loss_of(model, MODES["ours"], given), decoder(model).layers[0].parameters())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="gradient checkpointing drops keys and values"):
        run(model, MODES["ours"], given, 1)
    found = torch.autograd.grad(loss_of(model, MODES["ours"], given, cached=False), decoder(model).layers[0].parameters())
    assert all(close(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_around_the_model_is_looked_through_and_trained() -> None:
    peft = pytest.importorskip("peft")
    model, given = tiny.exact(tiny.seeing_model("qwen2")), ragged("qwen2")
    plain = loss_of(model, MODES["ours"], given).item()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)).double()
    loss = loss_of(wrapped, MODES["ours"], given)
    assert abs(loss.item() - plain) < CLOSE
    loss.backward()  # type: ignore[no-untyped-call]
    trained = [weight.grad for name, weight in wrapped.named_parameters() if "lora_B" in name and "language_model" in name]
    assert trained and all(grad is not None and float(grad.abs().max()) > 0 for grad in trained)


def test_a_model_that_forgets_is_refused() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**tiny.text_size(), use_sliding_window=True, sliding_window=8, max_window_layers=1))
    with pytest.raises(BackendError, match="full attention in every layer"):
        LatentReasoner(model)
    mistral = MistralForCausalLM(MistralConfig(**{**tiny.text_size(), "sliding_window": 4}))
    with pytest.raises(BackendError, match="sliding_window=4"):
        LatentReasoner(mistral)


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": 3},
        {"gradients": True},
        {"bottleneck": True},
        {"choice": True},
        {"k": 2.5},
        {"k": True},
        {"reuse": "yes"},
        {"pause_id": "7"},
    ],
)
def test_a_mode_of_other_types_is_refused(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=name):
        replace(OURS, **wrong)


def test_a_pause_beyond_the_vocabulary_is_refused() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**tiny.text_size()))
    with pytest.raises(BackendError, match="a pause_id from 0 to"):
        LatentReasoner(model, replace(OURS, thought="pause", pause_id=99_999))


def test_models_whose_numbers_would_be_others_are_refused() -> None:
    granite = GraniteForCausalLM(GraniteConfig(**{**tiny.text_size(), "logits_scaling": 8.0}))
    with pytest.raises(BackendError, match=r"logits_scaling=8\.0"):
        LatentReasoner(granite)
    with pytest.raises(BackendError, match="its decoder in 'model'"):
        LatentReasoner(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)))
    seeing = tiny.seeing_model("qwen2")
    seeing.config.vision_config.deepstack_visual_indexes = [0]
    with pytest.raises(BackendError, match="deepstack"):
        LatentReasoner(seeing)


def test_reference_mode_equals_the_released_code() -> None:
    """Sets, states, logits and words; the whole comparison is ``bench/latent_reference.py``."""
    place = released_ivtlr.checkout()
    if place is None:
        pytest.skip(released_ivtlr.HOW)
    for row in latent_reference.compare(place, 1, steps=(0, 3), ks=(8, 32)):
        assert row["sets_equal"] == row["words_equal"] == row["inputs"]
        assert row["states"] <= CLOSE and row["logits"] <= CLOSE


def test_the_shipped_answerer_thinks_and_what_it_sampled_is_replayed() -> None:
    checkpoint = open_checkpoint("starter:answerer", device="cpu", dtype=torch.float32)
    inputs, model = Inputs(checkpoint), checkpoint.model
    problems = list(Shapes().problems("validation", 3))
    given = []
    for words, problem in zip((3, 5, 9), problems, strict=True):
        picture = problem.pictures[0]()
        pixels, grids = inputs.pixels([picture])
        room = inputs.placeholders(picture).count
        ids = (20, *[checkpoint.model.config.image_token_id] * room, *range(30, 30 + words))
        assert torch.equal(inputs.positions(ids, grids), positions(model, Asked(ids, pixels, grids)))
        given.append(Asked(ids, pixels, grids, inputs.positions(ids, grids)))
    with torch.no_grad():
        reasoner = LatentReasoner(model, replace(OURS, k=4))
        thoughts = reasoner.think(prompts(model, given), 2)
        logits, said, values = reasoner.say(thoughts.last), [], []
        for _ in range(4):
            said.append(logits.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(len(said))).squeeze(1))
            values.append(logits.log_softmax(-1).gather(1, said[-1][:, None]).squeeze(1))
            logits = reasoner.hear(thoughts, said[-1])
        for lane, one in enumerate(given):
            again = reasoner.think(prompts(model, [one]), 2, chosen=thoughts.chosen[lane : lane + 1])
            ids = torch.stack(said, 1)[lane : lane + 1]
            replayed = reasoner.read(again, ids).log_softmax(-1).gather(2, ids[..., None])[0, :, 0]
            assert torch.allclose(replayed, torch.stack(values, 1)[lane], rtol=0, atol=1e-4)


def test_reference_mode_trains_as_the_released_code_does() -> None:
    """Same loss, same gradients everywhere; but what the released code owes to a state falls on the placeholder's own embedding."""
    place = released_ivtlr.checkout()
    if place is None:
        pytest.skip(released_ivtlr.HOW)
    base = released_ivtlr.model(2, 64, 512).requires_grad_(True)
    ids, pixels, grids = released_ivtlr.prompt(12, 10, 0, 512, torch.float64)
    said, steps, k = [20, 31, 42, 53, 1], 2, 8
    fed = torch.tensor([[*ids, *[released_ivtlr.LATENT] * steps, *said]])
    theirs = released_ivtlr.released(base, k, place).forward(
        input_ids=fed,
        attention_mask=torch.ones_like(fed),
        labels=torch.tensor([[*[-100] * (len(ids) + steps), *said]]),
        position_ids=torch.arange(fed.shape[1])[None],
        pixel_values=pixels,
        image_grid_thw=grids,
    )
    reasoner = LatentReasoner(base, replace(REFERENCE, k=k))
    thoughts = reasoner.think(prompts(base, [Asked(ids, pixels, grids)]), steps)
    ours = torch.nn.functional.cross_entropy(reasoner.read(thoughts, torch.tensor([said]))[0], torch.tensor(said))
    assert abs(ours.item() - theirs.loss.item()) < CLOSE
    weights = dict(base.named_parameters())
    pairs = [torch.autograd.grad(loss, list(weights.values()), retain_graph=True) for loss in (ours, theirs.loss)]
    for name, one, other in zip(weights, *pairs, strict=True):
        if name.endswith("embed_tokens.weight"):
            assert float(one[released_ivtlr.LATENT].abs().max()) == 0 < float(other[released_ivtlr.LATENT].abs().max())
            one, other = (grad.index_fill(0, torch.tensor([released_ivtlr.LATENT]), 0.0) for grad in (one, other))
        assert torch.allclose(one, other, rtol=0, atol=1e-6 * float(other.abs().max())), name  # their norms are in float32
