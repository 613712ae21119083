"""The knobs of a population, each with its unit; what contradicts itself is refused at construction."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PopulationSettings(BaseModel):
    """How many households, in which languages, saying how much.

    Raises:
        pydantic.ValidationError: A key is unknown, out of range, or contradicts another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    households: int = Field(default=15, ge=3, le=10_000, description="Number of households, unseen ones included.")
    languages: tuple[str, ...] = Field(
        default=("en", "de", "fr"),
        min_length=1,
        description="Languages of the households, by turns; codes of the package home-assistant-intents.",
    )
    unseen: float = Field(
        default=0.2, gt=0, lt=1, description="Share of households kept out of training; rounded, at least one."
    )
    utterances_min: int = Field(
        default=60, ge=4, description="Fewest utterances of a household, training and validation together."
    )
    utterances_max: int = Field(
        default=100, le=100_000, description="Most utterances of a household, training and validation together."
    )
    test_utterances: int = Field(default=40, ge=1, le=100_000, description="Test utterances of each household.")
    validation_fraction: float = Field(
        default=0.2, gt=0, le=0.5, description="Share of a household's utterances kept for its own validation."
    )
    concentration: float = Field(
        default=0.5,
        gt=0,
        allow_inf_nan=False,
        description="Dirichlet parameter of a household's mix of intents: small is one-sided, large is even.",
    )
    public_phrases: int = Field(
        default=6, ge=1, le=1000, description="Public phrases for each intent and public language."
    )
    public_languages: tuple[str, ...] = Field(
        default=("en",), min_length=1, description="Languages of the public phrases; need not be spoken by a household."
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for key, codes in (("languages", self.languages), ("public_languages", self.public_languages)):
            if len(set(codes)) < len(codes):
                raise ValueError(f"{key} names a language twice: {', '.join(codes)}")
        if self.utterances_min > self.utterances_max:
            raise ValueError(f"utterances_min {self.utterances_min} is above utterances_max {self.utterances_max}")
        if self.households < len(self.languages):
            raise ValueError(f"{self.households} households cannot speak {len(self.languages)} languages")
        if self.unseen_count > self.households - 2:
            raise ValueError(f"unseen {self.unseen} leaves fewer than 2 of {self.households} households to train")
        return self

    @property
    def unseen_count(self) -> int:
        """Number of households kept out of training."""
        return max(1, round(self.unseen * self.households))
