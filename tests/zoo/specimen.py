"""A specimen: a small model of an architecture with inputs on which it runs, found by trying."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from .build import build, small_config
from .called import with_forward
from .catalog import Architecture, config_class, model_classes, wholes
from .exceptional import Exception_
from .exceptions import EXCEPTIONS
from .given import GIVEN
from .handed import handed
from .inputs import candidates, repaired
from .running import run
from .together import mute, together

MOST_CLASSES = 3


class Missing(Exception):
    """There is no specimen: "not built" or "not run", and why."""

    def __init__(self, state: str, problems: list[str]) -> None:
        super().__init__(f"{state}: {problems[0]}")
        self.state = state
        self.problems = problems


@dataclass
class Specimen:
    """A model in eval mode and keyword inputs in its dtype.

    Attributes:
        whole: the architecture that this is a model of, where it is one around the part that was asked for.
    """

    model: Any
    inputs: dict[str, Any]
    whole: str = ""


@dataclass
class _Search:
    """What went wrong on the way to a specimen; the reason given is the first problem of the furthest stage."""

    building: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    default: str = ""
    contradiction: tuple[str, str] = ("", "")

    def missing(self) -> Missing:
        if self.running:
            return Missing("not run", self.running)
        error, reason = self.contradiction
        if reason and self.building and any(error in problem for problem in self.building):
            return Missing("not built", [reason, *self.building])
        if self.default:
            return Missing(
                "not built", [f"transformers' own default config fails, too: {self.default}", *self.building]
            )
        return Missing("not built", self.building or ["transformers has no model class that takes this config alone"])


def find(architecture: Architecture) -> Specimen:
    """Returns the first model and inputs that run; in float64 where the model can, so that comparisons are sharp.

    Raises:
        Missing: nothing builds, or nothing runs.
    """
    search = _Search()
    found = _first(architecture, search)
    if found is None:
        found = _within(architecture)
    if found is None:
        search.contradiction = EXCEPTIONS.get(architecture.name, Exception_()).contradiction
        search.default = _default_fails(architecture) if search.building and not search.running else ""
        raise search.missing()
    return found


def _default_fails(architecture: Architecture) -> str:
    """Returns how the model fails whose config is made without any argument; an empty string where it builds."""
    try:
        with torch.device("meta"):
            next(model_classes(architecture))._from_config(config_class(architecture)())
    except Exception as error:
        return brief(error)
    return ""


def _first(architecture: Architecture, search: _Search) -> Specimen | None:
    exception = EXCEPTIONS.get(architecture.name)
    for model in _models(architecture, search):
        inputs = _inputs_for(architecture, model, search)
        if inputs is not None:
            return Specimen(model, inputs) if exception and not exception.sharp else sharpened(model, inputs)
    return None


def _within(architecture: Architecture) -> Specimen | None:
    """Returns a specimen of the smallest architecture that builds a part from the config of this one, and runs it."""
    for whole in wholes(architecture)[:MOST_CLASSES]:
        with built_from(config_class(architecture)) as classes:
            found = _first(whole, _Search())
        if found is not None and runs(found, classes):
            return replace(found, whole=whole.name)
    return None


@contextlib.contextmanager
def built_from(config: Any) -> Iterator[set[type]]:
    """Collects the classes of the modules, whole models apart, that read a setting from a config of this class."""
    classes: set[type] = set()
    original = config.__getattribute__

    def noted(self: Any, name: str) -> Any:
        caller = sys._getframe(1)
        if caller.f_globals.get("__name__", "").startswith("transformers.models."):
            module = caller.f_locals.get("self")
            if isinstance(module, torch.nn.Module) and not isinstance(module, PreTrainedModel):
                classes.add(type(module))
        return original(self, name)

    own = "__getattribute__" in vars(config)
    config.__getattribute__ = noted
    try:
        yield classes
    finally:
        if own:
            config.__getattribute__ = original
        else:
            del config.__getattribute__


def runs(specimen: Specimen, classes: set[type]) -> bool:
    """Says whether a module of one of these classes is called when the model runs."""
    called: list[type] = []
    modules = [module for module in specimen.model.modules() if type(module) in classes]
    hooks = [module.register_forward_hook(lambda m, *_: called.append(type(m))) for module in modules]
    run(specimen.model, specimen.inputs)
    for hook in hooks:
        hook.remove()
    return bool(called)


def _models(architecture: Architecture, search: _Search) -> Iterator[Any]:
    exception = EXCEPTIONS.get(architecture.name, Exception_())
    for narrow in (True, False):
        try:
            config = small_config(architecture, narrow)
            classes = list(_classes(architecture))
        except Exception as error:
            search.building.append(brief(error))
            continue
        for model_class in classes:
            try:
                yield build(with_forward(architecture.name, model_class), config, exception.attention, exception.train)
            except Exception as error:
                search.building.append(f"{model_class.__name__}: {brief(error)}")


def _classes(architecture: Architecture) -> list[Any]:
    exception = EXCEPTIONS.get(architecture.name)
    found = model_classes(architecture)
    if exception is not None and exception.classes:
        by_name = {found.__name__: found for found in found}
        return [by_name[name] for name in exception.classes]
    return list(itertools.islice(found, MOST_CLASSES))


def _inputs_for(architecture: Architecture, model: Any, search: _Search) -> dict[str, Any] | None:
    """Returns the first inputs with which the model runs; text alone only if it runs with nothing besides."""
    given = GIVEN.get(architecture.name)
    if given:
        return _running(model, lambda: repaired(model, given(model.config)), search)
    found = _running(model, lambda: _tries(model), search)
    return (found and mute(found) and _running(model, lambda: together(model), _Search())) or found


def _running(
    model: Any, make: Callable[[], Generator[dict[str, Any], str, None]], search: _Search
) -> dict[str, Any] | None:
    """Returns the first of the inputs with which the model runs."""
    problem = ""
    try:
        tries = make()
        while True:
            inputs = tries.send(problem) if problem else next(tries)
            problem = problem_with(model, inputs)
            if not problem:
                return inputs
            search.running.append(f"{type(model).__name__} on {', '.join(inputs) or 'nothing'}: {problem}")
    except StopIteration:
        if not problem:
            search.running.append(f"the zoo has no inputs for {type(model).__name__}")
        return None
    except Exception as error:
        search.running.append(f"no inputs for {type(model).__name__}: {brief(error)}")
        return None


def _tries(model: Any) -> Generator[dict[str, Any], str, None]:
    yield from handed(model)
    yield from candidates(model)


def problem_with(model: Any, inputs: Mapping[str, Any]) -> str:
    """Returns why the model does not run, or gives nothing to compare; an empty string if it does."""
    try:
        outputs = [output for output in run(model, inputs) if output.is_floating_point() and output.numel()]
    except Exception as error:
        return brief(error)
    if not outputs:
        return "no output is a floating-point tensor"
    return "outputs hold NaN" if any(bool(output.isnan().any()) for output in outputs) else ""


def sharpened(model: Any, inputs: Mapping[str, Any]) -> Specimen:
    """Returns the specimen in float64, or as it is where the model's code insists on another dtype."""
    wide = copy.deepcopy(model).double()
    wide_inputs = {name: _double(value) for name, value in inputs.items()}
    if not problem_with(wide, wide_inputs):
        return Specimen(wide, wide_inputs)
    return Specimen(model, dict(inputs))


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return [_double(item) for item in value] if isinstance(value, list) else value


def brief(error: BaseException) -> str:
    """Returns the kind of an error and the start of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
