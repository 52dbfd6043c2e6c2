"""The sections of a params file: every parameter with its type, range, default and meaning.

`params.load` reads a file into these; nothing else builds them.
"""

import shlex
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rgalign.params_training import (
    STEPS,
    WRITING_STEPS,
    WRITTEN_TERMS,
    Alignment,
    Lora,
    Names,
    Ranker,
    Real,
    Section,
    Seed,
    Share,
    rule,
    tuple_from_yaml,
)

LAUNCHERS = ("torchrun", "accelerate launch")  # both take `-m MODULE`


class RunConfig(Section):
    seed: int = Field(0, ge=0, le=4_000_000, description="every other seed derives from it unless set")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["no", "bf16"] = Field("no", description="accelerate's mixed precision")
    threads: int = Field(1, ge=1, description="CPU threads; pinned, since their number changes the last bits")
    workers: int = Field(1, ge=1, description="rankers and tiny models trained at once on a CPU, sharing the threads")
    launcher: str | None = Field(
        None,
        description="starts several processes for the LLM and for training rankers (run/distributed.py): torchrun "
        "--nproc_per_node 4, accelerate launch --config_file params/accelerate/fsdp.yaml",
    )
    warm_start: str | None = Field(None, description="an aligned run to continue with newer logs; keep data.seed")

    @rule("launcher")
    def a_launcher_that_is_known(launcher: str | None, given: dict[str, Any]) -> str | None:
        program, *rest = shlex.split(launcher or "") or [""]
        name = PurePath(program).name
        if launcher is not None and name not in LAUNCHERS and " ".join([name, *rest[:1]]) not in LAUNCHERS:
            return f"expected one that begins with {' or '.join(LAUNCHERS)}"


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
    path: str | None = Field(None, validate_default=True, description="tables or raw files; relative to $RGALIGN_DATA")
    seed: Seed | None = Field(None, description="of the world or of sampled lists; empty: run.seed")
    dev_users: Share = Field(0.1, gt=0, lt=1, description="train's users kept for early stopping")
    dev_days: int = Field(0, ge=0, description="and all users with a session in train's last days: to see drift [C]")
    dev_new_intents: Share = Field(
        0.0, lt=1, description="of clicked intents, kept for early stopping: train must not know them [C]"
    )
    world: World = World()
    sampled_negatives: SampledNegatives | None = None
    day_first: bool | None = Field(None, description="CFPB dates such as 03/04/2014; empty: as the other dates show")
    features: Features = Features()

    @rule("sampled_negatives")
    def only_for_folders(sampled: SampledNegatives | None, given: dict[str, Any]) -> str | None:
        if sampled is not None and given.get("source", "folder") != "folder":
            return "only a folder's lists are described here; other sources know it themselves"

    @rule("day_first")
    def only_for_the_cfpb(day_first: bool | None, given: dict[str, Any]) -> str | None:
        if day_first is not None and given.get("source", "cfpb") != "cfpb":
            return "only the CFPB's files have dates to be read; other sources have timestamps"

    @rule("path")
    def path_where_needed(path: str | None, given: dict[str, Any]) -> str | None:
        source = given.get("source", "shopworld")
        if source != "shopworld" and not path:
            return f"data.source {source} needs the folder or file to read"


class TinyModel(Section):
    """The small Qwen3-architecture model that is built here; the paper has 4 billion parameters [P]."""

    hidden: int = Field(64, ge=8, description="width")
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1, validate_default=True, description="of the attention; they divide `hidden`")
    min_count: int = Field(2, ge=1, description="rarer words become 'unknown'")

    @rule("heads")
    def heads_divide_the_width(heads: int, given: dict[str, Any]) -> str | None:
        width = given.get("hidden", heads)
        if width % heads or (width // heads) % 2:
            return f"must divide hidden, which is {width}, into even parts"


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


class Warmup(Section):
    """Of a pretrained model: an adapter learns to write the transcripts' questions (reasoner/warmup.py) [C].

    One process trains it, in the type of the weights, whatever run.launcher and alignment.engine say.
    """

    epochs: Real = Field(0.0, ge=0, description="over the transcripts; 0: the model is taken as it is")
    learning_rate: Real = Field(4e-4, gt=0, description="AdamW; it rises, then falls as a cosine to zero")
    documents_per_batch: int = Field(16, ge=1)
    folds: int = Field(
        2,
        ge=1,
        le=10,
        description="of the users whose questions are read: what is written for a fold's sessions of train is written "
        "by an adapter that has not read theirs; 1: by the one that has",
    )
    lora: Lora = Lora()


class Sampling(Section):
    """Latent queries that notebook 02 writes to show them; embedding needs none."""

    sessions: int = Field(1000, ge=1, description="of valid, with a click; the first ones")
    samples: int = Field(4, ge=1, description="candidates a session")
    temperature: Real = Field(1.0, gt=0)
    top_p: Share = Field(1.0, gt=0)
    max_new_tokens: int = Field(24, ge=1, description="of a query with its end token: written, learnt from, embedded")


class OtherModel(Section):
    """One more LLM beside the main one (cross-sampling, METHOD.md 2.3)."""

    model: str = "tiny"
    seed: Seed | None = Field(None, description="empty: one more than that of the model before it")
    tiny: TinyModel = TinyModel()
    warmup: bool = Field(True, description="a pretrained one is warmed up as the main one is; false: it is not")


class Reasoner(Section):
    kind: Literal["causal", "encoder"] = Field("causal", description="an LLM that writes, or an embedder only")
    model: str = Field(
        "tiny",
        validate_default=True,
        description="tiny, smollm2, a hub name, a folder or a .gguf file; paper: Qwen/Qwen3-4B [P]",
    )
    adapter: str | None = Field(None, description="folder or name of a peft adapter of this model")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="of the weights; auto: bfloat16 where the device is quicker by it, else float32"
    )
    quantize: Literal["8bit", "4bit"] | None = Field(None, description="needs CUDA and bitsandbytes")
    features: Names | None = Field(None, description="columns shown; empty: dataset.yaml's prompt_features, or all")
    instruction: str | None = Field(None, description="system prompt; empty: our own [C], none for tiny")
    max_tokens: int = Field(256, ge=8, description="of a prompt; what is cut first: rgalign/reasoner/prompts.py")
    embed: Literal["prompt", "prompt_query"] = Field(
        "prompt",
        description="a session's vector is the last state of the prompt, from which the query would be written; or of "
        "prompt, written query and the asking mark again: a query has to be written for each session [C]",
    )
    pooling: Literal["last", "mean"] = Field(
        "last", description="of a pretrained LLM's states into one vector: the last token's [P], or their mean [C]"
    )
    reader: str | None = Field(
        None,
        description="an encoder that reads texts for the match terms raw_cosine and written_cosine in the LLM's place, "
        "as reasoner.model of kind encoder; empty: the LLM reads them [C]",
    )
    embed_tokens_per_batch: int | None = Field(None, ge=16, description="empty: by device")
    seed: Seed | None = Field(None, description="of the tiny model; empty: run.seed")
    tiny: TinyModel = TinyModel()
    pretraining: Pretraining = Pretraining()
    warmup: Warmup = Warmup()
    queries: Sampling = Sampling()
    others: Annotated[tuple[OtherModel, ...], BeforeValidator(tuple_from_yaml)] = ()

    @rule("adapter", "quantize")
    def for_pretrained_models(value: str | None, given: dict[str, Any]) -> str | None:
        if value is not None and given.get("model") == "tiny":
            return "is for a pretrained model; reasoner.model is tiny"

    @property
    def compares(self) -> Literal["causal", "encoder", "reader"]:
        """What reads texts for the match terms: the LLM, the encoder in its place, or `reader` beside it."""
        return "reader" if self.reader else self.kind

    @rule("reader")
    def beside_an_llm(reader: str | None, given: dict[str, Any]) -> str | None:
        if reader is not None and given.get("kind") == "encoder":
            return "stands beside an LLM; reasoner.kind is encoder, which reads by itself"

    @rule("pooling")
    def an_encoder_has_its_own(pooling: str, given: dict[str, Any]) -> str | None:
        if pooling != "last" and (given.get("model") == "tiny" or given.get("kind") == "encoder"):
            return "is for a pretrained LLM: an encoder has its own, and tiny's last state is trained to be read"

    @rule("warmup")
    def for_pretrained_models_that_write(warmup: Warmup, given: dict[str, Any]) -> str | None:
        if not warmup.epochs:
            return None
        if given.get("model") == "tiny" or given.get("kind") == "encoder":
            own = (
                "an encoder writes nothing" if given.get("kind") == "encoder" else "tiny is trained here from the start"
            )
            return f"epochs is {warmup.epochs:g}, and {own}: set it to 0"
        if given.get("quantize"):
            return f"quantize is {given['quantize']}: packed weights take in no adapter; leave one of the two out"
        if given.get("embed") == "prompt_query":
            return "the query that is embedded would be written by what has read the user's own: set embed to prompt"

    @rule("embed")
    def an_encoder_writes_no_query(embed: str, given: dict[str, Any]) -> str | None:
        if embed == "prompt_query" and given.get("kind") == "encoder":
            return "an encoder writes no query to embed: set reasoner.embed to prompt"

    @rule("others")
    def others_write(others: tuple[OtherModel, ...], given: dict[str, Any]) -> str | None:
        if others and given.get("kind") == "encoder":
            return "other models are there to write queries; an encoder run has none"

    @rule("model")
    def an_encoder_has_a_name(model: str, given: dict[str, Any]) -> str | None:
        if model == "tiny" and given.get("kind") == "encoder":
            return "an encoder is pretrained; expected a sentence-transformers name or folder"


class Experiment(Section):
    users: int = Field(100_000, ge=200, description="of the simulated A/B test, drawn from the test split's")
    repeats: int = Field(1000, ge=20, description="A/A tests, which show how often a test is wrong")
    repeat_users: int = Field(2000, ge=100, description="of each A/A test")
    looks: int = Field(20, ge=2, description="at an experiment before it ends, equally far apart")
    logs: int = Field(100, ge=2, description="sampled again to judge the off-policy estimates")
    clip: Real | None = Field(
        1000.0, gt=1, description="largest off-policy weight, 1 / propensity; empty: no limit [C]"
    )


IntentText = Literal["title", "title_and_description"]


class WordOverlap(Section):
    """What the TF-IDF cosine compares [C]: the best on valid of four public sets (ranker/match.py)."""

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

    @rule("run")
    def grpo_is_one_process(run: RunConfig, given: dict[str, Any]) -> str | None:
        alignment = given.get("alignment")
        if run.launcher is not None and alignment is not None and alignment.grpo.use:
            return (
                "launcher is given, and GRPO draws from the model that it trains, in one process: leave run.launcher "
                "out, or set alignment.grpo.use to false"
            )

    @rule("ranker")
    def an_encoder_writes_no_query(ranker: Ranker, given: dict[str, Any]) -> str | None:
        reasoner, terms = given.get("reasoner"), [term for term in WRITTEN_TERMS if term in ranker.match]
        if terms and reasoner is not None and reasoner.kind == "encoder":
            return f"match names {', '.join(terms)}, and an encoder writes no query: leave them out"

    @rule("ranker")
    def a_control_of_what_is_embedded_differs(ranker: Ranker, given: dict[str, Any]) -> str | None:
        reasoner = given.get("reasoner")
        if reasoner is not None and (same := f"qe_rec/{reasoner.embed}") in ranker.models:
            return f"{same} is qe_rec itself where reasoner.embed is {reasoner.embed}: leave it out of ranker.models"
        for name in ranker.models:
            if name.endswith("_match") and not ranker.match:
                return f"{name} is a control of match terms, and ranker.match is empty: name some, or leave it out"
            if reasoner is not None and name == "qe_rec/mean" and reasoner.pooling == "mean":
                return "qe_rec/mean is qe_rec itself where reasoner.pooling is mean: leave it out of ranker.models"
            if reasoner is not None and name == "qe_rec/prompt_query" and reasoner.warmup.epochs:
                return (
                    "qe_rec/prompt_query embeds queries of what has read the user's own (reasoner.warmup): leave it out"
                )
            if "written_" in name and not {*WRITTEN_TERMS} & {*ranker.match}:
                return f"{name} is a control of written queries, which no term of ranker.match reads: leave it out"
            if name.endswith("/word_match") and "word_overlap" not in ranker.match:
                return f"{name} reads word_overlap, which is not in ranker.match: name it there, or leave the model out"

    @rule("evaluation")
    def a_reader_reads_texts(evaluation: Evaluation, given: dict[str, Any]) -> str | None:
        reasoner, asked = given.get("reasoner"), evaluation.untrained.raw_cosine
        if reasoner is not None and reasoner.reader and asked.session == "prompt":
            return "untrained.raw_cosine.session is prompt, and reasoner.reader reads text columns and titles alone"

    @rule("alignment")
    def what_can_be_aligned(alignment: Alignment, given: dict[str, Any]) -> str | None:
        ranker, reasoner = given.get("ranker"), given.get("reasoner")
        if not alignment.loop.rounds:
            return None
        faults, used = [], [name for name in STEPS if getattr(alignment, name).use]
        if ranker is not None and "qe_rec" not in ranker.models:
            faults.append(
                f"ranker.models is {', '.join(ranker.models)}; the alignment needs qe_rec among them "
                "(or set alignment.loop.rounds to 0: no alignment)"
            )
        if reasoner is not None and reasoner.kind == "encoder":
            if writing := [name for name in WRITING_STEPS if name in used]:
                faults.append(
                    f"an encoder writes nothing that {' and '.join(writing)} could use: set their use to false"
                )
            if alignment.cl.use and alignment.cl.lm_weight:
                faults.append("an encoder has no language loss: set alignment.cl.lm_weight to 0")
            if alignment.lora is not None:
                faults.append("an encoder takes no adapter: leave alignment.lora empty, all its weights learn")
        if reasoner is not None and reasoner.quantize and used and not (alignment.lora or reasoner.adapter):
            faults.append(
                f"reasoner.quantize is {reasoner.quantize} and lora is empty: packed weights cannot learn, as "
                f"{', '.join(f'alignment.{name}' for name in used)} would have them do; give alignment.lora a rank, or "
                "leave reasoner.quantize out"
            )
        return "; ".join(faults)

    @rule("run")
    def what_the_machine_can_do(run: RunConfig, given: dict[str, Any]) -> str | None:
        reasoner, alignment = given.get("reasoner"), given.get("alignment")
        if reasoner is None or alignment is None:
            return None
        faults = [fault] if (fault := refused(gpu_only(reasoner, alignment), run.device)) else []
        if reasoner.warmup.epochs and alignment.loop.rounds > 1:
            faults.append(
                "reasoner.warmup has read what users of train typed, and a second round would write for them by it: "
                "set alignment.loop.rounds to 1"
            )
        if run.launcher and alignment.loop.rounds > 1:
            faults.append("a launcher does one round: set alignment.loop.rounds to 1, or leave run.launcher out")
        if run.launcher and reasoner.embed == "prompt_query":
            faults.append(
                "reasoner.embed prompt_query is written by one process: set it to prompt, or leave run.launcher out"
            )
        if run.launcher and alignment.cl.use and alignment.cl.ranker_learns:
            faults.append("alignment.cl.ranker_learns is trained in one process: leave run.launcher out")
        return "; ".join(faults)

    @model_validator(mode="before")
    @classmethod
    def empty_sections_are_defaults(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given
