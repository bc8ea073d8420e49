"""The nets in Keras, as far as TensorFlow's converters take them."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tf_keras as keras
from numpy.typing import NDArray

layers: Any = keras.layers


def _residual(x: Any) -> Any:
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x)))
    z = layers.ReLU()(layers.Add()([layers.Conv2D(8, 3, padding="same")(y), y]))
    return layers.Dense(4)(layers.GlobalAveragePooling2D()(z))


def _depthwise(x: Any) -> Any:
    y = layers.ReLU(6.0)(layers.BatchNormalization()(layers.Conv2D(8, 3, use_bias=False)(x)))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
    return layers.Conv2D(4, 1)(layers.ReLU(6.0)(layers.BatchNormalization()(y)))


def _mlp(x: Any) -> Any:
    y = layers.Dense(16, activation="relu")(layers.Flatten()(x))
    return layers.Dense(4)(layers.Dense(16, activation="relu", use_bias=False)(y))


def _classifier(x: Any) -> Any:
    y = layers.ReLU(6.0)(layers.BatchNormalization()(layers.Conv2D(8, 3, use_bias=False)(x)))
    y = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.MaxPooling2D()(y))
    return layers.Dense(4)(layers.GlobalAveragePooling2D()(y))


def _dilated(x: Any) -> Any:
    y = layers.Conv2D(8, 3, dilation_rate=2, activation="relu")(x)
    return layers.Conv2D(4, 3, strides=2, padding="same")(y)


def _transposed(x: Any) -> Any:
    y = layers.Conv2D(8, 3, activation="relu")(x)
    return layers.Conv2DTranspose(4, 2, strides=2)(y)


def _one_dimension(x: Any) -> Any:
    return layers.Conv1D(4, 1)(layers.Conv1D(8, 3, activation="relu")(x))


_NETS = {
    "residual": (_residual, (8, 8, 3)),
    "depthwise": (_depthwise, (8, 8, 3)),
    "mlp": (_mlp, (4, 4, 3)),
    "classifier": (_classifier, (8, 8, 3)),
    "dilated": (_dilated, (9, 9, 3)),
    "transposed": (_transposed, (6, 6, 3)),
    "conv1d": (_one_dimension, (16, 3)),
}


def nets() -> Iterator[tuple[str, Any, NDArray[np.float32]]]:
    """Name, network with random weights, 8 inputs."""
    for name, (build, shape) in _NETS.items():
        keras.utils.set_random_seed(0)
        x = keras.Input(shape, batch_size=2)
        net = keras.Model(x, build(x))
        for layer in net.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.gamma.assign(np.random.uniform(-1.5, 1.5, layer.gamma.shape))
        yield name, net, np.random.normal(size=(8, *shape)).astype(np.float32)
