"""The rules of the house."""

import ast
import inspect
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import cases
import pytest

import lionax

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lionax"
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
}

# From the bottom up: a module imports only from those before it.
ORDER = ["core.__init__", "core.table", "core.programs", "core.internals", "core.varying",
         "core.rounding", "core.quantized", "core.tree", "core.inspection", "core.patterns",
         "core.masks", "core.storage", "core.branching", "core.norms", "core.counting",
         "core.hyperparameters",
         "core.rule", "core.definition", "core.layout", "core.settings", "core.placement",
         "core.state", "core.one_leaf", "core.engine", "core.transformation",
         "transforms.__init__", "transforms.combining",
         "transforms.sign_momentum", "transforms.momentum", "transforms.adaptive",
         "transforms.decay", "transforms.clipping", "transforms.scaling", "transforms.averaging",
         "transforms.conditional", "transforms.accumulation", "transforms.low_precision",
         "transforms.majority_vote", "transforms.measuring",
         "optimizers", "compiler", "monitoring", "resume", "sharding",
         "compat.keras_schedules",
         "compat.keras_parts", "compat.keras2", "compat.keras3", "compat.dtensor",
         "compat.tf_models", "compat.weights", "compat.optax_states", "compat.__init__",
         "config", "__init__", "frameworks.__init__", "frameworks.contract",
         "frameworks.nnx_variables", "frameworks.nnx", "frameworks.linen", "frameworks.equinox",
         "frameworks.keras_variables", "frameworks.keras", "demo.__init__", "demo.text",
         "demo.model", "demo.checkpoints", "demo.training", "demo.report", "demo.sweep",
         "demo.information", "demo.command", "__main__"]
OWN = [name for name in ORDER if name.startswith(("core", "transforms"))]
# The library without frameworks and other systems.
OWN += ["optimizers", "compiler", "monitoring", "sharding"]
CORE = [*OWN, "config", "resume"]
MAKERS = [
    name for name in lionax.__all__ if getattr(getattr(lionax, name), "__annotations__", {}).get(
        "return") is lionax.Transformation and name != "from_config"
]


def tree(name):
    return ast.parse(MODULES[name].read_text())


def imported(name):
    """The modules of lionax that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node,
                      ast.ImportFrom) and node.module and node.module.split(".")[0] == "lionax":
            inside = node.module.removeprefix("lionax").removeprefix(".")
            for alias in node.names:
                full = f"{inside}.{alias.name}".removeprefix(".")
                found.add(
                    next((m for m in (full, f"{full}.__init__", inside, f"{inside}.__init__")
                          if m in MODULES), "__init__"))
        elif isinstance(node, ast.Import):
            found.update("__init__" for alias in node.names if alias.name == "lionax")
    return found


def exported(name):
    for node in tree(name).body:
        target = node.targets[0] if isinstance(
            node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "__all__":
            return ast.literal_eval(node.value)
    return None


def test_every_module_has_its_place_in_the_order():
    assert set(ORDER) == set(MODULES)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name):
    for other in imported(name):
        assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in ORDER if not name.endswith("__main__")])
def test_modules(name):
    assert ast.get_docstring(tree(name)), "a module begins with what it is for"
    names = exported(name)
    assert names is not None, "a module says what it exports"
    assert len(names) == len(set(names))
    assert name.split(".")[-1] not in names, "a module must not have the name of what it exports"
    assert not re.search(r"(^|_)(utils?|misc|common|src|helpers?)(_|$)", name)


def lines(path):
    return [line for line in path.read_text().splitlines() if line.strip()]


def test_sizes():
    """A stranger reads the engine in one sitting."""
    assert len(lines(MODULES["core.engine"])) <= 240
    assert len(lines(MODULES["core.norms"])) <= 145
    shown = ["core.table", "core.inspection", "transforms.measuring", "monitoring"]
    stored = ["core.rounding", "core.quantized", "core.storage", "transforms.low_precision"]
    meshes = ["core.internals", "core.varying", "core.placement", "transforms.majority_vote",
              "sharding"]
    apart = shown + stored + meshes
    assert sum(len(lines(MODULES[name])) for name in OWN if name not in apart) <= 3625
    for names, limit in ((shown, 705), (stored, 770), (meshes, 495)):
        assert sum(len(lines(MODULES[name])) for name in names) <= limit


SOURCES = sorted(path for folder in ("lionax", "tests", "benchmarks", "docs")
                 for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_lines_and_functions_have_a_limit(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert max(map(len, text.splitlines()), default=0) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documentation = node.body[0] if ast.get_docstring(node) else None
            size = node.end_lineno - node.lineno + 1
            if documentation is not None:
                size -= documentation.end_lineno - documentation.lineno + 1
            assert size <= 45, node.name


def test_dir_shows_the_public_names():
    assert dir(lionax) == sorted([*lionax.__all__, "compat"])


def test_every_public_name_is_exported_once():
    homes = {}
    for module in CORE:
        for name in exported(module):
            assert homes.setdefault(name,
                                    module) == module, f"{name} is in {homes[name]} and {module}"
    assert set(lionax.__all__) <= set(homes)
    assert lionax.__all__ == sorted(lionax.__all__)


PUBLIC = {name: getattr(lionax, name) for name in lionax.__all__ if name != "Scalar"}
PUBLIC |= {
    name: getattr(lionax.compat, name)
    for name in lionax.compat.__all__
    if name.endswith(("_optax", "_weights"))
}
for system in (lionax.compat.keras2, lionax.compat.keras3, lionax.compat.dtensor,
               lionax.compat.tf_models):
    functions = ("Lion", "SGD", "Lamb", "LAMB", "from_config", "to_config")
    PUBLIC |= {
        f"{system.__name__}.{name}": getattr(system, name)
        for name in functions
        if hasattr(system, name)
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = PUBLIC[name]
    text = inspect.getdoc(thing)
    assert text
    if name in ("Rule", "Step", "Transformation"):
        return
    assert ">>> " in text, "a doctest"
    assert len(re.findall(r"^\s*(>>>|\.\.\.)", text, re.M)) <= 8
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^\s+\**{parameter}: ", text, re.M), f"{parameter} has no description"
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))
    if "raise " in source:
        assert "Raises:" in text


def test_every_transformation_is_in_the_table_of_cases():
    assert {"lion", "lamb", "sgd", "trace", "chain"} <= set(MAKERS)
    assert set(MAKERS) == {case.public for case in cases.CASES.values()} | cases.IN_SHARD_MAP


def test_state_fields_are_commented():
    for module in CORE:
        source = MODULES[module].read_text().splitlines()
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef) and any(
                    getattr(base, "id", "") == "NamedTuple" for base in node.bases):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign):
                        assert "  # " in source[
                            field.lineno - 1], f"{module}.{node.name}: {source[field.lineno - 1]}"


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=ROOT, env={**os.environ, **environment})


def test_importing_touches_no_device_and_no_optional_package():
    code = """
    import sys
    for name in ("flax", "equinox", "matplotlib", "rich", "orbax", "hypothesis", "pytest"):
        sys.modules[name] = None
    import lionax
    from jax._src import xla_bridge
    assert not xla_bridge._backends, xla_bridge._backends
    lionax.chain(lionax.clip_by_global_norm(1.0), lionax.lion(1e-3, mask=lionax.matching("bias")))
    lionax.compiler_options()  # which comes before `jax.distributed.initialize`
    assert not xla_bridge._backends, "constructing touches a device"
    """
    result = run(textwrap.dedent(code))
    assert result.returncode == 0, result.stderr


def test_the_package_is_typed_and_versioned():
    assert (PACKAGE / "py.typed").exists()
    assert f"## {lionax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {lionax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_readme_shows_what_is_there():
    text = (ROOT / "README.md").read_text()
    for command in ('pip install ".[demo]" && lionax demo', 'pip install -e ".[test]" && pytest'):
        assert command in text
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        result = run(block)
        assert result.returncode == 0, result.stderr
