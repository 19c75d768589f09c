"""The whole path on real photographs: eight CamVid images can be learnt by heart."""

import functools

import jax
import numpy as np
import pytest

from jaxseg import initializers, metrics, train
from jaxseg.data.folder import open_folder
from jaxseg.data.loader import resize_image, resize_label
from jaxseg.decoders import BaselineDecoder
from jaxseg.optimizer import make_optimizer
from jaxseg.pretrained import load_encoder
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter

SIZE, NUM_CLASSES = (48, 64), 11


def test_eight_camvid_images_are_learnt_by_heart(shared, request):
    _, splits = open_folder(shared / "data" / "camvid", NUM_CLASSES)
    # Spread over the split, because its neighbours are frames of one film.
    items = [splits["train"][index] for index in range(0, len(splits["train"]), 46)]
    batch = {
        "image": np.stack([resize_image(item["image"], SIZE) for item in items]),
        "label": np.stack([resize_label(item["label"], SIZE) for item in items]),
    }
    assert len(items) == 8
    devices = jax.local_devices()[:1]
    model = Segmenter(ResNet(axis_name=train.AXIS), BaselineDecoder(NUM_CLASSES))
    variables = initializers.init(model, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))
    encoder = load_encoder("resnet18", shared / "weights" / "resnet18-9f26ff83.pth")
    variables["params"]["encoder"], variables["batch_stats"]["encoder"] = encoder["params"], encoder["batch_stats"]
    eval_batch = {**batch, "label_size": np.full((8, 2), SIZE, np.int32)}
    evaluate = functools.partial(train.make_evaluate(model, NUM_CLASSES, devices), batches=[eval_batch])
    # Whether 80 updates of everything are enough, or 100, and how long it lasts, depends on the random numbers.
    for freeze, rate, epochs in ((True, 1e-3, 1), (False, 2e-3, 12)):
        if not freeze:
            request.getfixturevalue("optimised")  # it pays where there are many updates
        stage = train.Stage("by heart", epochs, rate, freeze)
        tx = make_optimizer(rate, freeze, b2=0.98)
        state = train.start_stage(variables, tx, devices)
        batches = [batch] * (10 * epochs)
        for event in train.run_stage(model, tx, state, stage, jax.random.key(0), batches, 10, evaluate, devices):
            if isinstance(event, train.EpochDone):
                variables = {"params": event.state.params, "batch_stats": event.state.batch_stats}
                if metrics.mean_iou(event.confusion) > 0.95:
                    return
    pytest.fail(f"mean IoU {metrics.mean_iou(event.confusion)} after {epochs} times ten updates of everything")
