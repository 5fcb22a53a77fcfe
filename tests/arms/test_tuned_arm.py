"""Tuned arms: equal to plain arms with nothing to tune, they leave bad initial hyperparameters, and they resume."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ev3_distill.arms import arms_named
from ev3_distill.arms.gradient import gradient_arm
from ev3_distill.arms.tunable_loss import label_losses, net_weights
from ev3_distill.arms.tuned_arm import TUNABLE, TuningConfig, tuned_arm
from ev3_distill.core.explore import held_from
from ev3_distill.errors import InputError
from ev3_distill.students.families.resnet import resnet
from ev3_distill.tasks.classification import losses
from ev3_distill.types import Batch, Stretch, Variables

N = 256


def split(seed, *, wrong=1.0):
    """Linearly separable classes; the teacher is wrong on a fraction `wrong` of the examples."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    predictions = np.where(rng.random(N) < wrong, 1 - y, y)
    return Batch(
        jnp.asarray(x),
        jnp.asarray(y),
        {"logits": jnp.asarray(6 * np.eye(2, dtype=np.float32)[predictions])},
        jnp.arange(N),
        jnp.ones(N),
    )


def apply(variables, inputs, *, train, key=None):
    return jnp.tanh(inputs @ variables.params["w"]) @ variables.params["out"], variables


def fresh():
    first, second = jax.random.split(jax.random.key(3))
    params = {"w": jax.random.normal(first, (4, 8)), "out": 0.1 * jax.random.normal(second, (8, 2))}
    return Variables(params, {})


def drawing(examples):
    def draw(step):
        rows = jax.random.randint(jax.random.key(step), (32,), 0, len(examples.targets))
        return jax.tree.map(lambda leaf: leaf[rows], examples), jax.random.key(step)

    return draw


def stretch(start, steps):
    return Stretch(jnp.int32(start), jnp.int32(steps), jnp.float32(0), jnp.float32(0))


@functools.cache
def run_arm(*, wrong=1.0, steps=150, **options):
    arm = tuned_arm("tuned", apply, optax.adam(1e-2), TuningConfig(**options))
    draw, held = drawing(split(0, wrong=wrong)), held_from(split(1, wrong=wrong), jax.random.key(1), batch_size=64)
    propose = jax.jit(lambda state, where: arm.propose(state, draw, where, held))
    return arm, propose, propose(arm.init(fresh()), stretch(0, steps))


def accuracy(variables, examples):
    return float((apply(variables, examples.inputs, train=False)[0].argmax(1) == examples.targets).mean())


def test_arm_with_nothing_to_tune_equals_the_plain_arm():
    _, _, (state, student) = run_arm(tune=(), wrong=0.0)
    loss = losses.mix((0.9, losses.kd(temperature=4.0)), (0.1, losses.cross_entropy()))
    plain = gradient_arm("kd4", apply, loss, optax.adam(1e-2))
    draw = drawing(split(0, wrong=0.0))
    after, proposed = jax.jit(lambda state: plain.propose(state, draw, stretch(0, 150)))(plain.init(fresh()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), student, proposed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), state.trajectory, after)


def test_annealed_arm_with_nothing_to_tune_equals_the_plain_arm():
    loss, schedule = (
        losses.mix((0.9, losses.kd(temperature=4.0)), (0.1, losses.cross_entropy())),
        lambda spent: 1 - spent,
    )
    arm = tuned_arm("tuned", apply, optax.adam(1e-2), TuningConfig(tune=()), anneal=schedule)
    plain = gradient_arm("kd4", apply, loss, optax.adam(1e-2), anneal=schedule)
    draw, whole = (
        drawing(split(0, wrong=0.0)),
        Stretch(jnp.int32(0), jnp.int32(50), jnp.float32(0.5), jnp.float32(0.01)),
    )
    tuned = jax.jit(lambda state: arm.propose(state, draw, whole, draw))(arm.init(fresh()))[1]
    annealed = jax.jit(lambda state: plain.propose(state, draw, whole))(plain.init(fresh()))[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), tuned, annealed)


def test_tuned_arm_of_a_convolutional_student_uses_muon():
    """The state of the optimizer is that of Muon, and the hyperparameters change."""
    student = resnet((8, 8, 1), 2, depth=8, width=2)
    (arm,) = arms_named(student.apply, ["tuned-temperature-mix"], network=student)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(16, 8, 8, 1)), jnp.float32)
    batch = Batch(
        images,
        jnp.arange(16) % 2,
        {"logits": jnp.asarray(rng.normal(size=(16, 2)), jnp.float32)},
        jnp.arange(16),
        jnp.ones(16),
    )

    def draw(step):
        return batch, jax.random.key(step)

    initial = arm.init(student.init(jax.random.key(0)))
    where = Stretch(jnp.int32(0), jnp.int32(10), jnp.float32(0.1), jnp.float32(0.01))
    after, proposed = jax.jit(lambda state: arm.propose(state, draw, where, draw))(initial)
    names = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(after.trajectory.opt_state)}
    assert any("muon" in name for name in names)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((after.tuned, proposed)))
    assert any(
        float(jnp.abs(x - y).max()) > 0
        for x, y in zip(*map(jax.tree.leaves, (initial.tuned.free, after.tuned.free)), strict=True)
    )


@pytest.mark.parametrize("method", ["jvp", "guided"])
def test_mix_moves_away_from_a_wrong_teacher(method):
    arm, _, (state, student) = run_arm(tune=("temperature", "mix"), every=2, method=method)
    hyperparameters = arm.hyperparameters(state)
    assert set(hyperparameters) == {"temperature", "mix"} and state.tuned.steps == 75
    assert hyperparameters["mix"][1] > 0.3 and hyperparameters["temperature"] > 0  # starts at 0.1
    _, _, (_, untuned) = run_arm(tune=())
    test = split(2)
    assert accuracy(untuned, test) < 0.2 < 0.5 < accuracy(student, test)


def test_weights_are_lower_where_the_teacher_is_wrong():
    options = {"tune": ("weights",), "steps": 400, "every": 2, "wrong": 0.4}
    _, _, (state, student) = run_arm(**options)
    examples = split(0, wrong=0.4)
    weights = net_weights(
        state.tuned.free["weights"], label_losses(apply(student, examples.inputs, train=False)[0], examples)
    )
    wrong = examples.teacher["logits"].argmax(1) != examples.targets
    assert weights[wrong, 0].max() < weights[~wrong, 0].min()


def test_small_learning_rate_grows():
    arm = tuned_arm("tuned", apply, optax.sgd(1e-4), TuningConfig(tune=("rate",), every=1))
    draw, held = drawing(split(0, wrong=0.0)), held_from(split(1, wrong=0.0), jax.random.key(1), batch_size=64)
    state, _ = jax.jit(lambda state: arm.propose(state, draw, stretch(0, 100), held))(arm.init(fresh()))
    assert arm.hyperparameters(state)["rate"] > 3


def with_noise(examples, deviation, seed):
    noise = jax.random.normal(jax.random.key(seed), examples.inputs.shape)
    return examples._replace(inputs=examples.inputs + deviation * noise)


def tuned_on(examples, held_out, initial, where, **options):
    """The student that an arm proposes, and the hyperparameters that it reports."""
    arm = tuned_arm("tuned", apply, optax.adam(1e-2), TuningConfig(every=2, **options))
    held = held_from(held_out, jax.random.key(1), batch_size=64)
    state, student = jax.jit(lambda state: arm.propose(state, drawing(examples), where, held))(arm.init(initial))
    return student, arm.hyperparameters(state)


def test_noise_grows_if_held_out_examples_are_noisy():
    """The noise also helps a student that has overfitted 16 clean examples."""
    few, held_out = jax.tree.map(lambda leaf: leaf[:16], split(0, wrong=0.0)), with_noise(split(1, wrong=0.0), 1.0, 7)
    overfitted, _ = tuned_on(few, held_out, fresh(), stretch(0, 200), tune=())
    student, hyperparameters = tuned_on(few, held_out, overfitted, stretch(200, 200), tune=("noise",), noise=0.3)
    assert set(hyperparameters) == {"noise"} and hyperparameters["noise"].shape == ()
    assert hyperparameters["noise"] > 1
    test = with_noise(split(2, wrong=0.0), 1.0, 8)
    before, after = (losses.cross_entropy()(apply(x, test.inputs, train=False)[0], test) for x in (overfitted, student))
    assert after < 0.75 * before


def test_noise_shrinks_if_it_only_hurts():
    """An untrained student and many examples, which are as clean as the held-out ones."""
    _, hyperparameters = tuned_on(
        split(0, wrong=0.0), split(1, wrong=0.0), fresh(), stretch(0, 200), tune=("noise",), noise=1.0
    )
    assert hyperparameters["noise"] < 0.25


def test_no_noise_is_drawn_unless_it_is_tuned():
    def program(tune, noise):
        arm = tuned_arm("tuned", apply, optax.adam(1e-2), TuningConfig(tune=tune, noise=noise))
        draw = drawing(split(0))
        return str(jax.make_jaxpr(lambda state: arm.propose(state, draw, stretch(0, 9), draw))(arm.init(fresh())))

    normal_draw = "erf_inv"
    assert program(("temperature", "mix"), 0.1) == program(("temperature", "mix"), 9.0)
    assert normal_draw not in program(("temperature", "mix", "weights", "rate"), 0.1)
    assert normal_draw in program(("temperature", "noise"), 0.1)


def test_noise_does_not_change_dropout():
    """Noise below float precision does not change the trajectory of a student with dropout."""

    def dropout_apply(variables, inputs, *, train, key=None):
        hidden = jnp.tanh(inputs @ variables.params["w"])
        mask = jax.random.bernoulli(jax.random.fold_in(key, 0), 0.5, hidden.shape) if train else 0.5
        return (hidden * mask) @ variables.params["out"], variables

    def student(tune):
        arm = tuned_arm("tuned", dropout_apply, optax.adam(1e-2), TuningConfig(tune=tune, noise=1e-20, every=1000))
        draw = drawing(split(0, wrong=0.0))
        return jax.jit(lambda state: arm.propose(state, draw, stretch(0, 30), draw))(arm.init(fresh()))[1].params

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), student(("noise",)), student(()))


def test_outer_gradient_of_noise_agrees_with_finite_differences():
    """By finite differences of whole steps of the arm, in float64: both losses must use the same noise."""
    with jax.enable_x64(True):
        widen = functools.partial(
            jax.tree.map, lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        )
        draw, held = drawing(widen(split(0))), held_from(widen(split(1)), jax.random.key(1), batch_size=64)
        outer, initial = optax.sgd(1.0), widen(fresh())

        def after(noise):
            config = TuningConfig(tune=("noise",), noise=1.0, outer_optimizer=outer, every=1)
            arm = tuned_arm("tuned", apply, optax.sgd(0.1), config)
            state = arm.init(initial)
            free = {"noise": jnp.log(noise)}
            state = state._replace(tuned=state.tuned._replace(free=free, average=free))
            return arm.propose(state, draw, stretch(3, 1), held)

        def held_out_loss(log_noise):
            logits, _ = apply(after(jnp.exp(log_noise))[1], held(jnp.int32(3))[0].inputs, train=True)
            return losses.cross_entropy()(logits, held(jnp.int32(3))[0])

        at, h = jnp.log(jnp.float64(0.3)), 1e-4
        slope = jax.jit(lambda: (held_out_loss(at + h) - held_out_loss(at - h)) / (2 * h))()
        state, _ = jax.jit(after)(jnp.exp(at))
        assert abs(slope) > 1e-6
        np.testing.assert_allclose(at - state.tuned.free["noise"], slope, rtol=1e-5)


def test_noise_on_bytes_equals_noise_on_scaled_inputs():
    def scaled_apply(variables, inputs, *, train, key=None):
        return apply(variables, inputs / 255 if inputs.dtype == jnp.uint8 else inputs, train=train, key=key)

    rng = np.random.default_rng(0)
    images = split(0)._replace(inputs=jnp.asarray(rng.integers(0, 256, (N, 4)), jnp.uint8))

    def after(examples):
        arm = tuned_arm("tuned", scaled_apply, optax.adam(1e-2), TuningConfig(tune=("noise",), every=2))
        draw = drawing(examples)
        return jax.jit(lambda state: arm.propose(state, draw, stretch(0, 20), draw))(arm.init(fresh()))

    of_bytes, of_numbers = after(images), after(images._replace(inputs=images.inputs.astype(jnp.float32) / 255))
    assert of_bytes[0].tuned.steps == 10
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), of_bytes, of_numbers)


def test_trajectory_in_parts_equals_the_whole():
    arm, propose, (whole, student) = run_arm(tune=("temperature", "mix"))
    half, _ = propose(arm.init(fresh()), stretch(0, 70))
    rest, same = propose(half, stretch(70, 80))
    jax.tree.map(np.testing.assert_array_equal, (rest, same), (whole, student))


def test_zero_steps_change_nothing():
    arm, propose, _ = run_arm(tune=("temperature", "mix"))
    initial = arm.init(fresh())
    state, student = propose(initial, stretch(5, 0))
    jax.tree.map(np.testing.assert_array_equal, (state, student), (initial, fresh()))


def test_held_out_batches_depend_only_on_the_step():
    examples = split(1)
    held = held_from(examples, jax.random.key(0), batch_size=16)
    one, _ = held(jnp.int32(3))
    again, _ = held(jnp.int32(3))
    other, _ = held(jnp.int32(4))
    assert (one.index == again.index).all() and not (one.index == other.index).all()
    assert (one.inputs == examples.inputs[one.index]).all()


def test_outer_step_every_five_steps_moves_numbers_by_a_fifth():
    """The first step of Adam equals the learning rate."""
    arm = tuned_arm("tuned", apply, optax.adam(1e-2), TuningConfig(tune=("temperature", "weights")))
    draw, held = drawing(split(0)), held_from(split(1), jax.random.key(1), batch_size=64)
    start = arm.init(fresh())
    propose = jax.jit(lambda state, where: arm.propose(state, draw, where, held)[0])
    four, five = propose(start, stretch(0, 4)), propose(start, stretch(0, 5))
    assert four.tuned.steps == 0 and five.tuned.steps == 1
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), five.tuned.free, start.tuned.free)
    np.testing.assert_allclose(moved["temperature"], 0.2, rtol=1e-3)


def test_held_out_gradient_is_computed_in_halves():
    sizes = set()

    def observed(variables, inputs, *, train, key=None):
        sizes.add(len(inputs))
        return apply(variables, inputs, train=train, key=key)

    arm = tuned_arm("tuned", observed, optax.adam(1e-2), TuningConfig(every=1))
    held = held_from(split(1), jax.random.key(1), batch_size=64)
    jax.eval_shape(lambda state: arm.propose(state, drawing(split(0)), stretch(0, 1), held), arm.init(fresh()))
    assert sizes == {32}  # a batch is 32 training examples or half of 64 held-out ones


def test_unknown_hyperparameters_are_rejected():
    assert TUNABLE == ("temperature", "mix", "weights", "rate", "noise")
    with pytest.raises(InputError, match="temperature, mix, weights, rate, noise; got 'depth'"):
        TuningConfig(tune=("depth",))
