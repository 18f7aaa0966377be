"""Imports point upwards only, and the package is light to import."""

import ast
import subprocess
import sys

ORDER = """
    files jobs checkpoints findings dicom images columns layouts cohort phantom captions diffusion
    latents finetune inversion regeneration attention masks editors editing scoring edits networks
    metrics geometry classifiers ganterfactual judging evaluation evidence methods arms augment
    study vqa limits params figures run leaderboard workbench studio counting planner manifest
    shards execute report sweep doctor cli
""".split()  # noqa: SIM905
PROGRAMS = ("pretrain", "quality")  # of the phantom: they stand below all that they call
HEAVY = {
    "torch",
    "pandas",
    "diffusers",
    "transformers",
    "timm",
    "papermill",
    "matplotlib",
    "IPython",
}


def imported(path):
    """Modules of this package that a file imports, at any depth of its code but in main()."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # A program, as torchrun starts it, stands below all that it calls.
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "main"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prism_nb"):
            inner = node.module.split(".")[1:2]
            yield from inner or (alias.name for alias in node.names if alias.name in ORDER)
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            yield from (parts[1] for parts in names if parts[0] == "prism_nb" and len(parts) > 1)


def test_imports_point_upwards_only(root):
    for path in sorted((root / "prism_nb").rglob("*.py")):
        module = path.relative_to(root / "prism_nb").with_suffix("").parts[0]
        if module == "__init__" or path.stem in PROGRAMS:
            continue
        assert module in ORDER, f"{module} has no place in ORDER of {__name__}"
        for name in imported(path):
            below = ORDER.index(name) > ORDER.index(module)
            assert not below, f"{path.name} imports {name}, which stands below {module}"


def test_the_phantom_is_read_from_graph_to_cohort(root):
    order = ["draw", "graph", "anatomy", "disease", "devices", "renderer", "cohort"]
    for module in order:
        path = root / "prism_nb" / "phantom" / f"{module}.py"
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = {n.module for n in tree if isinstance(n, ast.ImportFrom) and n.module}
        inner = {n.split(".")[2] for n in names if n.startswith("prism_nb.phantom.")}
        assert all(order.index(n) < order.index(module) for n in inner), module


def test_importing_the_package_is_quick_and_the_command_line_light():
    script = """
import sys, time
start = time.perf_counter()
import prism_nb
took = time.perf_counter() - start
import prism_nb.cli, prism_nb.execute, prism_nb.report, prism_nb.doctor
print(took, *sys.modules)
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ]
    runs += [subprocess.run(runs[0].args, capture_output=True, text=True) for _ in range(2)]
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.3
    assert not HEAVY & set(runs[0].stdout.split())
