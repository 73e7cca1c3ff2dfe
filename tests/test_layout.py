"""The house stands as CONTRIBUTING.md says: folders, links, import directions, the wheel."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import copytree

import pytest

import arkcache

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "tiering")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]

# part -> the parts it may import. A part is a module of arkcache/ or a whole subpackage.
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "formats": {"errors"},
    "methods": {"errors", "methods"},
    "config": {"errors", "formats", "methods"},
    "settings": {"config", "errors", "sizes"},
    "sizes": {"errors"},
    "stats": set(),
    "kernels": {"config", "errors", "formats", "kernels"},
    "tiering": {"errors", "formats", "kernels", "tiering"},
    "tracing": {"errors", "files", "sizes", "tracing"},
}
MAY_IMPORT["pages"] = {"config", "errors", "kernels", "pages", "stats", "tiering"}
MAY_IMPORT["planning"] = {"config", "errors", "formats", "kernels", "pages", "tiering"}
MAY_IMPORT["lending"] = {"config", "errors"}
MAY_IMPORT["validate"] = {"config", "errors", "kernels", "pages"}
MAY_IMPORT["backend"] = {"config", "errors"}
MAY_IMPORT["engines"] = {*MAY_IMPORT, "engines"} - {"backend", "planning", "validate"}
MAY_IMPORT["layers"] = {*MAY_IMPORT, "layers"} - {"backend", "validate"}
MAY_IMPORT["manager"] = {*MAY_IMPORT}
MAY_IMPORT["manager"] |= {"saving"}
MAY_IMPORT["saving"] = {*MAY_IMPORT, "saving"} - {"backend", "planning", "validate"}
MAY_IMPORT["huggingface"] = {*MAY_IMPORT, "huggingface"}
MAY_IMPORT["chat"] = {*MAY_IMPORT, "chat"}
MAY_IMPORT["arkcache"] = {*MAY_IMPORT}
MAY_IMPORT["metrics"] = {"config", "errors", "stats"}
MAY_IMPORT["memory"] = {"backend", "config", "errors", "formats", "layers", "manager", "pages"}
MAY_IMPORT["memory"] |= {"planning", "tiering"}
MAY_IMPORT["demo"] = {*MAY_IMPORT, "demo"}
MAY_IMPORT["evaluation"] = {*MAY_IMPORT, "evaluation"}
MAY_IMPORT["bench"] = {*MAY_IMPORT, "bench"}
MAY_IMPORT["cli"] = {*MAY_IMPORT, "cli"}
MAY_IMPORT["__main__"] = {"cli"}

# Pure: integers and small tensors, testable anywhere.
PURE = {
    "arkcache.pages.bookkeeping",
    "arkcache.pages.evidence",
    "arkcache.pages.grouping",
    "arkcache.pages.importance",
    "arkcache.pages.policy",
    "arkcache.pages.windows",
}

# third party -> the parts that may import it; what is not named here may not be imported at all.
EVERYWHERE = {*MAY_IMPORT}
IMPORTED_BY = {
    "torch": EVERYWHERE,
    "numpy": EVERYWHERE,
    "safetensors": EVERYWHERE - {"pages"},
    "triton": {"kernels"},
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "cupy": {"tiering"},
    "transformers": {"bench", "chat", "huggingface", "demo", "evaluation", "cli"},
    "matplotlib": {"bench", "evaluation"},
    "prometheus_client": {"metrics"},
    "psutil": {"bench"},
    "rich": {"bench", "chat", "cli", "demo", "evaluation"},
    "typer": {"cli"},
}
# Heavy or optional: these import it inside functions, so that they start without it.
LAZILY = {
    ("arkcache.cli", "numpy"),
    ("arkcache.cli", "torch"),
    ("arkcache.cli", "transformers"),
    ("arkcache.cli", "arkcache.huggingface"),
    ("arkcache", "arkcache.chat.session"),
    ("arkcache", "arkcache.huggingface"),
    ("arkcache", "arkcache.manager"),
    ("arkcache", "torch"),
    ("arkcache.tiering", "cupy"),
    ("arkcache.config", "arkcache.methods"),  # they import numpy
    ("arkcache.manager", "arkcache.saving"),  # it imports the manager
    ("arkcache.layers.making", "arkcache.engines.device"),  # they import Triton
    ("arkcache.layers.making", "arkcache.layers.device_dense"),
    ("arkcache.layers.making", "arkcache.engines.native"),  # it imports numba
}


@dataclass(frozen=True)
class Import:
    """One imported name, and where."""

    importer: str
    name: str
    at_import_time: bool
    where: str

    @property
    def part(self) -> str:
        return part_of(self.importer)

    @property
    def target(self) -> str:
        """The part, for a name inside arkcache; the top-level package for any other."""
        return part_of(self.name)


def part_of(name: str) -> str:
    top, *rest = name.split(".")
    return rest[0] if top == "arkcache" and rest else top


@cache
def sources() -> dict[str, Path]:
    """Dotted name -> file, for every module that installs."""
    found = {}
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT / PROJECT["tool"]["setuptools"]["package-dir"][package]
        for path in sorted(folder.glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module, path in sources().items() for found in imports_of(module, path))


def imports_of(module: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(), path)
    deferred = set(deferred_nodes(tree))
    for node in ast.walk(tree):
        for name in imported_names(node):
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            yield Import(module, name, node not in deferred, where)


def deferred_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """What does not run when the module is imported: function bodies and TYPE_CHECKING blocks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        ):
            yield from ast.walk(node)


def imported_names(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            full = [f"{module}.{alias.name}" for alias in names]
            return [name if is_module(name) else module for name in full]
        case ast.ImportFrom():
            return ["<relative import>"]
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(
            function
        ) in {"importlib.import_module", "import_module", "__import__"}:
            return [name]
    return []


def is_module(name: str) -> bool:
    return name in sources() or name in PROJECT["tool"]["setuptools"]["packages"]


def is_within(name: str, module: str, *, deep: bool = True) -> bool:
    """Whether a dotted name is a module, or something in it."""
    return name == module or (deep and name.startswith(f"{module}."))


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Runs `code` in a new interpreter that sees `path` first; what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", LINKED)
def test_linked_folder(name: str) -> None:
    link = ROOT / "arkcache" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name / "__init__.py").exists()


def test_every_module_has_a_known_part() -> None:
    assert {part_of(module) for module in sources()} <= {*MAY_IMPORT}


def test_imports_point_one_way() -> None:
    wrong = [
        found
        for found in imports()
        if found.name.startswith("arkcache") and found.target not in MAY_IMPORT[found.part]
    ]
    assert wrong == []


def test_pure_modules_import_no_kernels_and_no_tiers() -> None:
    allowed = PURE | {"arkcache.errors"}
    wrong = [
        found
        for found in imports()
        if found.importer in PURE
        and found.name.startswith("arkcache")
        and not any(is_within(found.name, name) for name in allowed)
    ]
    assert wrong == []
    assert {*sources()} >= PURE


def test_third_parties_stay_in_their_parts() -> None:
    wrong = [
        found
        for found in imports()
        if not found.name.startswith("arkcache")
        and found.target not in sys.stdlib_module_names
        and found.part not in IMPORTED_BY.get(found.target, ())
    ]
    assert wrong == []


def test_heavy_imports_are_deferred() -> None:
    wrong = [
        found
        for found in imports()
        if found.at_import_time
        and any(
            is_within(found.importer, importer, deep=importer != "arkcache")
            and is_within(found.name, name)
            for importer, name in LAZILY
        )
    ]
    assert wrong == []


def test_import_sees_what_ast_hides() -> None:
    tree = ast.parse(
        "import a.b, c\n"
        "def f():\n"
        "    from d import e\n"
        "    importlib.import_module('g.h')\n"
        "if TYPE_CHECKING:\n"
        "    import i\n"
    )
    deferred = set(deferred_nodes(tree))
    found = {name: node in deferred for node in ast.walk(tree) for name in imported_names(node)}
    assert found == {"a.b": False, "c": False, "d": True, "g.h": True, "i": True}


HEAVY = ("cupy", "matplotlib", "numba", "numpy", "torch", "transformers", "triton")


def test_import_is_light() -> None:
    code = (
        "import sys, arkcache\n"
        "arkcache.CacheConfig(), arkcache.CacheStats(), dir(arkcache)\n"
        f"print(*({{*{HEAVY!r}, 'rich', 'typer'}} & {{*sys.modules}}))\n"
    )
    assert python(code, cwd=ROOT).split() == []


def test_the_manager_needs_torch_alone() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from arkcache import KVCacheManager\n"
        "heavy = {'transformers', 'triton', 'numba', 'cupy', 'typer'}\n"
        "print(*(heavy & (set(sys.modules) - before)))\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert python(code, cwd=ROOT).split() == []


def test_what_is_loaded_late_is_what_its_module_has() -> None:
    code = (
        "import arkcache, pickle\n"
        "from arkcache import KVCacheManager\n"
        "from arkcache.manager import KVCacheManager as there\n"
        "assert KVCacheManager is arkcache.KVCacheManager is there\n"
        "assert pickle.loads(pickle.dumps(arkcache.KVCacheManager)) is there\n"
        "assert pickle.loads(pickle.dumps(arkcache.ArkCache)) is arkcache.ArkCache\n"
    )
    python(code, cwd=ROOT)


def test_public_names_resolve_and_are_sorted() -> None:
    names = arkcache.__all__
    assert names == sorted(names)
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(arkcache, name)] == []
    assert {*names} <= {*dir(arkcache)}


def test_public_names_are_pinned() -> None:
    promised = {"ArkCache", "CacheConfig", "CacheStats", "KVCacheManager", "PrefixCache"}
    promised |= {"Session", "__version__", "detach", "generate_graphed", "load_config"}
    errors = {
        name
        for name, value in vars(arkcache.errors).items()
        if isinstance(value, type) and issubclass(value, arkcache.ArkCacheError)
    }
    assert {*arkcache.__all__} == promised | errors


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        arkcache.no_such_name  # noqa: B018


def test_version() -> None:
    assert arkcache.__version__ == VERSION


@dataclass(frozen=True)
class Built:
    """The distributions, and the wheel unpacked as an installer would."""

    sdist: Path
    wheel: Path
    site: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """tree -> sdist -> wheel, from a copy of the tree and without network."""
    work = tmp_path_factory.mktemp("build")
    tree = copy_of_the_tree(work / "tree")
    build = "from setuptools import build_meta; build_meta.build_sdist({!r})"
    python(build.format(str(work)), cwd=tree)
    (sdist,) = work.glob("*.tar.gz")
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", work, sdist], cwd=work, check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return Built(sdist, wheel, work / "site")


def copy_of_the_tree(target: Path) -> Path:
    target.mkdir()
    for path in ROOT.iterdir():
        if path.name in {"arkcache", "tests", "benchmarks", "examples", *LINKED}:
            copytree(path, target / path.name, symlinks=True)
        elif path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def installed_files() -> set[str]:
    """What the wheel must hold, metadata apart: the modules, the marker, the demo's model."""
    modules = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()
        for path in (ROOT / folder).glob("*.py")
    }
    model = (ROOT / "arkcache" / "demo" / "model").glob("*")
    data = {"arkcache/py.typed", "arkcache/tracing/page.html"}
    return modules | data | {str(path.relative_to(ROOT)) for path in model}


def test_wheel_holds_the_library_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        files = set(archive.namelist())
    metadata = f"arkcache-{VERSION}.dist-info/"
    assert {name for name in files if not name.startswith(metadata)} == installed_files()
    assert metadata + "licenses/LICENSE" in files
    assert built.wheel.name == f"arkcache-{VERSION}-py3-none-any.whl"


def test_sdist_can_be_tested(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert tests | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= files


def test_installed_wheel_has_no_bare_names(built: Built, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "import arkcache\n"
        f"print(*(find_spec(name).origin for name in {list(sources())!r}), sep='\\n')\n"
        f"for spec in filter(None, map(find_spec, {LINKED!r})):\n"
        "    print(*(spec.submodule_search_locations or [spec.origin]), sep='\\n')\n"
    )
    locations = python(code, cwd=tmp_path, path=built.site).splitlines()
    inside = {path.removeprefix(f"{built.site}/") for path in locations}
    modules = {name for name in installed_files() if name.endswith(".py")}
    assert modules <= inside
    assert [path for path in inside if path.startswith(LINKED)] == []


def test_this_installation_has_no_bare_names(tmp_path: Path) -> None:
    try:
        importlib.metadata.version("arkcache")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("arkcache is not installed here")
    code = (
        "from importlib.util import find_spec\n"
        f"for spec in filter(None, map(find_spec, {LINKED!r})):\n"
        "    print(*(spec.submodule_search_locations or [spec.origin]), sep='\\n')\n"
    )
    locations = python(code, cwd=tmp_path).splitlines()
    assert [path for path in locations if Path(path).is_relative_to(ROOT)] == []
