"""What is released: a wheel and an sdist that need nothing but the core dependencies."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest

import lionax

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BACKEND = PROJECT["build-system"]["requires"]
DEPENDENCIES = PROJECT["project"]["dependencies"]
LOWEST = [dependency.replace(">=", "==") for dependency in DEPENDENCIES]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
OPTIONAL = ("flax", "keras", "equinox", "matplotlib", "orbax", "rich", "torch")

# A few steps, what a state is for, and that nothing optional is there to help.
SCRIPT = """
import importlib.util, json, pickle, sys
import jax, jax.numpy as jnp, numpy as np, optax
import lionax

for name in sys.argv[1:]:
    assert importlib.util.find_spec(name) is None, name
assert "site-packages" in lionax.__file__, lionax.__file__

params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "bias": jnp.zeros(3)}
grads = jax.tree.map(lambda p: 0.3 * p + 0.1, params)
decayed = lionax.not_matching("bias")
for ours, theirs in [
    (lionax.lion(1e-2, weight_decay=0.1), optax.lion(1e-2, weight_decay=0.1)),
    (lionax.lamb(1e-2), optax.lamb(1e-2)),
    (lionax.sgd(1e-2, 0.9, True), optax.sgd(1e-2, 0.9, True)),
    (lionax.adamw(1e-2, mask=decayed), optax.adamw(1e-2, mask=decayed)),
    (lionax.chain(lionax.clip_by_global_norm(0.1), lionax.lion(1e-2)),
     optax.chain(optax.clip_by_global_norm(0.1), optax.lion(1e-2))),
]:
    step = jax.jit(ours.step, donate_argnums=(0, 1), compiler_options=lionax.compiler_options())
    mine, state = jax.tree.map(jnp.copy, params), ours.init(params)
    other, other_state = params, theirs.init(params)
    for _ in range(3):
        mine, state = step(mine, state, grads)
        updates, other_state = theirs.update(grads, other_state, other)
        other = optax.apply_updates(other, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), mine, other)
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert lionax.from_config(json.loads(json.dumps(lionax.to_config(ours)))) == ours
    assert lionax.plan(ours, params).parameters == 9

tx = lionax.dynamic_loss_scale(lionax.accumulate(lionax.lion(1e-2), every=2))
state = tx.init(params)
for _ in range(4):
    params, state = jax.jit(tx.step)(params, state, grads)
state = lionax.set_hyperparams(state, learning_rate=0.5)
assert float(lionax.get_hyperparams(state)["learning_rate"]) == 0.5
print(jax.__version__, np.__version__, optax.__version__)
"""

pytestmark = pytest.mark.slow


def run(*command, cwd=None):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False,
                            cwd=cwd, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def environment(folder, *packages):
    """The Python of a new virtual environment with these packages."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    return python


def install(python, *arguments):
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
        "--no-deps", "--force-reinstall", *arguments)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The wheel and the sdist, built of a copy of the sources."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lionax", source / "lionax",
                    ignore=shutil.ignore_patterns("__pycache__"))
    python = environment(folder / "build", "build", *BACKEND)
    run(python, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel, sdist):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"lionax/py.typed", "lionax/demo/sweep.json"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {
        "lionax", f"lionax-{lionax.__version__}.dist-info"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "lionax/py.typed"} <= inside


def test_wheel_and_sdist_step_without_optional_packages(released, tmp_path):
    wheel, sdist = released
    check_contents(wheel, sdist)
    python = environment(tmp_path / "newest", *DEPENDENCIES, *BACKEND)
    for arguments in ([wheel], ["--no-build-isolation", sdist]):
        install(python, *arguments)
        run(python, "-c", SCRIPT, *OPTIONAL, cwd=tmp_path)


def test_the_wheel_steps_with_the_lowest_versions(released, tmp_path):
    python = environment(tmp_path / "lowest", *LOWEST)
    install(python, released[0])
    found = run(python, "-c", SCRIPT, *OPTIONAL, cwd=tmp_path).split()
    for version, requirement in zip(found, LOWEST, strict=True):
        wanted = requirement.partition("==")[2]
        assert version == wanted or version.startswith(f"{wanted}."), requirement
