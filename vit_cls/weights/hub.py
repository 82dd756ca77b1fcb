"""Published weights on this disk: from huggingface_hub's cache, or fetched into it."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import PretrainedCfg

from vit_cls.errors import ModelFileError

SAFE_FILES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
"""The safetensors file that a repository may hold beside a pickle; it is asked for first."""


def weights_file(name: str, config: PretrainedCfg) -> Path:
    """The weights of a tag, fetched if they are not in the cache; ``name`` is for messages.

    Cache and switches are huggingface_hub's: ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_TOKEN``.
    ModelFileError says where the weights were looked for, and how to do without the hub.
    """
    if not config.hf_hub_id:
        if config.url:
            return _from_url(name, config)
        raise ModelFileError(f"no weights were published for {name}. Use it without model.pretrained.")
    repo, _, revision = str(config.hf_hub_id).partition("@")
    wanted = config.hf_hub_filename or "pytorch_model.bin"
    files = [SAFE_FILES[wanted], wanted] if wanted in SAFE_FILES else [wanted]
    missing: BaseException | None = None
    unreachable = False
    for filename in files:
        try:
            path = hf_hub_download(
                repo,
                filename,
                revision=revision or None,
                library_name="vit_cls",
                local_files_only=unreachable,  # a hub that does not answer is not asked for a pickle instead
            )
            return Path(path)
        except LocalEntryNotFoundError as error:  # no connection, or offline, and not in the cache
            missing = missing or error.__cause__ or error
            unreachable = True
        except EntryNotFoundError as error:
            missing = missing or error
        except Exception as error:  # of the HTTP library below, which changes with the client's versions
            if _is_refusal(error):
                raise ModelFileError(
                    f"{name}: the hub refuses {repo}/{files[0]}: {_first_line(error)}. Some weights need an "
                    f"account that accepted their licence (`hf auth login`). {_way_out(name)}"
                ) from error
            missing = missing or error
            unreachable = True
    reason = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else _first_line(missing)
    raise ModelFileError(
        f"{name}: {files[0]} of {repo} is not in the cache {constants.HF_HUB_CACHE} and cannot be fetched "
        f"from {constants.ENDPOINT}: {reason}. {_way_out(name)}"
    ) from missing


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)):
        return True
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)


def _from_url(name: str, config: PretrainedCfg) -> Path:
    """The few tags that are at an address alone; torch's cache of downloads, as timm uses it."""
    assert config.url
    url = config.url if isinstance(config.url, str) else config.url[0]
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if target.is_file():
        return target
    if constants.HF_HUB_OFFLINE:
        raise ModelFileError(
            f"{name}: {target.name} is not in the cache {target.parent} and offline mode is on "
            f"(HF_HUB_OFFLINE). {_way_out(name)}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=False)
        return target
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise ModelFileError(
            f"{name}: {target.name} is not in the cache {target.parent} and cannot be fetched from {url}: "
            f"{_first_line(error)}. {_way_out(name)}"
        ) from error


def _way_out(name: str) -> str:
    return f"With the file at hand use {name}=path/to/file, or model.pretrained path/to/file."


def _first_line(error: BaseException | None) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
