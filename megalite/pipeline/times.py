"""Times of a rank's actions, as people give them on a command line. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from types import MappingProxyType

from megalite.errors import ConfigError
from megalite.field_values import suggest
from megalite.pipeline.costs import Costs

TIMES: Mapping[str, float] = MappingProxyType(
    {"forward": 1.0, "input": 1.0, "weight": 1.0, "message": 0.0}
)
"""Of one micro-batch on all stages of a rank together; a message's is its own."""

TIMES_HELP = (
    "What a forward, the two parts of a backward (the gradients of input and weights) and a "
    "message take, of one micro-batch on all stages of a rank; those that are not named stay."
)
TIMES_TEXT = ",".join(f"{name}={value:g}" for name, value in TIMES.items())


def read_times(text: str) -> Mapping[str, float]:
    """`TIMES` with those of a text like `input=1.1,message=0.1` in their place.

    Raises:
        ConfigError: all that is wrong with it.
    """
    times, problems = dict(TIMES), []
    for item in text.split(","):
        name, equals, number = item.partition("=")
        about = f"--costs {item}"
        if not equals:
            problems.append(f"{about}: expected NAME=TIME")
            continue
        if name not in TIMES:
            problems.append(f"{about}: {name!r} is unknown{suggest(name, TIMES, every=True)}")
            continue
        try:
            times[name] = float(number)
        except ValueError:
            problems.append(f"{about}: expected a number")
            continue
        if name == "message" and not 0 <= times[name] < float("inf"):
            problems.append(f"{about} must be at least 0 and finite")
        elif name != "message" and not (times[name] > 0 and isfinite(times[name])):
            problems.append(f"{about} must be above 0 and finite")
    if problems:
        raise ConfigError(problems)
    return times


def costs_of(num_ranks: int, num_stages: int, times: Mapping[str, float]) -> Costs:
    """Costs of stages of which all on a rank take the times together."""
    chunks = num_stages / num_ranks
    return Costs.uniform(
        num_stages,
        forward=times["forward"] / chunks,
        input_gradient=times["input"] / chunks,
        weight_gradient=times["weight"] / chunks,
        message=times["message"],
    )
