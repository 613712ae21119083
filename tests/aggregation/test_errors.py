"""The lines that users see name the peer or file, the refused value, and the remedy."""

import pytest

from aggregation.errors import ConfigError, ProtocolError, TrustError, of_file


def test_a_protocol_error_begins_with_the_peer_and_keeps_the_subject() -> None:
    error = ProtocolError.of(ConfigError("rounds 0 is not between 1 and 9", about="spec.rounds", value=0), "kitchen")
    assert str(error) == "kitchen: rounds 0 is not between 1 and 9"
    assert (error.peer, error.about, error.value) == ("kitchen", "spec.rounds", 0)


def test_an_error_about_a_files_content_begins_with_the_file() -> None:
    with pytest.raises(TrustError) as caught, of_file("base.onnx"):
        raise TrustError("not a base", about="base.digest", value="ab")
    assert (str(caught.value), caught.value.about, caught.value.value) == ("base.onnx: not a base", "base.digest", "ab")
