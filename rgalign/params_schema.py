"""The sections of a params file: every parameter with its type, range, default and meaning.

`params.load` reads a file into these; nothing else builds them.
"""

import shlex
from pathlib import PurePath
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
    model_validator,
)

from rgalign.ranker.variants import RANKERS

# The types that sections are made of.


def _float_from_yaml(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` (no dot) as a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def all_different(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("each may be there once")
    return values


def tuple_from_yaml(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Real = Annotated[float, BeforeValidator(_float_from_yaml), Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(tuple_from_yaml), AfterValidator(all_different)]
Names = Annotated[tuple[str, ...], BeforeValidator(tuple_from_yaml)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


# The params of the rankers: which are trained, with what, and the search for their settings.

RANKER_NAMES = tuple(name for name, ranker in RANKERS.items() if ranker.in_params)  # with a slash: controls
RankerName = Literal[*RANKER_NAMES]
CORE_RANKERS = ("two_tower", "two_tower_text", "qe_rec")


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
    interaction: Literal["attention", "product"] = Field("attention", description="of the three towers [C]")
    interaction_hidden: int = Field(32, ge=1, description="width of what scores a pair from the towers' products")
    kl_weight: Real = Field(0.2, ge=0, description="how much the query branch must agree; 0 switches it off [C]")
    query_hidden: int = Field(128, ge=0, description="width of the query tower's hidden layer; 0: linear")
    query_dropout: Share = Field(0.5, lt=1)

    @field_validator("heads")
    @classmethod
    def heads_divide_the_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("embedding_dim", heads)
        if width % heads:
            raise ValueError(f"does not divide ranker.embedding_dim, which is {width}")
        return heads


class Ranker(RankerSettings):
    models: Annotated[tuple[RankerName, ...], BeforeValidator(tuple_from_yaml), AfterValidator(all_different)] = Field(
        CORE_RANKERS, min_length=1
    )
    seeds: Seeds | None = Field(None, min_length=1, description="one ranker a seed; empty: three from run.seed")
    position_bias: bool = Field(True, description="learnt in training, dropped at inference; needs real positions")
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
    form: str = Field(
        "auto", description="a name of alignment.reward.REWARDS; auto: the better judge of list and kb [C]"
    )
    null_share: Share = Field(0.1, lt=1, description="of training sessions conditioned on the null query [C]")
    compared: bool = Field(
        True, description="one more of another seed and one on a single LLM's queries, to judge it by"
    )


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
    objective: str = Field("dpo", description="a name of alignment.objectives.OBJECTIVES")
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
    tolerance: Real = Field(
        0.005, ge=0, description="GAUC on valid that may be lost while the reward rises; more stops training [C]"
    )


class Contrastive(Section):
    use: bool = Field(True, description="False switches this step off")
    similarity: Literal["ranker", "cosine", "dot"] = Field(
        "ranker", description="the frozen ranker's score of a pair, or of the query branch alone [C]"
    )
    ranker_learns: bool = Field(
        False, description="the reference: the rankers' own loss through the reasoner, and both learn"
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


class ClosedLoop(Section):
    """How the ranker follows the LM: after RG-SFT and RG-DPO, and again after RG-CL; and how often all is repeated."""

    rounds: int = Field(
        1, ge=0, le=10, description="at most, while GAUC on the development users rises; 0: no alignment at all"
    )
    ranker: Literal["warm", "scratch", "frozen"] = Field(
        "warm", description="continues the ranker before, starts from scratch, or is not trained [C]"
    )
    refit_whitening: bool = Field(
        True, description="on the vectors after RG-CL; false: that of the ranker that RG-CL aligned with [C]"
    )
    learning_rate: Real = Field(3e-4, gt=0, description="of the warm ranker")
    patience: int = Field(3, ge=1, description="epochs without a better GAUC on the development users")
    cross_fit: bool = Field(
        False, description="the ranker learns from vectors of models that RG-CL aligned without their users [C]"
    )
    look_sessions: int = Field(2000, ge=1, description="of each part, that a step is evaluated on while it trains")

    @field_validator("cross_fit")
    @classmethod
    def of_one_round(cls, cross_fit: bool, info: ValidationInfo) -> bool:
        if cross_fit and info.data.get("rounds", 1) > 1:
            raise ValueError("a second round would begin from a reasoner that has seen all users: set rounds to 1")
        return cross_fit


class Alignment(Section):
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
            raise ValueError(f"cl.ranker_learns is one training of all weights: it cannot go with {', '.join(wrong)}")
        return loop


# The params of the machine: seeds, device, processes, and what a CPU refuses by name.

LAUNCHERS = ("torchrun", "accelerate launch")  # both take `-m MODULE`


class RunConfig(Section):
    seed: int = Field(0, ge=0, le=4_000_000, description="every other seed derives from it unless set")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["no", "bf16"] = Field("no", description="accelerate's mixed precision")
    threads: int = Field(1, ge=1, description="CPU threads; pinned, since their number changes the last bits")
    workers: int = Field(
        1, ge=1, description="rankers, and tiny models, trained at once on a CPU; they share the threads out"
    )
    launcher: str | None = Field(
        None,
        description="starts several processes for the LLM and for training rankers (run/distributed.py): torchrun "
        "--nproc_per_node 4, accelerate launch --config_file params/accelerate/fsdp.yaml",
    )
    warm_start: str | None = Field(
        None,
        description="an aligned run to continue with newer logs: its encoding, LLMs and rankers; keep data.seed",
    )

    @field_validator("launcher")
    @classmethod
    def a_launcher_that_is_known(cls, launcher: str | None) -> str | None:
        if launcher is None:
            return None
        words = shlex.split(launcher)
        name = PurePath(words[0]).name if words else ""
        if " ".join([name, *words[1:2]]) not in LAUNCHERS and name not in LAUNCHERS:
            raise ValueError(f"expected one that begins with {' or '.join(LAUNCHERS)}")
        return launcher


def gpu_only(reasoner: Any, alignment: Any) -> dict[str, str]:
    """Parameters given here that run on CUDA alone, and their values: 8- and 4-bit weights, the 8-bit optimizer."""
    given = {"reasoner.quantize": reasoner.quantize, "alignment.engine.optimizer": alignment.engine.optimizer}
    return {key: value for key, value in given.items() if value not in (None, "adamw")}


def refused(given: dict[str, str], device: str) -> str | None:
    """Why these parameters of `gpu_only` cannot be used on this device; None where they can."""
    if not given or device in ("auto", "cuda"):
        return None
    named = " and ".join(f"{key} ({value})" for key, value in given.items())
    return f"{named} run on CUDA alone, and run.device is {device}: set it to cuda, or leave {' and '.join(given)} out"


def packed_fault(reasoner: Any, alignment: Any) -> str | None:
    """Why 8- or 4-bit weights cannot learn what is asked of them; None where they can, or need not."""
    used = [f"alignment.{name}" for name in STEPS if getattr(alignment, name).use]
    learns_beside = alignment.lora is not None or reasoner.adapter is not None
    if reasoner.quantize is None or learns_beside or not (alignment.loop.rounds and used):
        return None
    return (
        f"reasoner.quantize is {reasoner.quantize} and lora is empty: packed weights cannot learn, as "
        f"{', '.join(used)} would have them do; give alignment.lora a rank, or leave reasoner.quantize out"
    )


class World(Section):
    """ShopWorld's size; its rules are frozen with its version (shopworld/world.py)."""

    sessions: int = Field(36_000, ge=200, description="chat sessions in six weeks, with and without a click")
    users: int = Field(8_000, ge=20)
    distance: Share = Field(0.5, description="how far the LLM's chats are from this shop; 0: of its own kind")
    transcripts: int = Field(48_000, ge=0, description="chats of other shops")
    version: Literal[1, 2] = Field(1, description="2: distance also changes how the other shops put their event texts")


class Features(Section):
    drop: Names = Field((), description="feature columns left out")
    min_count: int = Field(2, ge=1, description="rarer values become 'unknown'")
    numeric_bins: int = Field(16, ge=2, le=256, description="quantile bins fitted on train")
    word_buckets: int = Field(4096, ge=16, le=1 << 20, description="hashed words of the text-aware control")
    max_history: int = Field(50, ge=1, description="most recent entries of a history that are kept")


class SampledNegatives(Section):
    """How the candidates of sampled lists were drawn [C]."""

    popularity: int = Field(ge=0, description="distinct negatives drawn with p ~ train clicks + smoothing")
    uniform: int = Field(ge=0, description="distinct negatives drawn uniformly from the rest")
    smoothing: Real = Field(0.5, gt=0)


class Data(Section):
    source: Literal["shopworld", "folder", "cfpb", "msweb"] = "shopworld"
    path: str | None = Field(
        None, validate_default=True, description="tables or raw files; relative: below $RGALIGN_DATA"
    )
    seed: Seed | None = Field(None, description="of the world or of sampled lists; empty: run.seed")
    dev_users: Share = Field(0.1, gt=0, lt=1, description="train's users kept for early stopping")
    dev_days: int = Field(0, ge=0, description="and all users with a session in train's last days: to see drift [C]")
    dev_new_intents: Share = Field(
        0.0, lt=1, description="share of clicked intents that train must not know, kept for early stopping too [C]"
    )
    world: World = World()
    sampled_negatives: SampledNegatives | None = None
    day_first: bool | None = Field(None, description="CFPB dates such as 03/04/2014; empty: as the other dates show")
    features: Features = Features()

    @field_validator("sampled_negatives")
    @classmethod
    def only_for_folders(cls, sampled: SampledNegatives | None, info: ValidationInfo) -> SampledNegatives | None:
        if sampled is not None and info.data.get("source", "folder") != "folder":
            raise ValueError("only a folder's lists are described here; other sources know it themselves")
        return sampled

    @field_validator("day_first")
    @classmethod
    def only_for_the_cfpb(cls, day_first: bool | None, info: ValidationInfo) -> bool | None:
        if day_first is not None and info.data.get("source", "cfpb") != "cfpb":
            raise ValueError("only the CFPB's files have dates to be read; other sources have timestamps")
        return day_first

    @field_validator("path")
    @classmethod
    def path_where_needed(cls, path: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source", "shopworld")
        if source != "shopworld" and not path:
            raise ValueError(f"data.source {source} needs the folder or file to read")
        return path


class TinyModel(Section):
    """The small Qwen3-architecture model that is built here; the paper has 4 billion parameters [P]."""

    hidden: int = Field(64, ge=8, description="width")
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1, validate_default=True, description="of the attention; they divide `hidden`")
    min_count: int = Field(2, ge=1, description="rarer words become 'unknown'")

    @field_validator("heads")
    @classmethod
    def heads_divide_the_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("hidden", heads)
        if width % heads or (width // heads) % 2:
            raise ValueError(f"must divide hidden, which is {width}, into even parts")
        return heads


class Pretraining(Section):
    """Of the tiny model, on transcripts and KB text; a model from a hub or folder is taken as it is."""

    epochs: Real = Field(3.0, gt=0)
    learning_rate: Real = Field(4e-3, gt=0, description="AdamW; warm-up, then a cosine to zero")
    documents_per_batch: int = Field(48, ge=1)
    prompt_weight: Share | None = Field(
        None, description="of a prompt token's loss against a query token's [C]; empty: 0, or 1 without transcripts"
    )
    ahead_weight: Real = Field(1.0, ge=0, description="of the look ahead from the prompt's end at the whole query [C]")
    kb_repeats: int = Field(10, ge=0, description="times that each KB intent is read in an epoch")


class Sampling(Section):
    """Latent queries that notebook 02 writes to show them; embedding needs none."""

    sessions: int = Field(1000, ge=1, description="of valid, with a click; the first ones")
    samples: int = Field(4, ge=1, description="candidates a session")
    temperature: Real = Field(1.0, gt=0)
    top_p: Share = Field(1.0, gt=0)
    max_new_tokens: int = Field(
        24, ge=1, description="of a query, its end token included: written, learnt from (chats, RG-SFT), embedded"
    )


class OtherModel(Section):
    """One more LLM beside the main one (cross-sampling, METHOD.md 2.3)."""

    model: str = "tiny"
    seed: Seed | None = Field(None, description="empty: one more than that of the model before it")
    tiny: TinyModel = TinyModel()


class Reasoner(Section):
    kind: Literal["causal", "encoder"] = Field("causal", description="an LLM that writes, or an embedder only")
    model: str = Field(
        "tiny", validate_default=True, description="tiny, a hub name or a folder; the paper has Qwen/Qwen3-4B [P]"
    )
    adapter: str | None = Field(None, description="folder or name of a peft adapter of this model")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["8bit", "4bit"] | None = Field(None, description="needs CUDA and bitsandbytes")
    features: Names | None = Field(None, description="columns shown; empty: dataset.yaml's prompt_features, or all")
    instruction: str | None = Field(None, description="system prompt; empty: our own [C], none for tiny")
    max_tokens: int = Field(256, ge=8, description="of a prompt; what is cut first: rgalign/reasoner/prompts.py")
    embed: Literal["prompt", "prompt_query"] = Field(
        "prompt",
        description="a session's vector is the last state of the prompt, from which the query would be written; or of "
        "prompt, written query and the asking mark again: a query has to be written for each session [C]",
    )
    embed_tokens_per_batch: int | None = Field(None, ge=16, description="empty: by device")
    seed: Seed | None = Field(None, description="of the tiny model; empty: run.seed")
    tiny: TinyModel = TinyModel()
    pretraining: Pretraining = Pretraining()
    queries: Sampling = Sampling()
    others: Annotated[tuple[OtherModel, ...], BeforeValidator(tuple_from_yaml)] = ()

    @field_validator("adapter", "quantize")
    @classmethod
    def for_pretrained_models(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("model") == "tiny":
            raise ValueError("is for a pretrained model; reasoner.model is tiny")
        return value

    @field_validator("embed")
    @classmethod
    def an_encoder_writes_no_query(cls, embed: str, info: ValidationInfo) -> str:
        if embed == "prompt_query" and info.data.get("kind") == "encoder":
            raise ValueError("an encoder writes no query to embed: set reasoner.embed to prompt")
        return embed

    @field_validator("others")
    @classmethod
    def others_write(cls, others: tuple[OtherModel, ...], info: ValidationInfo) -> tuple[OtherModel, ...]:
        if others and info.data.get("kind") == "encoder":
            raise ValueError("other models are there to write queries; an encoder run has none")
        return others

    @field_validator("model")
    @classmethod
    def an_encoder_has_a_name(cls, model: str, info: ValidationInfo) -> str:
        if model == "tiny" and info.data.get("kind") == "encoder":
            raise ValueError("an encoder is pretrained; expected a sentence-transformers name or folder")
        return model


class Experiment(Section):
    users: int = Field(100_000, ge=200, description="of the simulated A/B test, drawn from the test split's")
    repeats: int = Field(1000, ge=20, description="A/A tests, which show how often a test is wrong")
    repeat_users: int = Field(2000, ge=100, description="of each A/A test")
    looks: int = Field(20, ge=2, description="at an experiment before it ends, equally far apart")
    logs: int = Field(100, ge=2, description="sampled again to judge the off-policy estimates")
    clip: Real | None = Field(
        1000.0,
        gt=1,
        description="largest weight, 1 / propensity, of an off-policy estimate; empty: none is clipped [C]",
    )


IntentText = Literal["title", "title_and_description"]


class WordOverlap(Section):
    """What the TF-IDF cosine compares [C]: the best on valid of four public sets (ranker/untrained.py)."""

    session: Literal["text", "prompt"] = Field("text", description="the text columns alone, or the whole prompt")
    intent: IntentText = "title_and_description"


class RawCosine(Section):
    """What the cosine of the reasoner's own vectors compares [C]."""

    session: Literal["text", "prompt"] | None = Field(
        None, description="the text columns alone, or the whole prompt; empty: text of an encoder, prompt of an LLM"
    )
    intent: IntentText = "title_and_description"
    centred: bool = Field(True, description="the mean vector is taken off sessions (train's) and intents each")


class Untrained(Section):
    """The models without training that every ranker has to beat."""

    word_overlap: WordOverlap = WordOverlap()
    raw_cosine: RawCosine = RawCosine()


class Evaluation(Section):
    gauc_group: Literal["session", "user"] = "session"
    gauc_weight: Literal["impressions", "clicks", "uniform"] = "impressions"
    bootstrap: int = Field(1000, ge=100, description="replicates, users drawn with replacement")
    ihr_judge: Literal["tfidf", "embedding"] = Field("tfidf", description="fixed, or as the reasoner embeds")
    untrained: Untrained = Untrained()
    experiment: Experiment = Experiment()


class Params(Section):
    """All parameters of a run, resolved: no seed is left empty."""

    data: Data = Data()
    reasoner: Reasoner = Reasoner()
    ranker: Ranker = Ranker()
    alignment: Alignment = Field(Alignment(), validate_default=True)
    evaluation: Evaluation = Evaluation()
    run: RunConfig = Field(RunConfig(), validate_default=True)

    @field_validator("ranker")
    @classmethod
    def a_control_of_what_is_embedded_differs(cls, ranker: Ranker, info: ValidationInfo) -> Ranker:
        reasoner = info.data.get("reasoner")
        if reasoner is not None and (same := f"qe_rec/{reasoner.embed}") in ranker.models:
            raise ValueError(
                f"{same} is qe_rec itself where reasoner.embed is {reasoner.embed}: leave it out of ranker.models"
            )
        return ranker

    @field_validator("alignment")
    @classmethod
    def a_ranker_to_align_to(cls, alignment: Alignment, info: ValidationInfo) -> Alignment:
        ranker = info.data.get("ranker")
        if alignment.loop.rounds and ranker is not None and "qe_rec" not in ranker.models:
            raise ValueError(
                f"ranker.models is {', '.join(ranker.models)}; the alignment needs qe_rec among them "
                "(or set alignment.loop.rounds to 0: no alignment)"
            )
        return alignment

    @field_validator("alignment")
    @classmethod
    def what_an_encoder_can_learn(cls, alignment: Alignment, info: ValidationInfo) -> Alignment:
        reasoner = info.data.get("reasoner")
        if not alignment.loop.rounds or reasoner is None or reasoner.kind != "encoder":
            return alignment
        faults = []
        if writing := [name for name in WRITING_STEPS if getattr(alignment, name).use]:
            faults.append(f"an encoder writes nothing that {' and '.join(writing)} could use: set their use to false")
        if alignment.cl.use and alignment.cl.lm_weight:
            faults.append("an encoder has no language loss: set alignment.cl.lm_weight to 0")
        if alignment.lora is not None:
            faults.append("an encoder takes no adapter: leave alignment.lora empty, all its weights learn")
        if faults:
            raise ValueError("; ".join(faults))
        return alignment

    @field_validator("alignment")
    @classmethod
    def what_packed_weights_can_learn(cls, alignment: Alignment, info: ValidationInfo) -> Alignment:
        reasoner = info.data.get("reasoner")
        if reasoner is not None and (fault := packed_fault(reasoner, alignment)):
            raise ValueError(fault)
        return alignment

    @field_validator("run")
    @classmethod
    def what_the_machine_can_do(cls, run: RunConfig, info: ValidationInfo) -> RunConfig:
        reasoner, alignment = info.data.get("reasoner"), info.data.get("alignment")
        if reasoner is None or alignment is None:
            return run
        faults = [fault] if (fault := refused(gpu_only(reasoner, alignment), run.device)) else []
        if run.launcher and alignment.loop.rounds > 1:
            faults.append("a launcher does one round: set alignment.loop.rounds to 1, or leave run.launcher out")
        if run.launcher and reasoner.embed == "prompt_query":
            faults.append(
                "reasoner.embed prompt_query is written by one process: set it to prompt, or leave run.launcher out"
            )
        if run.launcher and alignment.cl.use and alignment.cl.ranker_learns:
            faults.append("alignment.cl.ranker_learns is trained in one process: leave run.launcher out")
        if faults:
            raise ValueError("; ".join(faults))
        return run

    @model_validator(mode="before")
    @classmethod
    def empty_sections_are_defaults(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given
