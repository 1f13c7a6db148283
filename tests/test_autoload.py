# SPDX-License-Identifier: Apache-2.0
"""What `import torch` does with SPON installed, intact or not: tests of integrations/spon_autoload.py.

Every test runs in a fresh interpreter with a site directory of its own, which holds a copy of the module under test and
the metadata that make torch call it. Most of them put tiny stand-ins for torch, peft, transformers and lm_eval there as
well.
"""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parents[1] / "integrations" / "spon_autoload.py"

# Directories on PYTHONPATH precede site-packages, so that our dist-info hides the one of an installed spon-plugin (the
# first distribution of a name counts) and our copy of the module hides the installed one. Packages that a test leaves
# out would still be found there: this finder says that they do not exist.
ISOLATE = """
import sys
from importlib.machinery import PathFinder
class OnlyThisSite:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if path is None and name.startswith("spon_"):
            spec = PathFinder.find_spec(name, [{site!r}])
            if spec is None:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
            return spec
sys.meta_path.insert(0, OnlyThisSite)
"""

# The part of torch/__init__.py that matters here.
TORCH = """
from importlib.metadata import entry_points
for entry in entry_points(group="torch.backends"):
    entry.load()()
"""

REGISTER = "def register():\n    print('registered', __name__)\n"
BROKEN = {
    "syntax-error": "def register(:\n",
    "import-error": "from os import no_such_name\n",
    "runtime-error": "raise RuntimeError('boom')\n",
}
WARNING = "RuntimeWarning: spon-plugin could not register with "

needs_hosts = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("peft", "transformers"))), reason="needs peft and transformers"
)
# tests/lm_eval is on sys.path under that name, as a package without a file
LM_EVAL = importlib.util.find_spec("lm_eval")
needs_lm_eval = pytest.mark.skipif(LM_EVAL is None or LM_EVAL.origin is None, reason="needs lm-eval")


class Site:
    """A directory of modules and the interpreters that see it."""

    def __init__(self, root: Path):
        self.path = root / "site"
        self.cwd = root / "empty"  # `python -c` puts its working directory on sys.path
        self.cwd.mkdir()
        self.write("spon_autoload.py", MODULE.read_text(encoding="utf-8"))
        self.write("spon_plugin-0.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: spon-plugin\nVersion: 0.0.0\n")
        self.write("spon_plugin-0.0.0.dist-info/entry_points.txt", "[torch.backends]\nspon = spon_autoload:autoload\n")

    def write(self, name: str, text: str = "") -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def run(self, code: str, *flags: str, **variables: str) -> subprocess.CompletedProcess:
        ours = ("SPON_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONWARNINGS")
        env = {key: value for key, value in os.environ.items() if key not in ours}
        env |= {"PYTHONPATH": str(self.path), "PYTHONIOENCODING": "utf-8", **variables}
        command = [sys.executable, *flags, "-c", ISOLATE.format(site=str(self.path)) + code]
        return subprocess.run(command, env=env, cwd=self.cwd, capture_output=True, text=True, timeout=300)

    def output(self, code: str, *flags: str, **variables: str) -> list[str]:
        """The lines that `code` prints, provided that it succeeds and writes nothing to stderr."""
        result = self.run(code, *flags, **variables)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        return result.stdout.splitlines()


@pytest.fixture
def real(tmp_path):
    """A site with the autoload module only: torch, peft and transformers are the installed ones."""
    return Site(tmp_path)


@pytest.fixture
def fake(real):
    """A site with intact stand-ins for the hosts and for our packages."""
    real.write("torch.py", TORCH)
    real.write("peft/__init__.py")
    real.write("peft/tuners/__init__.py", "READY = True\n")
    real.write("transformers/__init__.py")
    real.write("transformers/quantizers/__init__.py")
    real.write("transformers/quantizers/auto.py", "READY = True\n")
    real.write("lm_eval/__init__.py")
    real.write("lm_eval/models/__init__.py", "READY = True\n")
    real.write("spon_peft/__init__.py", REGISTER)
    real.write("spon_transformers/__init__.py", REGISTER)
    real.write("spon_lm_eval/__init__.py", REGISTER)
    return real


# --- the installed torch, peft and transformers ---


@pytest.mark.parametrize(
    "package",
    [
        *(pytest.param(source, id=name) for name, source in BROKEN.items()),
        pytest.param(None, id="absent"),
    ],
)
def test_import_torch_is_unaffected(real, package):
    if package is not None:
        real.write("spon_peft/__init__.py", package)
        real.write("spon_transformers/__init__.py", package)
    code = """
import torch
assert torch.ones(2).sum() == 2
assert "spon_autoload" in sys.modules and "spon_peft" not in sys.modules and "peft" not in sys.modules
"""
    assert real.output(code) == []


USE_PEFT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
    import torch
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
assert model(torch.ones(1, 4)).shape == (1, 4)
for warning in caught:
    if "spon" in str(warning.message):
        print(warning.category.__name__, warning.message)
"""


@needs_hosts
def test_real_peft_with_our_package_broken(real):
    real.write("spon_peft/__init__.py", BROKEN["import-error"])
    result = real.run(USE_PEFT)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("RuntimeWarning spon-plugin could not register with peft.tuners (ImportError: ")


@needs_hosts
def test_real_peft_with_our_packages_absent(real):
    result = real.run(USE_PEFT)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "spon" not in result.stderr


@needs_hosts
@pytest.mark.parametrize(
    "first",
    [
        pytest.param("from peft.utils import PeftType", id="peft-imports-torch"),
        pytest.param("import transformers.quantizers.auto", id="auto-imports-torch"),
        pytest.param(
            "from transformers import AutoModelForCausalLM as _, PreTrainedModel as _", id="transformers-first"
        ),
        pytest.param("import spon_peft", id="our-package-first"),
    ],
)
def test_real_hosts_offer_what_the_hooks_need(real, first):
    """At the time of the hooks, in every order of imports: the names that our packages register with."""
    real.write(
        "spon_peft/__init__.py",
        """
import peft
def register():
    from peft.config import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import PeftType, register_peft_method
    assert len(PEFT_TYPE_TO_TUNER_MAPPING) > 10
    print("registered", __name__)
""",
    )
    real.write(
        "spon_transformers/__init__.py",
        """
def register():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
    assert "awq" in AUTO_QUANTIZER_MAPPING
    print("registered", __name__)
""",
    )
    real.write("lm_eval/__init__.py")
    real.write("lm_eval/models/__init__.py")
    real.write("spon_lm_eval/__init__.py", REGISTER)
    ours = 'print(sum(type(finder).__module__ == "spon_autoload" for finder in sys.meta_path))'
    result = real.run(f"{first}\nimport peft, transformers.quantizers.auto, lm_eval.models\n{ours}")
    assert result.returncode == 0, result.stderr
    assert "spon" not in result.stderr
    *registered, left = result.stdout.splitlines()
    assert sorted(registered) == ["registered spon_lm_eval", "registered spon_peft", "registered spon_transformers"]
    assert left == "0"


@needs_lm_eval
@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import torch, lm_eval.models", id="torch-first"),
        pytest.param("import lm_eval.models, torch", id="models-first"),
        pytest.param("from lm_eval.models.huggingface import HFLM", id="model-of-lm-eval-first"),
        pytest.param("import lm_eval.evaluator", id="evaluator-first"),
        pytest.param("import spon_lm_eval, torch", id="our-package-first"),
    ],
)
def test_real_lm_eval_offers_what_the_hook_needs(real, first):
    """At the time of the hook: a registry that takes a placeholder, without importing what it stands for."""
    real.write(
        "spon_lm_eval/__init__.py",
        """
def register():
    import sys
    from lm_eval.api.registry import model_registry
    assert "hf" in model_registry
    before = set(sys.modules)
    if "spon-hf" not in model_registry:
        model_registry.register("spon-hf", target="spon_lm_eval:Model")
    assert set(sys.modules) == before
    print("registered", __name__)
class Model:
    pass
""",
    )
    result = real.run(f"{first}\nimport torch\nfrom lm_eval.api.registry import get_model\nprint(get_model('spon-hf'))")
    assert result.returncode == 0, result.stderr
    assert "could not register" not in result.stderr
    assert result.stdout.splitlines() == ["registered spon_lm_eval", "<class 'spon_lm_eval.Model'>"]


# --- when the hooks run ---


def test_each_hook_runs_once_and_the_finder_leaves(fake):
    code = """
before = list(sys.meta_path)
import torch
print("torch")
import peft.tuners
print("peft")
import transformers.quantizers.auto
import lm_eval.models
import peft.tuners, torch
assert sys.meta_path == before
"""
    registered = ["registered spon_transformers", "registered spon_lm_eval"]
    assert fake.output(code) == ["torch", "registered spon_peft", "peft", *registered]


def test_autoload_called_again(fake):
    code = """
import torch, spon_autoload
spon_autoload.autoload()
print(sum(type(finder).__module__ == "spon_autoload" for finder in sys.meta_path))
import peft.tuners
spon_autoload.autoload()
import transformers.quantizers.auto, lm_eval.models
spon_autoload.autoload()
print(sum(type(finder).__module__ == "spon_autoload" for finder in sys.meta_path))
"""
    registered = ["registered spon_peft", "registered spon_transformers", "registered spon_lm_eval"]
    assert fake.output(code) == ["1", *registered, "0"]


def test_switched_off(fake):
    code = """
before = sys.meta_path, list(sys.meta_path)
import torch, peft.tuners, transformers.quantizers.auto, lm_eval.models
assert sys.meta_path is before[0] and sys.meta_path == before[1]
assert "spon_autoload" in sys.modules
"""
    assert fake.output(code, SPON_AUTOLOAD="0") == []
    assert "registered spon_peft" in fake.run("import torch, peft.tuners", SPON_AUTOLOAD="1").stdout


def test_host_that_was_imported_before(fake):
    assert fake.output("import peft.tuners\nprint('host')\nimport torch") == ["host", "registered spon_peft"]


def test_host_barred_from_being_imported(fake):
    assert fake.output("sys.modules['peft.tuners'] = None\nimport torch") == []


def test_host_that_is_being_imported(fake):
    fake.write("peft/tuners/__init__.py", "import torch\nprint('torch')\nREADY = True\n")
    fake.write("spon_peft/__init__.py", "from peft.tuners import READY\n" + REGISTER)
    code = """
import peft.tuners
from importlib.machinery import ModuleSpec
assert type(peft.tuners.__spec__) is ModuleSpec and peft.tuners.__spec__._initializing is False
"""
    assert fake.output(code) == ["torch", "registered spon_peft"]


@pytest.mark.parametrize(
    "torch", [pytest.param("", id="torch-before"), pytest.param("import torch\n", id="torch-during")]
)
def test_host_that_fails_at_first(fake, torch):
    fake.write("peft/tuners/__init__.py", f"import os\n{torch}if 'FAIL' in os.environ:\n    raise OSError('host')\n")
    code = """
import os
if not "TORCH":
    import torch
os.environ["FAIL"] = "1"
try:
    import peft.tuners
except OSError as error:
    print(error, "peft.tuners" in sys.modules)
del os.environ["FAIL"]
import peft.tuners
"""
    assert fake.output(code.replace("TORCH", torch.strip())) == ["host False", "registered spon_peft"]


def test_looking_for_a_host_is_not_importing_it(fake):
    code = """
import importlib.util, torch
for _ in range(2):
    spec = importlib.util.find_spec("peft.tuners")
    assert spec.loader.get_source("peft.tuners") == "READY = True\\n"
print("found", "peft.tuners" in sys.modules)
import peft.tuners
print(importlib.util.find_spec("peft.tuners") is peft.tuners.__spec__)
"""
    assert fake.output(code) == ["found False", "registered spon_peft", "True"]


def test_reloading_a_host(fake):
    code = """
import importlib, torch, peft.tuners
peft.tuners.READY = False
assert importlib.reload(peft.tuners).READY
"""
    assert fake.output(code) == ["registered spon_peft"]


def test_the_host_looks_as_without_us(fake):
    code = """
import importlib.resources, inspect, pickle, torch, peft.tuners
from importlib.machinery import ModuleSpec, SourceFileLoader
spec = peft.tuners.__spec__
assert type(spec) is ModuleSpec and type(spec.loader) is SourceFileLoader and peft.tuners.__loader__ is spec.loader
assert set(vars(spec)) == set(vars(peft.__spec__)) and set(vars(spec.loader)) == set(vars(peft.__loader__))
assert inspect.getsource(peft.tuners) == "READY = True\\n"
assert importlib.resources.files("peft.tuners").joinpath("__init__.py").read_text() == "READY = True\\n"
pickle.dumps(spec)
"""
    assert fake.output(code) == ["registered spon_peft"]


def test_our_package_imports_the_host(fake):
    """The hook has to wait: its function is defined after the import of the host."""
    fake.write("spon_peft/__init__.py", "import peft.tuners\nprint('peft')\n" + REGISTER)
    assert fake.output("import torch, spon_peft") == ["peft", "registered spon_peft"]


@pytest.mark.parametrize("first", ["kinds", "uses"])
def test_a_module_of_our_package_imports_the_host(fake, first):
    """The hook has to wait for the outermost of them: what it registers is defined after the import of the host."""
    fake.write("spon_peft/__init__.py", "def register():\n    from spon_peft.kinds import KIND\n    print(KIND)\n")
    fake.write("spon_peft/kinds.py", "import peft.tuners\nprint('peft')\nKIND = 'kind'\n")
    fake.write("spon_peft/uses.py", "from spon_peft.kinds import KIND\nprint('used')\n")
    lines = {"kinds": ["peft", "kind"], "uses": ["peft", "used", "kind"]}
    assert fake.output(f"import torch, spon_peft.{first}") == lines[first]


@needs_hosts
def test_our_quantizer_imports_the_real_host(real):
    real.path.joinpath("spon_plugin").symlink_to(MODULE.parents[1] / "spon_plugin")
    for name in ("spon_transformers", "spon_peft"):
        real.path.joinpath(name).symlink_to(MODULE.parent / name)
    code = "import torch, spon_transformers.quantizer\nfrom transformers.quantizers import auto\n"
    result = real.run(code + "print('spon' in auto.AUTO_QUANTIZER_MAPPING)")
    assert result.stdout == "True\n" and "could not register" not in result.stderr, result.stderr


def test_one_hook_sets_off_the_other(fake):
    fake.write("spon_peft/__init__.py", "import transformers.quantizers.auto\n" + REGISTER)
    assert fake.output("import torch, peft.tuners") == ["registered spon_transformers", "registered spon_peft"]


# --- hooks that fail ---


@pytest.mark.parametrize(
    ("package", "error"),
    [
        pytest.param(BROKEN["syntax-error"], "SyntaxError: ", id="syntax-error"),
        pytest.param(BROKEN["import-error"], "ImportError: cannot import name", id="import-error"),
        pytest.param(BROKEN["runtime-error"], "RuntimeError: boom", id="runtime-error"),
        pytest.param("import no_such", "ModuleNotFoundError: No module named 'no_such'", id="dependency-absent"),
        pytest.param(
            "import spon_peft.gone", "ModuleNotFoundError: No module named 'spon_peft.gone'", id="part-absent"
        ),
        pytest.param("", "AttributeError: ", id="no-function"),
        pytest.param("def register():\n    raise KeyError('again')", "KeyError: 'again'", id="function-raises"),
    ],
)
def test_failing_hook_is_one_warning(fake, package, error):
    fake.write("spon_peft/__init__.py", package)
    result = fake.run("import torch\nimport peft.tuners, transformers.quantizers.auto\nprint(peft.tuners.READY)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["registered spon_transformers", "True"]
    assert result.stderr.count("spon-plugin") == 2  # the message and its remedy
    assert f"{WARNING}peft.tuners ({error}" in result.stderr
    assert "Reinstall spon-plugin, or set SPON_AUTOLOAD=0" in result.stderr


def test_failing_hook_where_warnings_are_errors(fake):
    fake.write("spon_peft/__init__.py", BROKEN["runtime-error"])
    result = fake.run("import torch\nimport peft.tuners\nprint(peft.tuners.READY)", "-W", "error")
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr
    assert "spon-plugin could not register with peft.tuners (RuntimeError: boom)" in result.stderr
    assert "Traceback" not in result.stderr


def test_absent_packages_are_silent(fake):
    shutil.rmtree(fake.path / "spon_peft")
    shutil.rmtree(fake.path / "spon_transformers")
    shutil.rmtree(fake.path / "spon_lm_eval")
    assert fake.output("import torch, peft.tuners, transformers.quantizers.auto, lm_eval.models", "-W", "error") == []


def test_directory_left_by_an_uninstall_is_silent(fake):
    (fake.path / "spon_peft" / "__init__.py").unlink()
    fake.write("spon_peft/notes.txt", "not ours")
    assert fake.output("import torch, peft.tuners", "-W", "error") == []


def test_interruption_is_not_swallowed(fake):
    fake.write("spon_peft/__init__.py", "import os\nif 'STOP' in os.environ:\n    raise KeyboardInterrupt\n" + REGISTER)
    code = """
import os, torch
try:
    import peft.tuners
except KeyboardInterrupt:
    print("interrupted", "peft.tuners" in sys.modules)
del os.environ["STOP"]
import peft
print(hasattr(peft, "tuners"))
import peft.tuners
print(hasattr(peft, "tuners"))
"""
    assert fake.output(code, STOP="1") == ["interrupted False", "False", "registered spon_peft", "True"]


def test_autoload_never_raises(fake):
    code = """
import types
class Hostile(types.ModuleType):
    @property
    def __spec__(self):
        raise RuntimeError("boom")
    __spec__ = __spec__.setter(lambda self, value: None)
sys.modules["peft.tuners"] = Hostile("peft.tuners")
import torch
print("torch")
"""
    result = fake.run(code)
    assert (result.returncode, result.stdout) == (0, "torch\n"), result.stderr
    assert f"{WARNING}torch (RuntimeError: boom)" in result.stderr


# --- company in sys.meta_path ---

# A finder for peft.tuners, in front of the path finder, and thus behind ours, which torch puts first.
FINDER = """
import torch
from importlib.machinery import ModuleSpec
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "peft.tuners":
            return {spec}
sys.meta_path.insert(1, Finder)
class Loader:
    __slots__ = ()
    {body}
"""
MODERN = "def create_module(self, spec): pass\n    def exec_module(self, module): module.READY = True"
LEGACY = """def load_module(self, name):
        from types import ModuleType
        sys.modules[name] = module = ModuleType(name)
        module.READY = True
        return module"""


@pytest.mark.parametrize(
    ("finder", "registered"),
    [
        pytest.param(FINDER.format(spec="ModuleSpec(name, Loader())", body=MODERN), True, id="loader-with-slots"),
        pytest.param(
            FINDER.format(spec="type('Spec', (ModuleSpec,), {})(name, Loader())", body=MODERN),
            True,
            id="own-spec-class",
        ),
        # importlib announces nothing for such a loader: its module works, unregistered
        pytest.param(
            FINDER.format(spec="ModuleSpec(name, Loader())", body=LEGACY),
            False,
            id="loader-without-exec_module",
            marks=pytest.mark.skipif(sys.version_info >= (3, 15), reason="load_module() is gone"),
        ),
        pytest.param(
            "import torch\nsys.meta_path.insert(1, type('Old', (), {'find_module': lambda *_: None})())",
            True,
            id="finder-without-find_spec",
        ),
    ],
)
def test_other_finders_and_loaders(fake, finder, registered):
    result = fake.run(finder + "\nimport peft.tuners\nprint(peft.tuners.READY)", "-W", "ignore::ImportWarning")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["registered spon_peft"] * registered + ["True"]


def test_spec_that_cannot_be_watched(fake):
    """The host works, and the user learns why SPON is missing."""
    more = """
class Final(ModuleSpec):
    def __init_subclass__(cls):
        raise TypeError("final")
import peft.tuners
print(peft.tuners.READY)
"""
    result = fake.run(FINDER.format(spec="Final(name, Loader())", body=MODERN) + more)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr
    assert f"{WARNING}peft.tuners (TypeError: final)" in result.stderr


def test_host_in_a_zip_file(fake):
    shutil.rmtree(fake.path / "peft")
    with zipfile.ZipFile(fake.path / "peft.zip", "w") as archive:
        archive.writestr("peft/__init__.py", "")
        archive.writestr("peft/tuners/__init__.py", "READY = True\n")
    code = """
import torch, pkgutil
sys.path.insert(0, ZIP)
import peft.tuners
print(peft.tuners.READY, type(peft.tuners.__loader__).__name__, pkgutil.get_data("peft.tuners", "__init__.py"))
"""
    expected = ["registered spon_peft", "True zipimporter b'READY = True\\n'"]
    assert fake.output(code.replace("ZIP", repr(str(fake.path / "peft.zip")))) == expected


def test_host_that_is_a_namespace_package(fake):
    (fake.path / "peft/tuners/__init__.py").unlink()
    fake.write("peft/tuners/lora.py")
    code = "import torch, peft.tuners.lora\nprint(getattr(peft.tuners, '__file__', None))"
    assert fake.output(code) == ["registered spon_peft", "None"]


def test_host_that_is_frozen(fake):
    fake.write("spon_autoload.py", MODULE.read_text(encoding="utf-8").replace('"peft.tuners": ', '"__hello__": '))
    code = "import torch, __hello__\nprint(__hello__.__spec__.origin, type(__hello__.__spec__).__name__)"
    assert fake.output(code)[-2:] == ["registered spon_peft", "frozen ModuleSpec"]


@pytest.mark.parametrize("position", [pytest.param(0, id="in-front-of-ours"), pytest.param(1, id="behind-ours")])
@pytest.mark.parametrize(
    "search",
    [
        pytest.param("[f.find_spec(name, path) for f in sys.meta_path if f is not Delegate]", id="skips-itself"),
        pytest.param("Delegate.busy or [Delegate.ask(name)]", id="asks-importlib"),
    ],
)
def test_finder_that_asks_the_others_as_well(fake, position, search):
    """Such as those of tracing and patching libraries: no endless recursion, and each is heard once."""
    code = f"""
import importlib.util, torch
class Delegate:
    busy = None
    @staticmethod
    def ask(name):
        Delegate.busy = [None]
        try:
            return importlib.util.find_spec(name)
        finally:
            Delegate.busy = None
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "peft.tuners":
            spec = next((spec for spec in {search} if spec), None)
            if spec:
                spec.delegated = getattr(spec, "delegated", 0) + 1
            return spec
sys.meta_path.insert({position}, Delegate)
import peft.tuners
print(peft.tuners.__spec__.delegated)
"""
    assert fake.output(code) == ["registered spon_peft", "1"]


def test_leaving_does_not_disturb_an_import_in_progress(fake):
    """importlib iterates over sys.meta_path itself (until 3.14); another thread's import may be anywhere in it."""
    code = """
import torch
others = iter(sys.meta_path)
next(others)
expected = sys.meta_path[1:]
import peft.tuners, transformers.quantizers.auto, lm_eval.models
assert list(others) == expected == sys.meta_path
"""
    assert fake.output(code)[:2] == ["registered spon_peft", "registered spon_transformers"]


# --- threads ---


def test_threads_importing_a_host(fake):
    """None of them gets hold of the host before it is registered with, whether it comes early or during the hook."""
    fake.write("events.py", "import threading\nhook = threading.Event()\n")
    fake.write("peft/tuners/__init__.py", "import time\ntime.sleep(0.1)\nREADY = []\n")
    register = "events.hook.set()\n    time.sleep(0.2)\n    READY.append(1)\n"
    fake.write(
        "spon_peft/__init__.py", f"import events, time\nfrom peft.tuners import READY\ndef register():\n    {register}"
    )
    code = """
import events, threading, torch
seen = []
barrier = threading.Barrier(4)
def load(wait):
    wait()
    from peft.tuners import READY
    seen.append(list(READY))
threads = [threading.Thread(target=load, args=[wait]) for wait in [barrier.wait] * 4 + [events.hook.wait] * 4]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(seen == [[1]] * 8)
"""
    assert fake.output(code) == ["True"]


def test_threads_importing_a_host_and_our_package(fake):
    """Each waits for the module that the other is importing: importlib then hands out one that is half imported."""
    fake.write("peft/tuners/__init__.py", "import time\ntime.sleep(0.3)\n")
    fake.write(
        "spon_peft/__init__.py", "import time\ntime.sleep(0.1)\nimport peft.tuners\ntime.sleep(0.1)\n" + REGISTER
    )
    code = """
import importlib, threading, torch, peft
threads = [threading.Thread(target=importlib.import_module, args=[name]) for name in ("peft.tuners", "spon_peft")]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    assert fake.output(code) == ["registered spon_peft"]


# --- cost ---


def test_only_the_standard_library(fake):
    tree = ast.parse(MODULE.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported <= sys.stdlib_module_names


COST = """
import importlib.metadata, time  # what torch needs to call an entry point at all
before = set(sys.modules)
start = time.perf_counter()
import spon_autoload
loaded = time.perf_counter()
spon_autoload.autoload()
end = time.perf_counter()
print(*sorted(set(sys.modules) - before))
print(end - loaded, end - start)
"""


def test_cost(fake):
    runs = [fake.output(COST) for _ in range(5)]
    assert {modules for modules, _ in runs} == {"spon_autoload"}
    calls, totals = zip(*(map(float, times.split()) for _, times in runs), strict=True)
    assert min(calls) < 0.005
    assert min(totals) < 0.005
