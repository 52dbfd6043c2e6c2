"""What sections of the params are made of, and those that say what is trained and how: ranker, alignment."""

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from rgalign.ranker.variants import RANKERS

RANKER_NAMES = tuple(name for name, ranker in RANKERS.items() if ranker.in_params)  # with a slash: controls
RankerName = Literal[*RANKER_NAMES]
Interactions = Literal["attention", "product"]  # names of ranker.towers.INTERACTIONS
# names of ranker.match_terms.MATCH_TERMS
MatchTerm = Literal["raw_cosine", "word_overlap", "memory", "written_overlap", "written_cosine"]
WRITTEN_TERMS = ("written_overlap", "written_cosine")  # those that read what the reasoner writes for a session
CORE_RANKERS = ("two_tower", "two_tower_text", "qe_rec")


def _float_from_yaml(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` (no dot) as a string; people mean the number."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def all_different(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("each may be there once")
    return values


def rule(*fields: str) -> Callable[[Callable[[Any, dict[str, Any]], str | None]], Any]:
    """A check of some fields: (value, the section's fields before it) -> what is wrong with it, or nothing."""

    def decorated(wrong: Callable[[Any, dict[str, Any]], str | None]) -> Any:
        def validate(value: Any, info: ValidationInfo) -> Any:
            if fault := wrong(value, info.data):
                raise ValueError(fault)
            return value

        return field_validator(*fields)(validate)

    return decorated


def tuple_from_yaml(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Real = Annotated[float, BeforeValidator(_float_from_yaml), Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(tuple_from_yaml), AfterValidator(all_different)]
Names = Annotated[tuple[str, ...], BeforeValidator(tuple_from_yaml)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Search(Section):
    trials: int = Field(
        0,
        ge=0,
        description="random configurations of each model, judged on valid beside the values given here; a control "
        "(qe_rec/lsa) has its model's best and searches what is its own alone (whitening_ridge, "
        "the chat settings); 0: take the values given here",
    )
    seed: Seed | None = Field(None, description="of the configurations and their training; empty: run.seed")


class RankerSettings(Section):
    """What one ranker is built and trained with; the sizes are choices [C] that the search may replace."""

    embedding_dim: int = Field(8, ge=1, description="width of a feature field")
    dim: int = Field(32, ge=1, description="width of the user and intent vectors")
    attention_layers: int = Field(1, ge=0, description="AutoInt layers over the fields")
    heads: int = Field(1, ge=1, description="of the attention; they divide embedding_dim")
    experts: int = Field(4, ge=1, description="mixture of experts on top of the fields")
    hidden: int = Field(32, ge=1, description="width of an expert")
    dropout: Share = Field(0.5, lt=1)
    id_dropout: Share = Field(0.1, lt=1, description="ids shown as 'unknown' in training, so that it can stand in")
    intent_std: Real = Field(0.3, gt=0, description="of the first weights of an intent's id and category")
    whitening_ridge: Real = Field(
        0.3,
        gt=0,
        description="of the vectors that are read: what is added to the variance of a direction before it is scaled to "
        "1; large: directions that hardly vary, mostly noise, stay small [C]",
    )
    learning_rate: Real = Field(4e-3, gt=0)
    weight_decay: Real = Field(0.01, ge=0)
    epochs: int = Field(60, ge=1, description="at most; early stopping ends before")
    patience: int = Field(5, ge=1, description="epochs without a better GAUC on the development users")
    chat_epochs: int = Field(4, ge=1, description="over the chats, before the clicks, of two_tower_text/chats [C]")
    chat_learning_rate: Real = Field(2e-3, gt=0, description="on the chats [C]")
    chat_temperature: Real = Field(1.0, gt=0, description="of the chats' softmax; 1: the ranker's own scores [C]")
    lists_per_batch: int = Field(128, ge=2, description="impression lists, not rows")
    interaction: Interactions = Field("attention", description="of the three towers [C]")
    interaction_hidden: int = Field(32, ge=1, description="width of what scores a pair from the towers' products")
    exposure: Literal["shown", "kb", "ips"] = Field(
        "shown",
        description="what a click competes with in training: the shown list; kb_negatives unshown intents too; or the "
        "whole KB, each click weighted by 1 / its chance of being seen [C]",
    )
    kb_negatives: int = Field(24, ge=1, description="unshown intents a list, drawn uniformly, where exposure is kb [C]")
    kl_weight: Real = Field(0.2, ge=0, description="how much the query branch must agree; 0 switches it off [C]")
    query_hidden: int = Field(128, ge=0, description="width of the query tower's hidden layer; 0: linear")
    query_dropout: Share = Field(0.5, lt=1)

    @rule("heads")
    def heads_divide_the_width(heads: int, given: dict[str, Any]) -> str | None:
        width = given.get("embedding_dim", heads)
        if width % heads:
            return f"does not divide ranker.embedding_dim, which is {width}"


class Memory(Section):
    """The match term that says what train's sessions with a near vector clicked [C]."""

    neighbours: int = Field(200, ge=1, description="lists with a click whose sessions are nearest")
    temperature: Real = Field(8.0, ge=0, description="a neighbour weighs exp(temperature * cosine)")
    prior: Real = Field(2.0, gt=0, description="neighbours of mean weight with the average clicks, added to all")
    whitening_ridge: Real = Field(0.3, gt=0, description="of the vectors that are compared, as a ranker's")
    compared: int = Field(
        20_000, ge=1, description="lists that a session is compared with; of more, those in the nearest cells"
    )


class Written(Section):
    """The queries that the reasoner writes for the match terms that read them [C]."""

    samples: int = Field(8, ge=1, description="a session")
    temperature: Real = Field(1.0, gt=0)
    top_p: Share = Field(1.0, gt=0)


class Ranker(RankerSettings):
    models: Annotated[tuple[RankerName, ...], BeforeValidator(tuple_from_yaml), AfterValidator(all_different)] = Field(
        CORE_RANKERS, min_length=1
    )
    seeds: Seeds | None = Field(None, min_length=1, description="one ranker a seed; empty: three from run.seed")
    match: Annotated[tuple[MatchTerm, ...], BeforeValidator(tuple_from_yaml), AfterValidator(all_different)] = Field(
        (),
        description="terms that compare session and intent directly, read by the rankers that read words; empty: "
        "no ranker does [C]",
    )
    memory: Memory = Memory()
    written: Written = Written()
    position_bias: bool = Field(True, description="learnt in training, dropped at inference; needs real positions")
    weight_cap: Real = Field(10.0, gt=0, description="largest weight of a click, where exposure is ips [C]")
    search: Search = Search()
    tuned: dict[RankerName, RankerSettings] = Field({}, description="model: settings that a search found for it")

    @field_serializer("tuned")
    def tuned_as_given(self, tuned: dict[str, RankerSettings]) -> dict[str, dict[str, Any]]:
        """Only what was set: the rest keeps following the shared settings when the params are read back."""
        return {name: own.model_dump(exclude_unset=True) for name, own in tuned.items()}

    def settings(self) -> dict[str, RankerSettings]:
        """model -> all it is built and trained with: the shared settings, under its parent's, under its own.

        A control (qe_rec/no_text) has its parent's settings (qe_rec): they differ in what is controlled alone.
        """
        shared = self.model_dump(include=set(RankerSettings.model_fields))
        tuned = self.model_dump()["tuned"]
        own = {name: {**tuned.get(name.split("/")[0], {}), **tuned.get(name, {})} for name in self.models}
        return {name: RankerSettings.model_construct(**{**shared, **own[name]}) for name in self.models}


# The params of ranking-guided alignment (METHOD.md 2.3): notebooks 04 to 08.

STEPS = {"sft": "RG-SFT", "dpo": "RG-DPO", "cl": "RG-CL"}  # of the alignment in their order: section -> name
WRITING_STEPS = ("sft", "dpo")  # that teach to write: not for an encoder
WEIGHT_DECAY = Field(0.01, ge=0)


class Lora(Section):
    """A low-rank adapter beside the frozen weights, through peft; for models of billions of parameters."""

    rank: int = Field(16, ge=1)
    alpha: Real = Field(32, gt=0)
    dropout: Share = Field(0.0, lt=1)
    targets: str = Field("all-linear", description="peft's target_modules")


class Engine(Section):
    """How RG-SFT, RG-DPO and RG-CL fit a large model into a card's memory; the defaults are for small ones."""

    gradient_checkpointing: bool = Field(False, description="states of layers are made again in the backward pass")
    tokens_per_batch: int | None = Field(
        None,
        ge=16,
        description="padded tokens that a process runs at once; a step's documents are run in such pieces and their "
        "gradients added: the same step. Not RG-CL, whose rows are each other's negatives. Empty: all at once",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="8 bit: bitsandbytes on CUDA alone")


class Candidates(Section):
    """What every LLM writes for a session with a click: its greedy query and these."""

    samples: int = Field(4, ge=1, description="a session and LLM")
    temperature: Real = Field(1.0, gt=0)
    top_p: Share = Field(1.0, gt=0)
    llms: Literal["all", "one"] = Field("all", description="one: the main LLM alone writes as many as all would")


class Reward(Section):
    folds: int = Field(
        2,
        ge=1,
        le=10,
        description="of train's users: a session that training data is chosen from is judged by a model that was "
        "trained without its user's fold; 1: by the model trained on all [C]",
    )
    form: str = Field("auto", description="of alignment.reward.REWARDS; auto: the better judge of list and kb [C]")
    null_share: Share = Field(0.1, lt=1, description="of training sessions conditioned on the null query [C]")
    compared: bool = Field(True, description="beside it one of another seed and one on a single LLM's queries")


class Sft(Section):
    use: bool = Field(True, description="False switches this step off")
    select: Literal["best", "random"] = Field("best", description="of a session's candidates: by reward, or any")
    min_reward: Real | None = Field(None, description="nats; a session whose best query has less is left out")
    epochs: Real = Field(3.0, gt=0)
    learning_rate: Real = Field(6e-4, gt=0)
    documents_per_batch: int = Field(48, ge=1)
    neftune: Real = Field(5.0, ge=0, description="NEFTune's alpha [P: NEFTune]; 0: no noise")
    weight_decay: Real = WEIGHT_DECAY


class Dpo(Section):
    use: bool = Field(True, description="False switches this step off")
    objective: str = Field(
        "dpo", description="a name of alignment.objectives.OBJECTIVES, or of LIST_OBJECTIVES there, which read lists"
    )
    list_size: int = Field(
        6,
        ge=2,
        description="queries of a session that a list objective reads: best, worst, others evenly between by rank [C]",
    )
    beta: Real = Field(0.3, gt=0, description="with small ones the policy drifts from its reference [C]")
    sft_weight: Real = Field(1.0, ge=0, description="of the chosen queries' -log p per token beside it [C]")
    length_normalised: bool = False
    min_margin: Real = Field(0.1, ge=0, description="nats of reward between chosen and rejected, at least [C]")
    margin_quantile: Share = Field(0.5, lt=1, description="share of the pairs with the smallest margins left out [C]")
    epochs: Real = Field(1.0, gt=0)
    learning_rate: Real = Field(1e-4, gt=0)
    pairs_per_batch: int = Field(32, ge=1)
    weight_decay: Real = WEIGHT_DECAY
    looks: int = Field(4, ge=0, description="evaluations of ranking and writing while it trains; 0: none")
    tolerance: Real = Field(0.005, ge=0, description="GAUC on valid that may be lost while the reward rises [C]")


class Grpo(Section):
    """GRPO on the reward model's reward, in RG-DPO's place; its looks and tolerance are those of alignment.dpo.

    Shao et al. 2024 for the method; every default that names no source is a choice [C].
    """

    use: bool = Field(False, description="True: the step of alignment.dpo is GRPO")
    advantage: Literal["dr", "group", "rloo", "canon"] = Field(
        "dr", description="of a query in its group (alignment.grpo.ADVANTAGES); dr: reward less the group's mean"
    )
    metric: Literal["tokens", "entropy", "other_reward", "random"] = Field(
        "tokens", description="what canon divides a group by: length, entropy, the other seed's reward, or chance"
    )
    between: Share = Field(
        1.0, description="of canon: weight of the comparison with the other half; the rest is with its own half"
    )
    normaliser: Literal["tokens", "length"] = Field(
        "tokens",
        description="what a loss is divided by: the step's tokens (DAPO), or max_new_tokens a query (Dr. GRPO)",
    )
    steps: int = Field(300, ge=1, description="rounds of drawing")
    inner_steps: int = Field(1, ge=1, description="optimiser steps a round; with 1 the policy is the one that drew")
    sessions_per_step: int = Field(32, ge=1)
    samples: int = Field(8, ge=2, description="queries a session and round, at temperature 1 (Rank-R1, RAG-Zeval: 8)")
    clip_low: Real = Field(0.2, gt=0, lt=1, description="the ratio of policy to the one that drew counts from 1 - this")
    clip_high: Real = Field(0.28, gt=0, description="and up to 1 + this (DAPO, CANON: 0.28)")
    kl_weight: Real = Field(0.02, ge=0, description="of KL to the reference at the start; 0: none")
    kl_target: Real | None = Field(
        2.0, gt=0, description="nats a query that kl_weight is steered to, between 1e-4 and 10; empty: it stays"
    )
    kl_rate: Real = Field(0.1, gt=0, description="a round multiplies kl_weight by exp(kl_rate (KL / kl_target - 1))")
    learning_rate: Real = Field(1e-4, gt=0, description="of all weights; with LoRA 1e-5 (Rank-R1)")
    weight_decay: Real = WEIGHT_DECAY


class Contrastive(Section):
    use: bool = Field(True, description="False switches this step off")
    similarity: Literal["ranker", "cosine", "dot"] = Field(
        "ranker", description="the frozen ranker's score, or its query branch's [C]"
    )
    ranker_learns: bool = Field(False, description="reference: the rankers' own loss through the reasoner; both learn")
    temperature: Real = Field(1.0, gt=0)
    hard: int = Field(16, ge=0, description="negatives a session: what the ranker ranks highest and nobody clicked")
    in_batch: bool = Field(True, validate_default=True, description="other sessions' clicked intents are negatives too")
    symmetric: Real = Field(0.0, ge=0, description="weight of the same loss from intent to session; not for ranker")
    lm_weight: Real = Field(0.3, ge=0, description="of the language loss on the best queries beside it [C]")
    epochs: Real = Field(4.0, gt=0)
    learning_rate: Real = Field(1e-3, gt=0)
    documents_per_batch: int = Field(64, ge=1)
    neftune: Real = Field(0.0, ge=0)
    weight_decay: Real = WEIGHT_DECAY

    @rule("in_batch")
    def something_to_push_away(in_batch: bool, given: dict[str, Any]) -> str | None:
        if not in_batch and given.get("use") and given.get("hard") == 0:
            return "there would be no negative: set hard above 0, or in_batch to true"

    @rule("symmetric")
    def not_for_the_rankers_score(symmetric: float, given: dict[str, Any]) -> str | None:
        if symmetric and given.get("similarity") == "ranker":
            return "a session's score of an intent is no distance; set similarity to cosine or dot"


class ClosedLoop(Section):
    """How the ranker follows the LM: after RG-SFT and RG-DPO, and again after RG-CL; and how often all is repeated."""

    rounds: int = Field(1, ge=0, le=10, description="at most, while GAUC on development users rises; 0: no alignment")
    ranker: Literal["warm", "scratch", "frozen"] = Field(
        "warm", description="continues the ranker before, starts from scratch, or is not trained [C]"
    )
    refit_whitening: bool = Field(
        True, description="on the vectors after RG-CL; false: as the ranker has it that RG-CL saw [C]"
    )
    learning_rate: Real = Field(3e-4, gt=0, description="of the warm ranker")
    patience: int = Field(3, ge=1, description="epochs without a better GAUC on the development users")
    cross_fit: bool = Field(
        False, description="the ranker learns from vectors of RG-CL models that never saw the user [C]"
    )
    look_sessions: int = Field(2000, ge=1, description="of each part, that a step is evaluated on while it trains")

    @rule("cross_fit")
    def of_one_round(cross_fit: bool, given: dict[str, Any]) -> str | None:
        if cross_fit and given.get("rounds", 1) > 1:
            return "a second round would begin from a reasoner that has seen all users: set rounds to 1"


class Alignment(Section):
    lora: Lora | None = Field(None, description="empty: all weights learn, as a tiny model may")
    weights: Literal["none", "exposure"] = Field(
        "none",
        description="exposure: RG-SFT, RG-DPO and RG-CL draw sessions by the weights of their clicks, 1 / "
        "the chance of being seen (ranker/exposure.py); the reward model has those of ranker.exposure [C]",
    )
    engine: Engine = Engine()
    candidates: Candidates = Candidates()
    reward: Reward = Reward()
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    grpo: Grpo = Grpo()
    cl: Contrastive = Contrastive()
    loop: ClosedLoop = ClosedLoop()

    @rule("grpo")
    def in_place_of_rg_dpo(grpo: Grpo, given: dict[str, Any]) -> str | None:
        dpo, reward = given.get("dpo"), given.get("reward")
        if grpo.use and dpo is not None and not dpo.use:
            return "use is true, and GRPO takes the place of RG-DPO, which is off: set alignment.dpo.use to true"
        needs = grpo.use and grpo.advantage == "canon" and grpo.metric == "other_reward"
        if needs and reward is not None and not reward.compared:
            return "metric is other_reward, of the reward model that alignment.reward.compared trains: set it to true"

    @rule("loop")
    def what_goes_with_a_ranker_that_learns(loop: ClosedLoop, given: dict[str, Any]) -> str | None:
        cl = given.get("cl")
        if cl is None or not (cl.use and cl.ranker_learns):
            return None
        beside = {"rounds above 1": loop.rounds > 1, "cross_fit": loop.cross_fit, "lora": given.get("lora")}
        wrong = [name for name, there in beside.items() if there]
        if cl.similarity != "ranker":
            wrong.append(f"similarity {cl.similarity}")
        if wrong:
            return f"cl.ranker_learns is one training of all weights: it cannot go with {', '.join(wrong)}"
