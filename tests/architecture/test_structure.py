"""The house as CONTRIBUTING.md describes it: import directions, no globals, light start-up."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"megalite": ROOT / "megalite", "megalite_kernels": ROOT / "kernels/megalite_kernels"}

# Each room may import the rooms of its own line and of the lines below it.
LAYERS = [
    {"pretrain", "verify", "doctor", "plan"},
    {"closing"},
    {"sampling", "verification", "diagnosis", "program"},
    {"trainer"},
    {"planning", "check", "check_memory"},
    {"figures"},
    {"metrics", "injected", "report", "estimate", "optim", "checkpoint", "pipeline", "saving"}
    | {"resume", "programs", "check_checkpoint", "check_trace", "schedule_flags"},
    {"effects", "preprocessing", "check_data", "check_pipeline", "check_scaling", "check_sharding"}
    | {"check_hf", "check_parameters", "check_precision"},
    {"data", "models", "cli"},
    {"layers", "config_file", "model_values"},
    {"parallel", "megalite_kernels", "field_values", "alternatives", "reading"}
    | {"plans", "run_plan", "treatment", "tensor_names", "precisions"},
    {"presets", "megatron_flags", "config", "config_data", "config_model", "config_parallel"}
    | {
        "config_checkpoint",
        "hf_config",
        "config_parameters",
        "config_scaling",
        "config_supervision",
        "exit_codes",
        "output",
        "batch_sizes",
        "option",
        "tokenizer",
        "errors",
        "events",
        "faults",
        "wording",
        "near",
    },
]

NO_TORCH = [
    "megalite.alternatives",
    "megalite.batch_sizes",
    "megalite.check",
    "megalite.check_checkpoint",
    "megalite.check_data",
    "megalite.check_hf",
    "megalite.check_memory",
    "megalite.check_parameters",
    "megalite.check_pipeline",
    "megalite.check_precision",
    "megalite.check_scaling",
    "megalite.check_sharding",
    "megalite.check_trace",
    "megalite.checkpoint.directory",
    "megalite.checkpoint.manifest",
    "megalite.checkpoint.regions",
    "megalite.checkpoint.tensor_file",
    "megalite.cli",
    "megalite.config",
    "megalite.config_checkpoint",
    "megalite.config_data",
    "megalite.config_file",
    "megalite.config_model",
    "megalite.config_parallel",
    "megalite.config_parameters",
    "megalite.config_scaling",
    "megalite.config_supervision",
    "megalite.events",
    "megalite.exit_codes",
    "megalite.output",
    "megalite.faults",
    "megalite.field_values",
    "megalite.hf_config",
    "megalite.near",
    "megalite.data.__main__",
    "megalite.data.best_fit",
    "megalite.data.best_fit_samples",
    "megalite.data.blend",
    "megalite.data.blended_samples",
    "megalite.data.cache",
    "megalite.data.sidecar",
    "megalite.data.corpus",
    "megalite.data.fill_in_middle",
    "megalite.data.index_cache",
    "megalite.data.indexed_writer",
    "megalite.data.ledger",
    "megalite.data.megatron_index",
    "megalite.data.megatron_samples",
    "megalite.data.mixture",
    "megalite.data.record",
    "megalite.data.samples",
    "megalite.data.sentinels",
    "megalite.data.source",
    "megalite.data.texts",
    "megalite.data.token_store",
    "megalite.diagnosis.row",
    "megalite.doctor",
    "megalite.effects",
    "megalite.estimate",
    "megalite.models.balance",
    "megalite.models.stage",
    "megalite.programs",
    "megalite.resume",
    "megalite.optim.filling",
    "megalite.optim.lr",
    "megalite.parallel.activity",
    "megalite.parallel.environment",
    "megalite.parallel.hang",
    "megalite.parallel.step_times",
    "megalite.parallel.stop",
    "megalite.parallel.stragglers",
    "megalite.parallel.topology",
    "megalite.planning.block_costs",
    "megalite.planning.choice",
    "megalite.pipeline.actions",
    "megalite.pipeline.building_blocks",
    "megalite.pipeline.channels",
    "megalite.pipeline.check",
    "megalite.pipeline.costs",
    "megalite.pipeline.draw",
    "megalite.pipeline.draw_svg",
    "megalite.pipeline.dualpipe_v",
    "megalite.pipeline.idle",
    "megalite.pipeline.lower",
    "megalite.pipeline.perfetto",
    "megalite.pipeline.phases",
    "megalite.pipeline.picture",
    "megalite.pipeline.placement",
    "megalite.pipeline.schedules",
    "megalite.pipeline.simulate",
    "megalite.pipeline.text",
    "megalite.pipeline.times",
    "megalite.pipeline.timing",
    "megalite.pipeline.trace",
    "megalite.pipeline.trace_file",
    "megalite.pipeline.weight_gradients",
    "megalite.pipeline.zb_v",
    "megalite.plan",
    "megalite.preprocessing.encode",
    "megalite.preprocessing.inspection",
    "megalite.preprocessing.merge",
    "megalite.preprocessing.run",
    "megalite.preprocessing.tokenizer_flags",
    "megalite.pretrain",
    "megalite.model_values",
    "megalite.option",
    "megalite.precisions",
    "megalite.program",
    "megalite.reading.records",
    "megalite.report",
    "megalite.run_plan",
    "megalite.schedule_flags",
    "megalite.tensor_names",
    "megalite.tokenizer.bpe",
    "megalite.tokenizer.byte",
    "megalite.tokenizer.choose",
    "megalite.tokenizer.hf",
    "megalite.tokenizer.hf_files",
    "megalite.tokenizer.null",
    "megalite.tokenizer.sentencepiece",
    "megalite.tokenizer.settings",
    "megalite.treatment",
    "megalite.verification.bounds",
    "megalite.verification.shrink",
    "megalite.verify",
]


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES and name not in PACKAGES}


def room(module: str) -> str:
    """The first folder or module; of the pipeline, what plans is apart from what runs."""
    parts = module.split(".")
    if parts[1:2] == ["pipeline"] and parts[-1] not in ("runtime", "recorder"):
        return "plans"
    return parts[0] if parts[0] == "megalite_kernels" else parts[1]


def level(module: str) -> int:
    return next(i for i, line in enumerate(LAYERS) if room(module) in line)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    if module == "megalite":
        assert not imports(MODULES[module])
        return
    for imported in imports(MODULES[module]):
        assert level(imported) >= level(module), f"{module} imports {imported}"
        if room(module) == "megalite_kernels":
            assert room(imported) == "megalite_kernels"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_mutable_state_at_module_level(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
            value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
        ):
            names = ast.unparse(node).split("=")[0]
            assert names.strip() == "__all__", f"{module}: {names} can be changed by anyone"


@pytest.mark.parametrize("module", NO_TORCH)
def test_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_is_a_plain_folder() -> None:
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's package"


def test_setup_lists_every_package() -> None:
    text = (ROOT / "setup.py").read_text()
    for package, folder in PACKAGES.items():
        for init in folder.rglob("__init__.py"):
            parts = (package, *init.parent.relative_to(folder).parts)
            assert f'"{".".join(parts)}"' in text


def test_no_pickle_and_no_code_from_files() -> None:
    banned = ("import pickle", "allow_pickle=True", "weights_only=False", "eval(", "exec(")
    for module, path in MODULES.items():
        text = path.read_text()
        assert not [word for word in banned if word in text.replace(".eval()", "")], module


def test_files_stay_small() -> None:
    long = {m: n for m, p in MODULES.items() if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"more than one idea in a file? {long}"


def test_every_folder_of_tests_is_collected(request: pytest.FixtureRequest) -> None:
    passed_over = request.config.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert not [f for f in folders if any(fnmatch.fnmatch(f, skip) for skip in passed_over)]
