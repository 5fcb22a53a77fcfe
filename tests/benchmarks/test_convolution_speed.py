"""The speed suite: ratios within turns, and who is compared with whom."""

from ev3_distill.benchmarks import convolution_speed


def rows(question, turns):
    return [{"question": question, "seed": i, "ms_per_step": times} for i, times in enumerate(turns)]


def test_ratios_are_taken_within_a_turn_and_compared_with_the_targets():
    steps = rows("step 8", [{"ours": 100.0 * k, "torch": 150.0 * k} for k in range(1, 8)])  # a machine that slows down
    text = convolution_speed.table(steps)
    assert "| step 8: ours / torch | 1.50 (1.50 to 1.50) | ≥ 1.3: held |" in text
    assert "| step 8: torch | 7 | 600.0 (150.0 to 1,050.0) |" in text and "Intervals of at least 95%." in text


def test_a_contender_that_is_missing_is_not_compared():
    text = convolution_speed.table(rows("epoch", [{"cold": 3.0, "warm": 1.0}]))
    assert "/" not in text.replace("---", "") and "Intervals" not in text


def test_turns_rotate_the_order_and_keep_the_names():
    order = []
    works = {name: ((lambda name=name: order.append(name)), 1) for name in "abc"}
    times = convolution_speed._turn(works, 1)
    assert order == ["b", "c", "a"] and list(times) == ["a", "b", "c"]


def test_the_slowest_start_is_compared_with_the_target():
    starts = [
        {
            "question": "start",
            "seed": i,
            "compile_s": {"first": 20.0, "second": s},
            "peak": {"first": 2**31, "second": 2**30},
        }
        for i, s in enumerate((3.0, 6.0, 4.0))
    ]
    text = convolution_speed.table(starts)
    assert "| first process: compiling | 3 | 20.0 s (20.0 to 20.0) | ≤ 60: held |" in text
    assert "| second process: compiling | 3 | 4.0 s (3.0 to 6.0) | ≤ 5: missed |" in text
    assert "| first process: peak memory | 3 | 2,048.0 MiB (2,048.0 to 2,048.0) | ≤ 4,096: held |" in text
