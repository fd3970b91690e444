"""The engine: what a rule is, and how rules run over a tree. Start at `lionax.core.rule`."""

__all__: list[str] = []
