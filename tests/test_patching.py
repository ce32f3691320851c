"""The patch tool on files of our own; `test_the_host` does the same to a real checkout where there is one."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_energy import cli
from vla_energy.hosts import patching
from vla_energy.hosts.anchors import AnchorError
from vla_energy.hosts.patch_file import MARKER, Anchor, FilePatch, Insertion, Patch, PatchError, load_patch, shipped
from vla_energy.hosts.patch_lines import add_lines, find_lines, remove_lines

TRAIN = """\
import os
from dataclasses import dataclass

DEBUG = os.environ.get("DEBUG")


@dataclass
class Config:
    steps: int = 3
    rate: float = 0.1  # learning rate


def save(step):
    print(step)


def train(cfg: Config):
    window = {
        "loss": [],
    }
    for step in range(cfg.steps):
        loss, metrics = step * cfg.rate, {}
        window["loss"].append(loss)
        if step:
            save(
                step,
            )
"""
EVAL = "import os\n\n\ndef main(cfg):\n    head = os.getcwd()\n    return head\n"
PATHS = ("scripts/train.py", "eval.py", "deploy.py")
LINES = {
    PATHS[0]: [
        (2, 0, "from energy import Plugin", {"after": "imports"}),
        (10, 4, "energy: int = 0", {"after": "last field", "in": "Config"}),
        (20, 4, "energy = Plugin(cfg, window)", {"after": "assignment of window", "in": "train"}),
        (22, 8, "loss = energy.add_loss(loss, metrics)", {"after": "assignment of loss", "in": "train"}),
        (27, 12, "energy.save(step)", {"after": "call of save", "in": "train"}),
    ],
    PATHS[1]: [
        (1, 0, "from energy import rerank", {"after": "imports"}),
        (5, 4, "head = rerank(head, cfg)", {"after": "assignment of head", "in": "main"}),
    ],
    PATHS[2]: [(0, 0, "import energy", {"before": "assignment of PORT"})],
}


def as_json(sources: dict[str, str]) -> dict[str, object]:
    files = []
    for path, lines in LINES.items():
        insertions = [dict(zip(("line", "indent", "text", "anchor"), line, strict=True)) for line in lines]
        sha256 = hashlib.sha256(sources.get(path, "").encode()).hexdigest()
        files.append({"path": path, "sha256": sha256, "insertions": insertions, "optional": path == PATHS[2]})
    return {"host": "someone/robot", "commit": "0" * 40, "files": files}


@pytest.fixture
def patch_path(tmp_path: Path) -> Path:
    path = tmp_path / "robot.json"
    path.write_text(json.dumps(as_json({PATHS[0]: TRAIN, PATHS[1]: EVAL})))
    return path


@pytest.fixture
def patch(patch_path: Path) -> Patch:
    return load_patch(patch_path)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    root = tmp_path / "host"
    (root / "scripts").mkdir(parents=True)
    (root / PATHS[0]).write_text(TRAIN)
    (root / PATHS[1]).write_text(EVAL)
    return root


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.autocrlf=false"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())


def states(root: Path, patch: Patch) -> list[str]:
    return [file.state for file in patching.check(root, patch).files]


EXPECTED_TRAIN = [
    (3, "from energy import Plugin"),
    (12, "    energy: int = 0"),
    (23, "    energy = Plugin(cfg, window)"),
    (26, "        loss = energy.add_loss(loss, metrics)"),
    (32, "            energy.save(step)"),
]


def test_apply_and_revert_on_the_known_version(host, patch):
    before = contents(host)
    assert states(host, patch) == ["exact", "exact", "absent"]
    assert not patching.apply(host, patch).applied
    lines = (host / PATHS[0]).read_text().splitlines()
    assert [(number, lines[number - 1]) for number, _ in EXPECTED_TRAIN] == [
        (number, text + MARKER) for number, text in EXPECTED_TRAIN
    ]
    assert [line for line in lines if not line.endswith(MARKER)] == TRAIN.splitlines()
    assert states(host, patch) == ["applied", "applied", "absent"]
    after = contents(host)
    assert patching.apply(host, patch).applied and contents(host) == after
    assert patching.revert(host, patch) == list(PATHS[:2]) and contents(host) == before
    assert patching.revert(host, patch) == [] and contents(host) == before


@pytest.mark.parametrize("change", [lambda text: text, lambda text: text.replace("\n", "\r\n"), str.rstrip])
def test_a_diverged_version_goes_by_the_anchors(host, patch, change):
    (host / PATHS[0]).write_bytes(change("# a fork\n" + TRAIN.replace("cfg.rate, {}", "cfg.rate * 2, {}")).encode())
    (host / PATHS[0]).chmod(0o750)
    (host / PATHS[2]).write_text("PORT = 1\n")
    before = contents(host)
    assert states(host, patch) == ["diverged", "exact", "diverged"]
    patching.apply(host, patch)
    lines = (host / PATHS[0]).read_text().splitlines()
    assert [(number, lines[number]) for number, _ in EXPECTED_TRAIN] == [
        (number, text + MARKER) for number, text in EXPECTED_TRAIN
    ]
    crlf = b"\r\n" in before[PATHS[0]]
    assert (host / PATHS[0]).read_bytes().count(b"\r\n") == (len(lines) if crlf else 0)
    assert (host / PATHS[2]).read_text() == f"import energy{MARKER}\nPORT = 1\n"
    patching.revert(host, patch)
    assert contents(host) == before and stat.S_IMODE((host / PATHS[0]).stat().st_mode) == 0o750


def test_lines_and_anchors_agree(patch):
    for file, source in zip(patch.files, (TRAIN, EVAL), strict=False):
        elsewhere = FilePatch(file.path, "0" * 64, file.insertions)
        assert add_lines(source.encode(), file) == add_lines(source.encode(), elsewhere)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("window = {", "history = {", "no place after the assignment of window in train: there is none"),
        ("def train(", "def fit(", "no place in train: there are 0 definitions of train"),
        ("class Config:", "class Settings:", "no place in Config: there are 0 definitions of Config"),
        ("    steps: int = 3\n    rate: float = 0.1", "    pass", "after the last field in Config: there is none"),
        (
            "        if step:",
            "        save(0)\n        if step:",
            "call of save in train: it is there 2 times (lines 24,",
        ),
        ("loss, metrics = step * cfg.rate, {}", "loss = 0.0; metrics = {}", "it shares line 22 with another statement"),
        (
            "            save(\n",
            "            return save(\n",
            "no place after the call of save in train: there is none",
        ),
        ("import os\nfrom dataclasses import dataclass", "", "no place after the imports: there is none"),
        (", metrics = step * cfg.rate, {}", " = step * cfg.rate", "reads metrics, which is not defined before line 26"),
        ("    window = {", "    energy = 1\n    window = {", "would define energy, which line 20 defines already"),
        ("DEBUG", "energy: int", "would define energy, which line 5 defines already"),
        ("def train(", "def train(:", "cannot be parsed as Python in UTF-8: invalid syntax"),
    ],
)
def test_a_fork_that_does_not_fit_is_refused(host, patch, old, new, message):
    edit(host / PATHS[0], old, new)
    before = contents(host)
    report = patching.check(host, patch)
    assert [file.state for file in report.files] == ["unfit", "exact", "absent"] and not report.ok
    assert message in report.files[0].problem
    with pytest.raises(PatchError) as raised:
        patching.apply(host, patch)
    assert PATHS[0] in str(raised.value) and message in str(raised.value)
    assert contents(host) == before


def test_storing_into_an_object_is_no_assignment_of_it(host, patch):
    edit(host / PATHS[0], "    for step in", "    window['rate'] = []\n    window.other = []\n    for step in")
    patching.apply(host, patch)
    assert (host / PATHS[0]).read_text().index("energy = Plugin") < (host / PATHS[0]).read_text().index(
        "window['rate']"
    )


def test_all_missing_anchors_are_named(host, patch):
    edit(host / PATHS[0], "window = {", "history = {")
    edit(host / PATHS[0], "save(\n", "keep(\n")
    problem = patching.check(host, patch).files[0].problem
    assert "assignment of window" in problem and "call of save" in problem


def test_a_line_that_would_change_more_than_it_adds_is_refused():
    source = b'x = """\na\n"""\n'
    file = FilePatch(
        "a.py", hashlib.sha256(source).hexdigest(), (Insertion(2, 0, "y = 1", Anchor("after", "imports")),)
    )
    with pytest.raises(AnchorError, match="would change more than they add"):
        add_lines(source, file)


def test_a_wrong_root_or_a_missing_file(host, patch, tmp_path):
    with pytest.raises(PatchError, match="is no folder; expected a checkout of someone/robot"):
        patching.check(tmp_path / "nowhere", patch)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchError, match=r"is no checkout of someone/robot: none of scripts/train\.py, eval\.py"):
        patching.apply(tmp_path / "empty", patch)
    (host / PATHS[1]).unlink()
    with pytest.raises(PatchError, match=r"eval\.py: not there; nothing was changed"):
        patching.apply(host, patch)
    assert (host / PATHS[0]).read_text() == TRAIN


def test_a_link_to_elsewhere_is_refused(host, patch, tmp_path):
    (host / PATHS[1]).rename(tmp_path / "modeling_prismatic.py")
    (host / PATHS[1]).symlink_to(tmp_path / "modeling_prismatic.py")
    with pytest.raises(PatchError, match="symbolic link"):
        patching.apply(host, patch)
    assert (tmp_path / "modeling_prismatic.py").read_text() == EVAL and (host / PATHS[0]).read_text() == TRAIN


def test_uncommitted_changes_are_refused(host, patch):
    git(host, "init", "-q")
    git(host, "add", "-A")
    git(host, "commit", "-qm", "host")
    edit(host / PATHS[0], "import os\n", "import os\nimport sys\n")
    before = contents(host)
    assert states(host, patch) == ["uncommitted changes", "exact", "absent"]
    with pytest.raises(PatchError, match=r"scripts/train\.py: has uncommitted changes; commit or stash them"):
        patching.apply(host, patch)
    assert contents(host) == before
    git(host, "commit", "-qam", "fork")
    patching.apply(host, patch)
    assert patching.check(host, patch).applied
    git(host, "commit", "-qam", "patched")
    assert patching.check(host, patch).applied
    patching.revert(host, patch)
    assert (host / PATHS[0]).read_text() == TRAIN.replace("import os\n", "import os\nimport sys\n")


def test_a_repository_that_git_cannot_read_is_an_error(host, patch, monkeypatch):
    (host / ".git").write_text("gitdir: nowhere\n")
    with pytest.raises(PatchError, match="git cannot tell whether"):
        patching.apply(host, patch)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PatchError, match="there is no git command"):
        patching.apply(host, patch)
    assert (host / PATHS[0]).read_text() == TRAIN


def test_a_write_protected_file_is_left_alone(host, patch, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "eval.py")  # root may write to any
    with pytest.raises(PermissionError, match=r"eval\.py is write-protected; nothing was changed"):
        patching.apply(host, patch)
    assert (host / PATHS[0]).read_text() == TRAIN


@pytest.mark.parametrize(
    "old, new, message",
    [
        (f"    energy: int = 0{MARKER}\n", "", "4 of 5 lines are there (3, 22, 25, 31), missing: energy: int = 0;"),
        ("energy.save(step)", "energy.save(step + 1)", "edited, or of another version of the patch: line 32"),
        (f"energy.save(step){MARKER}", "energy.save(step)", "edited, or of another version of the patch: line 32"),
        (
            "            energy.save",
            f"            energy.save(step){MARKER}\n            energy.save",
            "line 33 is there twice",
        ),
    ],
)
def test_a_half_applied_or_edited_file_is_refused(host, patch, old, new, message):
    patching.apply(host, patch)
    edit(host / PATHS[0], old, new)
    before = contents(host)
    assert states(host, patch) == ["half applied", "applied", "absent"]
    for action in (patching.apply, patching.revert):
        with pytest.raises(PatchError) as raised:
            action(host, patch)
        assert message in str(raised.value) and contents(host) == before


def test_lines_that_were_moved_are_not_called_applied(host, patch):
    patching.apply(host, patch)
    path = host / PATHS[0]
    line = f"            energy.save(step){MARKER}\n"
    edit(path, line, "")
    path.write_text(path.read_text() + line.lstrip())  # at the end of the file, where `energy` is not known
    assert states(host, patch) == ["half applied", "applied", "absent"]
    with pytest.raises(PatchError, match=r"moved or indented otherwise \(from line 3\d on\); revert, then apply"):
        patching.apply(host, patch)
    assert patching.revert(host, patch) == [*PATHS[:2]] and path.read_text() == TRAIN


def test_lines_whose_anchor_went_are_not_called_applied(host, patch):
    patching.apply(host, patch)
    edit(host / PATHS[0], "window = {", "history = {")
    edit(host / PATHS[0], 'window["loss"]', 'history["loss"]')
    report = patching.check(host, patch)
    assert report.files[0].state == "half applied" and "no longer where they belong" in report.files[0].problem


def test_a_revert_that_would_leave_no_python_is_refused(host, patch):
    patching.apply(host, patch)
    path = host / PATHS[0]
    edit(path, "            energy.save", "            if step > 10:\n                energy.save")
    before = contents(host)
    with pytest.raises(
        PatchError, match=r"train\.py: without the added lines \(from 3 on\): cannot be parsed.*nothing was"
    ):
        patching.revert(host, patch)
    assert contents(host) == before


def test_edits_beside_the_lines_stay(host, patch):
    patching.apply(host, patch)
    path = host / PATHS[0]
    path.write_text("# mine\n" + path.read_text() + "# mine\n")
    assert states(host, patch)[:2] == ["applied", "applied"]
    patching.revert(host, patch)
    assert path.read_text() == f"# mine\n{TRAIN}# mine\n"


def test_a_patch_in_one_file_only_is_half_applied_and_can_be_reverted(host, patch):
    patching.apply(host, patch)
    (host / PATHS[1]).write_text(EVAL)
    with pytest.raises(
        PatchError,
        match="half applied: some files have the lines and others do not; apply --only the others, or revert",
    ):
        patching.apply(host, patch)
    assert patching.revert(host, patch) == [PATHS[0]] and (host / PATHS[0]).read_text() == TRAIN


def test_a_write_that_fails_leaves_everything_as_it_was(host, patch, monkeypatch):
    before, replace, calls = contents(host), os.replace, []

    def fails_once(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OSError, match="disk full"):
        patching.apply(host, patch)
    assert len(calls) == 3 and contents(host) == before


LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def programs(draw) -> tuple[bytes, FilePatch]:
    """A program with any line ends, with or without one at the end, and lines to add anywhere in it."""
    lines, indent = [], 0
    for index in range(draw(st.integers(1, 12))):
        if indent == 0 and draw(st.booleans()):
            lines.append((0, f"def f{index}():"))
            indent = 4
        else:
            indent = draw(st.sampled_from([0, indent])) if lines and not lines[-1][1].endswith(":") else indent
        lines.append(
            (indent, draw(st.sampled_from([f"v{index} = 'ä'", f"v{index} = ('a',\n  1)", f"v{index} = 1  # c"])))
        )
        lines += [(0, "")] * draw(st.integers(0, 2))
    texts = [text for indent, line in lines for text in (" " * indent + line).split("\n")]
    texts = [text + draw(LINE_ENDS) for text in texts]
    source = "".join(texts)
    source = source.rstrip("\r\n") if draw(st.booleans()) else source
    body = ast.parse(source).body
    scopes = [("", body), *((node.name, node.body) for node in body if isinstance(node, ast.FunctionDef))]
    targets = [(scope, node) for scope, nodes in scopes for node in nodes if isinstance(node, ast.Assign)]
    insertions = []
    for number in range(draw(st.integers(1, 4))):
        scope, node = draw(st.sampled_from(targets))
        place = draw(st.sampled_from(["after", "before"]))
        line = (node.end_lineno or 0) if place == "after" else node.lineno - 1
        anchor = Anchor(place, "assignment", ast.unparse(node.targets[0]), scope)
        insertions.append(Insertion(line, node.col_offset, f"x{number} = {number}", anchor))
    known = draw(st.booleans())
    sha256 = hashlib.sha256(source.encode()).hexdigest() if known else "0" * 64
    return source.encode(), FilePatch("a.py", sha256, tuple(insertions))


@settings(deadline=None, max_examples=100)
@given(programs())
def test_revert_undoes_apply_and_apply_is_idempotent(program):
    source, file = program
    patched, places = add_lines(source, file)
    assert remove_lines(patched, file) == source
    numbers, problem = find_lines(patched, file)
    assert not problem and len(numbers) == len(places) == len(file.insertions)  # so that apply leaves it alone
    ours = [insertion.text + MARKER for insertion in file.insertions]
    left = [line for line in patched.decode().splitlines() if line.strip() not in ours]
    assert left == source.decode().splitlines()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"path": "prismatic/extern/hf/modeling_prismatic.py"},
            "names prismatic/extern/hf/modeling_prismatic.py, which must never",
        ),
        ({"path": "MODELING_PRISMATIC.PY"}, "must never be touched"),
        ({"path": "../train.py"}, "must stay inside the checkout"),
        ({"path": "/etc/train.py"}, "must stay inside the checkout"),
        ({"path": "eval.py"}, "names 3 files, expected at least one and each once"),
        ({"sha256": "abc"}, "sha256 'abc' is not 64 hexadecimal digits"),
        ({"optional": 1}, "optional is 1, expected true or false"),
        ({"insertions": []}, "0 insertions"),
        ({"insertions": None}, "cannot be read (TypeError"),
    ],
)
def test_a_damaged_patch_is_refused(tmp_path, change, message):
    data = as_json({})
    data["files"][0] |= change  # type: ignore[index]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PatchError) as raised:
        load_patch(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"line": -1}, "must be integers of 0 or more"),
        ({"indent": True}, "must be integers of 0 or more"),
        ({"text": "x = 1\ny = 2"}, "is not one whole Python statement"),
        ({"text": "x ="}, "is not one whole Python statement"),
        ({"text": "if x: y = 1"}, "is not one whole Python statement"),
        ({"text": "x = 1  # why"}, "without a comment"),
        ({"anchor": {"after": "lunch"}}, "anchor {'after': 'lunch'} is not understood; expected after or before"),
        ({"anchor": {"beside": "imports"}}, "is not understood"),
        ({"anchor": {"after": "call"}}, "is not understood"),
        ({"anchor": {"after": "imports", "before": "imports"}}, "is not understood"),
        ({"anchor": {"after": "last field"}}, "needs in: the class"),
        ({"anchor": {}}, "cannot be read (ValueError"),
    ],
)
def test_a_damaged_insertion_is_refused(tmp_path, change, message):
    data = as_json({})
    data["files"][0]["insertions"][0] |= change  # type: ignore[index]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PatchError) as raised:
        load_patch(path)
    assert message in str(raised.value)


def test_the_command(host, patch_path, capsys):
    flags = [str(host), "--patch", str(patch_path)]
    assert cli.main(["patch", "check", *flags]) == 0
    printed = capsys.readouterr().out
    assert "scripts/train.py: exact" in printed and "deploy.py: not there" in printed
    assert "after line 22 (after the assignment of loss in train): loss = energy.add_loss(loss, metrics)" in printed
    assert printed.endswith("vla-energy patch apply would work\n") and (host / PATHS[0]).read_text() == TRAIN
    assert cli.main(["patch", "apply", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("applied robot\n") and "already" not in printed
    assert cli.main(["patch", "apply", *flags]) == 0
    assert capsys.readouterr().out.endswith("already applied; nothing was changed\n")
    assert cli.main(["patch", "check", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["ok"] and report["applied"] and report["files"][0]["lines"] == [number for number, _ in EXPECTED_TRAIN]
    )
    assert cli.main(["patch", "revert", *flags]) == 0
    assert "scripts/train.py: the added lines are out" in capsys.readouterr().out
    assert cli.main(["patch", "revert", *flags]) == 0
    assert "not applied; nothing was changed" in capsys.readouterr().out


def test_the_command_on_what_does_not_fit(host, patch_path, tmp_path, capsys):
    edit(host / PATHS[0], "window = {", "history = {")
    flags = [str(host), "--patch", str(patch_path)]
    assert cli.main(["patch", "check", *flags]) == 1
    assert "scripts/train.py: no place after the assignment of window" in capsys.readouterr().out
    assert cli.main(["patch", "check", *flags, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "unfit"
    assert cli.main(["patch", "apply", *flags]) == 2
    assert "error: scripts/train.py: no place after" in capsys.readouterr().err
    assert cli.main(["patch", "apply", *flags, "--only", "eval.py"]) == 0
    assert (host / PATHS[0]).read_text() == TRAIN.replace("window = {", "history = {")
    assert cli.main(["patch", "check", *flags, "--only", "exam.py"]) == 2
    assert "has no file exam.py; it has scripts/train.py" in capsys.readouterr().err
    assert cli.main(["patch", "check", str(tmp_path), "--patch", str(patch_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert cli.main(["patch", "check", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert "is no checkout" in json.loads(captured.out)["problem"] and "is no checkout" in captured.err


def test_the_shipped_patch_is_small():
    patch = load_patch()
    assert patch.name == "openvla_oft_213c5ff8" and patch.commit.startswith("213c5ff8")
    counts = {file.path: len(file.insertions) for file in patch.files}
    required = [file.path for file in patch.files if not file.optional]
    assert required == ["vla-scripts/finetune.py", "experiments/robot/libero/run_libero_eval.py"]
    assert sum(counts[path] for path in required) <= 10
    widths = [insertion.indent + len(insertion.text + MARKER) for file in patch.files for insertion in file.insertions]
    assert max(widths) <= 120  # the host's line length
    assert (Path(__file__).parents[1] / "patches" / shipped().name).read_bytes() == shipped().read_bytes()


@pytest.mark.skipif("VLA_ENERGY_HOST" not in os.environ, reason="VLA_ENERGY_HOST: no openvla-oft checkout is named")
def test_the_host(tmp_path):
    patch = load_patch()
    for file in patch.files:
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(os.environ["VLA_ENERGY_HOST"]) / file.path, tmp_path / file.path)
    before = contents(tmp_path)
    assert states(tmp_path, patch) == ["exact"] * len(patch.files)
    for file in patch.files:
        elsewhere = FilePatch(file.path, "0" * 64, file.insertions)
        assert add_lines(before[file.path], file) == add_lines(before[file.path], elsewhere)
    patching.apply(tmp_path, patch)
    assert patching.check(tmp_path, patch).applied
    patching.revert(tmp_path, patch)
    assert contents(tmp_path) == before
