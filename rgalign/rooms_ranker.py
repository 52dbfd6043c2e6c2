"""The params of the rankers: which are trained, with what, and the search for their settings."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_serializer, field_validator

from rgalign.rooms_base import Real, Room, Seed, Seeds, Share, all_different, tuple_from_yaml

RankerName = Literal[  # rankers that can be trained (ranker/variants.py); with a slash: controls
    "two_tower",
    "two_tower_text",
    "two_tower_text/lm_features",
    "two_tower_text/chats",
    "three_tower_no_query",
    "qe_rec",
    "qe_rec/no_words",
    "qe_rec/prompt",
    "qe_rec/prompt_query",
    "qe_rec/random_lm",
    "qe_rec/no_text",
    "qe_rec/kb_lm",
    "qe_rec/lsa",
    "qe_rec/constant_query",
    "qe_rec/shuffled_query",
]
RANKERS = get_args(RankerName)
CORE_RANKERS = ("two_tower", "two_tower_text", "qe_rec")


class Search(Room):
    trials: int = Field(
        0,
        ge=0,
        description="random configurations of each model, judged on valid beside the values given here; a control "
        "(qe_rec/lsa) has its model's best and searches what is its own alone (whitening_ridge, "
        "the chat settings); 0: take the values given here",
    )
    seed: Seed | None = Field(None, description="of the configurations and their training; empty: run.seed")


class RankerSettings(Room):
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

    def settings(self) -> dict[str, dict[str, Any]]:
        """model -> all it is built and trained with: the shared settings, under its parent's, under its own.

        A control (qe_rec/no_text) has its parent's settings (qe_rec): they differ in what is controlled alone.
        """
        shared = self.model_dump(include=set(RankerSettings.model_fields))
        tuned = self.model_dump()["tuned"]
        own = {name: {**tuned.get(name.split("/")[0], {}), **tuned.get(name, {})} for name in self.models}
        return {name: {**shared, **own[name]} for name in self.models}
