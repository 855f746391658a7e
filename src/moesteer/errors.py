"""Every error moesteer raises on purpose: one tree, four parts each.

MoesteerError                 what happened, where, what was expected, what to do
├── InputError                something given to us is wrong (exit code 2)
│   ├── DataError             a conversations file
│   │   └── EmptyDataError      holds no conversation
│   ├── ScenarioError         a scenario file
│   ├── FileError             a file or folder cannot be read or written as asked
│   │   ├── LimitError          it is larger than the stated limit
│   │   └── RunDirectoryError   a run directory belongs to something else
│   │       └── RunLockedError    or to another process, now (exit code 1)
│   ├── MaskError             a steering mask
│   │   ├── MaskFileError       the bytes are not a whole, untouched mask
│   │   ├── MaskContentError    its numbers cannot be applied (NaN, more forced on than k, ...)
│   │   └── MaskMismatchError   it was made for another model
│   ├── TraceError            a trace folder
│   │   ├── TraceFileError      missing, truncated or mixed-up shards
│   │   └── TraceLabelError     it lacks the labels or spans a method needs
│   ├── UnpublishableError    a mask that this tool does not publish
│   └── UnknownNameError      a method, suite, scenario or split that does not exist
├── ModelError                a model cannot be used
│   ├── DenseModelError         it has no experts
│   ├── UnknownRouterError      it has experts, but no family row describes its router
│   ├── UnsafeModelError        it asks for code or formats that we do not load
│   ├── SelfCheckError          steering it does not do what routing.py says
│   └── EngineStoppedError      what ran it died; the same command goes on (exit code 1)
├── NumericsError             numbers that cannot be trusted
│   └── NanLogitsError          NaN or infinite router logits
├── OutOfMemoryError          too little memory, also for a small batch
├── HubError                  the Hub cannot be reached, or answers what it should not
├── NoEffectError             steering was asked for and would do nothing
├── AlreadySteeredError       a model is steered twice at once
└── MissingExtraError         an optional dependency is not installed
"""

from __future__ import annotations


class MoesteerError(Exception):
    """Base of the tree. Parts: what happened; where; what was expected; what to do.

    `exit_code` is what the command line ends with.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str, expected: str, do: str) -> None:
        self.what, self.where, self.expected, self.do = what, where, expected, do
        super().__init__(f"{what}\n  where:    {where}\n  expected: {expected}\n  do:       {do}")


class InputError(MoesteerError):
    """Something given to us is wrong."""

    exit_code = 2


class DataError(InputError):
    """A conversations file cannot be read."""


class EmptyDataError(DataError):
    """A conversations file holds no conversation."""


class ScenarioError(InputError):
    """A scenario file is wrong."""


class FileError(InputError):
    """A file or folder cannot be read or written as asked."""


class LimitError(FileError):
    """A file is larger than the stated limit."""


class RunDirectoryError(FileError):
    """A run directory belongs to something else."""


class RunLockedError(RunDirectoryError):
    """A run directory is being written by another process."""

    exit_code = 1


class MaskError(InputError):
    """A steering mask is wrong."""


class MaskFileError(MaskError):
    """The bytes are not a whole, untouched mask."""


class MaskContentError(MaskError):
    """A mask's numbers cannot be applied."""


class MaskMismatchError(MaskError):
    """A mask was made for another model."""


class TraceError(InputError):
    """A trace folder is wrong."""


class TraceFileError(TraceError):
    """A trace has missing, truncated or mixed-up shards."""


class TraceLabelError(TraceError):
    """A trace lacks the labels or spans that a method needs."""


class UnpublishableError(InputError):
    """A mask that this tool does not publish: not evaluated for safety, or one that lowers refusals of harm."""


class UnknownNameError(InputError):
    """A method, suite, scenario or split that does not exist."""


class ModelError(MoesteerError):
    """A model cannot be used."""

    exit_code = 2


class DenseModelError(ModelError):
    """The model has no experts."""


class UnknownRouterError(ModelError):
    """The model has experts, but no family row describes its router."""


class UnsafeModelError(ModelError):
    """The model asks for code or formats that we do not load."""


class SelfCheckError(ModelError):
    """Steering the model does not do what routing.py says."""

    exit_code = 1


class EngineStoppedError(ModelError):
    """The process that ran a model died. Nothing that is finished is lost: the same command goes on."""

    exit_code = 1


class NumericsError(MoesteerError):
    """Numbers that cannot be trusted."""


class NanLogitsError(NumericsError):
    """NaN or infinite router logits."""


class OutOfMemoryError(MoesteerError):
    """There is too little memory, also for a small part of a batch."""


class HubError(MoesteerError):
    """The Hub cannot be reached, or answers what it should not."""


class NoEffectError(MoesteerError):
    """Steering was asked for and would do nothing."""


class AlreadySteeredError(MoesteerError):
    """A model is steered twice at once."""


class MissingExtraError(MoesteerError):
    """An optional dependency is not installed."""

    exit_code = 2
