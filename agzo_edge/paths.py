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
    """A model's name as it holds in any working directory: a local directory's whole path, a hub id as it is."""
    path = Path(source)
    return str(path.absolute()) if source and path.is_dir() else source
