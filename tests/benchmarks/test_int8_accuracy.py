"""The int8 benchmark compares students in int8 with their float32 originals on the same images."""

import base64

import numpy as np

from ev3_distill.benchmarks import int8_accuracy


def test_int8_is_compared_with_float32_image_by_image():
    """Of 16 images one is lost, or two are lost and one is won. The intervals by Student's t were computed by hand."""
    right = {"float32": [1] * 15 + [0], "after training": [1] * 14 + [0, 0], "in the loop": [0, 0] + [1] * 14}

    def row(seed, contender):
        bits = np.array(right[contender] if seed == 0 or contender != "in the loop" else right["float32"], np.uint8)
        packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
        facts = {
            "steps": 10,
            "step": 1.25,
            "unrounded": ""
            if contender != "in the loop"
            else base64.b64encode(np.packbits([1] * 16).tobytes()).decode(),
            "bytes": 1234,
            "p50_ms": 0.5,
            "p50_ms_of_64": 7.0,
            "guard": "accuracy >= 0.5",
        }
        passes = None if contender == "after training" else seed == 0
        return {
            "seed": seed,
            "contender": contender,
            "accuracy": float(bits.mean()),
            "passes": passes,
            "right": packed,
        } | facts

    table = int8_accuracy.table([row(seed, contender) for seed in (0, 1) for contender in right])
    assert "| float32 | 93.75 ± 0.00 | 1,234 | 0.50 | 7.0 | 1.25 | 1 of 2 |" in table
    assert "| after training | 87.50 ± 0.00 | 1,234 | 0.50 | 7.0 | 1.25 |  |" in table
    assert "after training minus float32, points, image by image: seed 0 -6.25 (-19.57 to 7.07), seed 1 -6.25" in table
    assert "in the loop minus float32, points, image by image: seed 0 -6.25 (-29.83 to 17.33), seed 1 0.00" in table
    assert "over seeds -3.12 (-42.83 to 36.58), target ≥ -0.5" in table
    assert (
        "in the loop minus itself in float32, points, image by image: seed 0 -12.50 (-30.70 to 5.70), seed 1 -6.25"
        in table
    )
    assert table.endswith("Guard: accuracy >= 0.5.")
