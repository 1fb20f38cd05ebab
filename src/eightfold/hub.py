"""From what a user calls a model to a folder on this machine. No torch here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from eightfold.types import EightfoldError
from eightfold.weight_files import find_weights, one_line

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_DESCRIPTION = ["*.json", "*.jinja", "tokenizer.model*", "tekken.json"]
_IN_FOLDERS = ["*/*"]  # copies in other formats lie in folders of their own
_MISTRAL_WEIGHTS = "consolidated*.safetensors"


def resolve(model: str, download: bool = True, weights: bool = True) -> Path:
    """A local folder, "demo" (the model that comes with this package), or a name on the Hugging Face hub → its folder.

    A hub model is downloaded unless it is in the hub's cache; with `download` False, or HF_HUB_OFFLINE set, only the
    cache is looked at; with `weights` False only config and tokenizer are got. Raises EightfoldError if there is no
    such model, or the hub has its weights as pickles only.
    """
    if model == "demo":
        return _demo()
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - Path's own raises where there is no such user
    if model and path.is_dir():
        return path
    if model and path.exists():
        raise EightfoldError(f"{model} is a file; a model is a folder, give the one that this file lies in")
    if not _HUB_NAME.fullmatch(model):
        raise EightfoldError(f"no such folder: {model!r} (a model is a folder, a hub name like org/name, or demo)")
    if not weights:
        return _snapshot(model, _DESCRIPTION, _IN_FOLDERS, download)
    folder = _snapshot(model, [*_DESCRIPTION, "*.safetensors"], [*_IN_FOLDERS, "consolidated*"], download)
    if not _has_weights(folder):
        folder = _snapshot(model, [*_DESCRIPTION, _MISTRAL_WEIGHTS], _IN_FOLDERS, download)
    if not _has_weights(folder):
        raise EightfoldError(
            f"no safetensors with weights of {model} were found on the hub (or, offline, in its cache), and no others "
            "are downloaded: choose a repository that has them, or give the folder of your own copy of its .bin or "
            ".pth files, with --allow-pickle"
        )
    return folder


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot holds weights, and not only the index of pickles, which comes with its description."""
    found = find_weights(folder)
    return found is not None and (bool(found.files) or not found.pickled)


def _demo() -> Path:
    folder = Path(__file__).parent / "assets" / "demo"
    if not folder.is_dir():
        raise EightfoldError(f"this installation lacks the demo model ({folder})")
    return folder


def _snapshot(model: str, wanted: list[str], unwanted: list[str], download: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=not download
        )
    except errors.GatedRepoError:
        raise EightfoldError(
            f"{model} is gated: accept its terms on https://huggingface.co/{model} and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise EightfoldError(f"{model} is neither a folder here nor a model on the hub (or it is private)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise EightfoldError(
            f"{model} is neither a folder here nor in the hub's cache, and the hub was not reached: {one_line(error)}"
        ) from None
    except Exception as error:  # httpx, requests, OSError, by the version of the library: all mean the same to the user
        raise EightfoldError(f"cannot get {model} from the hub: {type(error).__name__}: {one_line(error)}") from None
    return Path(folder)
