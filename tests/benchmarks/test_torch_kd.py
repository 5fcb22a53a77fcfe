"""The PyTorch baseline: the teacher of the ONNX file, the loss, augmentation, training and resumption."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ev3_distill.benchmarks import torch_kd, torch_resnet  # noqa: E402

DATA = Path(os.environ.get("EV3_DISTILL_DATA", Path(__file__).parents[3] / "shared" / "data"))
ONNX = DATA.parent / "teachers" / "cifar10_resnet56.onnx"
CIFAR = DATA / "cifar10_jpeg.zip"
real_teacher = pytest.mark.skipif(not ONNX.exists(), reason=f"no {ONNX}: the pretrained teacher is missing")


def draw(count, *, size=16, seed=0):
    """Images of noise with one brighter channel, which is the label."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 128, (count, size, size, 3), dtype=np.uint8), rng.integers(0, 3, count)
    images[np.arange(count), :, :, labels] += 100
    return images, labels


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small batches gain nothing from more threads, and lose time when other tests run in parallel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_teacher():
    """An untrained network of three classes."""
    torch.manual_seed(0)
    return torch_resnet.resnet(8, 4, 3, folded=True).eval()


@real_teacher
def test_loaded_teacher_computes_the_logits_of_its_file():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    if CIFAR.exists():
        images = first_images(64)
    inputs = ((images / 255 - np.array(torch_kd.MEAN)) / np.array(torch_kd.STD)).astype(np.float32)
    session = onnxruntime.InferenceSession(ONNX, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"image": inputs.transpose(0, 3, 1, 2)})[0]
    model = torch_resnet.load_teacher(ONNX)
    with torch.no_grad():
        found = model(torch_kd.normalized(torch.tensor(images))).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (torch_kd.predictions(model, images, batch_size=50) == expected.argmax(1)).all()


def first_images(count):
    """Test images, spread over the classes."""
    image = pytest.importorskip("PIL.Image")
    import zipfile

    with zipfile.ZipFile(CIFAR) as file:
        names = sorted(name for name in file.namelist() if name.startswith("test/") and name.endswith(".jpg"))
        return np.stack([np.asarray(image.open(file.open(name))) for name in names[:: len(names) // count][:count]])


def test_kd_loss_follows_its_formula():
    rng = np.random.default_rng(0)
    logits, soft = rng.normal(0, 3, (2, 7, 5)).astype(np.float32)
    labels = rng.integers(0, 5, 7)

    def softmax(row, temperature):
        exps = [math.exp(float(x) / temperature) for x in row]
        return [e / sum(exps) for e in exps]

    expected = 0.0
    for s, t, label in zip(logits, soft, labels, strict=True):
        p, q = softmax(t, 4), softmax(s, 4)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected += (0.1 * -math.log(softmax(s, 1)[label]) + 0.9 * 16 * kl) / 7
    found = torch_kd.kd_loss(torch.tensor(logits), torch.tensor(soft), torch.tensor(labels))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_augmentation_crops_the_padded_image_and_flips_it():
    images = draw(81)[0]
    corners = np.stack([np.repeat(np.arange(9), 9), np.tile(np.arange(9), 9)], axis=1)
    flips = np.arange(81) % 2 == 0
    found = torch_kd.augmented(torch.tensor(images), torch.tensor(corners), torch.tensor(flips)).numpy()
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for i, (y, x) in enumerate(corners):
        crop = padded[i, y : y + 16, x : x + 16]
        np.testing.assert_array_equal(found[i], crop[:, ::-1] if flips[i] else crop)
    assert (found[40] == images[40, :, ::-1]).all()  # the crop in the middle, flipped


def test_epoch_visits_each_image_once_in_a_new_order():
    images, labels = draw(50)
    images[:] = np.arange(50)[:, None, None, None] + 100  # each image has its own value; padding is 0
    epochs = []
    for epoch in range(2):
        batches = list(torch_kd._batches(torch.tensor(images), torch.tensor(labels), 16, 3, epoch))
        assert [len(batch[1]) for batch in batches] == [16, 16, 16, 2]
        inputs = torch.cat([batch[0] for batch in batches])
        assert inputs[:16].is_contiguous(memory_format=torch.channels_last)
        pixels = (inputs.numpy().transpose(0, 2, 3, 1) * torch_kd.STD + torch_kd.MEAN) * 255
        visited = np.rint(pixels.max((1, 2, 3))).astype(int) - 100
        assert sorted(visited) == list(range(50))
        assert (labels[visited] == torch.cat([batch[1] for batch in batches]).numpy()).all()
        epochs.append(inputs)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize(("depth", "params"), [(8, 75290), (20, 269722)])
def test_resnet_has_the_layers_of_the_paper(depth, params):
    model = torch_resnet.resnet(depth, 16, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth", [2, 10])
def test_depth_other_than_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2, at least 8; got {depth}"):
        torch_resnet.resnet(depth, 16, 10)


def test_shortcut_subsamples_and_pads_with_zeros():
    block = torch_resnet._block()(2, 4, 2, False).eval()
    for conv in (block.conv1, block.conv2):
        torch.nn.init.zeros_(conv.weight)
    x = torch.rand(1, 2, 6, 6)
    found = block(x)[0]
    assert torch.equal(found[1:3], x[0, :, ::2, ::2]) and not found[[0, 3]].any()


@pytest.mark.parametrize("kd", [True, False])
def test_student_learns(kd, small_teacher):
    images, labels = draw(256)
    epochs = []
    teacher = Oracle() if kd else small_teacher
    options = torch_kd.Options(depth=8, epochs=1, batch_size=16, seed=0, kd=kd)
    model = torch_kd.train(images, labels, teacher=teacher, options=options, on_epoch=lambda *a: epochs.append(a))
    assert len(epochs) == 1 and epochs[0][0] == 1 and epochs[0][1] is model and epochs[0][2] > 0
    fresh_images, fresh_labels = draw(200, seed=1)
    assert (torch_kd.predictions(model, fresh_images) == fresh_labels).mean() > 0.8


class Oracle(torch.nn.Module):
    """Predicts the brightest channel of normalized images."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x):
        return 5 * x.mean((2, 3))


def test_student_follows_the_teacher_alone_if_alpha_is_1(monkeypatch):
    """All labels are wrong, and have no weight."""
    monkeypatch.setattr(torch_kd, "ALPHA", 1.0)
    images, labels = draw(256)
    options = torch_kd.Options(depth=8, epochs=1, batch_size=16, seed=0)
    model = torch_kd.train(images, (labels + 1) % 3, teacher=Oracle(), options=options)
    fresh_images, fresh_labels = draw(200, seed=1)
    assert (torch_kd.predictions(model, fresh_images) == fresh_labels).mean() > 0.8


def test_interrupted_training_resumes_bit_by_bit(tmp_path, small_teacher):
    images, labels = draw(48)
    options = dict(teacher=small_teacher, options=torch_kd.Options(depth=8, epochs=3, batch_size=16, seed=5))
    whole = torch_kd.train(images, labels, **options)

    def stop(epoch, model, seconds):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torch_kd.train(images, labels, **options, on_epoch=stop, checkpoint=tmp_path / "c")
    epochs = []
    again = torch_kd.train(
        images, labels, **options, on_epoch=lambda *a: epochs.append(a[0]), checkpoint=tmp_path / "c"
    )
    assert epochs == [2, 3]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_training_depends_on_its_seed_alone(small_teacher):
    images, labels = draw(32)
    options = [torch_kd.Options(depth=8, epochs=1, batch_size=16, seed=seed) for seed in (1, 1, 2)]
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, two, other = (torch_kd.train(images, labels, teacher=small_teacher, options=o).linear.weight for o in options)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_timed_loops_run_for_student_and_kd(small_teacher):
    images, labels = draw(40)
    loops = torch_kd.timed_loops(images, labels, teacher=small_teacher, depth=8, batch_size=16, steps=3)
    assert set(loops) == {"student", "kd"}
    for work in loops.values():
        work()
