"""Can reasoning go latent where it takes more look-ups in a row than the model has layers? Every arm from the same start, per seed.

    python bench/hops.py [--seeds 0 1 2] [--arms direct explicit ...] [--out runs/hops] [--json bench/results/hops.json]

World: three hops and a colour, four look-ups in series, in rendered pixels; the model has three layers of width 64. Shared by all arms of
a seed, and said openly: perception (recipe ``speaker``: every cell read from pixels, then single look-ups), after which the picture tower
and the word embeddings stand still, so visual tokens are computed once for 12,288 training pictures; start cells are drawn anew each
time. From there

    direct      question and answer alone, as many steps as explicit and latent stages together
    spoken      the whole dialogue out loud, questions and replies
    explicit    its replies alone out loud; the arms below begin here and internalise one step a stage
    ours        two attended patches and the state a step, gradients through the states, and each state shall name its finding (anchor)
    full        the same without the anchor            hidden  states alone, anchored      hidden-full  states alone, not anchored
    detached    no gradients through the states, no anchor   detached-anchor  ... with the anchor
    reference   the released code's order, positions and gradients
    state-first ``ours`` in the paper's order: the state, then its patches
    random      ``ours`` with patches by lot    patches  patches alone    pause  a constant word in place of states, no patches
    dialogue    as ``hidden``, but from ``spoken``: whole turns are internalised, not replies
    k1, k3      patches a step   n1 .. n3  so many latent steps for four look-ups, the rest of the rationale dropped
    blind-*     the picture hidden from everything behind the question: states and words see one re-read patch a step only, which an
                oracle gives, which is attended to (by the state itself, or by the row that made it), drawn, or none. Choosing carries no
                gradient; ``through`` gives it one, straight through, and ``taught`` has a loss on the attention that chooses, while
                it learns, and chooses by itself when examined. Half a rationale could not be said behind the bottleneck, so all
                of these learn by the number of hops, none to three, and each state shall name its finding; the state comes first,
                so that it can be asked what it wants. What the question itself took from the picture, ``blind-none`` shows

Validation problems show how a stage ends; the figures are of test problems of another seed than the trials' (theirs were seen while the
recipe was sought). What is done already is not done again and a killed training is resumed, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from monologue.backends.checkpoints import open_checkpoint
from monologue.backends.latent import Habit
from monologue.backends.perception.ivtlr import LatentReasoner
from monologue.backends.perception.prompts import Asked, Prompts
from monologue.tasks.base import Problem
from monologue.tasks.hops import COLOURS, LETTERS, VOCABULARY, Board, Drawing, Hops, walk
from monologue.training import causal
from monologue.training.internalise import Lesson
from monologue.training.latent import Latent, internalise
from monologue.training.recipe import read_recipe
from monologue.training.starter import speaker
from monologue.training.starter.batches import Words, patches
from monologue.training.starter.fit import Curve, Stage
from monologue.training.starter.make import save
from monologue.training.starter.models import build_image_processor, build_speaker, build_tokenizer

HOPS, LOOKUPS, CELLS = 3, 4, speaker.CELLS
SEEDS = {"validation": 0, "test": 3}
"""Of the problems on which everyone is examined; of training the seed's own."""
POOL, EXAMINED = 12288, 128
"""Training pictures; problems of a batch under examination."""
EXPLICIT, STAGE, BATCH, LR = 400, 300, 32, 2e-3


@dataclass(frozen=True, slots=True)
class Drawn(Lesson):
    """A lesson about a picture that was looked at before."""

    place: int = 0
    """Its visual tokens in the pool."""
    way: tuple[int, ...] = ()
    """The cell that each step looks up; of blind ones the cell that its state asks for, and the last keeps the one before."""


@dataclass(frozen=True)
class Arm:
    """What an arm is."""

    settings: dict[str, Any]
    """Of the mode."""
    mode: str = "ours"
    anchor: float = 0.0
    latents: int = LOOKUPS
    """Latent steps; the rest of the rationale is dropped."""
    oracle: bool = False
    """The cell that a state asks for is re-read behind it; or, with ``looks``, shall be chosen."""
    looks: float = 0.0
    """Weight of the loss on the attention that chooses."""
    begins: str = "explicit"
    """The arm whose model is the start."""
    blind: bool = False
    """Learns by the number of hops, answers alone."""


OURS = {"k": 2, "order": "patches-first"}
BLIND = {"bottleneck": "question", "k": 1, "reuse": True, "order": "state-first"}
HIDDEN = {"patches": "none"}
ARMS: dict[str, Arm] = {
    "ours": Arm(OURS, anchor=1.0),
    "full": Arm(OURS),
    "hidden": Arm(HIDDEN, anchor=1.0),
    "hidden-full": Arm(HIDDEN),
    "detached": Arm({**OURS, "gradients": "detached"}),
    "detached-anchor": Arm({**OURS, "gradients": "detached"}, anchor=1.0),
    "reference": Arm({"k": 2}, mode="reference"),
    "state-first": Arm({**OURS, "order": "state-first"}, anchor=1.0),
    "random": Arm({**OURS, "patches": "random"}, anchor=1.0),
    "patches": Arm({**OURS, "thought": "none"}),
    "pause": Arm({"thought": "pause", "patches": "none"}),
    "dialogue": Arm(HIDDEN, anchor=1.0, begins="spoken"),
    "blind-oracle": Arm(BLIND, anchor=1.0, oracle=True, blind=True),
    "blind-state": Arm({**BLIND, "selects": "state"}, anchor=1.0, blind=True),
    "blind-through": Arm({**BLIND, "selects": "state", "choice": "through"}, anchor=1.0, blind=True),
    "blind-taught": Arm({**BLIND, "selects": "state", "choice": "through"}, anchor=1.0, oracle=True, looks=1.0, blind=True),
    "blind-attended": Arm(BLIND, anchor=1.0, blind=True),
    "blind-random": Arm({**BLIND, "patches": "random"}, anchor=1.0, blind=True),
    "blind-none": Arm({**BLIND, "patches": "none"}, anchor=1.0, blind=True),
    "k1": Arm({**OURS, "k": 1}, anchor=1.0),
    "k3": Arm({**OURS, "k": 3}, anchor=1.0),
    "n1": Arm(OURS, anchor=1.0, latents=1),
    "n2": Arm(OURS, anchor=1.0, latents=2),
    "n3": Arm(OURS, anchor=1.0, latents=3),
}
LOUD = {"direct": 0, "spoken": LOOKUPS, "explicit": LOOKUPS}
"""Arms without latent steps, and how many steps they say."""
NAMES = (*LOUD, *ARMS)


class World:
    """Pictures of a seed as visual tokens, and lessons about them."""

    def __init__(self, folder: Path, seed: int, arm: Arm, whole: bool) -> None:
        """``folder/base`` sees; ``whole``: questions are said too."""
        base = open_checkpoint(str(folder / "base"), device="cpu", dtype=torch.float32)
        self.folder, self.seed, self.arm, self.whole, self.words = folder, seed, arm, whole, Words(base.tokenizer)
        self.task, self.eyes = Hops([f"hop{HOPS}"]), speaker.Speaker(base.model, Words(base.tokenizer))
        self.boards: list[Board] = []
        self.tokens = torch.zeros(0, CELLS, base.model.get_input_embeddings().embedding_dim)
        self.train = self.look("train", POOL)

    def problem(self, split: str, index: int) -> Problem:
        """Everyone is examined on the same."""
        return self.task.problem(split, index, SEEDS.get(split, self.seed))

    def look(self, split: str, count: int) -> range:
        """Draws and sees so many pictures of a split, once; their places in the pool."""
        problems = (self.problem(split, index) for index in range(count))
        drawings = [one.pictures[0] for one in problems]
        file = self.folder / f"{split}-{SEEDS.get(split, self.seed)}-{count}.safetensors"
        if not file.exists():
            with torch.inference_mode():
                seen = [self.eyes.see(patches([one() for one in drawings[i : i + 64]])) for i in range(0, count, 64)]
            save_file({"tokens": torch.cat(seen).clone()}, file)
        first = len(self.boards)
        self.boards += [drawing.board for drawing in drawings if isinstance(drawing, Drawing)]
        self.tokens = torch.cat([self.tokens, load_file(file)["tokens"]])
        return range(first, first + count)

    def lesson(self, place: int, start: str, kept: int, hops: int = HOPS) -> Drawn:
        """About a pooled picture, with so many steps of its rationale."""
        board, words = self.boards[place], self.words
        way = walk(board, start, hops)
        needed = tuple(board.index(cell) for cell in ((*way[1:], way[-1]) if self.arm.blind else way))
        asked = f"<bos> <user> {speaker.PICTURE} which colour is {hops} hops after {start} {speaker.CHOICES} <assistant>"
        steps = [(f"what follows {cell.letter}", cell.follows) for cell in way[:-1]]
        steps.append((f"what colour is {way[-1].letter}", way[-1].colour))
        return Drawn(
            asked=Asked(tuple(words(asked))),
            steps=tuple(tuple(words(f"{question} {reply}" if self.whole else reply)) for question, reply in steps[:kept]),
            gists=tuple(words(reply)[0] for _, reply in steps[:kept]),
            ending=tuple(words(f"{way[-1].colour} <eos>")),
            chosen=tuple((cell,) for cell in needed) if self.arm.oracle else (),
            place=place,
            way=needed,
        )

    def practice(self, kept: int, recipe: Latent) -> Callable[[int], Drawn]:
        """The i-th lesson of a training; of blind ones about a hop less than there are latent steps."""

        def drawn(index: int) -> Drawn:
            rng = random.Random(f"hops/{self.seed}/{index}")
            hops = recipe.practised(index // recipe.batch) - 1 if self.arm.blind else HOPS
            return self.lesson(rng.choice(self.train), rng.choice(tuple(LETTERS)), kept, hops)

        return drawn

    def embed(self, model: Any, lessons: Sequence[Lesson]) -> Prompts:
        """Prompts with pooled visual tokens; all have their picture in the same place."""
        ids = torch.tensor([one.asked.ids for one in lessons])
        pads = ids == model.config.image_token_id
        places = torch.tensor([one.place for one in lessons if isinstance(one, Drawn)])
        embeds = model.get_input_embeddings()(ids).masked_scatter(pads.unsqueeze(-1), self.tokens[places])
        positions = self.eyes.positions(ids, True)
        spots = torch.arange(CELLS) + int(pads[0].int().argmax())
        return Prompts(embeds, torch.ones_like(pads), positions, spots.expand(len(ids), -1), (1,) * len(ids))

    def exams(self, model: Any, split: str, count: int, kept: int, hops: int = HOPS) -> list[causal.Exam]:
        """The first problems of a split, in batches."""
        places, found = self.look(split, count), []
        starts = [self.problem(split, index).question.split()[-1] for index in range(count)]
        for first in range(0, count, EXAMINED):
            some = list(zip(places, starts, strict=True))[first : first + EXAMINED]
            lessons = [self.lesson(place, start, kept, hops) for place, start in some]
            if self.arm.looks:  # taught to choose; now it does
                lessons = [replace(one, chosen=()) for one in lessons]
            with torch.no_grad():
                found.append(causal.Exam(self.embed(model, lessons), lessons, [one.way for one in lessons]))
        return found


def begin(folder: Path, seed: int) -> None:
    """``folder/base``: perception, as all arms of a seed share it."""
    if (folder / "base" / "config.json").exists():
        return
    tokenizer = build_tokenizer(VOCABULARY)
    learner = speaker.Speaker(build_speaker(seed, tokenizer), Words(tokenizer))
    curve = Curve(folder / "base" / "curve.jsonl")
    for stage in read_recipe("speaker")["stage"][:2]:
        speaker.learn(learner, Stage(**stage), seed, curve, Hops())
    save(learner.model, tokenizer, folder / "base", build_image_processor(112, 84))


def recipe_of(name: str, seed: int, plan: argparse.Namespace) -> Latent:
    """The training of an arm."""
    arm = ARMS.get(name, Arm({"patches": "none"}))
    steps = [0] + [LOOKUPS * plan.stage // arm.latents] * arm.latents
    if name == "direct":
        steps = [plan.explicit + LOOKUPS * plan.stage]
    elif name in LOUD:
        steps = [plan.explicit]
    settings = {**arm.settings, **({"pause_id": 0} if arm.settings.get("thought") == "pause" else {})}
    frozen = ["visual", "embed_tokens"]
    common = {"task": "hops", "lr": plan.lr, "batch": plan.batch, "warmup": 100, "save_every": 200, "clip": 1.0, "seed": seed}
    common |= {"optimizer": "muon", "floor": 0.1, "words": "dialogue" if "spoken" in (name, arm.begins) else "replies"}
    return Latent.read(
        {**common, "mode": arm.mode, "settings": settings, "anchor": arm.anchor, "looks": arm.looks, "steps": steps, "frozen": frozen}
    )


def made(name: str, folder: Path, seed: int, plan: argparse.Namespace) -> dict[str, Any]:
    """The row of an arm, trained and examined."""
    recipe, arm, out = recipe_of(name, seed, plan), ARMS.get(name, Arm({}, begins="base")), folder / name
    kept, settled = LOUD.get(name, arm.latents), recipe.model_dump(mode="json")
    world = World(folder, seed, arm, whole="spoken" in (name, arm.begins))
    done = json.loads((out / "trained.json").read_text()) if (out / "trained.json").exists() else None
    if done is None:
        done = {"recipe": settled, **trained(recipe, world, folder / arm.begins, out, kept)}
        (out / "trained.json").write_text(json.dumps(done) + "\n")
    if done.pop("recipe") != settled:
        raise SystemExit(f"{out} was trained by another recipe; name another --out, or remove it")
    model = open_checkpoint(str(out), device="cpu", dtype=torch.float32).model
    own = sum(recipe.steps)
    row = {"seed": seed, "arm": name, "latents": recipe.latents, "steps": own, "steps_before": plan.explicit if arm.begins != "base" else 0}
    return {**row, **done, **examined(thinker(model, recipe, recipe.latents), world, name, kept, plan.n)}


def trained(recipe: Latent, world: World, source: Path, out: Path, kept: int) -> dict[str, Any]:
    """What the training took, and validation accuracy after each stage."""
    checkpoint, arm = open_checkpoint(str(source), device="cpu", dtype=torch.float32), world.arm
    exams = world.exams(checkpoint.model, "validation", 256, kept)

    def after(stage: int, model: Any) -> dict[str, Any]:
        seen = world.exams(model, "validation", 256, kept, stage - 1) if arm.blind else exams
        return {"validation": said(thinker(model, recipe, stage), seen, stage)["chain"]}

    started, resume = time.process_time(), (out / "trainer").exists()
    lines = internalise(recipe, checkpoint, world.practice(kept, recipe), out, embed=world.embed, after=after, resume=resume)
    stages = [line["validation"] for line in lines if "validation" in line]
    return {"cpu_seconds": round(time.process_time() - started), "resumed": resume, "stages": stages}


def thinker(model: Any, recipe: Latent, stage: int) -> causal.Thinking:
    mode = recipe.as_mode()
    banned = (model.config.image_token_id, model.config.video_token_id)
    return causal.Thinking(LatentReasoner(model, mode), Habit(mode, stage), banned)


def said(thinking: causal.Thinking, exams: Sequence[causal.Exam], stage: int) -> dict[str, Any]:
    """Share of problems answered right, greedily; ``chain``: whose remaining rationale is right too, word for word."""
    answers: list[bool] = []
    chains: list[bool] = []
    for exam in exams:
        wanted, endings = [one.left(stage) for one in exam.lessons], [one.ending for one in exam.lessons]
        words = causal.spoken(thinking, thinking.think(exam), len(wanted[0]))  # all rows say equally many
        chains += causal.same(words, wanted)
        answers += causal.same(words[:, len(wanted[0]) - len(endings[0]) :], endings)
    return {**causal.share(answers), "chain": causal.share(chains)["accuracy"]}


def examined(thinking: causal.Thinking, world: World, name: str, kept: int, count: int) -> dict[str, Any]:
    """Test accuracy and, for those who think, controls, probes and recall."""
    exams, stage = world.exams(thinking.reasoner.model, "test", count, kept), thinking.habit.steps
    found: dict[str, Any] = said(thinking, exams, stage)
    if stage:
        rows = causal.controls(thinking, exams)
        found["controls"] = {row["control"]: row["accuracy"] for row in rows}
        found["carried"] = next(row["carried"] for row in rows if row["control"] == "shuffled")
        found["probes"] = causal.probes(thinking, exams)
    if thinking.reasoner.mode.patches != "none" and stage:
        found["recall"] = causal.recall(thinking, exams)
    if name == "ours":
        further = replace(thinking, habit=replace(thinking.habit, steps=LOOKUPS + 1))
        longer = world.exams(thinking.reasoner.model, "test", 512, kept, HOPS + 1)
        hits = [hit for exam in longer for hit in causal.right(further, further.think(exam), [one.ending for one in exam.lessons])]
        found["one hop more"] = causal.share(hits)["accuracy"]
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--arms", nargs="+", choices=NAMES, default=list(NAMES))
    options.add_argument("--n", type=int, default=1000, help="test problems")
    options.add_argument("--explicit", type=int, default=EXPLICIT, help="steps of the explicit stage")
    options.add_argument("--stage", type=int, default=STAGE, help="steps of each latent stage")
    options.add_argument("--batch", type=int, default=BATCH)
    options.add_argument("--lr", type=float, default=LR)
    options.add_argument("--out", type=Path, default=Path("runs/hops"))
    options.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "hops.json")
    plan = options.parse_args()
    torch.set_num_threads(1)
    for seed in plan.seeds:
        begin(plan.out / str(seed), seed)
        for name in dict.fromkeys(one for arm in plan.arms for one in (*([ARMS[arm].begins] if arm in ARMS else []), arm)):
            kept = plan.out / str(seed) / f"{name}.json"
            if not kept.exists():
                kept.write_text(json.dumps(made(name, plan.out / str(seed), seed, plan)) + "\n")
            row = json.loads(kept.read_text())
            print(
                json.dumps({key: row.get(key) for key in ("seed", "arm", "accuracy", "stages", "cpu_seconds", "controls", "carried")}),
                flush=True,
            )
    rows = [json.loads(file.read_text()) for name in NAMES for file in sorted(plan.out.glob(f"*/{name}.json"))]
    changed = [
        f"--{name} {getattr(plan, name)}"
        for name in ("explicit", "stage", "batch", "lr", "n")
        if getattr(plan, name) != options.get_default(name)
    ]
    command = " ".join(["python bench/hops.py --seeds", *(str(seed) for seed in sorted({row["seed"] for row in rows})), *changed])
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, one thread"
    settings = {name: getattr(plan, name) for name in ("explicit", "stage", "batch", "lr", "n")}
    result = {"name": "hops", "command": command, "machine": machine, "chance": 1 / len(COLOURS), "settings": settings, "rows": rows}
    plan.json.parent.mkdir(parents=True, exist_ok=True)
    plan.json.write_text(json.dumps({**result, "ratio": summary_of(rows)}, indent=1) + "\n")
    print(json.dumps(summary_of(rows), indent=1))


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and range of test accuracy by arm."""
    found = {}
    for name in NAMES:
        scores = [row["accuracy"] for row in rows if row["arm"] == name]
        if scores:
            found[name] = {"seeds": len(scores), "mean": round(statistics.fmean(scores), 4), "least": min(scores), "most": max(scores)}
    return found


if __name__ == "__main__":
    main()
