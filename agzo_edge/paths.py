"""The names of files and models as people give them."""

from pathlib import Path

from agzo_edge.errors import ConfigError


def expanded(name: str) -> str:
    """`name` with the home directory that its leading ~ means. Raises ConfigError for nobody's."""
    if not name.startswith("~"):
        return name
    try:
        return str(Path(name).expanduser())
    except RuntimeError:
        raise ConfigError(f"{name}: nobody has this home directory; write ./{name} for a file of that name") from None


def lasting(source: str) -> str:
    """A name as it holds in any working directory: the whole path of what is there, a hub id as it is."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source
