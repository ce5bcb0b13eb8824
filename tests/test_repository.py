"""The repository holds to its own rules.   python -m pytest tests/test_repository.py"""
import ast
import dataclasses
import glob
import importlib
import os
import re
import shlex

import pytest

from conftest import ROOT, SCRIPTS

# of common/; imports point to the left
FLOORS = ["tokenizer", "distributed", "lora", "hf", "checkpoint", "export", "verifier", "rows",
          "data", "preferences", "optimizers", "train", "memory", "evaluate", "flags", "models",
          "early_stopping", "run", "show"]
COMMON = [f"common/{name}.py" for name in FLOORS]
EXPERIMENTS = sorted(os.path.relpath(path, ROOT) for path in glob.glob(f"{ROOT}/experiments/*.py"))
TESTS = sorted(os.path.relpath(path, ROOT) for path in glob.glob(f"{ROOT}/tests/*.py"))
PAGES = ["README.md"] + sorted(f"docs/{name}" for name in os.listdir(f"{ROOT}/docs"))


def source(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def all_tests():
    return {name for file in TESTS for name in re.findall(r"^def (test_\w+)", source(file), re.M)}


def imports(file):
    """Every module that a file names in an import statement."""
    found = set()
    for node in ast.walk(ast.parse(source(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def config_of(script):
    tree = ast.parse(source(script))
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")


# ------------------------------------------------------------------------------------- the layout


def test_the_top_level_holds_the_transformer_and_six_scripts():
    assert {f for f in os.listdir(ROOT) if f.endswith(".py")} == {"model.py", *SCRIPTS}
    assert {f for f in os.listdir(f"{ROOT}/common") if f.endswith(".py")} == {
        "__init__.py", *(os.path.basename(f) for f in COMMON)}
    for name in ("README.md", "requirements.txt", "LICENSE", ".gitignore", ".ci/run"):
        assert os.path.exists(os.path.join(ROOT, name)), name


def test_imports_point_downwards():
    """model.py imports nothing of ours, common/ only what is below, a script no other script."""
    scripts = {name[:-3] for name in SCRIPTS}
    others = {"experiments", "tests", "conftest"} | {os.path.basename(f)[:-3] for f in EXPERIMENTS}
    ours = {"model", "common", *scripts, *others, *(f"common.{name}" for name in FLOORS)}
    assert not imports("model.py") & ours
    for i, name in enumerate(FLOORS):
        below = {f"common.{floor}" for floor in FLOORS[:i]}
        allowed = {"model"} | below
        if name == "hf":
            allowed |= {"common", "common.export"}     # on the command line, see below
        assert imports(f"common/{name}.py") & ours <= allowed, name
    for script in SCRIPTS:
        assert not imports(script) & (scripts | others), script


def test_hf_imports_from_above_on_the_command_line_only():
    """`python -m common.hf export` loads a checkpoint and writes a folder."""
    for node in ast.parse(source("common/hf.py")).body[:-1]:
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom):
                assert inner.module not in ("common", "common.export")


def test_load_is_importable_from_common():
    from common import load
    assert load is importlib.import_module("common.checkpoint").load


def test_lines_have_at_most_100_characters():
    for file in ["model.py", *SCRIPTS, *COMMON, *EXPERIMENTS, *TESTS]:
        wide = [i for i, line in enumerate(source(file).splitlines(), 1) if len(line) > 100]
        assert not wide, f"{file}: lines {wide}"


# ------------------------------------------------------------------------------------- the scripts


def test_the_same_name_in_two_scripts_is_the_same_text():
    seen = {}
    for script in SCRIPTS:
        for node in ast.parse(source(script)).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            if node.name in ("Config", "train"):
                continue
            code = ast.get_source_segment(source(script), node)
            first, text = seen.setdefault(node.name, (script, code))
            assert code == text, f"{node.name} differs between {first} and {script}"


def test_the_same_flag_in_two_scripts_has_the_same_type():
    seen = {}
    for script in SCRIPTS:
        for name, kind in re.findall(r"^    (\w+): (\w+) = .*#", source(script), re.M):
            first, other = seen.setdefault(name, (script, kind))
            assert kind == other, f"--{name} is {other} in {first} and {kind} in {script}"


def test_dapo_differs_from_grpo_in_its_own_settings_only():
    """It also has several updates per rollout, or clip-higher could not act."""
    grpo, dapo = importlib.import_module("grpo"), importlib.import_module("dapo")
    ours = {f.name: f.default for f in dataclasses.fields(grpo.Config)}
    theirs = {f.name: f.default for f in dataclasses.fields(dapo.Config)}
    changed = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert changed == {"out"}
    assert ours.keys() - theirs.keys() == {"clip_eps", "kl_beta", "ref_every", "ref_mix", "max_kl"}
    own = {"clip_low", "clip_high", "max_generations", "overlong_cache"}
    assert theirs.keys() - ours.keys() == own
    own = {"overlong_cache": dapo.PRETRAINED["overlong_cache"]}
    shared = {name: x for name, x in grpo.PRETRAINED.items() if name != "max_kl"}
    assert dapo.PRETRAINED == shared | own
    responses = theirs["prompts"] * theirs["group_size"]
    assert theirs["epochs"] * responses // theirs["minibatch"] > 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_read(script):
    fields = {n.target.id for n in config_of(script).body if isinstance(n, ast.AnnAssign)}
    text = source(script) + "".join(source(file) for file in COMMON)
    unread = {name for name in fields if not re.search(rf'\bcfg\.{name}\b|cfg, "{name}"', text)}
    assert not unread


def test_every_field_of_the_model_is_read():
    fields = set(importlib.import_module("model").GPTConfig.__dataclass_fields__)
    read = set(re.findall(r"\bcfg\.(\w+)", source("model.py").split("# ---", 2)[2]))
    assert fields <= read


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script):
    *body, last = ast.parse(source(script)).body
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main(train, Config)"
    inert = (ast.Expr, ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)
    assert all(isinstance(node, inert) for node in body)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_section_to_copy_needs_torch_alone(script):
    """The functions under the banner of the algorithm use torch, F and math and nothing else."""
    section = source(script).split("the algorithm\n", 1)[1]
    section = re.split(r"\n# -+ the (?:reward|task)\n", section)[0]
    names = {"math": importlib.import_module("math"), "torch": importlib.import_module("torch"),
             "F": importlib.import_module("torch.nn.functional")}
    known = set(dir(__builtins__)) | set(__builtins__ if isinstance(__builtins__, dict) else ())
    tree = ast.parse(section)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert defined
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        local = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
        stored = {n.id for n in ast.walk(function)
                  if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        inner = {n.name for n in ast.walk(function) if isinstance(n, ast.FunctionDef)}
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        assert used <= local | stored | inner | defined | known | names.keys(), function.name


def test_the_copy_of_grpo_is_word_for_word():
    ours, copy = source("grpo.py"), source("experiments/grpo_on_transformers.py")
    for name in ("group_advantage", "kl_k3", "grpo_loss"):
        pieces = []
        for text in (ours, copy):
            node = next(n for n in ast.parse(text).body if getattr(n, "name", "") == name)
            pieces.append(ast.get_source_segment(text, node))
        assert pieces[0] == pieces[1], name
    assert not imports("experiments/grpo_on_transformers.py") & {"model", "common", "grpo"}


def changed_lines(old, new):
    """Lines of a shortest diff: all but twice the longest common subsequence."""
    longest = [0] * (len(new) + 1)
    for line in old:
        previous, longest = longest, [0]
        for j, other in enumerate(new):
            best = previous[j] + 1 if line == other else max(previous[j + 1], longest[j])
            longest.append(best)
    return len(old) + len(new) - 2 * longest[-1]


def test_the_diffs_stay_short():
    """`diff grpo.py dapo.py` is the paper's changes, `diff ppo.py grpo.py` the critic."""
    lines = {name: source(f"{name}.py").splitlines() for name in ("ppo", "grpo", "dapo")}
    assert changed_lines(lines["grpo"], lines["dapo"]) <= 190
    assert changed_lines(lines["ppo"], lines["grpo"]) <= 268


# ------------------------------------------------------------------------- safety and portability


def test_nothing_evaluates_or_unpickles():
    for file in [*SCRIPTS, "model.py", *COMMON]:
        for node in ast.walk(ast.parse(source(file))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "np.load")
                assert name != "torch.load" or "weights_only=True" in ast.unparse(node)


ABSENT_MODULES = {"fcntl", "grp", "multiprocessing", "pwd", "resource", "select", "termios",
                  "triton", "tty"}
ABSENT_CALLS = {"rename", "fork", "kill", "killpg", "setsid", "symlink", "link", "mkfifo", "getuid",
                "nice", "sync"}


def is_optional_import(node):
    """A try whose handler catches ImportError."""
    if not isinstance(node, ast.Try):
        return False
    return any(h.type and ast.unparse(h.type) == "ImportError" for h in node.handlers)


@pytest.mark.parametrize("file", [*SCRIPTS, "model.py", *COMMON])
def test_nothing_that_windows_or_a_mac_cannot_do(file):
    """No module, call, signal or path of POSIX alone; text files are UTF-8 whatever the system's
    encoding is."""
    tree = ast.parse(source(file))
    optional = set()
    for node in filter(is_optional_import, ast.walk(tree)):
        optional |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names}
            names.add((getattr(node, "module", None) or "").split(".")[0])
            assert not names & ABSENT_MODULES or id(node) in optional, where
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            assert node.attr not in ABSENT_CALLS, where
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "signal":
            assert not node.attr.startswith("SIG") or node.attr in ("SIGINT", "SIGTERM"), where
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "open":
            text = ast.unparse(node)
            modes = [a.value for a in node.args[1:] if isinstance(a, ast.Constant)]
            assert "encoding='utf-8'" in text or any("b" in mode for mode in modes), where
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess."):
            assert "([sys.executable, " in ast.unparse(node), where
            assert not {"shell", "preexec_fn"} & {k.arg for k in node.keywords}, where
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/tmp", "/dev/", "/proc", "/usr", "~")), where


# ------------------------------------------------------------------------------- README and docs/


def test_the_readme_is_for_a_newcomer():
    lines = source("README.md").splitlines()
    assert len(lines) <= 250
    assert any("python grpo.py" in line for line in lines[:40]), "the first command comes late"
    for name, count in re.findall(r"^\| \[(\w+\.py)\].*?\| (\d+) \|", source("README.md"), re.M):
        now = source(name).count("\n")
        assert abs(int(count) - now) <= 0.05 * now, f"{name} has {now} lines"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_only_files_and_flags_that_exist(page):
    text = source(page)
    paths = set(re.findall(r"`((?:tests|assets|common|experiments|docs)/[\w.]+\.\w+)`", text))
    for path in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]*)?\)", text):
        paths.add(os.path.normpath(os.path.join(os.path.dirname(page), path)))
    for path in paths:
        assert os.path.exists(os.path.join(ROOT, path)), path
    for block in re.findall(r"^```\n(.*?)^```", text, re.S | re.M):
        for line in block.splitlines():
            if "python " not in line:
                continue
            command = line.split("python ", 1)[1].split("&&")[0].split("|")[0]
            words = shlex.split(command, comments=True)
            if not words or not words[0].endswith(".py"):
                continue
            code = source(words[0])
            if words[0] == "experiments/variants.py":
                code += source("grpo.py") + source("dpo.py")
            for flag in [word for word in words if word.startswith("--")]:
                assert re.search(rf"^    {flag[2:]}:|\"{flag}\"", code, re.M), f"{flag} of `{line}`"


@pytest.mark.parametrize("page", ["README.md", "docs/algorithms.md"])
def test_the_code_that_a_page_shows_stands_in_the_files(page):
    """Every line of a Python block in some file, every line of a diff in its own."""
    def plain(line):
        return " ".join(line.split())

    lines = {f: {plain(line) for line in source(f).splitlines()}
             for f in (*SCRIPTS, "model.py", *COMMON, *EXPERIMENTS)}
    text = source(page)
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        for line in filter(None, map(plain, block.splitlines())):
            assert any(line in own for own in lines.values()), line
    diffs = re.findall(r"`diff (\w+\.py) (\w+\.py)`[^`]*?```diff\n(.*?)```", text, re.S)
    assert len(diffs) == text.count("```diff")
    for old, new, block in diffs:
        for line in filter(None, map(str.rstrip, block.splitlines())):
            assert plain(line[1:]) in lines[old if line[0] == "-" else new], line


def test_every_equation_stands_in_its_file_and_has_its_tests():
    """Rows of docs/proofs_and_pitfalls.md: equation | file: `line` | `test`, `test`."""
    text = source("docs/proofs_and_pitfalls.md")
    rows = re.findall(r"^\| (.*) \| ([\w./]+\.py): `(.*)` \| (.*) \|$", text, re.M)
    assert len(rows) >= 20
    known = all_tests()
    for _, file, line, tests in rows:
        assert any(line in " ".join(own.split()) for own in source(file).splitlines()), (file, line)
        names = set(re.findall(r"`(\w+)`", tests))
        assert names and names <= known, tests
    assert {file for _, file, _, _ in rows} >= {"model.py", *SCRIPTS}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page):
    assert set(re.findall(r"`(test_\w+)`", source(page))) <= all_tests()
