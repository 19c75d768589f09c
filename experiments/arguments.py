"""How tyro reads the options that are unions or tuples: without a check of their defaults, which would slow --help."""

import dataclasses
import types
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")


def quick_arguments(options: type[T]) -> type[T]:
    """Spares tyro the check of these options' defaults, for which it imports typeguard: a third of --help's time.

    To be applied to a class before it becomes a dataclass. For tyro its annotations that are unions or tuples come to
    stand for any object, which is read as tyro reads what was written there. Of `X | None` it reads X: None is what an
    option is that is not given.

    Raises:
      TypeError: an option is of a type that tyro cannot read, or a union of more than one and None.
    """
    for name, annotation in options.__annotations__.items():
        written, *notes = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
        if get_origin(written) in (tuple, types.UnionType, Union):
            options.__annotations__[name] = Annotated[object, _reader(written), *notes]
    return options


def _reader(written: Any) -> PrimitiveConstructorSpec:
    kinds = (written,) if get_origin(written) is tuple else set(get_args(written)) - {types.NoneType}
    readers = [ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set())) for kind in kinds]
    if len(readers) != 1 or not isinstance(reader := readers[0], PrimitiveConstructorSpec):
        raise TypeError(f"an option cannot be of type {written}")
    as_texts = reader.str_from_instance
    return dataclasses.replace(reader, str_from_instance=lambda x: ["None"] if x is None else as_texts(x))
