"""How the tests are run: in several processes with a thread each, the slow ones when asked for."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in children
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

WHY = "slow; `pytest --slow` runs it, too"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"): item.add_marker(pytest.mark.skip(reason=WHY))


def pytest_terminal_summary(terminalreporter):
    "Says what was left out."
    left = sum(WHY in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if left: terminalreporter.write_line(f"{left} slow tests were left out: `pytest --slow`.")


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    "A folder for each small twin, as its makers would publish it."
    from ddpo_scratch.twins import TWINS, make_twin
    room = tmp_path_factory.mktemp("twins")
    for name in TWINS: make_twin(name).save_pretrained(room / name)
    return {name: str(room / name) for name in TWINS}
