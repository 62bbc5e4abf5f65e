"""Plans."""


def stats() -> dict[str, float]:
    return {}
