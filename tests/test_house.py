"""The repository holds to its own rules.   python -m pytest tests/test_house.py"""
import ast
import dataclasses
import importlib
import os
import re
import shlex

import pytest

from conftest import ROOT

SCRIPTS = [f for f in ("sft.py", "reward.py", "ppo.py", "dpo.py", "grpo.py", "dapo.py") if os.path.exists(os.path.join(ROOT, f))]


def all_tests():
    """The names of all test functions in tests/."""
    files = [f for f in os.listdir(os.path.join(ROOT, "tests")) if f.endswith(".py")]
    return {name for f in files for name in re.findall(r"^def (test_\w+)", source("tests/" + f), re.M)}


def source(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def test_same_name_means_same_code():
    """A function that stands in two scripts is the same text in both; to differ, it takes another name."""
    seen = {}
    for f in SCRIPTS:
        for node in ast.parse(source(f)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("Config", "train"):
                code = ast.get_source_segment(source(f), node)
                first, text = seen.setdefault(node.name, (f, code))
                assert code == text, f"{node.name} differs between {first} and {f}"


def test_same_flag_means_same_type():
    seen = {}
    for f in SCRIPTS:
        for name, kind in re.findall(r"^    (\w+): (\w+) = .*#", source(f), re.M):
            first, k = seen.setdefault(name, (f, kind))
            assert kind == k, f"--{name} is {k} in {first} and {kind} in {f}"


def test_dapo_differs_from_grpo_in_its_own_settings_alone():
    """As many updates a rollout among them, and more than one, or clip-higher could not act."""
    grpo, dapo = ({f.name: f.default for f in dataclasses.fields(importlib.import_module(name).Config)} for name in ("grpo", "dapo"))
    assert {name for name in grpo if name in dapo and grpo[name] != dapo[name]} == {"out"}
    assert grpo.keys() - dapo.keys() == {"clip_eps", "kl_beta", "ref_every", "ref_mix", "max_kl"}
    assert dapo.keys() - grpo.keys() == {"clip_low", "clip_high", "tries", "overlong_cache"}
    ours, public = (importlib.import_module(name).PUBLIC for name in ("grpo", "dapo"))
    assert public == ours | {"overlong_cache": public["overlong_cache"]}
    assert dapo["epochs"] * dapo["prompts"] * dapo["group"] // dapo["minibatch"] > 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_read(script):
    tree = ast.parse(source(script))
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    fields = {n.target.id for n in config.body if isinstance(n, ast.AnnAssign)}
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "cfg"}
    assert fields <= read, f"never read: {fields - read}"


def test_every_field_of_the_model_is_read():
    tree = ast.parse(source("model.py"))
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "GPTConfig")
    fields = {n.target.id for n in config.body if isinstance(n, ast.AnnAssign)}
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("cfg", "self.cfg", "model.cfg")}
    assert fields <= read, f"never read: {fields - read}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_model_and_nothing_else_of_ours_and_does_nothing_when_imported(script):
    tree = ast.parse(source(script))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {n + ".py" for n in names} & set(SCRIPTS)
    *_, last = tree.body
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main(train, Config)"
    assert all(isinstance(n, (ast.Expr, ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)) for n in tree.body[:-1])


def test_nothing_evaluates_or_unpickles():
    for f in SCRIPTS + ["model.py"]:
        for node in ast.walk(ast.parse(source(f))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "np.load")
                assert name != "torch.load" or "weights_only=True" in ast.unparse(node)


def test_nothing_that_windows_or_a_mac_cannot_do():
    """No fork, no Triton, no module, call, signal or path of POSIX alone, no rename that fails where the new name is taken, and text in UTF-8
    whatever the system's own encoding is."""
    for f in SCRIPTS + ["model.py"]:
        tree = ast.parse(source(f))
        guarded = lambda n: isinstance(n, ast.Try) and any(h.type and ast.unparse(h.type) == "ImportError" for h in n.handlers)
        optional = {id(n) for t in filter(guarded, ast.walk(tree)) for n in ast.walk(t)}
        for node in ast.walk(tree):
            at, text = f"{f}:{getattr(node, 'lineno', 0)}", ast.unparse(node) if isinstance(node, (ast.Call, ast.Attribute)) else ""
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {a.name.split(".")[0] for a in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
                absent = {"fcntl", "grp", "multiprocessing", "pwd", "resource", "select", "termios", "triton", "tty"}
                assert not names & absent or id(node) in optional, at
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
                assert node.attr not in {"rename", "fork", "kill", "killpg", "setsid", "symlink", "link", "mkfifo", "getuid", "nice", "sync"}, at
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "signal" and node.attr.startswith("SIG"):
                assert node.attr in ("SIGINT", "SIGTERM"), at
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "open":
                assert "encoding='utf-8'" in text or any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:]), at
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess."):
                assert "([sys.executable, " in text and not {"shell", "preexec_fn"} & {k.arg for k in node.keywords}, at
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/tmp", "/dev/", "/proc", "/usr", "~")), at


def test_the_layout():
    ours = {f for f in os.listdir(ROOT) if f.endswith(".py")}
    assert ours == {"model.py", *SCRIPTS}
    for f in ("README.md", "requirements.txt", "LICENSE", ".gitignore", ".ci/run"):
        assert os.path.exists(os.path.join(ROOT, f)), f


def test_readme_names_only_files_and_flags_that_exist():
    text = source("README.md")
    for path in set(re.findall(r"`((?:tests/|assets/)?[\w.]+\.(?:py|txt|png|md))`", text) + re.findall(r"\]\(([\w/.]+)\)", text)):
        if not path.startswith(("out/", "curves", "samples")):
            assert os.path.exists(os.path.join(ROOT, path)), path
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    commands = [line for language, block in blocks if not language for line in block.splitlines() if "python " in line]
    assert commands
    for line in commands:
        words = shlex.split(line.split("python ", 1)[1], comments=True)
        if words[0].endswith(".py"):
            code = source(words[0])
            for flag in (w for w in words if w.startswith("--")):
                assert re.search(rf"^    {flag[2:]}:|\"{flag}\"", code, re.M), f"{flag} of `{line}`"


def test_the_code_that_the_readme_shows_stands_in_the_files():
    """Every line of its Python blocks in a script, every line of its diff in the file that it is taken from."""
    plain = lambda line: " ".join(line.split())
    text = source("README.md")
    lines = {f: {plain(line) for line in source(f).splitlines()} for f in (*SCRIPTS, "tests/relatives.py")}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        for line in filter(None, map(plain, block.splitlines())):
            assert any(line in own for own in lines.values()), line
    blocks = re.findall(r"```diff\n(.*?)```", text, re.S)
    for block, (old, new) in zip(blocks, (("ppo.py", "grpo.py"), ("grpo.py", "dapo.py")), strict=True):
        for line in block.splitlines():
            assert plain(line[1:]) in lines[old if line[0] == "-" else new], line


def test_every_equation_of_the_readmes_table_stands_in_its_file_and_has_its_tests():
    """Rows are: equation | file: `line` | `test`, `test`."""
    table = source("README.md").split("### What proves it")[1].split("\n#")[0]
    rows = re.findall(r"^\| (?!equation|---)(.*) \| ([\w.]+): `(.*)` \| (.*) \|$", table, re.M)
    assert len(rows) == table.count("\n| ") - 1 >= 20
    known = all_tests()
    for _, file, line, tests in rows:
        assert any(line in " ".join(own.split()) for own in source(file).splitlines()), (file, line)
        assert set(re.findall(r"`(\w+)`", tests)) <= known, tests
    assert {file for _, file, _, _ in rows} == {"model.py", *SCRIPTS}


def test_every_test_that_the_readme_names_exists():
    assert set(re.findall(r"`(test_\w+)`", source("README.md"))) <= all_tests()
