"""Everything that can go wrong, split by what happens next.

    StreamAdaptError
    ├── ConfigError          exit 2  the operator's words are off: usage, configuration, a mapping file
    │   └── ModelError       exit 2  a model file is damaged, or does not fit the configuration
    │       ├── ModelMissing         it is not there
    │       └── ModelUnfit           it cannot take the place of the one that rows are of
    ├── DataError            exit 2  a data set could not be had, or is not what it should be
    ├── KafkaRefused         exit 3  the broker said no, or cannot be reached: nothing was lost
    ├── RegistryRefused      exit 3  the schema registry said no: nothing was lost
    │   └── RegistryUnreachable  exit 3  it does not answer; waited for while a member runs
    ├── StateFull            exit 3  memory or disk for the rows is used up: nothing was lost
    ├── Fenced               exit 4  another instance uses this transactional.id
    ├── StateMismatch        exit 5  rows and offsets, or rows and model, do not belong together: the operator decides
    └── DeadLetterBreaker    exit 6  too much of the input is refused; what was refused is committed

A bad *record* is not an exception that leaves the pipeline: it becomes a dead letter (`decode.py`). What a Kafka
error calls for inside a transaction (try again, abort, build a new producer) is decided in `kafka/errors.py`.
Every message says what happened, where, the value, and what to do.
"""

from __future__ import annotations


class StreamAdaptError(Exception):
    """Root of the errors we raise on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(StreamAdaptError):
    """Usage or configuration: the message names the key, its value and its source."""

    exit_code = 2


class ModelError(ConfigError):
    """A model file is missing, truncated, has the wrong hash, holds NaN, or was made for other settings."""


class ModelMissing(ModelError):
    """A model, or one of its files, is not there."""


class ModelUnfit(ModelError):
    """A model cannot take the place of the one that rows are of; says what differs."""


class DataError(StreamAdaptError):
    """A data set could not be fetched, read or verified."""

    exit_code = 2


class KafkaRefused(StreamAdaptError):
    """The broker refused, or could not be reached within its deadline. Nothing uncommitted became visible."""

    exit_code = 3


class RegistryRefused(StreamAdaptError):
    """The schema registry does not let us in, or does not take a schema. Nothing uncommitted became visible."""

    exit_code = 3


class RegistryUnreachable(RegistryRefused):
    """The schema registry does not answer. A member that runs waits for it; one that starts does for a minute."""


class StateFull(StreamAdaptError):
    """No room for more rows, on the disk of `state.dir` or in memory. Nothing uncommitted became visible."""

    exit_code = 3


class Fenced(StreamAdaptError):
    """Another live instance uses the same transactional.id; this one stepped back."""

    exit_code = 4


class StateMismatch(StreamAdaptError):
    """The restored rows do not belong to the committed offsets or to the model; the message has both and the remedies.

    Nothing was changed: going on would learn events twice or not at all, and nobody would notice.
    """

    exit_code = 5


class DeadLetterBreaker(StreamAdaptError):
    """More of the input was refused than `input.breaker_share` allows; what was refused is committed, each once."""

    exit_code = 6
