"""The list of checks, and how one is run: it passes, it is beyond what the family declares, or it does not apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .specimen import Specimen

Verdict = Literal["pass", "limit", "not applicable", "not run"]


class NotRun(Exception):
    """A check needs what this machine lacks; the text says what."""


@dataclass(frozen=True)
class Check:
    """One thing that a family has to be able to do.

    Attributes:
        name: Short, as :attr:`Family.limits` names it.
        about: What holds where it passes, in one line.
        function: Raises AssertionError, or any other error, where it does not hold.
        applies: Why a specimen has nothing to be checked; empty where it has.
    """

    name: str
    about: str
    function: Callable[[Specimen], None]
    applies: Callable[[Specimen], str]


@dataclass(frozen=True)
class Outcome:
    """What a check came to.

    Attributes:
        verdict: ``"pass"``; ``"limit"``, it fails as the family declares; ``"not applicable"``; ``"not run"``.
        reason: Of any verdict but ``"pass"``.
    """

    verdict: Verdict
    reason: str = ""


CHECKS: dict[str, Check] = {}
"""Name -> check, in the order in which they run."""


def check(
    name: str, about: str, applies: Callable[[Specimen], str] = lambda specimen: ""
) -> Callable[[Callable[[Specimen], None]], Callable[[Specimen], None]]:
    """Registers a function as a check; see :class:`Check`."""

    def register(function: Callable[[Specimen], None]) -> Callable[[Specimen], None]:
        CHECKS[name] = Check(name, about, function, applies)
        return function

    return register


def run_check(specimen: Specimen, name: str) -> Outcome:
    """Runs one check.

    Raises:
        AssertionError: it fails and the family does not declare it, or the family declares it and it passes.
        Exception: whatever else the check ended with, under the same condition.
    """
    found = CHECKS[name]
    reason = found.applies(specimen)
    if reason:
        return Outcome("not applicable", reason)
    declared = {**specimen.family.limits, **specimen.limits}.get(name)
    try:
        found.function(specimen)
    except NotRun as error:
        return Outcome("not run", str(error))
    except Exception:
        if declared is None:
            raise
        return Outcome("limit", declared)
    if declared is not None:
        raise AssertionError(f"{specimen.name}: {name!r} passes, though the family declares: {declared}")
    return Outcome("pass")
