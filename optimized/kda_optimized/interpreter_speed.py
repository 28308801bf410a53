"""Take out of Triton's interpreter what costs time and changes no result.

A small operation takes some microseconds in numpy and ten times that around it: the type of every tensor is built anew, its
numpy dtype looked up in a dictionary made for the purpose, and 32-bit sums are computed again in 64 bits for an assertion that is
switched off. What is asked again is kept here with the object it was asked of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def quicken(shipped: Any) -> None:  # noqa: ANN401 - a module, of whatever Triton version
    """Speed up the interpreter of the Triton that is loaded; a Triton made otherwise keeps what it has.

    Parameters
    ----------
    shipped
        ``triton.runtime.interpreter``.
    """
    from triton.language import core

    builder = shipped.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    shipped._get_np_dtype = _kept_with_its_argument(shipped._get_np_dtype, "kda_numpy")
    shipped._patch_attr = _patch_without_wrapper(shipped.interpreter_semantic)
    core.block_type.__init__ = _types_made_once(core.block_type.__init__, core.constexpr)
    core.tensor.__init__ = _shapes_made_once(core.tensor.__init__)
    semantic = shipped.interpreter_semantic
    semantic.binary_op_type_checking_impl = _operands_matched_once(semantic, core.tensor)


def _kept_with_its_argument(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    def kept(argument: Any) -> Any:  # noqa: ANN401
        found = argument.__dict__.get(name)
        if found is None:
            found = argument.__dict__[name] = function(argument)
        return found

    return kept


def _patch_without_wrapper(semantic: Any) -> Callable[..., None]:  # noqa: ANN401
    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:  # noqa: ANN401
        del builder
        # A builtin's wrapper only asks whether this argument is there.
        inner = member.__wrapped__ if member.__code__.co_qualname == "builtin.<locals>.wrapper" else member

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        scope.set_attr(owner, name, call)

    return patch_attr


def _types_made_once(original: Callable[..., None], constexpr: Any) -> Callable[..., None]:  # noqa: ANN401
    made: dict[Any, dict[str, Any]] = {}

    def initialise(self: Any, element_ty: Any, shape: Any) -> None:  # noqa: ANN401
        shape = shape.value if isinstance(shape, constexpr) else shape
        sizes = (size.value if isinstance(size, constexpr) else size for size in shape)
        key = (element_ty.name, *sizes)
        found = made.get(key)
        if found is None:
            original(self, element_ty, shape)
            made[key] = self.__dict__
        else:
            # One dictionary for all types that are equal: what is kept with one is kept with all.
            self.__dict__ = found

    return initialise


def _shapes_made_once(original: Callable[..., None]) -> Callable[..., None]:
    def initialise(self: Any, handle: Any, type: Any) -> None:  # noqa: A002, ANN401 - Triton's names
        found = type.__dict__.get("kda_tensor")
        if found is None:
            original(self, handle, type)
            found = {name: value for name, value in self.__dict__.items() if name != "handle"}
            type.__dict__["kda_tensor"] = found
        self.__dict__.update(found)
        self.handle = handle

    return initialise


def _operands_matched_once(semantic: Any, tensor: Any) -> Callable[..., tuple[Any, Any]]:  # noqa: ANN401
    """Remember what types the operands of an elementwise operation come to, and leave it to numpy to broadcast them."""
    original = semantic.binary_op_type_checking_impl
    matched: dict[Any, tuple[Any, Any, Any, Any]] = {}

    def label(operand: Any) -> Any:  # noqa: ANN401
        if isinstance(operand, tensor):
            return operand.type.name
        return type(operand), operand

    def adapted(operand: Any, wanted: Any) -> Any:  # noqa: ANN401
        if operand.type.scalar.name != wanted.scalar.name:
            operand = semantic.cast(operand, wanted.scalar)
        return operand if operand.type.name == wanted.name else tensor(operand.handle, wanted)

    def match(lhs: Any, rhs: Any, *rules: Any, **named_rules: Any) -> tuple[Any, Any]:  # noqa: ANN401
        key = (label(lhs), label(rhs), rules, *named_rules.items())
        found = matched.get(key)
        if found is None:
            x, y = original(lhs, rhs, *rules, **named_rules)
            constants = (None if isinstance(lhs, tensor) else x, None if isinstance(rhs, tensor) else y)
            matched[key] = (x.type, y.type, *constants)
            return x, y
        type_x, type_y, x, y = found
        return adapted(lhs, type_x) if x is None else x, adapted(rhs, type_y) if y is None else y

    return match
