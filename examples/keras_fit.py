"""Trains a Keras model with Lion on scikit-learn's digits, saves it and goes on from the file.

    pip install "lionax[keras]" scikit-learn && python examples/keras_fit.py

It prints what the network reaches, and what the average of its parameters reaches.
"""

import os
import tempfile

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported
import keras

import lionax
from lionax.frameworks.keras import Optimizer


def digits():
    """Images of 8 x 8 pixels and their classes: to train on, and to validate."""
    images, classes = load_digits(return_X_y=True)
    images, classes = (images / 16).reshape(-1, 8, 8, 1), classes.astype(np.int32)
    return train_test_split(images, classes, test_size=0.25, random_state=0, stratify=classes)


def network():
    """A small convolutional network."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(10),
    ])


def main():
    """Trains for 10 epochs, then for 10 more from the saved file."""
    train_images, images, train_classes, classes = digits()
    decayed = lionax.not_matching("bias")
    tx = lionax.chain(lionax.clip_by_global_norm(1.0),
                      lionax.lion(1e-3, weight_decay=0.1, mask=decayed), lionax.params_ema(0.98))
    model = network()
    model.compile(Optimizer(tx), metrics=["accuracy"],
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = {"x": train_images, "y": train_classes, "validation_data": (images, classes),
            "batch_size": 64, "verbose": 0}
    plateau = keras.callbacks.ReduceLROnPlateau(factor=0.3, patience=2, min_delta=1e-3)
    model.fit(**data, epochs=10, callbacks=[plateau])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "digits.keras")
        model.save(path)
        model = keras.saving.load_model(path)
    print("loaded:", model.optimizer.tx)
    report(model, images, classes)
    model.fit(**data, epochs=10, callbacks=[plateau])
    report(model, images, classes)

    average = lionax.averaged_params(model.optimizer.state)
    for variable in model.trainable_variables:
        variable.assign(average[variable.path])
    report(model, images, classes, "the average of the parameters")


def report(model, images, classes, what="the parameters"):
    """Prints what the model reaches."""
    loss, accuracy = model.evaluate(images, classes, verbose=0)
    print(f"{what} after {int(model.optimizer.iterations)} steps, learning rate now "
          f"{float(model.optimizer.learning_rate):.1e}: validation loss {loss:.4f}, "
          f"accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
