"""The rules that tests/conftest.py holds every test to: each is seen to catch a test that breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed  # noqa: F401  # pytester drops modules that an inner run imported first; torch loads only once

pytestmark = pytest.mark.launchers

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[0] / "conftest.py"
MARKERS = "markers =\n" + "".join(
    f"    {name}: as in pyproject.toml\n" for name in ("ranks", "launchers", "cluster", "gpu", "data", "nightly")
)


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty test folder under the same conftest."""
    monkeypatch.delenv("DTRAIN_MUST_RUN", raising=False)
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makeini(f"[pytest]\naddopts = --import-mode=importlib\n{MARKERS}")
    return pytester


def run(inner: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return inner.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])",
            "*left behind: process*time.sleep*",
        ),
        ("os.environ['DTRAIN_LEAK'] = 'x'", "*DTRAIN_LEAK=x in the environment, where it was None*"),
        ("os.environ.pop('PATH')", "*PATH=None in the environment*"),
        ("os.chdir('/')", "*the working folder /, where it was*"),
        (
            "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)",
            "*torch.distributed's default process group*",
        ),
    ],
    ids=["child", "variable set", "variable removed", "folder", "process group"],
)
def test_a_test_that_leaves_something_behind_fails_and_the_next_one_starts_clean(
    inner: pytest.Pytester, body: str, said: str
) -> None:
    inner.makepyfile(f"import os, subprocess, sys\ndef test_leaks():\n    {body}\ndef test_next():\n    pass\n")

    result = run(inner)

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines([said])


def test_a_test_that_cleans_up_in_its_fixtures_passes(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        "import subprocess, sys\n"
        "def test_clean(monkeypatch, tmp_path):\n"
        "    monkeypatch.setenv('DTRAIN_LEAK', 'x')\n"
        "    monkeypatch.chdir(tmp_path)\n"
        "    subprocess.run([sys.executable, '-c', ''], check=True)\n"
    )

    run(inner).assert_outcomes(passed=1)


SKIPS = """
import pytest
def test_passes(): pass
def test_skips(): pytest.skip("not today")
@pytest.mark.skipif(True, reason="never")
def test_is_skipped_by_a_mark(): pass
@pytest.mark.xfail
def test_fails_as_expected(): assert False
@pytest.mark.data
def test_needs_data(): pass
"""


def test_skips_are_failures_where_everything_must_run_but_for_missing_resources(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner.makepyfile(SKIPS)

    run(inner).assert_outcomes(passed=1, skipped=3, xfailed=1)
    monkeypatch.setenv("DTRAIN_MUST_RUN", "1")
    result = run(inner)

    result.assert_outcomes(passed=1, failed=1, errors=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(["*must run here*skipped: *never*", "*must run here*skipped: *not today*"])


def test_a_module_that_skips_itself_is_a_failure_where_everything_must_run(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner.makepyfile("import pytest\npytest.importorskip('no_such_module')\ndef test_unreached(): pass\n")

    run(inner).assert_outcomes(skipped=1)
    monkeypatch.setenv("DTRAIN_MUST_RUN", "1")
    result = run(inner)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*must run here*no_such_module*"])


def test_quick_stages_come_first_and_unit_tests_have_a_minute(inner: pytest.Pytester) -> None:
    limit = "limit = request.node.get_closest_marker('timeout')"
    for name, stages in (("a", "cluster launchers"), ("b", "launchers"), ("c", "ranks"), ("d", "")):
        marks = "".join(f"@pytest.mark.{stage}\n" for stage in stages.split())
        body = (
            f"import pytest\n{marks}def test_{name}(request):\n    {limit}\n    print('limit', limit and limit.args)\n"
        )
        inner.makepyfile(**{f"test_{name}": body})

    result = run(inner, "-s", "-v")

    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["test_d.py*limit (60,)*", "test_c.py*limit None*", "test_b.py*", "test_a.py*"])


def test_what_is_marked_nightly_runs_with_the_option_alone(inner: pytest.Pytester) -> None:
    inner.makepyfile("import pytest\n@pytest.mark.nightly\ndef test_rest(): pass\ndef test_first(): pass\n")

    run(inner).assert_outcomes(passed=1, deselected=1)
    run(inner, "--nightly").assert_outcomes(passed=2)


def test_a_run_ends_with_the_time_of_each_stage_and_the_slowest_tests(inner: pytest.Pytester) -> None:
    # A fixture's time counts for the test that set it up; what takes no time is not listed.
    inner.makepyfile(
        "import pytest, time\n"
        "@pytest.fixture(scope='module')\n"
        "def shared(): time.sleep(1.1)\n"
        "def test_unit(): pass\n"
        "@pytest.mark.ranks\n"
        "def test_first(shared): pass\n"
        "@pytest.mark.ranks\n"
        "def test_second(shared): pass\n"
    )

    result = run(inner)

    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["stage*", "unit*1*0.0*0%", "ranks*2*1.1*100%", "all*3*1.1*", "*1.1  *::test_first"])
    assert "::test_second" not in result.stdout.str()
