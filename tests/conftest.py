"""How the tests are run: in several processes with a thread each, the slow ones when asked for."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in children
os.environ.setdefault("MPLBACKEND", "Agg")
HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(  # children test this checkout, wherever they start
    [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest

WHY = "slow: add --slow to run it"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"): item.add_marker(pytest.mark.skip(reason=WHY))


def pytest_terminal_summary(terminalreporter):
    "Says what was left out."
    left = sum(WHY in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if left: terminalreporter.write_line(f"Slow tests left out: {left}. `pytest --slow` adds them.")


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    "A folder for each small twin, as its makers would publish it."
    from ddpo_scratch.workshop.twins import TWINS, make_twin
    room = tmp_path_factory.mktemp("twins")
    for name in TWINS: make_twin(name).save_pretrained(room / name)
    return {name: str(room / name) for name in TWINS}
