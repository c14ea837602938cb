"""How torch binds the arguments of a Function."""

import inspect
from typing import Any


class _AllGiven(inspect.BoundArguments):
    args = property(lambda self: tuple(self.arguments.values()))
    kwargs = property(lambda self: {})

    def apply_defaults(self) -> None:
        pass


class _Positional(inspect.Signature):
    def bind(self, *args: Any) -> _AllGiven:
        return _AllGiven(self, dict(zip(self.parameters, args, strict=True)))


def positional(forward: Any) -> Any:
    """torch binds the arguments of a Function to the signature of its forward at every call, which takes as long as five small operations.
    Ours are all given, by position: there is nothing to bind."""
    forward.__signature__ = _Positional(list(inspect.signature(forward).parameters.values()))
    return forward
