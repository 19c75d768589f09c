"""Images of any size, in batches, on any devices, whole or in tiles: the class maps that the network itself gives."""

import collections
import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxseg import classify, train
from jaxseg.data.canvases import choose_canvases
from jaxseg.decoders import BaselineDecoder
from jaxseg.manner import Manner, plan_canvases, prepare
from jaxseg.segmenter import Segmenter
from tests.peers.small_run import SmallEncoder


class SmallDecoder(nn.Module):
    """One product, which compiles at once: each feature gives 32 x 32 pixels in blocks of two."""

    @nn.compact
    def __call__(self, x, train=False, keys=None):
        x = nn.Dense(16 * 16 * 3, name="head")(x)
        number, height, width, _ = x.shape
        x = x.reshape(number, height, width, 16, 16, 3).swapaxes(2, 3).reshape(number, 16 * height, 16 * width, 3)
        return x.repeat(2, 1).repeat(2, 2)


MODEL = Segmenter(SmallEncoder("small"), SmallDecoder())
DEVICES = jax.devices()


def init(model):
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
    # Random biases, so that no class wins everywhere.
    head = variables["params"]["decoder"]["head"]
    head["kernel"] = 5 * jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return variables


@pytest.fixture(scope="module")
def variables():
    return init(MODEL)


def photographs(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def run(variables, images, manner, devices=1, batch_size=4, model=MODEL, canvases=None):
    """The class maps in the images' order."""
    classify_all = classify.make_classify(model, variables, manner, DEVICES[:devices], batch_size)
    found = list(classify_all((index, prepare(image, manner, canvases)) for index, image in enumerate(images)))
    assert sorted(index for index, _ in found) == list(range(len(images)))
    return [classes for _, classes in sorted(found, key=lambda pair: pair[0])]


@functools.cache
def apply(model):
    return jax.jit(model.apply)


def logits_of(variables, image, model=MODEL):
    return np.asarray(apply(model)(variables, image[None])[0])


@pytest.mark.parametrize("devices,batch_size", [(1, 4), (4, 8)])
def test_at_a_given_size_it_is_the_evaluations_class_map_to_the_pixel(variables, devices, batch_size):
    images = photographs((1, 1), (64, 96), (40, 300), (700, 90), (64, 96))
    manner = Manner((64, 96))
    found = run(variables, images, manner, devices, batch_size)
    batch = {
        "image": np.stack([prepare(image, manner).shown[0] for image in images]),
        "label": np.zeros((len(images), 700, 300), np.uint8),
        "label_size": np.array([image.shape[:2] for image in images], np.int32),
    }
    expected = jax.jit(functools.partial(train.predict_step, model=MODEL))(variables, batch)
    for image, classes, whole in zip(images, found, expected, strict=True):
        assert classes.dtype == np.uint8
        assert np.array_equal(classes, whole[: image.shape[0], : image.shape[1]])
    assert len(np.unique(np.concatenate([classes.ravel() for classes in found]))) == 3


def test_at_its_own_size_an_image_gives_what_the_network_alone_does(variables):
    for size in [(32, 64), (1, 1), (33, 90)]:
        (image,) = photographs(size)
        (classes,) = run(variables, [image], Manner(None))
        assert np.array_equal(classes, logits_of(variables, image).argmax(-1))


@pytest.mark.parametrize("image_size", [(64, 96), None])
def test_probabilities_of_scales_and_mirror_images_are_averaged(variables, image_size):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    (image,) = photographs((64, 96))
    manner = Manner(image_size, flip=True, scales=(0.5, 1.0))
    total = 0
    shown = prepare(image, manner)
    for one, (height, width), mirrored in zip(shown.shown, shown.sizes, [False, True] * 2, strict=True):
        logits = torch.tensor(logits_of(variables, one[:height, :width])).permute(2, 0, 1)[None]
        logits = logits.flip(3) if mirrored else logits
        total = total + torch.nn.functional.interpolate(logits, (64, 96), mode="bilinear").softmax(1)
    (classes,) = run(variables, [image], manner)
    assert (classes != total[0].argmax(0).numpy()).mean() <= 1e-3
    (plain,) = run(variables, [image], Manner(image_size))
    assert (classes != plain).mean() > 0.01


def test_a_mirror_image_gives_the_mirrored_class_map_where_both_are_shown(variables):
    (image,) = photographs((64, 90))
    manner = Manner((64, 96), flip=True)
    one, other = run(variables, [image, image[:, ::-1]], manner)
    assert (one != other[:, ::-1]).mean() <= 1e-3


@pytest.fixture
def compiled():
    """How many programs have been compiled since the test began, by XLA's name."""
    counts = collections.Counter()

    def count(event, _, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


def test_images_of_many_sizes_take_few_compilations(variables, compiled, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 97, (60, 2))
    images = photographs(*sizes)
    classify._make_logits_fn.cache_clear(), classify._make_look_fn.cache_clear()
    # One program for the network, and few for class maps, in blocks with a side of 128, 64 or 32.
    run(variables, images, Manner((32, 32)))
    given = dict(compiled)
    assert given["jit(logits_step)"] == 1 and 1 <= given["jit(_look)"] <= 3
    # As many shapes as are planned, each with its blocks.
    monkeypatch.setattr("jaxseg.manner.choose_canvases", functools.partial(choose_canvases, most=2))
    canvases = plan_canvases(sizes, Manner(None))
    assert len(set(canvases.values())) == 2 and len(canvases) == len({tuple(size) for size in sizes})
    run(variables, images, Manner(None), canvases=canvases)
    assert compiled["jit(logits_step)"] - given["jit(logits_step)"] == 2
    assert 1 <= compiled["jit(_look)"] - given["jit(_look)"] <= 2 * 3


def test_a_canvas_is_planned_for_each_size_or_its_tiles_but_not_for_what_is_resized():
    assert plan_canvases(np.array([(50, 60)]), Manner((32, 32))) == {}
    manner = Manner(None, scales=(1.0, 1.5), tile=128)
    canvases = plan_canvases(np.array([(50, 60), (10, 200)]), manner)
    assert canvases == {(50, 60): (64, 64), (10, 200): (32, 128)}
    (image,) = photographs((50, 60))
    assert prepare(image, manner, canvases).shapes == prepare(image, manner).shapes == ((64, 64, 3), (96, 96, 3))
    assert prepare(image, manner, {(50, 60): (96, 128)}).shapes == ((96, 128, 3), (160, 192, 3))


def test_what_waits_long_is_computed_in_a_batch_that_is_not_full(variables, monkeypatch):
    monkeypatch.setattr(classify, "_WAITING", 4)
    images = photographs((32, 32), (32, 64), *[(64, 64)] * 14)
    asked = []

    def named():
        for index, image in enumerate(images):
            asked.append(index)
            yield index, prepare(image, Manner(None))

    classify_all = classify.make_classify(MODEL, variables, Manner(None), DEVICES[:1], 8)
    next(classify_all(named()))
    assert len(asked) < len(images)
    assert len(list(classify_all(named()))) == len(images)


def test_a_batch_that_is_not_full_is_filled_no_further_than_it_must_be(variables):
    network = classify._Network(MODEL, variables, Manner(None), tuple(DEVICES[:1]), 8)
    shapes = ((64, 64, 3),)
    # With nothing compiled a power of two; then what there is, if it suffices.
    for images, number in [(3, 4), (2, 4), (1, 4), (5, 8), (8, 8), (4, 4)]:
        assert network.number(shapes, images) == number
    assert network.compiled == {shapes: {4, 8}}
    assert classify._Network(MODEL, variables, Manner(None), tuple(DEVICES[:2]), 6).number(shapes, 6) == 3


class Contextual(nn.Module):
    """Five convolutions: a feature sees 63 x 63 pixels, twice as many in each direction as lie between two features."""

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(5):
            x = nn.relu(nn.Conv(6, (3, 3), 2, padding=1)(x))
        return {32: x}


def test_tiles_whose_context_suffices_equal_the_whole_image():
    model = Segmenter(Contextual(), BaselineDecoder(3, (6, 6, 6, 6, 6)))
    variables, (image,) = init(model), photographs((70, 810))
    whole = logits_of(variables, image, model).argmax(-1)
    assert len(np.unique(whole)) > 1
    # Of an overlap of 256 pixels each tile leaves out the outer 96.
    (tiled,) = run(variables, [image], Manner(None, tile=384, overlap=256), model=model)
    assert np.array_equal(tiled, whole)
    # With none there is a difference, or this test would prove nothing.
    (tiled,) = run(variables, [image], Manner(None, tile=384, overlap=0), model=model)
    assert 0 < (tiled != whole).mean() < 0.1


def test_tiles_are_shown_mirrored_too_and_are_spread_over_the_devices(variables):
    # Of a multiple of 32 pixels, so that the mirror image's cells of 32 x 32, which is all that is seen, are the same.
    (image,) = photographs((192, 320))
    whole, tiled = (
        run(variables, [image], Manner(None, True, (1.0,), tile, overlap), devices)[0]
        for tile, overlap, devices in [(512, 0, 1), (256, 192, 2)]
    )
    assert (tiled != whole).mean() < 1e-3


def test_of_many_images_that_are_computed_in_tiles_none_is_left_out(variables):
    images = photographs((32, 160), (32, 64), (32, 190))
    manner = Manner(None, tile=128)
    for image, classes in zip(images, run(variables, images, manner), strict=True):
        assert np.array_equal(classes, run(variables, [image], manner)[0])


def test_tiles_of_images_of_many_sizes_have_few_shapes_and_their_canvas_is_not_seen(variables):
    manner = Manner(None, tile=512)
    panoramas = [(height, width) for height in range(20, 512, 20) for width in (600, 700)]
    assert len(set(plan_canvases(np.array(panoramas), manner).values())) == 8
    (image,), manner, canvases = photographs((32, 160)), Manner(None, tile=128), {(32, 160): (96, 128)}
    assert prepare(image, manner, canvases).canvas == (96, 128)
    alone, padded = (run(variables, [image], manner, canvases=chosen)[0] for chosen in (None, canvases))
    assert np.array_equal(alone, padded)


def test_a_manner_without_meaning_is_refused():
    for wrong in [
        {"scales": ()},
        {"scales": (0.0,)},
        {"scales": (5.0,)},
        {"tile": 100},
        {"tile": 0},
        {"overlap": 2048},
        {"overlap": 20},
    ]:
        with pytest.raises(ValueError, match=r"scales|tile"):
            Manner(None, **wrong)
