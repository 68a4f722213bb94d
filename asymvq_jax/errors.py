"""What can go wrong for a reason that the user can mend; command lines print these messages without a traceback."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What every command of this package ends with."""

    DONE = 0
    # Training diverged, a benchmark's contender failed, or an unexpected error, whose traceback is printed.
    FAILED = 1
    # Options, files or settings that cannot work; one line says what to do.
    WRONG_INPUT = 2
    # "Temporary failure, try again" in sysexits.h: asked to stop, saved, and resumes when started again.
    SAVED = 75
    # "Remote error": another process of the run, or what it writes to, has ended or does not answer; the run resumes
    # when all of them are started again.
    LOST_PEER = 76
    # Ctrl-C, as shells report it.
    INTERRUPTED = 130


class UserError(ValueError):
    """Bad input; the message is for the user, and command lines print it without a traceback."""


class ConfigError(UserError):
    """A configuration that cannot work; the message names the field, what was expected and how to fix it."""


class ImageError(UserError):
    """A file that is not a picture, or a picture that does not fit; the message names the file."""


class MaskError(ImageError):
    """A mask file that could mean two things; the message names it and how to tell which."""


class OutputError(UserError):
    """A place that cannot be written to; the message names the path and the reason."""


class UnansweredError(UserError):
    """A bucket's service, or a disk, that did not answer in time; the message names the place."""


class TensorFileError(UserError):
    """A weights file that is missing, broken, dangerous, or of another model; the message names it and the remedy."""


class ConvertError(UserError):
    """Weights that cannot be converted; the message lists every tensor or field at fault."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unfinished or of another model; the message names the path and the remedy."""


class DataError(UserError):
    """Data that is missing, empty or too often corrupt; the message names the path and the remedy."""


class InputError(UserError):
    """Arrays that do not fit each other or the model; the message gives both shapes."""


class EvaluationError(UserError):
    """Pictures, masks or models that do not belong together; the message names them."""


class GenerateError(UserError):
    """Options or files that do not belong together; the message names them."""


class SamplingError(UserError):
    """What is asked for does not fit the pipeline; the message gives the sizes."""


class TokenizerError(UserError):
    """A folder that does not hold a tokenizer, or that of another model."""


class UNetError(UserError):
    """A UNet of an unsupported kind; the message names the fields."""


class SchedulerError(UserError):
    """An unsupported scheduler; the message names the field and what is supported."""


class CLIPError(UserError):
    """An encoder of an unsupported kind; the message names the fields."""


class PipelineError(UserError):
    """A folder or file that does not hold a pipeline for the task; the message names the part and what was expected."""


class LoraError(UserError):
    """A LoRA that is not readable, or does not fit the pipeline."""


class InceptionError(UserError):
    """A weights file of another network; the message lists what does not fit."""


class DistributionError(UserError):
    """Sets of pictures for which a score cannot be computed; the message names them and the remedy."""


class TopologyError(UserError):
    """A topology that does not exist or cannot be compiled for; the message lists what is known."""


class ExportError(UserError):
    """A size that the model cannot decode; the message says which it can."""


class TooSmallError(ImageError):
    """A picture whose shorter side is below the minimum."""


class NonFiniteError(RuntimeError):
    """A metric became NaN or infinite; the message names the step and the checkpoint to go back to."""


class LostPeerError(RuntimeError):
    """A computation of several processes failed, most often because one of them has ended."""


# The exit code of each kind of error that ends a command with one line, and no traceback.
EXIT_CODES: dict[type[BaseException], ExitCode] = {
    # Before the class that it is one of.
    UnansweredError: ExitCode.LOST_PEER,
    UserError: ExitCode.WRONG_INPUT,
    NonFiniteError: ExitCode.FAILED,
    LostPeerError: ExitCode.LOST_PEER,
}


def exit_code(error: BaseException) -> ExitCode:
    """What a command that this error ends returns."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), ExitCode.FAILED)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its type where it says nothing."""
    # A KeyError's text is its argument's representation.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
