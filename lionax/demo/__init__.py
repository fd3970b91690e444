"""What ``lionax demo`` runs: a small transformer learns English from Python's help topics."""

__all__: list[str] = []
