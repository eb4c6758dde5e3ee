"""The house rules: levels, containment of the engines, sizes, style; README quotes the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_srpo"
LEVELS = (
    "types protocols config_method config_sections config_precision config config_file seeding "
    "environment exit_codes run_folder staging shared_folder",
    "algorithm draws restarts rollouts resets advantages extensions thoughts localize rewards data "
    "tokenizer hf_folder hf_config hf_writer pack_layout batching loss mismatch metrics payoff "
    "stopwatch memory turns checkpoint_folder checkpoint_store signals stopping watchdog "
    "rendezvous kernels theory",
    "engines",
    "preflight claim journal kept weight_sync colocation guard telemetry evaluate held_out "
    "eval_table evaluate_model compare exchange replica export inputs plan sft retention assembly "
    "train checkpoints resume convert verify submit report profile",
    "__main__",
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
FILES = sorted(PACKAGE.rglob("*.py"))
PURE = (
    "types", "protocols", "algorithm", "draws", "restarts", "rollouts", "resets", "advantages",
    "thoughts", "localize",
)  # fmt: skip
HEAVY = ("torch", "megatron", "vllm", "transformers", "datasets")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    """`engines.fake` for megatron_srpo/engines/fake.py; a folder's own name for its __init__."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


TREES = {name_of(file): ast.parse(file.read_text()) for file in FILES}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that can run: what only a type checker reads is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for kept in child.orelse:
                yield from [kept, *runtime_nodes(kept)]
            continue
        yield child
        yield from runtime_nodes(child)


def imported(name: str) -> set[str]:
    """Dotted names that a module imports, inside functions too."""
    found: set[str] = set()
    for node in runtime_nodes(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(name: str) -> set[str]:
    """Modules of the package that a module imports; `from folder import file` is the file."""
    own = {i.removeprefix("megatron_srpo.") for i in imported(name)} & set(TREES)
    return own - {name}


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def num_lines(node: Function) -> int:
    """Decorators, signature and docstring included."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or first) - first + 1


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Blocks inside blocks of one function; `elif` is no deeper than its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef | ast.Lambda):
            continue
        is_block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match)
        is_elif = isinstance(child, ast.If) and child in getattr(node, "orelse", [])
        deepest = max(deepest, nesting(child, depth + (is_block and not is_elif)))
    return deepest


def num_branches(node: ast.AST) -> int:
    kinds = ast.If | ast.IfExp | ast.For | ast.While | ast.ExceptHandler | ast.match_case
    return sum(isinstance(child, kinds) for child in ast.walk(node))


def train_loop() -> Function:
    (loop,) = (f for f in functions(TREES["train"]) if f.name == "loop")
    return loop


# --- imports -------------------------------------------------------------------------------------


def test_every_module_has_a_level():
    modules = {name.split(".")[0] for name in TREES} - {"__init__", "megatron_srpo", ""}
    assert modules == set(LEVEL_OF)


@pytest.mark.parametrize("name", TREES)
def test_imports_go_down_the_levels_or_stay_on_one(name: str):
    own_level = LEVEL_OF.get(name.split(".")[0], 0)
    upward = {i for i in own_imports(name) if LEVEL_OF.get(i.split(".")[0], 0) > own_level}
    assert upward == set()


def test_no_module_imports_itself_by_way_of_others():
    open_names: list[str] = []
    done: set[str] = set()

    def visit(name: str) -> None:
        assert name not in open_names, " -> ".join([*open_names, name])
        if name in done:
            return
        open_names.append(name)
        for other in sorted(own_imports(name)):
            visit(other)
        done.add(open_names.pop())

    for name in TREES:
        visit(name)


@pytest.mark.parametrize("library", ["megatron", "vllm"])
def test_only_an_engines_own_folder_imports_its_library(library: str):
    users = {
        name
        for name in TREES
        if any(i == library or i.startswith(library + ".") for i in imported(name))
    }
    assert users and all(name.startswith(f"engines.{library}") for name in users)


def test_the_engines_do_not_know_each_other():
    for name in TREES:
        for one, other in (("megatron", "vllm"), ("vllm", "megatron")):
            if name.startswith(f"engines.{one}"):
                assert not any(i.startswith(f"engines.{other}") for i in own_imports(name))


def test_nothing_in_the_package_depends_on_the_theory():
    outside = [name for name in TREES if not name.startswith("theory")]
    assert not [name for name in outside if any("theory" in i for i in own_imports(name))]


@pytest.mark.parametrize("name", PURE)
def test_the_pure_modules_name_no_heavy_library(name: str):
    assert not {i.split(".")[0] for i in imported(name)} & set(HEAVY)


def test_importing_the_algorithm_loads_no_heavy_library():
    program = (
        "import sys, megatron_srpo.algorithm, megatron_srpo.advantages;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- size ----------------------------------------------------------------------------------------


def test_no_file_is_longer_than_400_lines():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_algorithm_can_be_read_in_150_lines():
    assert len((PACKAGE / "algorithm.py").read_text().splitlines()) <= 150


def test_no_function_is_longer_than_60_lines():
    long = {
        f"{name}.{f.name}": num_lines(f)
        for name, tree in TREES.items()
        for f in functions(tree)
        if num_lines(f) > 60
    }
    assert long == {}


def test_no_function_nests_deeper_than_three_blocks():
    deep = {
        f"{name}.{f.name}": nesting(f)
        for name, tree in TREES.items()
        for f in functions(tree)
        if nesting(f) > 3
    }
    assert deep == {}


def test_the_loop_has_at_most_60_lines_and_10_branches():
    assert num_lines(train_loop()) <= 60
    assert num_branches(train_loop()) <= 10


# --- style ---------------------------------------------------------------------------------------


def test_no_function_changes_a_global_name():
    assert [
        n for n, tree in TREES.items() if any(isinstance(x, ast.Global) for x in ast.walk(tree))
    ] == []


def test_no_except_hides_what_it_does_not_name():
    wide = ("Exception", "BaseException")
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}:{node.lineno}: bare except"
                caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                assert not caught & set(wide), f"{name}:{node.lineno}: except {caught}"


def test_no_file_is_named_after_nothing():
    nothing = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager"}
    assert not nothing & {part for name in TREES for part in name.split(".")}


def test_every_file_says_what_it_is_for():
    assert [n for n, tree in TREES.items() if tree.body and not ast.get_docstring(tree)] == []


def documents_itself(node: ast.stmt) -> bool:
    """A docstring; or, of a class, one under a field or in a method."""
    if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
        return True
    if ast.get_docstring(node):
        return True
    return isinstance(node, ast.ClassDef) and any(
        (
            isinstance(entry, ast.Expr)
            and isinstance(entry.value, ast.Constant)
            and isinstance(entry.value.value, str)
        )
        or (isinstance(entry, Function) and ast.get_docstring(entry))
        for entry in node.body
    )


def test_every_public_function_and_class_documents_itself():
    silent = [
        f"{name}.{node.name}"  # type: ignore[attr-defined]
        for name, tree in TREES.items()
        for node in tree.body
        if not documents_itself(node)
    ]
    assert silent == []


def test_no_module_holds_state_that_can_change():
    """Constants in capitals may be tables; everything else at module level is immutable."""
    mutable = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp
    found: list[str] = []
    for name, tree in TREES.items():
        for node in tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            makers = {"dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict"}
            is_made = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in makers
            if isinstance(node.value, mutable) or is_made:
                names = [ast.unparse(target) for target in targets]
                found += [f"{name}.{n}" for n in names if not re.fullmatch(r"[A-Z0-9_]+", n)]
    assert found == []


# --- README --------------------------------------------------------------------------------------


def readme_blocks(language: str) -> list[str]:
    readme = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)


def test_the_loop_in_the_readme_is_the_loop():
    (quoted,) = (block for block in readme_blocks("python") if block.startswith("def loop("))
    source = (PACKAGE / "train.py").read_text()
    assert quoted.strip() == (ast.get_source_segment(source, train_loop()) or "").strip()


def tree_paths(block: str) -> list[str]:
    """Paths of an indented tree: a name that ends with / is the folder of what is indented below.

    What follows two spaces is a remark; several names may share a line.
    """
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, block.splitlines()):
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split(" ")
        while folders and folders[-1][0] >= indent:
            folders.pop()
        above = folders[-1][1] if folders else ""
        paths += [above + name for name in names]
        if names[-1].endswith("/"):
            folders.append((indent, above + names[-1]))
    return paths


def test_a_tree_is_read_by_its_indentation():
    tree = "a/\n  b.py    what b is\n  c/   a folder\n    d.py e.py\n  f/g/  deep\n    h.py\ni.md"
    expected = ["a/", "a/b.py", "a/c/", "a/c/d.py", "a/c/e.py", "a/f/g/", "a/f/g/h.py", "i.md"]
    assert tree_paths(tree) == expected


def readme_tree() -> list[str]:
    (tree,) = (block for block in readme_blocks("text") if "megatron_srpo/" in block)
    return tree_paths(tree)


def test_everything_in_the_readmes_tree_is_there():
    assert [path for path in readme_tree() if not (ROOT / path).exists()] == []


def test_the_readmes_family_is_the_source_s():
    source = (PACKAGE / "engines/megatron/families/qwen3.py").read_text()
    assert source[source.index("FAMILY = ") :] in (ROOT / "README.md").read_text()


def test_every_file_of_the_package_is_in_the_readmes_tree():
    listed = set(readme_tree())
    files = {str(file.relative_to(ROOT)) for file in FILES if file.name != "__init__.py"}
    assert files - listed == set()
