"""Where people train: Flax NNX, Flax Linen, Equinox, Keras.

    from lionax.frameworks import nnx          # pip install "lionax[flax]"
    from lionax.frameworks import linen        # pip install "lionax[flax]"
    from lionax.frameworks import equinox      # pip install "lionax[equinox]"
    from lionax.frameworks import keras        # pip install "lionax[keras]"

Each module imports its framework.
"""

__all__ = []
