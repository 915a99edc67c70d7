"""Quantities in human-readable form: 16.8 MB, 3 min 05 s, 97.80 %."""

import re

SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
NONE = "-"  # a value that was not measured


def amount(value: float | None, unit: str = "") -> str:
    """Format with three significant digits and a decimal prefix: 16.8 M, 8.39 kB."""
    if value is None:
        return NONE
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{_significant(value / size)} {prefix}{unit}"
    return f"{_significant(value)} {unit}".rstrip()


def _significant(value: float) -> str:
    """Format with three significant digits and no exponent, for 0 and 0.0005 <= |value| < 1000."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Format seconds: 0.8 s, 41 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s"
        if whole < 3600
        else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def seconds_of(text: str) -> float | None:
    """Parse a duration: 90s, 30m, 2h, 1h30m. Returns seconds, or None for anything else."""
    found = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", text, re.ASCII)
    if not text or found is None:
        return None
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(3600 * hours + 60 * minutes + seconds)


def bytes_of(text: str) -> int | None:
    """Parse a size: 100MB, 1.5GB, 700MiB, or a number of bytes. Returns None for anything else."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]I?|)B?\s*", text.upper(), re.ASCII)
    return int(float(found[1]) * SCALES[found[2]]) if found else None


def share_of(text: str) -> float | None:
    """Parse a share in percent: 40%, 12.5 %. Returns None for anything else."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*%\s*", text, re.ASCII)
    return float(found[1]) / 100 if found else None


def number(value: float | None) -> str:
    """Format with four significant digits, or with all digits before the point: 0.002010, 33.00, 31,416."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"


def measured_percent(value: float | None) -> str:
    """Format a measured fraction with two decimals: 97.80 %."""
    return NONE if value is None else f"{100 * value:.2f} %"


def asked_percent(share: float) -> str:
    """Format a requested fraction as briefly as possible: 75 %, 12.5 %."""
    return f"{100 * share:.3g} %"


def rate_of(text: str) -> tuple[float, bool] | None:
    """Parse a speed: 30, or 1.5x of another. Returns the number and whether it is a multiple, or None for
    anything else and for no speed at all."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(x?)\s*", text.lower(), re.ASCII)
    return (float(found[1]), bool(found[2])) if found and float(found[1]) else None
