"""Byte counts as people write and read them. Inside the program everything is bytes."""

import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3
MOST_BYTES = 2**60  # of any machine, by far: a bound that keeps arithmetic within a float

_BYTES_PER_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 1024**4,
}


def parse_bytes(text: str) -> int:
    """Bytes in `text`, a number with a unit: "6GiB", "512 MiB", "5.5GB".

    Raises ValueError when the unit is missing (6 of what?), unknown, or the number is not positive.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not an amount of memory: write a number and a unit, such as 6GiB")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{text!r} has no unit: write {number}GiB or {number}MiB")
    if unit.upper() not in _BYTES_PER_UNIT:
        raise ValueError(f"{text!r} has an unknown unit {unit!r}: use B, KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    amount = float(number) * _BYTES_PER_UNIT[unit.upper()]
    if amount >= MOST_BYTES:
        raise ValueError(f"{text[:40]!r} is more memory than any machine has")
    n_bytes = round(amount)
    if n_bytes <= 0:
        raise ValueError(f"{text!r} is not a positive amount of memory")
    return n_bytes


def format_bytes(n_bytes: float) -> str:
    """`n_bytes` for a person: "5.43 GiB", "312.0 MiB", "18 B"; negative numbers keep their sign."""
    size = abs(n_bytes)
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{n_bytes / unit:.2f} {name}" if unit == GIB else f"{n_bytes / unit:.1f} {name}"
    return f"{n_bytes:.0f} B"
