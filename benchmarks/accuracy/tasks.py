"""The tasks, by their names on the command line."""

from benchmarks.accuracy.digits import DIGITS
from benchmarks.accuracy.mnist1d import MNIST1D, MNIST1D_GRU
from benchmarks.accuracy.shapes import SHAPES
from benchmarks.accuracy.text import TEXT
from benchmarks.accuracy.tones import TONES

TASKS = {
    "digits": DIGITS,
    "mnist1d": MNIST1D,
    "mnist1d_gru": MNIST1D_GRU,
    "shapes": SHAPES,
    "text": TEXT,
    "tones": TONES,
}
