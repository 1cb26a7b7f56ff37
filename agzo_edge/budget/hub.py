"""Configuration and headers of a model on the hub; no weight is downloaded.

What is cached is read from the cache; the rest is asked from the hub, unless HF_HUB_OFFLINE is set.
"""

from pathlib import Path
from typing import Any

from agzo_edge.budget.headers import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    StoredTensor,
    read_checkpoint,
    read_json,
    shard_names,
)
from agzo_edge.errors import ModelError


def open_checkpoint(source: str) -> Checkpoint:
    """The checkpoint at `source`, a directory or a hub id, by its headers.

    Raises ModelError when neither exists, or what is there cannot be read.
    """
    try:
        path = Path(source)
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # too long a name, a zero byte
        raise ModelError(f"{source[:100]}: names no directory and no model: {error}") from None
    if is_directory:
        return read_checkpoint(path, source=source)
    if exists:
        raise ModelError(f"{source}: is a file: give the directory that holds it and its config.json")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source.strip():
        raise ModelError(f"{source}: no such directory: name the one that holds the model with --model")
    cached = _cached_directory(source)
    return read_checkpoint(cached, source=source) if cached is not None else _ask_hub(source)


def _cached_directory(source: str) -> Path | None:
    """The hub cache's directory of `source`, when config and all shards lie in it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(source, name)
        return Path(found) if isinstance(found, str) else None

    try:
        config, single, index = cached("config.json"), cached(SINGLE_FILE), cached(INDEX_FILE)
    except HFValidationError as error:
        raise ModelError(f"{source}: no such directory, and no name of a model on the hub: {error}") from None
    if config is None or (single is None and index is None):
        return None
    if single is None and index is not None:
        shards = shard_names(read_json(index, source=source), source)
        if any(cached(shard) is None for shard in shards):
            return None
    return config.parent


def _ask_hub(source: str) -> Checkpoint:
    """The headers that the hub sends: a few hundred kilobytes, whatever the model's size."""
    from huggingface_hub import constants, get_safetensors_metadata, hf_hub_download
    from huggingface_hub import errors as hub_errors

    tried = f"{source}: no such directory, and not in the cache {constants.HF_HUB_CACHE}"
    try:
        config = hf_hub_download(source, "config.json")
        metadata: Any = get_safetensors_metadata(source)
    except (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError):
        raise ModelError(f"{tried}; the hub was not asked (HF_HUB_OFFLINE) or could not be reached") from None
    except hub_errors.EntryNotFoundError:
        raise ModelError(f"{source}: holds no config.json on the hub: is it a transformers model?") from None
    except hub_errors.NotASafetensorsRepoError:
        raise ModelError(f"{source}: has no safetensors files, and only safetensors is read") from None
    except (hub_errors.HfHubHTTPError, hub_errors.SafetensorsParsingError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{tried}; the hub refused: {reason}. A gated model needs HF_TOKEN") from None
    except Exception as error:  # noqa: BLE001  # the HTTP library's, which differs between the client's versions
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{tried}; the hub could not be reached ({reason})") from None
    tensors = {
        name: StoredTensor(tuple(info.shape), info.dtype, info.data_offsets[1] - info.data_offsets[0])
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return Checkpoint(source, read_json(Path(config), source=source), tensors, true_shapes={})
