"""Runs the tests that prove a promise, in the long run, and writes `docs/reliability.md`.

``python tests/run_reliability.py`` takes about 45 minutes. With names of sections, or beginnings of
promises, it runs those again and keeps the others, which are in `docs/reliability.json`. A test
names its promise by ``@pytest.mark.promise(section, text)`` and its figures by the fixture
``figure``.
"""

import collections
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
RECORD = PAGE.with_suffix(".json")
HEAD = """# Reliability

What lionax promises, the test of each promise, and what the test saw. The tests made this page:

```
python tests/run_reliability.py
```

A figure is a sum over the tests of its row, but for one that is called largest. Errors are
relative to the largest element of a leaf. Of {tests:,} tests {failed} failed. The runs:

{runs}
"""


class Results:
    """What pytest's plugin hooks report, by promise."""

    def __init__(self):
        self.promises = collections.defaultdict(list)

    def pytest_runtest_logreport(self, report):
        promises = [value for name, value in report.user_properties if name == "promise"]
        # A set-up that fails or skips ends a test, too.
        if promises and (report.when == "call" or report.outcome != "passed"):
            self.promises[tuple(promises[0])].append(report)

    def sections(self):
        """What is kept of each section, by promise."""
        found, run = collections.defaultdict(dict), f"{datetime.date.today()}, {where()}"
        for (section, text), reports in self.promises.items():
            found[section][text] = row(reports) | {"run": run}
        return found


def page(record):
    """The text of the page."""
    rows = [row for section in record.values() for row in section.values()]
    passed, failed = (sum(row[outcome] for row in rows) for outcome in ("passed", "failed"))
    runs = sorted({row["run"] for row in rows})
    lines = [HEAD.format(tests=passed + failed, failed=failed, runs="\n".join(
        f"{number}. {run}" for number, run in enumerate(runs, 1)))]
    for section, kept in sorted(record.items()):
        lines += [f"## {section}\n", "| promise | tests | passed | figures | run |",
                  "| --- | --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(cells(text, row, runs))} |"
                  for text, row in sorted(kept.items())] + [""]
    return "\n".join(lines)


def where():
    """The versions and the machine of a run."""
    packages = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "flax"))
    return (f"Python {platform.python_version()}, {', '.join(packages)}, {platform.system()}, "
            f"{os.cpu_count()} CPU cores")


def row(reports):
    """What is kept of one promise."""
    files = collections.defaultdict(dict)  # their tests, in order
    for report in reports:
        file, test = report.nodeid.split("::")
        files[file][test.split("[")[0].removeprefix("test_")] = None
    return {"tests": {file: sorted(tests) for file, tests in sorted(files.items())},
            "passed": sum(report.outcome == "passed" for report in reports),
            "failed": sum(report.outcome == "failed" for report in reports),
            "figures": figures(reports)}


def cells(text, row, runs):
    """A row of a table. A link names the one test in its file, or tells how many there are."""
    links = (f"[{tests[0].replace('_', ' ') if len(tests) == 1 else f'{len(tests)} tests'}]"
             f"(../{file})" for file, tests in row["tests"].items())
    yield text.rstrip(".")
    yield ", ".join(links)
    yield f"{row['passed']:,}" + (f", {row['failed']} failed" if row["failed"] else "")
    yield "; ".join(f"{name} {written(value)}" for name, value in sorted(
        row["figures"].items()))
    yield str(1 + runs.index(row["run"]))


def figures(found):
    """The figures of several tests: of what is called so the largest, else the sum."""
    total = collections.defaultdict(list)
    for key, value in (pair for report in found for pair in report.user_properties):
        if key != "promise":
            total[key].append(value)
    return {key: (max if key.startswith("largest") else sum)(values)
            for key, values in total.items()}


def written(value):
    return f"{value:,}" if isinstance(value, int) else f"{value:.2g}"


def main(parts):
    """Runs the tests; returns pytest's exit status."""
    os.environ |= {"LIONAX_LONG": "1", "LIONAX_PROMISES": ";".join(parts)}
    os.chdir(ROOT)
    results = Results()
    status = pytest.main(["-m", "promise"], plugins=[results])
    record = json.loads(RECORD.read_text()) if parts else {}
    for section, found in results.sections().items():
        record[section] = record.get(section, {}) | found
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(record))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
