"""Reading a safetensors file that somebody else may have written."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from agzo_edge.errors import AdapterError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, copied; safetensors checks each length and offset against the file's size.

    Raises AdapterError when the file is missing or is no sound safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise AdapterError(f"{path}: cannot be read as safetensors: {error}") from None
