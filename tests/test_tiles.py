"""Tiles cover an image, and their weights sum to 1 at every pixel and are 0 where a tile lacks context."""

import itertools

import numpy as np
import pytest

from jaxseg.tiles import classify_in_tiles, starts, weights

CASES = [
    (1, 128, 32),
    (128, 128, 64),
    (129, 128, 64),
    (1000, 128, 64),
    (1000, 128, 0),
    (999, 256, 224),
    (2048, 1024, 256),
]


@pytest.mark.parametrize("length,tile,overlap", CASES)
def test_the_tiles_cover_the_axis_and_begin_at_multiples_of_the_stride(length, tile, overlap):
    begins = starts(length, tile, overlap)
    assert begins[0] == 0 and all(begin % 32 == 0 for begin in begins)
    assert length <= begins[-1] + tile < max(length, tile) + 32
    assert all(0 < after - before <= tile - overlap for before, after in itertools.pairwise(begins))


@pytest.mark.parametrize("length,tile,overlap", CASES)
def test_the_weights_sum_to_one_and_are_zero_near_an_inner_edge(length, tile, overlap):
    begins, found = starts(length, tile, overlap), weights(length, tile, overlap)
    assert found.shape == (len(begins), length) and found.min() >= 0
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
    margin = int(overlap * 3 / 8)
    for begin, row in zip(begins, found, strict=True):
        inside = np.zeros(length, bool)
        inside[begin + margin * (begin > 0) : begin + tile - margin * (begin + tile < length)] = True
        assert not row[~inside].any()
    # Slowly: no seam.
    if overlap:
        assert np.abs(np.diff(found)).max(initial=0) <= 2 / (overlap / 4)


@pytest.mark.parametrize("size,tile,overlap", [((100, 300), 128, 64), ((300, 100), 128, 32), ((333, 257), 128, 96)])
def test_scores_that_need_no_context_give_what_the_whole_image_would(size, tile, overlap):
    scores = np.random.default_rng(0).normal(size=(*size, 3)).astype(np.float32)
    rows = []

    def score(places):
        rows.append(places)
        # In whatever order they are ready.
        return ((number, scores[place]) for number, place in reversed(list(enumerate(places))))

    assert np.array_equal(classify_in_tiles(size, tile, overlap, score), scores.argmax(-1))
    assert len(rows) == len(starts(size[0], tile, overlap))
