"""Every bug of the zoo (bug_zoo.py) is found by the test that it names.

    python -m pytest tests/test_bug_zoo.py -m slow
    python -m pytest tests/test_bug_zoo.py -k inverted_clip

Every entry runs in a copy of the repository. There the named test passes, the words stand exactly
once, and with the line changed the same test fails by an assertion: not by a syntax error, and not
by a crash.
"""
import os
import sys

import pytest

from bug_zoo import BUGS, copied, infected


def code_modules(folder):
    """Names under which the copy's code is imported."""
    names = {name for name in sys.modules if name.split(".")[0] == "common"}
    for part in (".", "experiments", "tests"):
        for name in os.listdir(os.path.join(folder, part)):
            if name.endswith(".py"):
                names.add(name[:-3])
    return names


def outcomes(folder, tests, keep=False):
    """Run tests of the copy up to the first that fails, in this process, which has torch already:
    {name: None if it passed, or what ended it}. keep: compiled code may be kept."""
    found = {}

    class Watch:
        def pytest_runtest_makereport(self, item, call):
            if call.when == "call" or call.excinfo:
                name = item.nodeid.removeprefix("tests/")
                found[name] = call.excinfo and call.excinfo.value

    ours = {name: sys.modules.pop(name) for name in code_modules(folder) if name in sys.modules}
    try:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sys, "path", sys.path[:])
            m.setattr(sys, "dont_write_bytecode", not keep)
            paths = [os.path.join(folder, "tests", test) for test in tests]
            quiet = "-qqx --tb=no --no-summary -p no:cacheprovider -p no:faulthandler".split()
            pytest.main([*paths, "--rootdir", folder, "-m", "slow or not slow", *quiet], [Watch()])
    finally:
        for name in code_modules(folder):
            sys.modules.pop(name, None)
        sys.modules.update(ours)
    return found


@pytest.fixture(scope="module")
def healthy(request, tmp_path_factory):
    """The copy, and what becomes in it of every test that is named, before anything is changed."""
    named = set()
    for item in request.session.items:
        if item.originalname == test_the_bug_is_found.__name__:
            named.add(item.callspec.params["bug"].test)
    folder = copied(tmp_path_factory.mktemp("zoo"))
    return folder, outcomes(folder, sorted(named), keep=True)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_is_found(bug, healthy):
    folder, before = healthy
    own = {}
    for name, error in before.items():
        if name == bug.test or name.startswith(bug.test + "["):
            own[name] = error
    assert own and not any(own.values()), f"{bug.test} does not pass in our own code: {own}"
    with infected(folder, bug):
        errors = [error for error in outcomes(folder, [bug.test]).values() if error]
    assert errors, f"{bug.name} survives {bug.test}: {bug.mistake}"
    assert isinstance(errors[0], AssertionError), f"{bug.name} crashes, is not found: {errors[0]!r}"


def test_every_entry_is_complete_and_has_a_name_of_its_own():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 30
    for bug in BUGS:
        assert bug.mistake.endswith(".") and bug.seen and bug.old != bug.new
