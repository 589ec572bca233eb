"""A bundle on the Hugging Face hub: the network by timm's own function, the rest of the files beside it."""

from __future__ import annotations

from pathlib import Path

import timm
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from okdc.deploy.bundle import CACHE, load_student, loader
from okdc.errors import ExportError
from okdc.system.wording import one_line

_MESSAGE = "Add the network, its exports and their verification"


def check(repository: str) -> None:
    """Raise ExportError unless the hub can be reached and takes what this user sends; asked before any work is done."""
    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except HFValidationError as error:
        raise ExportError(f"--push-to-hub {repository}: give USER/NAME. {one_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise ExportError(f"--push-to-hub {repository}: nobody is logged in here. Type: hf auth login") from error
    except Exception as error:  # offline, a proxy, an expired token: the libraries below have many words for it
        raise ExportError(
            f"--push-to-hub {repository}: the hub cannot be used from here ({one_line(error)}). Mend that, or log in "
            "again (hf auth login), or leave --push-to-hub out and upload the bundle later: hf upload REPO BUNDLE"
        ) from error


def push(bundle: Path, repository: str) -> str:
    """Put a bundle into a repository, which is made where there is none; returns its address.

    Where timm builds the network, timm's own function pushes weights and configuration. Then all files of the bundle
    follow in one commit. Raises ExportError with the command that repeats the upload.
    """
    try:
        network = load_student(bundle)
        if network is not None and loader(bundle) == "timm":
            timm.models.push_to_hf_hub(network, repository, commit_message=_MESSAGE, safe_serialization=True)
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=bundle, commit_message=_MESSAGE, ignore_patterns=f"*{CACHE}/*"
        )
    except Exception as error:  # whatever the network does
        raise ExportError(
            f"{bundle} is written, but could not be pushed: {one_line(error)}. "
            f"Try again: hf upload {repository} {bundle}"
        ) from error
    return str(address)
