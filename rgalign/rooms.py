"""The rooms of a params file: every parameter with its type, range, default and meaning.

`params.load` reads a file into these; nothing else builds them.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from rgalign.rooms_alignment import Alignment
from rgalign.rooms_base import Names, Real, Room, Seed, Share, tuple_from_yaml
from rgalign.rooms_ranker import Ranker
from rgalign.rooms_run import RunRoom, gpu_only, packed_fault, refused


class World(Room):
    """ShopWorld's size; its rules are frozen with its version (data/world.py)."""

    sessions: int = Field(36_000, ge=200, description="chat sessions in six weeks, with and without a click")
    users: int = Field(8_000, ge=20)
    distance: Share = Field(0.5, description="how far the chats the LLM has read are from this shop; 0 = its own kind")
    transcripts: int = Field(48_000, ge=0, description="chats of other shops")
    version: Literal[1, 2] = Field(1, description="2: distance also changes how the other shops put their event texts")


class Features(Room):
    drop: Names = Field((), description="feature columns left out")
    min_count: int = Field(2, ge=1, description="rarer values become 'unknown'")
    numeric_bins: int = Field(16, ge=2, le=256, description="quantile bins fitted on train")
    word_buckets: int = Field(4096, ge=16, le=1 << 20, description="hashed words of the text-aware control")
    max_history: int = Field(50, ge=1, description="most recent entries of a history that are kept")


class SampledNegatives(Room):
    """How the candidates of sampled lists were drawn [C]."""

    popularity: int = Field(ge=0, description="distinct negatives drawn with p ~ train clicks + smoothing")
    uniform: int = Field(ge=0, description="distinct negatives drawn uniformly from the rest")
    smoothing: Real = Field(0.5, gt=0)


class Data(Room):
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
    day_first: bool | None = Field(None, description="CFPB dates such as 03/04/2014; empty: as the other dates tell")
    features: Features = Features()

    @field_validator("sampled_negatives")
    @classmethod
    def only_for_folders(cls, sampled: SampledNegatives | None, info: ValidationInfo) -> SampledNegatives | None:
        if sampled is not None and info.data.get("source", "folder") != "folder":
            raise ValueError("only a folder's lists are described here; other sources say it themselves")
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


class TinyModel(Room):
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


class Pretraining(Room):
    """Of the tiny model, on transcripts and KB text; a model from a hub or folder is taken as it is."""

    epochs: Real = Field(3.0, gt=0)
    learning_rate: Real = Field(4e-3, gt=0, description="AdamW; warm-up, then a cosine to zero")
    documents_per_batch: int = Field(48, ge=1)
    prompt_weight: Share | None = Field(
        None, description="of a prompt token's loss against a query token's [C]; empty: 0, or 1 without transcripts"
    )
    ahead_weight: Real = Field(1.0, ge=0, description="of the look ahead from the prompt's end at the whole query [C]")
    kb_repeats: int = Field(10, ge=0, description="times that each KB intent is read in an epoch")


class Sampling(Room):
    """Latent queries that notebook 02 writes for a look at them; embedding needs none."""

    sessions: int = Field(1000, ge=1, description="of valid, with a click; the first ones")
    samples: int = Field(4, ge=1, description="candidates a session")
    temperature: Real = Field(1.0, gt=0)
    top_p: Share = Field(1.0, gt=0)
    max_new_tokens: int = Field(
        24, ge=1, description="of a query, its end token included: written, learnt from (chats, RG-SFT), embedded"
    )


class OtherModel(Room):
    """One more LLM beside the main one (cross-sampling, METHOD.md 2.3)."""

    model: str = "tiny"
    seed: Seed | None = Field(None, description="empty: one more than that of the model before it")
    tiny: TinyModel = TinyModel()


class Reasoner(Room):
    kind: Literal["causal", "encoder"] = Field("causal", description="an LLM that writes, or an embedder only")
    model: str = Field(
        "tiny", validate_default=True, description="tiny, a hub name or a folder; the paper has Qwen/Qwen3-4B [P]"
    )
    adapter: str | None = Field(None, description="folder or name of a peft adapter of this model")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["8bit", "4bit"] | None = Field(None, description="needs CUDA and bitsandbytes")
    features: Names | None = Field(None, description="columns shown; empty: dataset.yaml's prompt_features, or all")
    instruction: str | None = Field(None, description="what the model is told first; empty: our own [C], none for tiny")
    max_tokens: int = Field(256, ge=8, description="of a prompt; what is cut first: rgalign/data/cutting.py")
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


class Experiment(Room):
    users: int = Field(100_000, ge=200, description="of the simulated A/B test, drawn from the test split's")
    repeats: int = Field(1000, ge=20, description="A/A tests, which show how often a test is wrong")
    repeat_users: int = Field(2000, ge=100, description="of each A/A test")
    looks: int = Field(20, ge=2, description="at an experiment before it ends, equally far apart")
    logs: int = Field(100, ge=2, description="drawn anew to judge the off-policy estimates")
    clip: Real | None = Field(
        1000.0,
        gt=1,
        description="largest weight, 1 / propensity, of an off-policy estimate; empty: none is clipped [C]",
    )


IntentText = Literal["title", "title_and_description"]


class WordOverlap(Room):
    """What the TF-IDF cosine compares [C]: the best on valid of four public sets (ranker/untrained.py)."""

    session: Literal["text", "prompt"] = Field("text", description="the text columns alone, or the whole prompt")
    intent: IntentText = "title_and_description"


class RawCosine(Room):
    """What the cosine of the reasoner's own vectors compares [C]."""

    session: Literal["text", "prompt"] | None = Field(
        None, description="the text columns alone, or the whole prompt; empty: text of an encoder, prompt of an LLM"
    )
    intent: IntentText = "title_and_description"
    centred: bool = Field(True, description="the mean vector is taken off sessions (train's) and intents each")


class Untrained(Room):
    """The models without training that every ranker has to beat."""

    word_overlap: WordOverlap = WordOverlap()
    raw_cosine: RawCosine = RawCosine()


class Evaluation(Room):
    gauc_group: Literal["session", "user"] = "session"
    gauc_weight: Literal["impressions", "clicks", "uniform"] = "impressions"
    bootstrap: int = Field(1000, ge=100, description="replicates, users drawn with replacement")
    ihr_judge: Literal["tfidf", "embedding"] = Field("tfidf", description="fixed, or as the reasoner embeds")
    untrained: Untrained = Untrained()
    experiment: Experiment = Experiment()


class Params(Room):
    """All parameters of a run, resolved: no seed is left empty."""

    data: Data = Data()
    reasoner: Reasoner = Reasoner()
    ranker: Ranker = Ranker()
    alignment: Alignment = Field(Alignment(), validate_default=True)
    evaluation: Evaluation = Evaluation()
    run: RunRoom = Field(RunRoom(), validate_default=True)

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
        if writing := [name for name in ("sft", "dpo") if getattr(alignment, name).use]:
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
    def what_the_machine_can_do(cls, run: RunRoom, info: ValidationInfo) -> RunRoom:
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
