"""How much, in words: the one place that decides how sizes are shown to people."""

UNITS = ("kB", "MB", "GB", "TB", "PB")
STEP = 1000
ONE_PLACE_BELOW = 9.95  # 9.96 is 10, not 10.0


def size_words(size: float) -> str:
    """`size` bytes in the decimal unit that suits, as disks and GPUs are sold: 512 B, 3.4 kB, 12 MB, 1,200 PB.

    Two digits at the least, so that no amount is shown as 0.0 of a unit that is too large for it.
    """
    if round(size) < STEP:
        return f"{size:.0f} B"
    power = next((n for n in range(1, len(UNITS)) if round(size / STEP**n) < STEP), len(UNITS))
    amount, unit = size / STEP**power, UNITS[power - 1]
    return f"{amount:.1f} {unit}" if amount < ONE_PLACE_BELOW else f"{amount:,.0f} {unit}"


def time_words(seconds: float) -> str:
    """A time that is only roughly known: 40 s, 12 minutes, 3.4 hours, 120 hours."""
    minutes, hours = seconds / 60, seconds / 3600
    if round(minutes) < 2:
        return f"{seconds:.0f} s"
    if round(minutes) < 120:
        return f"{minutes:.0f} minutes"
    return f"{hours:.1f} hours" if hours < ONE_PLACE_BELOW else f"{hours:,.0f} hours"
