"""A fixed sample of everyday captions and drawn pictures, to see how a model changes outside its training data.

64 captions of ordinary scenes, and 64 pictures: eight shapes in eight colours. They are not pairs: the sample is used
only to see whether items that were close are still close. Nothing is read from disk, and no font is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CAPTIONS = (
    "a dog running on a beach",
    "two dogs playing in the snow",
    "a cat sleeping on a sofa",
    "a horse in a green field",
    "a bird on a branch",
    "a flock of sheep on a hill",
    "a cow beside a fence",
    "a fish in clear water",
    "a child playing with a ball",
    "a girl in a red dress",
    "a boy jumping into a pool",
    "a baby in a chair",
    "a man riding a bicycle",
    "a woman holding an umbrella",
    "an old man reading a book",
    "a group of friends laughing",
    "people walking on a busy street",
    "a crowd at a concert",
    "a football player kicking the ball",
    "a runner in a race",
    "a surfer on a wave",
    "a skier going down a slope",
    "a climber on a rock",
    "two people dancing",
    "a red car on a road",
    "a yellow bus at a stop",
    "a train crossing a bridge",
    "an airplane in a blue sky",
    "a boat on a lake",
    "a ship in a harbour",
    "a motorcycle in front of a house",
    "a truck on the highway",
    "a city at night",
    "a village in the mountains",
    "a church with a tall tower",
    "a tall glass building",
    "a wooden house near a forest",
    "a bridge over a river",
    "an empty street in the rain",
    "a market with fruit",
    "a snowy mountain",
    "a sunset over the sea",
    "a waterfall in the forest",
    "a desert with sand dunes",
    "a field of flowers",
    "a tree without leaves",
    "a path through the woods",
    "dark clouds in the sky",
    "a plate of food on a table",
    "a bowl of soup",
    "a slice of pizza",
    "a cake with candles",
    "a cup of coffee",
    "a glass of red wine",
    "a basket of apples",
    "fresh bread on a board",
    "a chair beside a window",
    "a bed with white pillows",
    "a lamp on a desk",
    "a computer on a table",
    "a clock on a wall",
    "a pair of shoes",
    "a guitar against a wall",
    "an open book",
)

SIDE = 96  # pixels

COLOURS = (
    (220, 40, 40),
    (40, 160, 60),
    (40, 80, 220),
    (240, 200, 40),
    (150, 60, 190),
    (240, 130, 30),
    (30, 30, 30),
    (60, 190, 200),
)

_GROUNDS = ((250, 250, 250), (200, 215, 230), (225, 210, 190), (120, 125, 130))
_Grid = NDArray[np.int64]

_SHAPES: tuple[Callable[[_Grid, _Grid], NDArray[np.bool_]], ...] = (  # x and y from -48 to 47
    lambda x, y: x * x + y * y < 30 * 30,  # a disc
    lambda x, y: (abs(x) < 27) & (abs(y) < 27),  # a square
    lambda x, y: (abs(x) * 2 < y + 34) & (y < 28),  # a triangle
    lambda x, y: (abs(x) < 9) | (abs(y) < 9),  # a cross
    lambda x, y: (x + 48) // 8 % 2 == 0,  # stripes
    lambda x, y: (x * x + y * y) // 256 % 2 == 0,  # rings, the finer the further out
    lambda x, y: ((x + 48) // 16 + (y + 48) // 16) % 2 == 0,  # a chessboard
    lambda x, y: (x * 7919 + y * 104729 + x * y * 31) % 97 < y + 48,  # grains, the more the lower
)


def captions() -> list[str]:
    """Return the 64 captions."""
    return list(CAPTIONS)


def pictures() -> list[Image.Image]:
    """Return the 64 pictures, RGB, 96 x 96 px, drawn with integers only: the same on every machine."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] - SIDE // 2
    images = []
    for number, shape in enumerate(_SHAPES):
        inside = shape(x, y)[..., None]
        for index, colour in enumerate(COLOURS):
            ground = _GROUNDS[(number + index) % len(_GROUNDS)]
            images.append(Image.fromarray(np.where(inside, colour, ground).astype(np.uint8)))
    return images
