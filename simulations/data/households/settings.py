"""The settings of a population of households."""

from typing import Self

from pydantic import Field, model_validator

from adapters.settings import Settings


class PopulationSettings(Settings):
    """The size, the languages and the habits of a population.

    Raises:
        pydantic.ValidationError: A key is unknown, out of range, or contradicts another.
    """

    households: int = Field(default=15, ge=3, le=10_000, description="number of households, unseen ones included")
    languages: tuple[str, ...] = Field(
        default=("en", "de", "fr"),
        min_length=1,
        description="languages of the households, in turn; codes of the package home-assistant-intents",
    )
    unseen: float = Field(
        default=0.2, gt=0, lt=1, description="share of households that take no part in training; rounded, at least one"
    )
    utterances_min: int = Field(
        default=60, ge=4, description="fewest utterances of a household, training and validation together"
    )
    utterances_max: int = Field(
        default=100, le=100_000, description="most utterances of a household, training and validation together"
    )
    test_utterances: int = Field(default=40, ge=1, le=100_000, description="test utterances of each household")
    validation_fraction: float = Field(
        default=0.2, gt=0, le=0.5, description="share of a household's utterances kept for its own validation"
    )
    concentration: float = Field(
        default=0.5,
        gt=0,
        description="Dirichlet concentration of a household's mix of intents: small is one-sided, large is even",
    )
    public_phrases: int = Field(
        default=6, ge=1, le=1000, description="public phrases for each intent and public language"
    )
    public_languages: tuple[str, ...] = Field(
        default=("en",), min_length=1, description="languages of the public phrases; a household need not speak them"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
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
