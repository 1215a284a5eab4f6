"""The architecture, read from the source: arrows point down only, and one file knows TRL's private names."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import trl

import trl_lol


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_lol"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
OLD_TRL = ROOT / "benchmarks" / "trl_ppo.py"  # runs with TRL 1.12, in an environment of its own
EVERYWHERE = [
    path
    for folder in ("trl_lol", "recipes", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path != OLD_TRL
]

SEAMS = ROOT / "tests" / "test_trl_seams.py"  # pins what `_trl.py` borrows, so it has to look inside TRL

PURE = {"losses", "advantages"}  # nothing but torch
TRAINERS = {"offline", "online"}  # each other's strangers, and nobody's foundation


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """
    Absolute dotted names of everything that a module's source imports, wherever in the module it does. For `from x
    import y` this is "x.y", whether y is a module or a name in one.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a module of the package that the layering forbids."""
    layer = module.split(".")[1] if "." in module else ""
    forbidden = []
    for name in imports(source, module, is_package):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "trl_lol":
            allowed = layer not in PURE and (target not in TRAINERS or layer in {target, ""})
        elif layer in PURE:
            allowed = top == "torch" or top in sys.stdlib_module_names
        else:
            allowed = top not in {"recipes", "benchmarks", "tests", "conftest"}
        if not allowed:
            forbidden.append(name)
    return forbidden


def own_module(name: str) -> str | None:
    """The module of the package that an imported dotted name is or lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    forbidden = upward(MODULES[module].read_text(), module, module in PACKAGES)
    assert not forbidden, f"{module} imports {forbidden}, which lies above or beside it: see `upward`"


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("trl_lol.losses", "import math\nimport torch.nn.functional as F\nfrom torch import Tensor", []),
        ("trl_lol.losses", "from transformers import Trainer", ["transformers.Trainer"]),
        ("trl_lol.losses", "from .advantages import gae", ["trl_lol.advantages.gae"]),
        ("trl_lol.data", "from ._trl import pad\nfrom trl import is_conversational", []),
        ("trl_lol.data", "def f():\n    from .offline.trainer import x", ["trl_lol.offline.trainer.x"]),
        ("trl_lol.rewards.scoring", "from ..data import Group\nfrom .calling import call", []),
        ("trl_lol.rewards.scoring", "from ..online import x", ["trl_lol.online.x"]),
        ("trl_lol.value", "import trl_lol.offline.trainer", ["trl_lol.offline.trainer"]),
        ("trl_lol.offline.trainer", "from .sampling import EpochSampler\nfrom ..losses import alol_loss", []),
        ("trl_lol.offline.trainer", "from ..online.trainer import x", ["trl_lol.online.trainer.x"]),
        ("trl_lol.online.trainer", "from trl_lol.offline import x", ["trl_lol.offline.x"]),
        ("trl_lol.toy", "from recipes import alol_hh\nimport tests.conftest", ["recipes.alol_hh", "tests.conftest"]),
    ],
)
def test_an_upward_import_is_caught(module, source, forbidden):
    """Control: what `upward` says of sources that are written for it."""
    assert upward(source, module) == forbidden


def test_no_import_cycles():
    graph = {
        module: {own_module(name) for name in imports(path.read_text(), module, module in PACKAGES)} - {module, None}
        for module, path in MODULES.items()
        if module != "trl_lol"  # imports its modules when asked for a name, see `test_importing_is_lazy`
    }
    assert graph["trl_lol.offline.alol_trainer"] >= {"trl_lol.losses", "trl_lol.offline.trainer"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"Modules import each other: {' -> '.join(error.args[1])}")


# ---- TRL ----


def trl_names(source: str) -> list[str]:
    """What a source takes from TRL beyond its public names."""
    public = {f"trl.{name}" for name in trl.__all__} | {"trl", "trl.__version__"}
    modules = {f"trl.{name}" for name in trl.__all__ if inspect.ismodule(getattr(trl, name))}
    return [name for name in imports(source, "") if name.split(".")[0] == "trl" and name not in public - modules]


def mentions_experimental(source: str) -> bool:
    """Whether a source imports from TRL's experimental folder, also through `importlib` or an attribute."""
    name = re.compile(r"trl\.experimental(\.\w+)*")
    nodes = list(ast.walk(ast.parse(source)))
    dotted = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    dotted += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return any(map(name.fullmatch, [*imports(source, ""), *dotted]))


def test_private_names_of_trl_are_imported_in_one_file():
    taken = {path: trl_names(path.read_text()) for path in EVERYWHERE if path != SEAMS}
    assert taken.pop(PACKAGE / "_trl.py")
    taken = {str(path.relative_to(ROOT)): names for path, names in taken.items() if names}
    assert not taken, f"{taken}: import them in trl_lol/_trl.py, with a comment that says what they are relied on for"


@pytest.mark.parametrize(
    ("source", "taken"),
    [
        ("from trl import DPOTrainer, extract_prompt\nimport trl", []),
        ("import trl_lol.data\nfrom trl_lol._trl import pad", []),
        ("from trl.trainer.utils import pad", ["trl.trainer.utils.pad"]),
        ("import trl.data_utils", ["trl.data_utils"]),
        ("from trl import data_utils", ["trl.data_utils"]),
        ("def f():\n    from trl import models", ["trl.models"]),
    ],
)
def test_a_private_name_of_trl_is_caught(source, taken):
    """Control: what `trl_names` says of sources that are written for it."""
    assert trl_names(source) == taken


def test_what_is_borrowed_is_listed():
    """`__all__` of `_trl.py` is what `tests/test_trl_seams.py` pins, so a name must not be missing from it."""
    from trl_lol import _trl

    tree = ast.parse((PACKAGE / "_trl.py").read_text())
    names = [a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert sorted(names) == _trl.__all__ == sorted(_trl.__all__)


def test_experimental_is_never_imported():
    assert not [str(path) for path in EVERYWHERE if mentions_experimental(path.read_text())]
    experimental = "trl." + "experimental"
    for source in (
        f"from {experimental}.gkd import GKDTrainer",
        f"import {experimental} as x",
        "from trl import experimental",
        f"import trl\n{experimental}.gkd",
        f"import_module('{experimental}.gkd')",
    ):
        assert mentions_experimental(source), source
    assert not mentions_experimental(f'"""Not from {experimental}, which changes without notice."""\nimport trl')


# ---- Public names ----


def test_public_names_resolve():
    assert len(set(trl_lol.__all__)) == len(trl_lol.__all__) == len(dir(trl_lol))
    for name in trl_lol.__all__:
        value = getattr(trl_lol, name)
        assert value is not None and (name == "__version__" or value.__name__ == name)
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainer'"):
        trl_lol.DPOTrainer  # noqa: B018


def test_type_checkers_see_the_same_names():
    """The imports under `TYPE_CHECKING` repeat, for tools that do not run the module, what `__getattr__` imports."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: f".{node.module}" for node in block.body for alias in node.names}
    assert seen == trl_lol._MODULES


def test_importing_is_lazy():
    """A fresh interpreter, since this one has imported everything by now. The control: using a name imports TRL."""
    script = (
        "import sys, trl_lol; dir(trl_lol), trl_lol.__version__\n"
        "heavy = ['torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate']\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "trl_lol.sequence_advantages\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines() == ["[]", "['torch']"], result.stderr


def undocumented(module: object) -> list[str]:
    """Public classes and functions of a module, and their own public methods, that have no docstring."""
    missing = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if (inspect.isclass(value) or inspect.isfunction(value)) and not _doc(value):
            missing.append(name)
        if inspect.isclass(value):
            missing += [f"{name}.{method}" for method in _own_methods(value) if not _doc(getattr(value, method))]
    return missing


def _doc(value: object) -> str | None:
    # A dataclass or NamedTuple without a docstring is given its signature as one
    doc = value.__doc__
    return None if doc and doc.startswith(f"{getattr(value, '__name__', '')}(") else doc


def _own_methods(cls: type) -> list[str]:
    """Names of the public methods and properties that a class introduces. An override is described where it began."""
    kinds = (property, classmethod, staticmethod)
    return [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (isinstance(value, kinds) or inspect.isfunction(value))
        and name != "torch_call"  # what DataCollatorMixin calls without defining it
        and not any(hasattr(base, name) for base in cls.__bases__)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    assert not undocumented(importlib.import_module(module))


def test_a_missing_docstring_is_caught():
    """Control: this module with two functions and a class added that have none."""
    module = type(sys)("synthetic")
    source = (
        "from dataclasses import dataclass\nfrom math import sqrt\n"
        "def f(): pass\ndef g():\n    'Says what it does.'\ndef _h(): pass\n"
        "@dataclass\nclass A:\n    x: int\n    def method(self): pass\n"
    )
    exec(source, vars(module))
    assert undocumented(module) == ["f", "A", "A.method"]
