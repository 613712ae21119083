"""The coordinator's transport on Flower's own link state, with late answers and absent nodes."""

import time
from collections.abc import Callable
from threading import Thread
from typing import Any

from flwr.app import Message

from aggregation.steps import Step


def test_every_node_gets_its_own_body_and_each_answer_has_its_node(link: Any) -> None:
    transport, threads = link.transport(5.0), [link.serve(node) for node in link.nodes]
    assert link.ask(transport) == {node: b"got to %d" % node for node in link.nodes}
    assert transport.nodes() == tuple(link.nodes)
    assert transport.take_carried().up == sum(len(b"got to %d" % node) for node in link.nodes)
    for thread in threads:
        thread.join()


def test_an_unknown_node_does_not_shift_the_answers_of_others(link: Any) -> None:
    stranger = 7
    threads = [link.serve(node) for node in link.nodes]
    answers = link.ask(link.transport(5.0), [stranger, *link.nodes])
    assert answers == {stranger: "could not be reached"} | {node: b"got to %d" % node for node in link.nodes}
    for thread in threads:
        thread.join()


def test_an_answer_is_yielded_before_the_others_have_arrived(link: Any) -> None:
    first, second, third = link.nodes
    bodies, attachments = dict.fromkeys(link.nodes, b"x"), dict.fromkeys(link.nodes, link.attachments)
    replies = link.transport(5.0).ask(Step.OFFER, bodies, "g", attachments)
    thread = link.serve(second)
    assert next(replies).node == second
    threads = [thread, link.serve(first), link.serve(third)]
    assert {reply.node for reply in replies} == {first, third}
    for thread in threads:
        thread.join()


def test_a_node_that_answers_late_has_no_answer_and_the_late_one_is_refused(link: Any) -> None:
    transport, late = link.transport(0.3), link.nodes[0]
    threads = [link.serve(node) for node in link.nodes[1:]]
    kept = next_message(link, late)
    begin = time.monotonic()
    answers = link.ask(transport)
    assert time.monotonic() - begin < 2.0
    assert isinstance(answers[late], str)
    assert all(isinstance(answers[node], bytes) for node in link.nodes[1:])
    time.sleep(0.6)  # past Flower's own limit for the message
    assert link.answer(kept()) is None
    again = [link.serve(node) for node in link.nodes]
    assert link.ask(link.transport(5.0)) == {node: b"got to %d" % node for node in link.nodes}
    for thread in threads + again:
        thread.join()


def test_a_node_that_comes_back_late_does_not_get_the_old_message(link: Any) -> None:
    assert all(isinstance(answer, str) for answer in link.ask(link.transport(0.1)).values())
    time.sleep(0.7)
    assert [link.received(node) for node in link.nodes] == [[], [], []]


def test_a_node_that_signed_off_has_no_answer_at_once(link: Any) -> None:
    gone = link.nodes[1]
    link.state.deactivate_node(gone)
    threads = [link.serve(node) for node in link.nodes if node != gone]
    begin = time.monotonic()
    answers = link.ask(link.transport(30.0))
    assert time.monotonic() - begin < 5.0
    assert "unavailable" in str(answers[gone]).lower()
    assert gone not in link.transport(30.0).nodes()
    for thread in threads:
        thread.join()


def test_a_devices_error_cannot_imitate_a_line_of_the_coordinators_log(link: Any) -> None:
    liar = link.nodes[0]
    threads = [link.serve(liar, error="no\nround 9 of 9: 99 survivors\x1b[2J" + 1000 * "!")]
    threads += [link.serve(node) for node in link.nodes[1:]]
    reason = link.ask(link.transport(5.0))[liar]
    assert isinstance(reason, str)
    assert reason.isprintable()
    assert reason.startswith("no round 9")
    assert len(reason) <= 200
    for thread in threads:
        thread.join()


def next_message(link: Any, node: int) -> Callable[[], Message]:
    """Take the next message to ``node`` in the background; the function that is returned gives it."""
    taken: list[Message] = []

    def work() -> None:
        end = time.monotonic() + 5.0
        while not taken and time.monotonic() < end:
            taken.extend(link.received(node))
            time.sleep(0.005)

    thread = Thread(target=work)
    thread.start()

    def get() -> Message:
        thread.join()
        return taken[0]

    return get
