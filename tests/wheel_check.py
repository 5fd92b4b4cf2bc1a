"""Build a wheel, and use it in an empty environment outside the repository (`make wheel-check`).

Libraries are those of this environment, found through a .pth file; mmkit must come from the wheel.
What runs there: the imports and files of the package, the README's first program in a few steps,
the command line, and one notebook in its fast mode.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = "03_training"  # quick, and it reads measured results
INSTALLED = """
import importlib.metadata, json, sys
from pathlib import Path
import mmkit as mm

home, version, files = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
assert Path(mm.__file__).is_relative_to(home), f"mmkit is {mm.__file__}, not of the wheel"
assert mm.__version__ == version == importlib.metadata.version("mmkit"), mm.__version__
missing = [name for name in files if not (Path(mm.__file__).parents[1] / name).is_file()]
assert not missing, f"not in the wheel: {missing}"
assert mm.results.read("race")["machine"]
print(f"mmkit {mm.__version__}, {len(files)} files")
"""
FAST = """
import functools
import mmkit as mm

mm.TrainingConfig = functools.partial(mm.TrainingConfig, max_steps=3, batch_size=64)
"""
RUN = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
quiet = ["--log-level=ERROR"]
NotebookClient(notebook, timeout=600, kernel_name="python3", extra_arguments=quiet).execute()
print(f"{sys.argv[1]}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells")
"""


def first_program() -> str:
    """The first Python program of the README that trains."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return next(code for code in found if "mm.train_model(" in code)


def package_files() -> list[str]:
    """Every file of the package that git knows, as the wheel must have it."""
    command = ["git", "ls-files", "mmkit"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in found.stdout.split() if (ROOT / name).is_file()]


def build(folder: Path) -> Path:
    """The wheel, built from a copy: what an earlier build has left gets into none."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mmkit", source / "mmkit", ignore=ignored)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(folder))
    (wheel,) = folder.glob("mmkit-*.whl")
    return wheel


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*command, *words, "--no-deps", "--quiet"], check=True)


def environment(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """(the Python, the site-packages) of an environment with the wheel and this one's libraries."""
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    paths = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    packages = Path(found.stdout.strip())
    pip("--python", str(python), "install", "--no-index", str(wheel))
    (packages / "libraries.pth").write_text("\n".join(dict.fromkeys(paths.values())) + "\n")
    return python, packages


def main() -> None:
    started = time.perf_counter()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        wheel = build(folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
        python, packages = environment(folder, wheel)
        work = folder / "work"
        work.mkdir()
        shutil.copy(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb", work)
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        # One thread: two wait for each other where another program keeps a core busy.
        variables |= {"MMKIT_FAST": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}

        def run(what: str, *words: str) -> None:
            if subprocess.run([str(python), *words], cwd=work, env=variables).returncode:
                sys.exit(f"with the wheel this fails: {what}")

        files = json.dumps(package_files())
        run("its contents", "-c", INSTALLED, str(packages), project["version"], files)
        run("the README's program", "-c", FAST + first_program())
        search = ["mmkit", "search", "a red cat", "--checkpoint", "runs/first/best_model.pth"]
        run("the command line", "-m", *search)
        run(f"notebook {NOTEBOOK}", "-c", RUN, f"{NOTEBOOK}.ipynb")
    print(f"the wheel works ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
