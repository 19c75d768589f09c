"""How tyro reads a command's options and explains them: soon, and with paragraphs that fit any terminal."""

import ast
import dataclasses
import inspect
import itertools
import sys
import types
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")


def quick_arguments(options: type[T]) -> type[T]:
    """Tells tyro how to read and to explain each option, which it would find out itself, but slowly.

    To be applied to a class before it becomes a dataclass. `X | None` and tuples are annotated with tyro's own way of
    reading X or the tuple. Of such types it would check the defaults with typeguard, whose import takes two fifths of
    --help's time; as `Optional` with None in front and as any object they are checked without. The explanation is the
    string below the option, as one paragraph: tyro would break it where the source does.

    Raises:
      TypeError: an option is a union of more than one type and None, or what is in a union or tuple cannot be read.
    """
    explained = _explanations(options)
    for name, annotation in options.__annotations__.items():
        written, *notes = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
        if get_origin(written) is tuple:
            written, notes = object, [_reader(written), *notes]
        elif get_origin(written) in (types.UnionType, Union):
            written, notes = Union[(None, *get_args(written))], [_optional_reader(written), *notes]
        if name in explained:
            notes.append(tyro.conf.arg(help=explained[name]))
        if notes:
            options.__annotations__[name] = Annotated[written, *notes]
    return options


def _explanations(options: type) -> dict[str, str]:
    """The string below each of a class's annotations that has one."""
    found: dict[str, str] = {}
    try:
        module = ast.parse(inspect.getsource(sys.modules[options.__module__]))
    except OSError:  # installed without its source
        return found
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and node.name == options.__name__:
            for pair in itertools.pairwise(node.body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        found[name] = " ".join(text.split())
    return found


def _optional_reader(written: Any) -> PrimitiveConstructorSpec:
    """Reads X of `X | None`, so that --help and mistakes are of X alone; and None where X is any one word."""
    kinds = set(get_args(written)) - {types.NoneType}
    if len(kinds) != 1:
        raise TypeError(f"an option cannot be of type {written}")
    reader = _reader(kinds.pop())
    return dataclasses.replace(
        reader,
        instance_from_str=lambda texts: None if texts == ["None"] else reader.instance_from_str(texts),
        str_from_instance=lambda value: ["None"] if value is None else reader.str_from_instance(value),
    )


def _reader(written: Any) -> PrimitiveConstructorSpec:
    """How tyro reads a type that is not marked in any way, and what it is if it cannot be read."""
    reader = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(written, set()))
    if not isinstance(reader, PrimitiveConstructorSpec):
        raise TypeError(f"an option cannot be of type {written}")

    def read(texts: list[str]) -> Any:
        try:
            return reader.instance_from_str(texts)
        except ValueError:
            raise ValueError(f"expected {reader.metavar}, not {' '.join(texts)}") from None

    return dataclasses.replace(reader, instance_from_str=read)
