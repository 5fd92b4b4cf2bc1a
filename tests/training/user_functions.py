"""Functions as a user would write them, for schedules and transforms."""

import dataclasses


def defined(source: str, name: str = "f", file: str = "a.py", **values):
    """A function from its source, as a user's module would define it."""
    namespace = {"__name__": values.pop("module", "mine"), **values}
    exec(compile(source, file, "exec"), namespace)
    return namespace[name]


def scaled(by):
    return lambda progress: by * (1 - progress)


def by_attribute(settings):
    return lambda progress: settings.peak * progress


def within(by):
    return lambda progress: sum(fraction * by for fraction in (progress, 1.0))


class Slope:
    def __init__(self, by):
        self.by = by

    def __call__(self, progress):
        return self.by * (1 - progress)


@dataclasses.dataclass
class Step:
    at: float = 0.5

    def __call__(self, progress):
        return float(progress < self.at)
