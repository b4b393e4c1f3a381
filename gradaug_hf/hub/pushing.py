"""Pushing to the Hub: what fails ends in one message, and no token is written."""

import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils.hub import hf_api

from gradaug_hf.hub.configs import PREPROCESSOR

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


class PushingTrainer(Trainer):
    """`transformers.Trainer`, of which every push that fails is heard of in one message that says what to do.

    A push that was asked for raises `PushError`. One of a checkpoint runs beside the training, which goes on when it
    fails, with a warning. A branch that `hub_revision` names is made where there is none.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """`Trainer.init_hf_repo`, which also makes the branch `args.hub_revision`.

        Raises:
            PushError: the Hub refuses, or cannot be reached.
        """
        with self._push_errors("cannot be pushed to"):
            super().init_hf_repo(token, private)
        self._make_branch(self.args.hub_revision, token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """`Trainer.push_to_hub`; a branch that `revision` names is made where there is none.

        Raises:
            PushError: the Hub refuses, or cannot be reached.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, kwargs.get("private"))
        self._make_branch(revision, token)
        with self._push_errors("was not pushed to", revision):
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)

    def _make_branch(self, revision: str | None, token: str | None) -> None:
        if revision is None or revision.startswith("refs/") or not self.is_world_process_zero():
            return
        with self._push_errors("cannot be pushed to", revision):
            hf_api().create_branch(
                self.hub_model_id, branch=revision, token=token or self.args.hub_token, exist_ok=True
            )

    @contextmanager
    def _push_errors(self, what: str, revision: str | None = None) -> Iterator[None]:
        try:
            yield
        except (*HUB_ERRORS, OSError, RuntimeError) as error:
            cause = hub_error(error)
            if cause is None:
                raise
            raise PushError(f"{self._repository} {what}: {reason(cause)}.{self._how_to_go_on(revision)}") from error

    @property
    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _how_to_go_on(self, revision: str | None = None) -> str:
        """The command that pushes the output folder, once there is something in it."""
        if self.hub_model_id is None or not any(Path(self.args.output_dir).iterdir()):
            return ""
        command = push_command(self.args, self.hub_model_id, revision)
        return f" All of it is in {self.args.output_dir}; push that with: {command}"

    # ---- checkpoints, which are pushed while training goes on ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, of which an error ends no push halfway."""
        try:
            return super().train(*args, **kwargs)
        except Exception:
            self._finish_current_push()
            raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push = getattr(self, "push_in_progress", None)
        if push is not None and not push.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()  # it reads the files that are written next
        self._warn_of_failed_pushes()
        processor = Path(checkpoint_folder) / PREPROCESSOR  # Trainer copies the weights and their configuration
        if processor.is_file() and self.args.hub_strategy != HubStrategy.END:
            shutil.copy(processor, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Warn of the pushes that are over and failed, of which Trainer says nothing; each once."""
        push = getattr(self, "push_in_progress", None)
        if push is None or not push.is_done():
            return
        self.push_in_progress = None
        for error in filter(None, (job.exception() for job in push.jobs)):
            warnings.warn(
                f"a checkpoint was not pushed to {self._repository}: {reason(hub_error(error) or error)}."
                f"{self._how_to_go_on()}",
                stacklevel=2,
            )


def push_command(args: TrainingArguments, repository: str, revision: str | None = None) -> str:
    """The command that pushes an output folder as the Trainer does, without its checkpoints."""
    revision = revision or args.hub_revision
    words = ["hf", "upload", repository, args.output_dir, ".", "--exclude", "checkpoint-*", "--exclude", "_*"]
    return shlex.join([*words, *(["--revision", revision] if revision else [])])


def hub_error(error: BaseException | None) -> BaseException | None:
    """The error of the Hub, or of the connection to it, that an error is or comes from; None for others."""
    while error is not None:
        if isinstance(error, HUB_ERRORS) or type(error).__module__.partition(".")[0] == "hf_xet":
            return error
        error = error.__cause__
    return None


def reason(error: BaseException) -> str:
    """Why a push failed, and what to do, in a line."""
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
