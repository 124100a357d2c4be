"""The Hugging Face hub: names, files, and whether it can be reached."""

import re
import urllib.error
import urllib.request
from pathlib import Path

from kd_core.system.terminal import one_line

# ---------------------------------------------------------------------------------------------------- Hugging Face hub

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
HUB_TIMEOUT_S = 5


def hub_file(repository: str, filename: str) -> Path:
    """A data set's file from the local Hugging Face cache, else from the hub.

    Raises:
        ValueError: it is in neither, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        require_hub(f"--data: {filename} of {repository}")
    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset"))
    except OSError as error:
        raise ValueError(f"--data: {filename} of {repository} cannot be downloaded ({one_line(error)})") from error


def require_hub(what: str) -> None:
    """Fails within seconds when the hub cannot be reached; its own libraries would retry for most of a minute.

    With HF_HUB_OFFLINE set there is nothing to wait for: the libraries look into their caches only.

    Raises:
        ValueError: in one line that begins with `what`.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # an answer, whatever it says
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{what} needs {constants.ENDPOINT}, which cannot be reached ({reason}); connect this machine, give a local "
            "path, or set HF_HUB_OFFLINE=1 if it lies in the Hugging Face cache"
        ) from error
