"""What the timings of the benchmarks mean."""

from benchmarks.timing import Call, Timing, interleaved, measure


def test_each_repeat_has_a_new_input() -> None:
    inputs = iter(range(10))
    seen: list[int] = []
    timing = measure(seen.append, lambda: next(inputs), 3)
    assert seen == [0, 1, 2]
    assert len(timing.wall) == len(timing.cpu) == 3
    assert Timing((1.0, 9.0, 2.0), (1.0, 1.0, 1.0)).ms == 2.0


def test_calls_are_timed_alternately() -> None:
    seen: list[str] = []
    ran = interleaved(Call(seen.append, lambda: "ours", 3), Call(seen.append, lambda: "peer", 1))
    assert seen == ["ours", "peer", "ours", "ours"]
    assert [len(timing.wall) for timing in ran] == [3, 1]


def test_quartiles_are_those_of_the_repeats() -> None:
    assert Timing((4.0, 1.0, 3.0, 2.0, 5.0), (0.0,) * 5).quartiles == (2.0, 4.0)
    assert Timing((7.0,), (0.0,)).quartiles == (7.0, 7.0)
    assert (Timing((1.0, 2.0), (3.0, 4.0)) + Timing((10.0, 20.0), (0.0, 1.0))).wall == (11.0, 22.0)
