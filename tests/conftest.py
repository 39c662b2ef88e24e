"""Settings of all tests: four devices, shapes and dtypes enforced."""

import gc
import os
import shutil
from importlib.metadata import version
from pathlib import Path

# Before JAX starts: the multi-device tests need several devices on any machine.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "agg")
# The tests compile much and compute little, so what is compiled is not optimised.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if tuple(int(part) for part in version("jaxlib").split(".")[:2]) <= (0, 10):
    # Fused operations do not go through MLIR, which takes as long as all the rest.
    # Later releases do not know the flag, and would stop.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Many tests compile the same training step; the second time it is read from here. Also
# the commands that tests start keep their programs here, and none in the user's home.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import jaxtyping
import pytest

# Every shape and type in a signature of the package is checked when it is called.
jaxtyping.install_import_hook("wf_vit", "beartype.beartype").__enter__()

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parents[1]
# Of a process. Linux allows 65,530, a compiled program takes about six, and XLA crashes
# when there are no more.
MANY_MEMORY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def nothing_left():
    """Drops what a file of tests leaves, and what was compiled before it is too much.

    Errors that nobody asked for are reported when they are collected; if that happens
    within ast.parse, Python 3.11 fails.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MEMORY_MAPS:
        jax.clear_caches()
    gc.collect()


@pytest.fixture
def no_type_checks():
    """Runs as users do: the errors are ours, not those of the type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; its tests skip without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the data folder shared/ beside the checkout")
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, without a window; its tests skip without it."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--window-size=1100,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    service = webdriver.ChromeService(chromedriver)
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver
