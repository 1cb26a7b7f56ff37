"""What the public verbs share: they are called from programs that have torch set up as they like it."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


def with_torch_as_ours(verb: Callable[Given, Result]) -> Callable[Given, Result]:
    """The verb, for which torch is as this package means it, and after which it is as it was."""

    @wraps(verb)
    def called(*args: Given.args, **settings: Given.kwargs) -> Result:
        from agzo_edge.model.device import torch_as_ours  # torch takes seconds, and --help needs none of it

        with torch_as_ours():
            return verb(*args, **settings)

    return called
