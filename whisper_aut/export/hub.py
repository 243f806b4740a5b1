"""An export → a repository on the Hugging Face hub.

In: a directory that `whisper-aut export` wrote. Out: the address of the commit. Next: `load_encoder("org/name")`. All of it is
huggingface_hub's own upload; the token is the one that `hf auth login` keeps, and `HF_ENDPOINT` names another hub.
"""

from importlib import import_module
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import get_session

from whisper_aut import __version__
from whisper_aut.errors import UserError

# Version 1 of huggingface_hub speaks through httpx, version 2 through its successor; both call their errors alike.
HTTPError: type[Exception] = import_module(
    type(get_session()).__module__.partition(".")[0]
).HTTPError


def push(folder: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Upload an export, making the repository where there is none; return the address of the commit.

    Raises:
        UserError: an impossible name, no token or no right to write, or a hub that cannot be reached.
    """
    if repository.count("/") != 1:
        raise UserError(f"--push takes ORG/NAME, not {repository!r}.")
    api = api or HfApi(library_name="whisper-aut", library_version=__version__)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        message = f"Export of whisper-aut {__version__}"
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except LocalTokenNotFoundError:
        raise UserError("There is no token to push with. Log in first: hf auth login") from None
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name for a repository: {error}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        hint = " Log in first: hf auth login" if status == 401 else ""
        raise UserError(
            f"The hub refused {repository} with status {status}: {str(error).splitlines()[0]}{hint}"
        ) from None
    except (OSError, HTTPError) as error:
        raise UserError(
            f"The hub cannot be reached: {error}. What was exported lies in {folder}."
        ) from None
    return str(commit.commit_url)
