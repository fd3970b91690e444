"""What ``lionax demo`` runs: a small transformer learns English from the text that every Python ships."""

__all__: list[str] = []
