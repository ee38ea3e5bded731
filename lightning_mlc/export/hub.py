"""Upload an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lightning_mlc.errors import UserError, first_line


def require_pushable(repo_id: str) -> None:
    """Check, before anything is read, that a later :func:`push` can work.

    Args:
        repo_id: Repository, as ``OWNER/NAME``.

    Raises:
        UserError: ``repo_id`` is not a valid name, or the user is not logged in to the hub.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError("--push_to_hub", f"'{repo_id}' is not the name of a repository; write OWNER/NAME") from error
    if get_token() is None:
        raise UserError("--push_to_hub", "not logged in; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder to a repository. If the repository does not exist, create it as a private one.

    Args:
        folder: The folder.
        repo_id: The repository, as ``OWNER/NAME``.

    Returns:
        The address of the repository.

    Raises:
        UserError: The hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Model of lightning-mlc")
    except Exception as error:  # errors of the hub, the network and requests have no common base
        raise UserError(
            "--push_to_hub",
            f"cannot push to {repo_id} ({first_line(error)}); {folder} is complete: "
            f"push it with `hf upload {repo_id} {folder} --private`",
        ) from error
    return str(address)
