"""The transformations: each module holds rules and the functions that make them."""

__all__: list[str] = []
