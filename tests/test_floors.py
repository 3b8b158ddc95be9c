"""The house has floors: a module imports from its own floor and from those below, never from one above, and never in a circle.

The imports are read from the source, those inside functions too; those for type checkers alone do not count.
"""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "flashsfa"

# Lowest first. A name stands for a module, or for a package with all that it holds. The package's own __init__ stands on no floor:
# it shows what the others hold. Nor does that of ops, which holds words alone.
FLOORS = (
    ("checks", "contexts", "extras", "files"),  # 1: what everything needs, and nothing of attention
    (
        "budget",
        "formats",
        "mask",
        "reference",
        "rotation",
        "scores",
    ),  # 2: the types of the rules, and the exact operator in plain PyTorch
    (
        "ops.record",
        "ops.compiled",
        "ops.cpu",
        "ops.nvrtc",
        "ops.triton",
        "ops.select",
        "ops.transform",
    ),  # 3: the record of what ran, what kernels share, coding and the coordinates before it
    ("codes", "narrow", "axes"),  # 4: the types of the codes, over the operators that make them
    (
        "stored",
        "coder",
        "ops.prefill",
        "ops.decode",
        "ops.plan",
    ),  # 5: what a cache holds, attention in all its forms, and which one runs
    ("attention", "decode", "cache", "basis", "nn"),  # 6: the public operators, caches, basis and layer
    ("huggingface", "vllm"),  # 7: glue to other libraries
    (
        "training",
        "evaluation",
        "benchmarking",
        "candidates",
        "choose",
        "convert",
        "presets",
        "report",
        "models",
        "outlook",
    ),  # 8: the laboratory
    ("cli",),  # 9: the command line
)
LIBRARY = 7  # the highest floor of what a user's program imports
WITHOUT_FLOOR = ("", "ops")


def module_name(file):
    """The name below flashsfa: "" of the package itself, "ops.select.plain" of ops/select/plain.py."""
    return ".".join(part for part in file.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def floor(module):
    for number, names in enumerate(FLOORS, start=1):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    return None


def imports(module):
    """The modules of the package that `module` imports, by the lines that do; nobody imports a parent by importing its child."""
    found = {}
    for node in statements(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = source(module, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if below(name) in FILES else base for name in names]
        for name in names:
            if below(name) is not None:
                assert below(name) in FILES, f"line {node.lineno} of {FILES[module]} imports {name}, which is no module"
                found.setdefault(below(name), node.lineno)
    return found


def statements(node):
    """The imports below a node of the syntax tree, but those that a type checker alone follows."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).removeprefix("typing.") == "TYPE_CHECKING":
            yield from statements(ast.Module(child.orelse, []))
        else:
            yield from statements(child)


def source(module, node):
    """The absolute name of what `from ... import` names, for an import in `module`."""
    if node.level == 0:
        return node.module
    parts = ["flashsfa", *filter(None, module.split("."))]
    up = node.level - (FILES[module].name == "__init__.py")
    return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])


def below(name):
    """The name below flashsfa of an absolute name; None if it is another package's."""
    return name.removeprefix("flashsfa").removeprefix(".") if name.split(".")[0] == "flashsfa" else None


IMPORTS = {module: imports(module) for module in FILES}


def test_every_module_stands_on_a_floor():
    homeless = [
        str(FILES[module].relative_to(PACKAGE))
        for module in FILES
        if floor(module) is None and module not in WITHOUT_FLOOR
    ]
    assert not homeless, "name these in FLOORS above, on the lowest floor that holds all they import: " + ", ".join(
        homeless
    )


def test_nobody_climbs():
    climbs = [
        f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)}) in line {line}"
        for module, others in IMPORTS.items()
        for other, line in others.items()
        if module not in WITHOUT_FLOOR and other not in WITHOUT_FLOOR and (floor(other) or 0) > (floor(module) or 0)
    ]
    assert not climbs, "move what is shared to a lower floor:\n" + "\n".join(climbs)


def test_the_library_imports_nothing_of_the_laboratory():
    """Nor does the package's own __init__, which stands on no floor."""
    wrong = [
        f"{module or 'flashsfa'} imports {other} in line {line}"
        for module, others in IMPORTS.items()
        for other, line in others.items()
        if (floor(module) or 0) <= LIBRARY < (floor(other) or 0)
    ]
    assert not wrong, "\n".join(wrong)


def reachable(module):
    """All modules that `module` imports, and that these import."""
    seen, waiting = set(), list(IMPORTS[module])
    while waiting:
        if (other := waiting.pop()) not in seen:
            seen.add(other)
            waiting += IMPORTS[other]
    return seen


def test_no_circles():
    reach = {module: reachable(module) for module in FILES}
    circles = {frozenset(other for other in reach[module] if module in reach[other]) for module in FILES}
    assert circles == {frozenset()}, "each of these imports itself in the end: " + "; ".join(
        ", ".join(sorted(name or "flashsfa" for name in circle)) for circle in circles if circle
    )


ASK = """
import sys
import torch
before = set(sys.modules)
import flashsfa
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(names & {"triton", "transformers", "numba", "matplotlib", "rich"}), "GPU" if torch.cuda.is_initialized() else "")
"""


def test_importing_the_package_is_light():
    """It needs torch alone, and touches no GPU."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
