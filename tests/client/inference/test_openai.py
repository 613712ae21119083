"""OpenAI's own client gets answers, streams and errors from ``device serve``, as it does from its maker's server."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from client.inference import server
from client.inference.session import ClassificationSession
from tests.client.inference.test_passages import encoder as encoder
from tests.client.inference.test_server import MESSAGES, TOKENS, Steps, tenants, written
from tests.support.gateway import wait_until
from tests.support.wire import Site, site

ASKED: dict[str, Any] = {"model": "anna", "max_tokens": 6}


def client_of(running: Site, token: str = TOKENS["anna"]) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key=token, max_retries=0, timeout=60)


@pytest.fixture
def served(lm_bundle: Any) -> Iterator[Site]:
    with site(lm_bundle) as running:
        yield running
        assert not running.logged


@pytest.fixture
def client(served: Site) -> OpenAI:
    return client_of(served)


@pytest.fixture
def chat(client: OpenAI) -> Callable[..., Any]:
    return lambda **own: client.chat.completions.create(**{**ASKED, "messages": MESSAGES, **own})


def test_models_are_listed_and_found_by_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["anna", "global", "base"]
    for name in ("anna", "base", "anna+global:0.5"):
        assert client.models.retrieve(name).id == name
    for name in ("nobody", "anna+nobody", "../../health", "..%2f..%2fhealth", "anna?x", "%00"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_a_chat_is_answered_whole_and_in_pieces(chat: Callable[..., Any], lm_bundle: Any) -> None:
    expected, whole = written(lm_bundle), chat()
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "length")
    *pieces, last = chat(stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].delta.content for piece in pieces) == expected
    assert (last.usage, pieces[-1].choices[0].finish_reason) == (whole.usage, "length")


@pytest.mark.parametrize(
    "own",
    [
        {"max_tokens": None, "max_completion_tokens": 6},
        dict.fromkeys(("stop", "temperature", "top_p", "n", "seed", "user", "stream", "stream_options", "logprobs")),
        {"response_format": {"type": "text"}, "frequency_penalty": 0, "presence_penalty": 0.0, "n": 1, "tools": []},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    ],
)
def test_what_means_the_same_gets_the_same_answer(
    chat: Callable[..., Any], lm_bundle: Any, own: dict[str, Any]
) -> None:
    assert chat(**own).choices[0].message.content == written(lm_bundle)


def test_an_answer_has_the_form_that_a_class_describes(client: OpenAI) -> None:
    class Light(BaseModel):
        on: bool

    asked: dict[str, Any] = {**ASKED, "max_tokens": 60, "messages": MESSAGES, "response_format": Light}
    assert isinstance(client.chat.completions.parse(**asked).choices[0].message.parsed, Light)
    with client.chat.completions.stream(**asked) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Light)


def test_a_text_is_continued(client: OpenAI) -> None:
    whole = client.completions.create(**ASKED, prompt="ab").choices[0].text
    assert (
        "".join(part.choices[0].text for part in client.completions.create(**ASKED, prompt="ab", stream=True)) == whole
    )


def ends_its_answer(served: Site, steps: Steps) -> None:
    """Whether an answer that nobody reads is left, though its model could go on."""
    wait_until(lambda: not served.service._written)
    steps.open.release(1000)
    wait_until(lambda: served.service._model.idle)
    assert len(steps.wrote) < 20
    assert (served.service._waiting, served.service._seats.free) == (0, 2 * server.ROWS)


def test_a_stream_that_is_closed_ends_its_answer(served: Site, chat: Callable[..., Any]) -> None:
    steps = Steps(served.service, held=True)
    steps.open.release(5)
    with chat(max_tokens=200, stream=True) as stream:
        next(stream)
    ends_its_answer(served, steps)
    assert chat().choices[0].message.content


def test_a_client_that_no_longer_waits_ends_its_answer(served: Site, client: OpenAI) -> None:
    steps = Steps(served.service, held=True)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).chat.completions.create(**ASKED, messages=MESSAGES)
    ends_its_answer(served, steps)


TOOL = {"type": "function", "function": {"name": "light", "parameters": {}}}


@pytest.mark.parametrize(
    ("own", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{"name": "light"}]}, "functions"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": []}, "text"),
        ({"messages": [{"role": "user", "content": "a" * 3000}]}, "prompt"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "guide"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "guide"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": 99}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": -1}, "seed"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "in pieces"])
def test_what_cannot_be_answered_names_the_parameter(
    chat: Callable[..., Any], own: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(**own, stream=stream)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_an_unknown_model_a_long_body_and_another_interface_are_refused(
    client: OpenAI, chat: Callable[..., Any]
) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        chat(model="gpt-4")
    assert refused.value.param == "model"
    with pytest.raises(openai.APIStatusError) as large:  # and not a connection that ends while it still sends
        chat(messages=[{"role": "user", "content": "a" * 2**23}])
    assert large.value.status_code == 413
    with pytest.raises(openai.NotFoundError) as other:
        client.responses.create(model="anna", input="ab")
    assert "/v1/chat/completions" in other.value.message


def test_a_tenant_is_known_by_its_key(lm_bundle: Any) -> None:
    with site(lm_bundle, tenants()) as running:
        assert [model.id for model in client_of(running, TOKENS["anna"]).models.list()] == ["anna", "global", "base"]
        with pytest.raises(openai.NotFoundError):
            client_of(running, TOKENS["ben"]).chat.completions.create(**ASKED, messages=MESSAGES)  # type: ignore[call-overload]
        with pytest.raises(openai.AuthenticationError):
            client_of(running, "c" * 32).models.list()


def test_embeddings_are_those_of_the_base(encoder: Any) -> None:
    texts = ["turn on the light", "play music"]
    expected = ClassificationSession.open(encoder).embed(texts)
    with site(encoder) as running:
        client = client_of(running)
        for coding in ({}, {"encoding_format": "float"}):  # by default it asks for base64
            found = client.embeddings.create(model="base", input=texts, **coding)
            np.testing.assert_allclose([row.embedding for row in found.data], expected, atol=1e-6)
        for own in ({"input": ""}, {"input": [1, 2]}, {"input": "a", "dimensions": 4}):
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model="base", **own)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="text-embedding-3-small", input="a")
        assert not running.logged


def test_equal_seeds_give_equal_answers(chat: Callable[..., Any]) -> None:
    own = {"temperature": 1.0, "seed": 5, "top_p": 0.9}
    assert chat(**own).choices[0].message.content == chat(**own).choices[0].message.content
