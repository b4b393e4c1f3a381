"""Install gradaug_hf beside other versions of what it needs, and run a fast part of the tests there.

    pip install uv
    python .ci/environments.py lowest newest    # in .environments/lowest and .environments/newest
    python .ci/environments.py --record         # in all, with the table in docs/installation.md

uv takes the Pythons of pyenv and those on the PATH, and downloads others. The exit status is 1 if a test failed, 3 if
an environment cannot be made here.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs" / "environments.json", ROOT / "docs" / "installation.md"
BEGIN, END = "<!-- environments: begin -->\n", "<!-- environments: end -->"
# Python, and what uv is told of the versions; `lowest` has the floors of setup.cfg.
ENVIRONMENTS = {
    "lowest": ("3.10", "--resolution lowest-direct"),
    "2.7": ("3.11", "torch==2.7.* transformers==5.7.* accelerate==1.8.* datasets==4.0.* numpy==2.0.* pillow==11.*"),
    "2.8": ("3.12", "torch==2.8.* transformers==5.10.* accelerate==1.10.* datasets==4.2.* numpy==2.0.* pillow==11.*"),
    "2.10": ("3.12", "torch==2.10.* transformers==5.20.* accelerate==1.13.* datasets==4.8.* numpy==2.3.*"),
    "2.13": ("3.13", "torch==2.13.* transformers==5.16.* accelerate==1.12.* datasets==4.5.* numpy==2.2.*"),
    "newest": ("3.13", "--prerelease allow --upgrade"),
}
PACKAGES = ("torch", "transformers", "timm", "accelerate", "datasets", "numpy", "pillow", "huggingface_hub")
# The objective, slicing, the trainer, a folder that timm and transformers load, resuming, two processes, compiling.
TESTS = (
    "tests/objective/test_objective.py",
    "tests/slimming/test_slimmable.py",
    "tests/trainer/test_hooks.py",
    "tests/trainer/test_resuming.py::test_a_killed_training_ends_as_if_it_had_not_been",
    "tests/hub/test_configs.py::test_what_the_trainer_saves_loads_in_timm_and_transformers",
    "tests/trainer/test_distributed.py::test_two_processes_train_like_one_with_the_whole_batch",
    "tests/trainer/test_distributed.py::test_two_processes_compile_each_subnetwork_once_and_train_as_uncompiled",
    "tests/trainer/test_compilation.py::test_training_and_evaluation_at_each_width_are_graphs_of_their_own_and_right",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; none: all of them")
    parser.add_argument("--folder", type=Path, default=ROOT / ".environments", help="where the environments lie")
    parser.add_argument("--record", action="store_true", help="write the result to docs/installation.md")
    args = parser.parse_args()
    if unknown := set(args.names) - {*ENVIRONMENTS}:
        parser.error(f"NAME is {', '.join(sorted(unknown))}; accepted are {', '.join(ENVIRONMENTS)}")
    rows = {}
    for name in args.names or ENVIRONMENTS:
        try:
            python = install(args.folder / name, *ENVIRONMENTS[name])
        except subprocess.CalledProcessError as error:
            print(f"{name} cannot be installed here: {error}", file=sys.stderr)
            return 3
        rows[name] = versions(python) | test(python, args.folder / name / "tests.xml")
        print(name, json.dumps(rows[name]), flush=True)
        if args.record:
            record(name, rows[name])
    return int(any(row["failed"] for row in rows.values()))


def install(folder: Path, python: str, wanted: str) -> Path:
    """Make an environment with this package in it, and return its Python."""
    uv = [sys.executable, "-m", "uv"]
    found = [str(path) for path in sorted(Path.home().glob(".pyenv/versions/*/bin"))]
    environ = {**os.environ, "PATH": os.pathsep.join([*found, os.environ["PATH"]])}
    subprocess.run([*uv, "venv", "--quiet", "--allow-existing", "--python", python, folder], env=environ, check=True)
    interpreter = folder / "bin" / "python"
    arguments = ["--python", interpreter, *wanted.split(), "-e", ".[test]"]
    subprocess.run([*uv, "pip", "install", "--quiet", *arguments], cwd=ROOT, check=True)
    return interpreter


def versions(python: Path) -> dict[str, str]:
    """Return the versions of Python and of the packages in an environment."""
    code = (
        "import json, platform; from importlib.metadata import version; "
        f"found = {{name: version(name).partition('+')[0] for name in {PACKAGES}}}; "
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def test(python: Path, report: Path) -> dict[str, int]:
    """Run the tests in an environment, and return how many passed, failed and were skipped."""
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "--quiet", "--maxprocesses", "2", f"--junitxml={report}", *TESTS]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    suite = ElementTree.parse(report).getroot()[0]
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {"passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}


def record(name: str, row: dict[str, Any]) -> None:
    """Keep the result of an environment, and write the table of all."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = {known: row if known == name else rows.get(known) for known in ENVIRONMENTS}
    rows = {known: found for known, found in rows.items() if found}
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table(rows)}{END}{rest.partition(END)[2]}")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the results as a table of the page."""
    head = ["Python", *PACKAGES, "passed", "failed", "skipped"]
    lines = [[str(value) for value in row.values()] for row in rows.values()]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    sys.exit(main())
