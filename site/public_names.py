"""What griffe, which reads source code for mkdocstrings, cannot see there: names that are exported when they are asked
for, signatures and docstrings that are made when a class is, and the sentences of options."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import griffe

ROOMS = (
    "modernbert",
    "modernbert.corpus",
    "modernbert.indexing",
    "modernbert.interop",
    "modernbert.serving",
    "modernbert.tools",
    "modernbert.training",
)
_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
}


class PublicNames(griffe.Extension):
    """Adds what running the package shows to what its source shows."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Export the public names of each room, and describe the classes among them as they are."""
        if pkg.path != "modernbert":
            return

        def docstring(text: str, parent: griffe.Object) -> griffe.Docstring:
            how = {"parser": loader.docstring_parser, "parser_options": loader.docstring_options}
            return griffe.Docstring(inspect.cleandoc(text), parent=parent, **how)

        for room in ROOMS:
            package = importlib.import_module(room)
            here = loader.modules_collection[room]
            for name in package.__all__:
                value = getattr(package, name)
                if inspect.ismodule(value) or name in here.members:
                    continue
                if getattr(value, "__module__", "").startswith("modernbert."):
                    target = f"{value.__module__}.{value.__qualname__}"
                    here.set_member(name, griffe.Alias(name, target, parent=here))
                    if inspect.isclass(value):
                        describe(loader.modules_collection[target], value, docstring)
                    else:
                        sign(loader.modules_collection[target], value, docstring)
        for value in without_a_name():
            describe(loader.modules_collection[f"{value.__module__}.{value.__qualname__}"], value, docstring)


def without_a_name() -> Iterator[type]:
    """Classes that are made by a task's name and not imported: pipelines, and the options of fine-tuning."""
    from modernbert.pipelines import TASKS
    from modernbert.training.tasks.options import OPTIONS, MineOptions

    for place, _ in TASKS.values():
        module, name = place.split(".")
        yield getattr(importlib.import_module(f"modernbert.pipelines.{module}"), name)
    yield from {*OPTIONS.values(), MineOptions, *(parent for task in OPTIONS.values() for parent in task.__mro__[1:-2])}


def describe(found: griffe.Class, real: type, docstring: Callable[..., griffe.Docstring]) -> None:
    """Give a class the docstring and the members that it has once it is made."""
    if real.__doc__ and found.docstring:
        found.docstring = docstring(real.__doc__, found)
    for name, value in vars(real).items():
        if inspect.isfunction(value) and "__signature__" in vars(value):
            if name not in found.members or not found.members[name].is_function:
                function = griffe.Function(name, lineno=1, endlineno=1, parent=found)
                found.set_member(name, function)
            sign(found.members[name], value, docstring)
    if dataclasses.is_dataclass(real):
        for field in dataclasses.fields(real):
            if "help" not in field.metadata or field.name not in found.members:
                continue
            member = found.members[field.name]
            made = field.default_factory is not dataclasses.MISSING
            member.value = repr(field.default_factory() if made else field.default)
            member.docstring = docstring(str(field.metadata["help"]), member)


def sign(found: griffe.Function, real: Any, docstring: Callable[..., griffe.Docstring]) -> None:
    """Give a function the arguments that `help` shows, and its docstring."""
    if "__signature__" in vars(real):
        parameters = inspect.signature(real).parameters.values()
        found.parameters = griffe.Parameters(*map(_parameter, parameters))
        found.labels.discard("class-attribute")
    if real.__doc__:
        found.docstring = docstring(real.__doc__, found)


def _parameter(given: inspect.Parameter) -> griffe.Parameter:
    default = None if given.default is inspect.Parameter.empty else repr(given.default)
    annotation = None if given.annotation is inspect.Parameter.empty else _type(given.annotation)
    return griffe.Parameter(given.name, annotation=annotation, kind=_KINDS[given.kind], default=default)


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("modernbert.decoding.cache.", "").replace("torch.Tensor", "Tensor")
