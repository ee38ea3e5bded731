"""An exported folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lightning_mlc.errors import UserError, first_line


def require_pushable(repo_id: str) -> None:
    """Refuse, before anything is read, what could not be pushed.

    Raises:
        UserError: ``repo_id`` is no name of a repository, or nobody is logged in.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError("--push_to_hub", f"'{repo_id}' is no name of a repository; write OWNER/NAME") from error
    if get_token() is None:
        raise UserError("--push_to_hub", "nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str) -> str:
    """Upload ``folder`` to the repository ``repo_id``, which is made, and then private, where there is none.

    Returns:
        The repository's address.

    Raises:
        UserError: The hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Model of lightning-mlc")
    except Exception as error:  # of the library's own, of the network, of requests: all say in words what is wrong
        raise UserError(
            "--push_to_hub",
            f"cannot push to {repo_id} ({first_line(error)}); {folder} is whole: "
            f"push it with `hf upload {repo_id} {folder}`",
        ) from error
    return str(address)
