"""Pushing to the Hub: a push that fails ends in one message that says what to do."""

import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from transformers import Trainer, TrainingArguments

# hf_xet, which uploads large files, raises ConnectionError and errors of its own.
HUB_ERRORS = (HTTPError, HFValidationError, ConnectionError)
LOGIN = "run `hf auth login`, or set HF_TOKEN, with a token that may write to it"
# What to do about a status of the Hub's answer.
REMEDIES = {
    401: f"it does not know who asks; {LOGIN}",
    403: f"the token may not write there; {LOGIN}, or set hub_model_id to a repository of your own",
    404: f"there is no such repository, or the token does not see it; check hub_model_id, or {LOGIN}",
    409: "something else was writing to it at that moment; try again",
    412: "something else was pushed to it at that moment; try again",
    429: "there were too many requests; try again later",
}


class PushError(OSError):
    """The Hub did not take a push; the local folder is as it was."""


@contextmanager
def push_errors(
    args: TrainingArguments, hub_model_id: str | None, failure: str, revision: str | None = None
) -> Iterator[None]:
    """Raise an error of the Hub, or of the connection to it, as a `PushError` that says what to do.

    Args:
        args: the settings of the training.
        hub_model_id: the repository; None before it is known to be there.
        failure: what the repository does not do if there is an error, such as "was not pushed to".
        revision: the branch that is pushed to, if it is another than `args.hub_revision`.

    Raises:
        PushError: the Hub refuses, or cannot be reached.
    """
    try:
        yield
    except (*HUB_ERRORS, OSError, RuntimeError) as error:
        cause = hub_error(error)
        if cause is None:
            raise
        how = how_to_go_on(args, hub_model_id, revision)
        raise PushError(f"{repository_name(args, hub_model_id)} {failure}: {reason(cause)}.{how}") from error


def make_branch(trainer: Trainer, revision: str | None, token: str | None = None) -> None:
    """Make the branch that a revision names, from one process, unless it is there or names a pull request.

    Raises:
        PushError: the Hub refuses, or cannot be reached.
    """
    if revision is None or revision.startswith("refs/") or not trainer.is_world_process_zero():
        return
    args, repository = trainer.args, trainer.hub_model_id
    with push_errors(args, repository, "cannot be pushed to", revision):
        HfApi().create_branch(repository, branch=revision, token=token or args.hub_token, exist_ok=True)


def warn_of_failed_push(args: TrainingArguments, hub_model_id: str | None, error: BaseException) -> None:
    """Warn that a checkpoint was not pushed, and say how to push it."""
    why = reason(hub_error(error) or error)
    warnings.warn(
        f"a checkpoint was not pushed to {repository_name(args, hub_model_id)}: {why}."
        f"{how_to_go_on(args, hub_model_id)}",
        stacklevel=3,
    )


def repository_name(args: TrainingArguments, hub_model_id: str | None) -> str:
    """Return the name of the repository as far as it is known."""
    return hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name


def how_to_go_on(args: TrainingArguments, hub_model_id: str | None, revision: str | None = None) -> str:
    """Return a sentence with the command that pushes the output folder, once there is something in it."""
    if hub_model_id is None or not any(Path(args.output_dir).iterdir()):
        return ""
    command = push_command(args, hub_model_id, revision)
    return f" All of it is in {args.output_dir}; push that with: {command}"


def push_command(args: TrainingArguments, repository: str, revision: str | None = None) -> str:
    """Return the command that pushes an output folder as the Trainer does, without its checkpoints."""
    revision = revision or args.hub_revision
    words = ["hf", "upload", repository, args.output_dir, ".", "--exclude", "checkpoint-*", "--exclude", "_*"]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def hub_error(error: BaseException | None) -> BaseException | None:
    """Return the error of the Hub, or of the connection to it, that an error is or comes from; None for others."""
    while error is not None:
        if isinstance(error, HUB_ERRORS) or type(error).__module__.partition(".")[0] == "hf_xet":
            return error
        error = error.__cause__
    return None


def reason(error: BaseException) -> str:
    """Return why a push failed, and what to do about it, in a line."""
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 is set"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        remedy = REMEDIES.get(status, "try again later" if status >= 500 else f"{error.server_message or error}")
        return f"the Hub answers {status}; {remedy}"
    if isinstance(error, (HTTPError, ConnectionError)):
        return f"the connection to the Hub broke ({type(error).__name__}: {error}); try again"
    if isinstance(error, HFValidationError):
        return f"hub_model_id is no name of a repository ({error})"
    return " ".join(str(error).split()) or type(error).__name__
