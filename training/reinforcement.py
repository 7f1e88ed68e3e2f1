"""The recipe of stage two, as it stands in a TOML file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from monologue.training.adapters import Lora
from monologue.training.credit import COUNTERFACTUAL, Kind
from monologue.training.gate import Guards
from monologue.training.objectives import Grpo, Objective
from monologue.training.recipe import RecipeError, follow
from monologue.training.replay import TOLERANCE
from monologue.training.rewards import SCORE

Rate: TypeAlias = Annotated[float, Field(gt=0)]
Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
PLAYING = frozenset(
    [
        "first",
        "split",
        "problems",
        "samples",
        "temperature",
        "top_p",
        "max_tokens",
        "max_turns",
        "examine_every",
        "examine",
        "keep",
        "families",
        "graph",
        "task",
        "rewards",
        "judge",
        "served",
    ]
)
"""Keys that say how to play."""
FREE = frozenset(["iterations", "save_every", "keep", "examine_every", "examine", "report_to", "device", "served", "guards", "tolerance"])
"""Keys that may differ when a run goes on: they say how long, where and under whose eyes, not what a step is."""


class Reinforcement(BaseModel):
    """Which policies are reinforced, on what experience, and how. Keys that do not exist are refused."""

    model_config = ConfigDict(extra="forbid")

    policy: Literal["reinforce"] = "reinforce"
    """The stage."""
    trained: list[str] = Field(default=["questioner"], min_length=1)
    """Roles whose weights move; the others stay as they are."""
    alternate: int = Field(default=0, ge=0)
    """The trained roles take turns of so many iterations; 0: all move at once."""
    questioner: str = "starter"
    """Checkpoint to begin with: a folder, a Hub name, or ``starter``."""
    answerer: str = "starter"
    """Checkpoint to begin with."""

    runs: list[str] = []
    """Folders of logged runs to learn from. Empty: play, with the weights as they are trained."""
    rows: int = Field(default=64, ge=1)
    """Offline: rows an iteration."""
    task: str = "shapes"
    """Online: what is played."""
    split: str = "train"
    """Of the task."""
    families: str = ""
    """Question families separated by commas; empty: the task's usual ones."""
    graph: str = "monologue"
    """Online: the graph."""
    served: dict[str, str] = {}
    """Online: addresses of the SGLang servers that play a role, with commas between them; other roles play in this process. Servers are
    given the weights of each version, so they must be able to read the run's folder.
    """
    first: int = Field(default=0, ge=0)
    """Number of the first problem, so that a run meets other problems than its prior did."""
    problems: int = Field(default=16, ge=1)
    """Online: problems an iteration."""
    samples: int = Field(default=4, ge=1)
    """Online: episodes a problem; a group."""
    temperature: float = Field(default=1.0, gt=0)
    """Online: of the trained roles' sampling; the others are greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Online: nucleus of the trained roles' sampling."""
    max_tokens: int = Field(default=64, ge=1)
    """Online: sampled ids a turn at most."""
    max_turns: int = Field(default=8, ge=1)
    """Online: actions of the concluding seat at most."""
    examine_every: int = Field(default=0, ge=0)
    """Online: every so many iterations all seats are examined, greedy, on the validation split; 0: never."""
    examine: int = Field(default=200, ge=1)
    """Problems of an examination."""

    objective: Objective = Grpo()
    """What is maximised, with its settings."""
    compat: Literal["", "released"] = ""
    """``released``: score dialogues as IMMO's released script does, without the answers, gate off; to measure what that costs."""
    credit: Kind = "team"
    """Whose reward praises whom."""
    share: float = Field(default=1.0, ge=0, le=1)
    """Of the episode's reward, with ``per_role``."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Of later turns' rewards, with ``turn``."""
    rewards: dict[str, Finite] = {}
    """Online: weights of rewards by name, beside the task's own score, ``exact_match``, whose weight is 1 unless it stands here."""
    judge: str = ""
    """Online: the chat model behind the reward ``judge``, PROVIDER:MODEL by LangChain's names."""

    truncated: bool = False
    """Whether replies that were cut off at the length limit carry loss."""
    iterations: int = Field(default=100, ge=1)
    """Batches of experience."""
    passes: int = Field(default=1, ge=1)
    """Over each batch."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps a pass."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches a step; changes memory, not the result."""
    forward_rows: int = Field(default=64, ge=1)
    """Rows at once where no gradient is taken."""
    trees: bool = False
    """Read the opening that episodes of a problem share once, not once an episode; changes time, not the result."""
    lr: Rate | dict[str, Rate] = 3e-4
    """Learning rate of AdamW, or one for each trained role."""
    lora: Lora | None = None
    """Train low-rank adapters in place of all weights, e.g. ``lora = { rank = 16 }``; needs peft."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises; then it stays."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm of a role; 0: any."""
    reference: bool = True
    """Keep the weights of the start, to measure the KL to them."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the trained weights."""
    mixed: Literal["no", "bfloat16"] = "no"
    """Numbers of the matrix products; weights, optimizer, softmax and loss stay in ``dtype``. Engine and trainer then round differently, so
    ``tolerance`` has to be said with it.
    """
    shard: bool = False
    """Share out the trained weights among the processes that were launched."""
    device: str = "cpu"
    """Where trained weights live."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of problems, sampling and the order of rows."""
    report_to: list[str] = []
    """Trackers of ``transformers`` that are told of every iteration, e.g. tensorboard, wandb."""
    save_every: int = Field(default=20, ge=1)
    """Iterations between checkpoints to resume from."""
    keep: int = Field(default=2, ge=1)
    """Versions of played weights that stay on disk; 'monologue verify' can replay these."""

    tolerance: float = Field(default=TOLERANCE, gt=0)
    """Largest difference of log-probs that the gate lets pass, in nats."""
    proof: int = Field(default=64, ge=0)
    """Offline: calls that are replayed before the first step; 0: none, where the weights that sampled are gone."""
    verified: int = Field(default=0, ge=0)
    """Fresh rows a role and iteration that are recomputed, and proven by the gate; 0: all. The others' log-probs are taken as recorded,
    which saves their pass; entropy is then that of the proven ones.
    """
    guards: Guards = Guards()
    """Rules that end a run gone wrong."""

    @classmethod
    def read(cls, recipe: dict[str, Any]) -> Reinforcement:
        """Raises RecipeError that names the keys at fault."""
        return follow(cls, recipe, "reinforce")

    @model_validator(mode="after")
    def _fits(self) -> Reinforcement:
        if len(set(self.trained)) < len(self.trained):
            raise ValueError(f"trained names a role twice: {self.trained!r}")
        if self.alternate and len(self.trained) < 2:
            raise ValueError(f"alternate needs two trained roles, got {self.trained!r}")
        if isinstance(self.lr, dict) and set(self.lr) != set(self.trained):
            raise ValueError(f"lr wants one rate for each of {self.trained!r}, got {self.lr!r}")
        if self.compat and (self.objective.name != "ppo" or self.trained != ["questioner"]):
            raise ValueError(f"compat={self.compat!r} is of ppo on the questioner alone, got {self.objective.name!r} on {self.trained!r}")
        if self.mixed != "no" and (self.dtype != "float32" or "tolerance" not in self.model_fields_set):
            told = f"got dtype={self.dtype!r}" if self.dtype != "float32" else "got no tolerance; 0.1 nats is usual"
            raise ValueError(f"mixed={self.mixed!r} wants dtype='float32' and a tolerance of its own, {told}")
        if self.verified and (self.compat or self.objective.critic or not self.objective.ratios or self.mixed != "no"):
            told = f"objective {self.objective.name!r}, compat={self.compat!r}, mixed={self.mixed!r}"
            raise ValueError(f"verified={self.verified!r} takes recorded log-probs for the trainer's own, which does not go with {told}")
        if self.shard and self.lora is not None:
            raise ValueError("adapters are not sharded; leave out lora or shard")
        if self.objective.penalty and not self.reference:
            raise ValueError(f"the objective {self.objective.name!r} with kl={self.objective.penalty!r} needs reference=true")
        if bool(self.judge) != ("judge" in self.rewards):
            raise ValueError(f"the reward 'judge' and the key judge belong together, got judge={self.judge!r} and rewards {self.rewards!r}")
        if SCORE in self.rewards and not any(self.rewards.values()):
            raise ValueError(f"expected a reward that counts, got no weight but 0: {self.rewards!r}")
        useless = sorted((PLAYING if self.runs else {"rows", "proof"}) & self.model_fields_set)
        if self.runs and self.objective.name == "ppo":
            raise ValueError("ppo needs fresh episodes; for logged runs take grpo, topr, awr or filter")
        if self.credit != "team" and self.objective.name in ("ppo", "filter"):
            own = "gives credit by its critic" if self.objective.critic else "looks at a stream's rewards"
            raise ValueError(f"{self.objective.name} {own}, so credit={self.credit!r} would be ignored; take grpo, topr or awr")
        for key, kind in (("share", "per_role"), ("discount", "turn")):
            if getattr(self, key) != 1 and self.credit != kind:
                raise ValueError(f"{key} belongs to credit={kind!r}, got {key}={getattr(self, key)!r} with credit={self.credit!r}")
        if self.credit == COUNTERFACTUAL in self.rewards:
            raise ValueError(f"credit={self.credit!r} is told from the reward of that name already; leave it out of rewards")
        if self.credit == COUNTERFACTUAL and SCORE in self.rewards:
            told = f"credit={self.credit!r} counts a question by the probability of the right conclusion"
            raise ValueError(f"{told}, so the weight of {SCORE!r} would be ignored there; leave it out of rewards")
        if self.runs and "proof" in self.model_fields_set and not self.objective.ratios:
            raise ValueError(f"{self.objective.name} forms no ratios, so nothing is replayed and proof={self.proof!r} would be ignored")
        if useless:
            raise ValueError(f"{', '.join(useless)} {'belong to playing, but runs are given' if self.runs else 'belong to logged runs'}")
        return self

    def continues(self, recipe: dict[str, Any], out: str) -> None:
        """Raises RecipeError where this is not what the run in ``out`` was begun with, FREE keys aside."""
        if not recipe:
            raise RecipeError(f"the run in {out!r} was not begun by 'monologue train reinforce'; name another folder")
        now, then = self.model_dump(mode="json"), {**Reinforcement().model_dump(mode="json"), **recipe}
        changed = sorted(name for name in now if name not in FREE and now[name] != then[name])
        if changed:
            told = "; ".join(f"{name} is {now[name]!r}, was {then[name]!r}" for name in changed)
            raise RecipeError(f"the run in {out!r} was begun with another recipe ({told}); resume it as it was, or begin another folder")

    def rate(self, role: str) -> float:
        """Learning rate of a role."""
        return self.lr[role] if isinstance(self.lr, dict) else self.lr

    def active(self, iteration: int) -> list[str]:
        """Roles that move in an iteration."""
        if not self.alternate:
            return self.trained
        return [self.trained[iteration // self.alternate % len(self.trained)]]

    @property
    def steps(self) -> int:
        """Optimizer steps an iteration."""
        return self.passes * self.minibatches

    def updates(self, role: str, iteration: int) -> int:
        """The number of the first iteration that a role's weights, as they are when this one begins, have not been trained in; 0: never."""
        return next((k + 1 for k in range(iteration - 1, -1, -1) if role in self.active(k)), 0)
