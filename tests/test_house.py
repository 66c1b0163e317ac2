"""The map that CONTRIBUTING draws: which way imports point, and how many doors a corridor has."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dpo_ds"
ORDER = (
    "errors", "config", "cluster", "batch", "data", "logprobs", "losses", "models", "reference", "checkpoint", "memory",
    "training", "commands", "demo", "__main__",
)  # fmt: skip


def arrows() -> set[tuple[str, str]]:
    """Every import of one of our modules by another, those inside functions included, as dotted names below dpo_ds."""
    files = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
    modules = {name.removesuffix("__init__").rstrip(".") for name in files}
    found = set()
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dpo_ds":
                base = node.module.removeprefix("dpo_ds").lstrip(".")
                below = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
                found |= {(name, module if module in modules else base) for module in below}
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("dpo_ds.")]
                found |= {(name, module.removeprefix("dpo_ds.")) for module in names}
    return {(source.removesuffix(".__init__"), target) for source, target in found if target and source != target}


def test_imports_point_only_to_entries_above_ones_own():
    def room(module: str) -> int:
        return ORDER.index(module.split(".")[0])

    against = [f"{source} -> {target}" for source, target in sorted(arrows()) if room(target) > room(source)]
    assert against == [], "these imports point down the list in CONTRIBUTING.md"


def test_no_circle():
    """A folder's own name counts as its __init__: a module that imports from it needs it whole."""
    targets: dict[str, set[str]] = {}
    for source, target in arrows():
        targets.setdefault(source, set()).add(target)
    while leaves := {target for own in targets.values() for target in own} - targets.keys():
        targets = {source: left for source, own in targets.items() if (left := own - leaves)}
    assert targets == {}, "these modules import each other in a circle, or what does"


def test_the_corridor_is_short():
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    for folder in folders:
        files = list(folder.glob("*.py"))
        entries = [*files, *(path.parent for path in folder.glob("*/__init__.py"))]
        assert len(files) <= 14, f"{folder.name} has {len(files)} modules; 14 at most"
        assert folder != PACKAGE or len(entries) <= 16, f"dpo_ds/ has {len(entries)} entries; 16 at most"
