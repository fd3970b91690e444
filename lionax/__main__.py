"""``python -m lionax``."""

from lionax.demo.command import run

if __name__ == "__main__":
    run()
