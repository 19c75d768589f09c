"""How far a pixel's colour alone goes on `shapes`: scikit-learn's boosted trees on single RGB values.

    python -m tests.peers.colour_classifier --data-dir data

Fits two classifiers on pixels of the training split, one that counts pixels as they come and one that weights the
classes equally, and prints the validation table of the one with the higher mean IoU. Takes about a minute.
"""

import argparse
import pathlib

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from jaxseg import metrics
from jaxseg.data import records, shapes


def draw_pixels(source: records.RecordSource, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws about `count` labelled pixels, equally many from each scene.

    Returns:
      Colours (N, 3) uint8 and labels (N,) uint8, none of them 255.
    """
    rng = np.random.default_rng(seed)
    colours, labels = [], []
    for index in range(len(source)):
        scene = source[index]
        valid = np.flatnonzero(scene["label"] != shapes.IGNORE_LABEL)
        chosen = rng.choice(valid, min(len(valid), -(-count // len(source))), replace=False)
        colours.append(scene["image"].reshape(-1, 3)[chosen])
        labels.append(scene["label"].ravel()[chosen])
    return np.concatenate(colours), np.concatenate(labels)


def classify(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    class_weight: str | None,
    iterations: int = 30,
) -> np.ndarray:
    """Fits on the training pixels and counts the validation pixels: (9, 9) int64, labels in rows."""
    model = HistGradientBoostingClassifier(
        max_iter=iterations, learning_rate=0.3, class_weight=class_weight, random_state=0
    )
    model.fit(*train)
    colours, labels = validation
    pairs = labels.astype(np.int64) * len(shapes.NAMES) + model.predict(colours)
    return np.bincount(pairs, minlength=len(shapes.NAMES) ** 2).reshape(len(shapes.NAMES), -1)


def main() -> None:
    """Prints the table of the better of the two classifiers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, default="data", help="where the scenes are, or will be")
    parser.add_argument("--pixels", type=int, default=100_000, help="training pixels")
    arguments = parser.parse_args()
    sources = shapes.open_shapes(arguments.data_dir)
    train = draw_pixels(sources["train"], arguments.pixels)
    height, width = sources["val"].label_sizes()[0]
    validation = draw_pixels(sources["val"], len(sources["val"]) * height * width)
    tables = {weight: classify(train, validation, weight) for weight in (None, "balanced")}
    best = max(tables, key=lambda weight: metrics.mean_iou(tables[weight]))
    print(f"single-pixel colours, {len(train[0])} training pixels, class weights: {best or 'none'}")
    print(metrics.iou_table(tables[best], shapes.NAMES))


if __name__ == "__main__":
    main()
