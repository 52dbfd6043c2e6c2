"""The params of ranking-guided alignment (METHOD.md 2.3): notebooks 04 to 08."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from rgalign.rooms_base import Real, Room, Share

WEIGHT_DECAY = Field(0.01, ge=0)


class Lora(Room):
    """A low-rank adapter beside the frozen weights, through peft; for models of billions of parameters."""

    rank: int = Field(16, ge=1)
    alpha: Real = Field(32, gt=0)
    dropout: Share = Field(0.0, lt=1)
    targets: str = Field("all-linear", description="peft's target_modules")


class Engine(Room):
    """How RG-SFT, RG-DPO and RG-CL fit a large model into a card's memory; the defaults are for small ones."""

    gradient_checkpointing: bool = Field(False, description="states of layers are made again in the backward pass")
    tokens_per_batch: int | None = Field(
        None,
        ge=16,
        description="padded tokens that a process runs at once; a step's documents are run in such pieces and their "
        "gradients added: the same step. Not RG-CL, whose rows are each other's negatives. Empty: all at once",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="8 bit: bitsandbytes on CUDA alone")


class Candidates(Room):
    """What every LLM writes for a session with a click: its greedy query and these."""

    samples: int = Field(4, ge=1, description="a session and LLM")
    temperature: Real = Field(1.0, gt=0)
    top_p: Share = Field(1.0, gt=0)
    llms: Literal["all", "one"] = Field("all", description="one: the main LLM alone writes as many as all would")


class Reward(Room):
    folds: int = Field(
        2,
        ge=1,
        le=10,
        description="of train's users: a session that training data is chosen from is judged by a model that was "
        "trained without its user's fold; 1: by the model trained on all [C]",
    )
    form: str = Field(
        "auto", description="a name of alignment.reward.REWARDS; auto: the better judge of list and kb [C]"
    )
    null_share: Share = Field(0.1, lt=1, description="of training sessions that hear the null query [C]")
    compared: bool = Field(
        True, description="one more of another seed and one on a single LLM's queries, to judge it by"
    )


class Sft(Room):
    use: bool = Field(True, description="False switches this step off")
    select: Literal["best", "random"] = Field("best", description="of a session's candidates: by reward, or any")
    min_reward: Real | None = Field(None, description="nats; a session whose best query earns less teaches nothing")
    epochs: Real = Field(3.0, gt=0)
    learning_rate: Real = Field(6e-4, gt=0)
    documents_per_batch: int = Field(48, ge=1)
    neftune: Real = Field(5.0, ge=0, description="NEFTune's alpha [P: NEFTune]; 0: no noise")
    weight_decay: Real = WEIGHT_DECAY


class Dpo(Room):
    use: bool = Field(True, description="False switches this step off")
    objective: str = Field("dpo", description="a name of alignment.objectives.OBJECTIVES")
    beta: Real = Field(0.3, gt=0, description="small ones let the policy run away from its reference [C]")
    sft_weight: Real = Field(1.0, ge=0, description="of the chosen queries' -log p per token beside it [C]")
    length_normalised: bool = False
    min_margin: Real = Field(0.1, ge=0, description="nats of reward between chosen and rejected, at least [C]")
    margin_quantile: Share = Field(0.5, lt=1, description="share of the pairs with the smallest margins left out [C]")
    epochs: Real = Field(1.0, gt=0)
    learning_rate: Real = Field(1e-4, gt=0)
    pairs_per_batch: int = Field(32, ge=1)
    weight_decay: Real = WEIGHT_DECAY
    looks: int = Field(4, ge=0, description="times that ranking and writing are looked at while it trains; 0: never")
    tolerance: Real = Field(
        0.005, ge=0, description="GAUC on valid that may be lost while the reward rises; more stops training [C]"
    )


class Contrastive(Room):
    use: bool = Field(True, description="False switches this step off")
    similarity: Literal["ranker", "cosine", "dot"] = Field(
        "ranker", description="the frozen ranker's score of a pair, or of the query branch alone [C]"
    )
    ranker_learns: bool = Field(
        False, description="the reference: the rankers' own loss through the reasoner, and both learn"
    )
    space: Literal["retrained", "before"] = Field(
        "retrained",
        description="whose space it pulls into: of the ranker retrained after RG-SFT and RG-DPO, or of the one before "
        "them, the old order, kept for one study [C]",
    )
    temperature: Real = Field(1.0, gt=0)
    hard: int = Field(16, ge=0, description="negatives a session: what the ranker ranks highest and nobody clicked")
    in_batch: bool = Field(
        True, validate_default=True, description="the other sessions' clicked intents are negatives too"
    )
    symmetric: Real = Field(0.0, ge=0, description="weight of the same loss from intent to session; not for ranker")
    lm_weight: Real = Field(0.3, ge=0, description="of the language loss on the best queries beside it [C]")
    epochs: Real = Field(4.0, gt=0)
    learning_rate: Real = Field(1e-3, gt=0)
    documents_per_batch: int = Field(64, ge=1)
    neftune: Real = Field(0.0, ge=0)
    weight_decay: Real = WEIGHT_DECAY

    @field_validator("in_batch")
    @classmethod
    def something_to_push_away(cls, in_batch: bool, info: ValidationInfo) -> bool:
        if not in_batch and info.data.get("use") and info.data.get("hard") == 0:
            raise ValueError("there would be no negative: set hard above 0, or in_batch to true")
        return in_batch

    @field_validator("symmetric")
    @classmethod
    def not_for_the_rankers_score(cls, symmetric: float, info: ValidationInfo) -> float:
        if symmetric and info.data.get("similarity") == "ranker":
            raise ValueError("a session's score of an intent is no distance; set similarity to cosine or dot")
        return symmetric


class ClosedLoop(Room):
    """How the ranker follows the LM: after RG-SFT and RG-DPO, and again after RG-CL; and how often all is repeated."""

    rounds: int = Field(
        1, ge=0, le=10, description="at most, while GAUC on the development users rises; 0: no alignment at all"
    )
    ranker: Literal["warm", "scratch", "frozen"] = Field(
        "warm", description="goes on from the ranker before, starts from scratch, or is not trained [C]"
    )
    refit_whitening: bool = Field(
        True, description="on the vectors after RG-CL; false: as the ranker had it through which RG-CL pulled [C]"
    )
    learning_rate: Real = Field(3e-4, gt=0, description="of the warm ranker")
    patience: int = Field(3, ge=1, description="epochs without a better GAUC on the development users")
    cross_fit: bool = Field(
        False, description="the ranker learns from vectors of models that RG-CL aligned without their users [C]"
    )
    look_sessions: int = Field(2000, ge=1, description="of each part, by which a step is looked at")

    @field_validator("cross_fit")
    @classmethod
    def of_one_round(cls, cross_fit: bool, info: ValidationInfo) -> bool:
        if cross_fit and info.data.get("rounds", 1) > 1:
            raise ValueError("a second round would begin from a reasoner that has heard all users: set rounds to 1")
        return cross_fit


class Alignment(Room):
    lora: Lora | None = Field(None, description="empty: all weights learn, as a tiny model may")
    engine: Engine = Engine()
    candidates: Candidates = Candidates()
    reward: Reward = Reward()
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    cl: Contrastive = Contrastive()
    loop: ClosedLoop = ClosedLoop()

    @field_validator("loop")
    @classmethod
    def what_goes_with_a_ranker_that_learns(cls, loop: ClosedLoop, info: ValidationInfo) -> ClosedLoop:
        cl = info.data.get("cl")
        if cl is None or not (cl.use and cl.ranker_learns):
            return loop
        beside = {"rounds above 1": loop.rounds > 1, "cross_fit": loop.cross_fit, "lora": info.data.get("lora")}
        wrong = [name for name, given in beside.items() if given]
        if cl.similarity != "ranker":
            wrong.append(f"similarity {cl.similarity}")
        if wrong:
            raise ValueError(f"cl.ranker_learns is one training of all weights and knows no {', '.join(wrong)}")
        return loop
