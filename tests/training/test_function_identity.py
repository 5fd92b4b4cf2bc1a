"""Functions that compute the same are known wherever they are written; others are told apart."""

import functools
import math
import random
import threading
import types

import numpy as np
import pytest
import torch

import mmkit as mm
from mmkit.data.images import square
from mmkit.training.function_identity import function_identity
from tests.train_small import jittered
from tests.training.user_functions import Slope, Step, by_attribute, defined, scaled, within

SETTINGS = types.ModuleType("settings")
FLOOR = "def f(p):\n    return max(floor, 1 - p)"
INNER = "def f(p):\n    def g(): return p * {}\n    return g()"
SAME = {  # two functions that compute the same, though they are written differently
    "another file, line, module, local name and docstring": lambda: (
        defined("def f(p):\n    'How far.'\n    return 1 - p"),
        defined(
            "\n\n# moved\ndef f(fraction):\n    return 1 - fraction", file="b.py", module="theirs"
        ),
    ),
    "built anew": lambda: (scaled(0.5), scaled(0.5)),
    "partial": lambda: tuple(functools.partial(pow, exp=2, mod=None) for _ in range(2)),
    "an object": lambda: (Slope(0.5), Slope(0.5)),
    "a transform that draws": lambda: (jittered, (random.random(), jittered)[1]),
    "by its registered name": lambda: (mm.schedules.cosine, mm.schedules.SCHEDULES["cosine"]),
    "what it does not read of what it refers to": lambda: tuple(
        by_attribute(types.SimpleNamespace(peak=0.5, name=name)) for name in ("one", "other")
    ),
    "a set, in any order": lambda: tuple(
        defined("def f(p):\n    return p in names", names=names)
        for names in ({"a", "b", "c"}, {"c", "b", "a"})
    ),
}
OTHER = {
    "a constant": lambda: [defined(f"def f(p):\n    return {n} - p") for n in (1, 2)],
    "a constant of another type": lambda: [scaled(1), scaled(1.0)],
    "an operator": lambda: [defined(f"def f(p):\n    return 1 {x} p") for x in "-+"],
    "a function that is called": lambda: [
        defined(f"import math\ndef f(p):\n    return math.{name}(p)") for name in ("sin", "cos")
    ],
    "closure": lambda: [scaled(0.5), scaled(0.25)],
    "what it reads of what it refers to": lambda: [
        by_attribute(types.SimpleNamespace(peak=peak)) for peak in (0.5, 0.25)
    ],
    "closure of a function within": lambda: [within(0.5), within(0.25)],
    "default": lambda: [defined(f"def f(p, by={n}):\n    return p * by") for n in (1, 2)],
    "arguments of a partial": lambda: [functools.partial(pow, n) for n in (2, 3)],
    "a global value": lambda: [defined(FLOOR, floor=floor) for floor in (0.1, 0.2)],
    "a global function": lambda: [
        defined("def f(p):\n    return g(p)", g=scaled(by)) for by in (0.5, 0.25)
    ],
    "a function within": lambda: [defined(INNER.format(n)) for n in (1, 2)],
    "the state of an object": lambda: [Slope(0.5), Slope(0.25)],
    "a method of another object": lambda: [Slope(by).__call__ for by in (0.5, 0.25)],
    "a field of a dataclass": lambda: [Step(0.5), Step(0.25)],
    "the code of a class": lambda: [
        defined(f"class f:\n    def __call__(self, p):\n        return {n} * p")() for n in (1, 2)
    ],
    "what a cached function computes": lambda: [
        functools.cache(defined(f"def f(p):\n    return {n}")) for n in (1, 2)
    ],
    "a tensor": lambda: [scaled(torch.tensor([n])) for n in (1, 2)],
    "a transform's size": lambda: [lambda image, n=n: square(n)(image) for n in (15, 16)],
    "C functions": lambda: [math.sin, math.cos],
    "of NumPy": lambda: [np.sin, np.cos],
    "of torch": lambda: [torch.sin, torch.cos],
    "optimizers": lambda: [torch.optim.SGD, torch.optim.Adam],
    "a library's name, wrapped": lambda: [
        functools.wraps(math.cos)(defined(f"def f(p):\n    return {n}")) for n in (1, 2)
    ],
}


@pytest.mark.parametrize("how", SAME)
def test_a_function_is_known_wherever_it_is_written(how):
    one, other = map(function_identity, SAME[how]())
    assert one == other and not one.startswith("?")


@pytest.mark.parametrize("how", OTHER)
def test_another_function_is_told_apart(how):
    one, other = map(function_identity, OTHER[how]())
    assert one != other and not one.startswith("?")


def test_an_attribute_of_a_module_that_is_read_counts():
    read = defined("def f(p):\n    return settings.floor * p", settings=SETTINGS)
    found = []
    for SETTINGS.floor, SETTINGS.other in ((1, 1), (1, 2), (2, 2)):
        found.append(function_identity(read))
    assert found[0] == found[1] != found[2]


def test_what_cannot_be_compared_says_why():
    for value, words in (
        (threading.Lock(), "a lock, whose state cannot be read"),
        (torch.nn.Linear(2, 3), r"a model \(Linear\), which changes"),
        ([[i] for i in range(10_007)], "more than 10,000 values"),
    ):
        with pytest.raises(AssertionError, match=words):
            found = function_identity(lambda progress, value=value: progress)
            assert not found.startswith("?"), found
    nested: list = []
    for _ in range(5003):
        nested = [nested]
    assert "nested too deeply" in function_identity(scaled(nested))
    loop = []
    loop.append(loop)
    assert function_identity(scaled(loop)) == function_identity(scaled(loop))
