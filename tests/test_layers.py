"""Who may import whom: flows → tasks → hass_core. Read from the source, so nothing needs to be imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(place: str) -> Iterator[tuple[Path, str]]:
    """(file, imported module) for every import in a folder or a file, inside functions too."""
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file.relative_to(ROOT), alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                assert node.module
                yield file.relative_to(ROOT), node.module
                yield from ((file.relative_to(ROOT), f"{node.module}.{alias.name}") for alias in node.names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("package", ["prefect", "mlflow", "tasks", "flows", "tests"])
def test_the_core_imports_no_orchestrator_tracker_or_outer_layer(package):
    assert [entry for entry in imports("hass_core") if is_in(entry[1], package)] == []


@pytest.mark.parametrize("package", ["flows", "tests"])
def test_tasks_do_not_import_flows(package):
    assert [entry for entry in imports("tasks") if is_in(entry[1], package)] == []


def test_only_the_tracking_package_imports_mlflow():
    found = [*imports("tasks"), *imports("flows")]
    importers = {str(file) for file, module in found if is_in(module, "mlflow")}
    assert importers
    assert all(file.startswith("tasks/tracking/") for file in importers)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("hass_core/decoding", "hass_core.training"),  # what decodes needs no trainer
        ("hass_core/draft_model", "hass_core.target_model"),  # what a draft needs of its target is handed in
        ("hass_core/kernels", "hass_core.target_model"),
        ("hass_core/store", "hass_core.config"),
        ("hass_core/training", "hass_core.evaluation"),
        ("hass_core/data", "hass_core.features"),
        ("hass_core/data", "hass_core.decoding"),  # answering draws as decoding does, by hass_core.sampling
        ("hass_core/sampling.py", "hass_core.decoding"),
    ],
)
def test_the_core_is_layered(package, forbidden):
    assert [entry for entry in imports(package) if is_in(entry[1], forbidden)] == []


def test_packages_of_the_core_import_each_other_in_one_direction():
    needs: dict[str, set[str]] = {}
    for file, module in imports("hass_core"):
        if is_in(module, "hass_core") and module.count(".") and file.name != "__main__.py":
            needs.setdefault(file.with_suffix("").parts[1], set()).add(module.split(".")[1])
    order = TopologicalSorter({name: others - {name} for name, others in needs.items()})
    order.prepare()  # raises CycleError, naming the packages


def test_nothing_of_the_product_imports_the_benchmarks():
    found = [*imports("hass_core"), *imports("tasks"), *imports("flows")]
    assert [e for e in found if is_in(e[1], "hass_core.bench") and e[0].parts[1] != "bench"] == []


def test_flows_take_only_types_and_settings_from_the_core():
    allowed = ("hass_core.config", "hass_core.settings", "hass_core.store.Artifact", "hass_core.errors")
    core = {module for _, module in imports("flows") if is_in(module, "hass_core") and module != "hass_core.store"}
    assert [module for module in core if not module.startswith(allowed)] == []


def test_flows_do_not_compute():
    assert [entry for entry in imports("flows") if entry[1].split(".")[0] in ("torch", "transformers", "pyarrow")] == []


@pytest.mark.parametrize("module", ["hass_core.config", "hass_core.store", "hass_core.target_model.loader"])
def test_importing_the_core_loads_neither_prefect_nor_mlflow(module):
    code = f"import {module}, sys; print([m for m in ('prefect', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
