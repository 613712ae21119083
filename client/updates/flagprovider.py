"""A provider of OpenFeature over a flag definition that is at hand, evaluated by flagd's own evaluator.

flagd's provider for Python can read a file, too, but depends on gRPC and on a protobuf that Flower cannot have
(docs/decisions/0064). Both use the same evaluator.
"""

from collections.abc import Mapping, Sequence

from openfeature.contrib.tools.flagd.core import FlagdCore
from openfeature.evaluation_context import EvaluationContext
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType
from openfeature.provider import AbstractProvider, Metadata


class SignedFlagProvider(AbstractProvider):
    """Flags of a definition whose signature was verified."""

    def __init__(self, definition: bytes) -> None:
        super().__init__()
        self._core = FlagdCore()
        self._core.set_flags(definition.decode())

    def get_metadata(self) -> Metadata:
        """Its name."""
        return Metadata("edgeadapt signed flags")

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        """Raises OpenFeatureError."""
        return self._core.resolve_boolean_value(flag_key, default_value, evaluation_context)

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        """Raises OpenFeatureError."""
        return self._core.resolve_string_value(flag_key, default_value, evaluation_context)

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        """Raises OpenFeatureError."""
        return self._core.resolve_integer_value(flag_key, default_value, evaluation_context)

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        """Raises OpenFeatureError."""
        return self._core.resolve_float_value(flag_key, default_value, evaluation_context)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        """Raises OpenFeatureError."""
        return self._core.resolve_object_value(flag_key, default_value, evaluation_context)
