"""Defaults from a file and from the environment: who wins, what is refused and where, and ``tstitch-trt config``."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import tstitch_trt
from support.command import Command, Outcome, refused
from test_layers import modules
from tstitch_engines.errors import BadInput
from tstitch_trt.cli import COMMANDS
from tstitch_trt.cli._command import command_line
from tstitch_trt.cli._defaults import VARIABLES, config_path, option_key, settable, variables_of
from tstitch_trt.cli.config import every_command

Write = Callable[[str], Path]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """The user's file of defaults."""
    monkeypatch.delenv("TSTITCH_TRT_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "config" / "tstitch-trt" / "config.toml"
    path.parent.mkdir(parents=True)

    def make(text: str) -> Path:
        path.write_text(text)
        return path

    return make


def test_the_command_line_wins_then_the_environment_then_the_file(
    run: Command, write: Write, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write('[all]\nthreads = 1\n[sample]\nsteps = 4\nfraction = 0.5\nlabels = "3"\njson = true\n')

    def steps(*more: object) -> list[str]:
        done = run("sample", fashion_bundle, "-o", tmp_path / "a.png", *more)
        assert done.code == 0, done.err
        members: list[str] = done.json["schedule"]["members"]
        return members

    assert steps() == ["small"] * 2 + ["large"] * 2
    monkeypatch.setenv("TSTITCH_TRT_SAMPLE_STEPS", "2")
    assert steps() == ["small", "large"]
    assert steps("--steps", "3", "--fraction", "0") == ["large"] * 3
    assert run("sample", "--help").code == 0
    monkeypatch.setenv("TSTITCH_TRT_SAMPLE_JSON", "0")
    assert not run("sample", fashion_bundle, "-o", tmp_path / "a.png").out.startswith("{")


def test_help_as_the_value_of_an_option_leaves_the_defaults_on(
    run: Command, write: Write, fashion_bundle: Path
) -> None:
    """Else a prompt of a stranger would switch off the signature that the file asks for."""
    write('[all]\nrequire-signature = "/no/key.pem"\n')
    refused(run("sample", fashion_bundle, "--negative", "--help"), "/no/key.pem")
    refused(run("sample", fashion_bundle, "--latents-out", "a.npy", "--", "-h"), "unexpected extra argument")
    write("[sample\n")
    for words in (("sample", "--steps", "x", "-h"), ("cache", "prune", "--help"), ("build", "--help")):
        assert run(*words).out.startswith("Usage:")
    for words in (("completion", "bash"), ("config", "--template"), ("--version",)):
        assert run(*words).code == 0


def test_a_command_that_reproduces_a_result_has_values_from_everywhere(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tstitch_trt.cli import cli
    from tstitch_trt.cli.evaluate import command

    write('[all]\nthreads = 2\n[evaluate]\nschedule = ["small", "large"]\nsteps = 9\n')
    monkeypatch.setenv("TSTITCH_TRT_EVALUATE_SEED", "7")
    root = cli.make_context("tstitch-trt", ["evaluate"])
    with root, command.make_context("evaluate", ["a.bundle", "--steps", "5"], parent=root):
        assert command_line() == (
            "tstitch-trt evaluate a.bundle --schedule small --schedule large --steps 5 --seed 7 --threads 2"
        )


def test_relative_paths_are_in_the_current_folder_and_python_does_not_read_the_file(
    run: Command, write: Write, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write('[sample]\noutput = "here.png"\nlatents-out = "~/home.npy"\nlabels = 3\nsteps = 1\n')
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run("sample", fashion_bundle).out.split() == ["here.png", str(tmp_path / "home" / "home.npy")]
    assert (tmp_path / "here.png").is_file()
    write("[all]\nrequire-signature = '/no/key.pem'\n[sample\n")
    monkeypatch.setenv("TSTITCH_TRT_SAMPLE_STEPS", "x")
    with tstitch_trt.load(fashion_bundle, threads=1) as runtime:
        assert len(runtime.sample(labels=[3], steps=2).schedule.names) == 2


WRONG = {
    "[sample]\nstep = 3": ("line 2: [sample] step: tstitch-trt sample has no option --step", "did you mean 'steps'?"),
    "\n[sample]\nsteps = true": ("line 3: [sample] steps is True; allowed is a whole number",),
    "[sample]\nsteps = 0": ("line 2: [sample] steps: 0 is not in the range",),
    "[sample]\nprompt = 'a fox'": ("[sample] prompt is 'a fox'; allowed is a list",),
    "[sample]\nlabels = ['3']": ("allowed is a text or a number",),
    "[all]\ngraph = 'atuo'": ("line 2: [all] graph: 'atuo' is not one of",),
    "[sampel]\nsteps = 3": ("unknown table 'sampel'", "did you mean 'sample'? (", "line 1: sampel"),
    "[all]\nsteps = 3": ("unknown key of [all] 'steps'", "in their command's table"),
    "sample = 3": ("sample is no table",),
    "[cache]\nmax-size = '1GB'": ("unknown table 'cache.max-size'",),
    "\ufeff[sample]\nsteps = 3": ("begins with a byte order mark", "without one"),
    "[sample\nsteps = 3": ("no valid TOML", "line 1"),
    "[sample]\ntrust = true": ("--trust can't be set by a file", "on the command line"),
    "[sample]\nbackend = 'torch'": ("--backend can't be set by a file",),
    "[serve]\ninsecure = true": ("--insecure can't be set by a file",),
    "[sample]\noutput = '~nobody-here/x'": ("[sample] output is '~nobody-here/x'", "write the whole path"),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_the_file_is_refused_with_its_place(run: Command, write: Write, text: str) -> None:
    path = write(text)
    command = ["serve" if "serve" in text else "sample", "a.bundle"]
    if "[cache]" in text:
        command = ["cache", "list"]
    refused(run(*command), str(path) if "cache" not in text else "cache", *WRONG[text])
    refused(run("config"), *WRONG[text])


def test_what_is_wrong_in_the_environment_is_refused(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: str, value: str, *command: str) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            return run(*command)

    one = ("sample", "a.bundle")
    for command in (one, ("config",)):
        refused(asked("TSTITCH_TRT_SAMPLE_STEPS", "x", *command), "$TSTITCH_TRT_SAMPLE_STEPS: 'x'")
        refused(asked("TSTITCH_TRT_SAMPLE_JSON", "maybe", *command), "allowed are 1, true, 0 and false")
    refused(asked("TSTITCH_TRT_SAMPLE_STEP", "3", *one), "did you mean TSTITCH_TRT_SAMPLE_STEPS?")
    for name in ("TRUST", "BACKEND", "PROMPT"):
        refused(asked(f"TSTITCH_TRT_SAMPLE_{name}", "1", *one), "can't be set by the environment")
    refused(asked("TSTITCH_TRT_CONFIG", "/no/such.toml", *one), "$TSTITCH_TRT_CONFIG", "no file")
    refused(asked("TSTITCH_TRT_CASHE", "/x", "config"), "belongs to no command", "did you mean TSTITCH_TRT_CACHE?")
    done = asked("TSTITCH_TRT_KEY_PASSPHRSE", "secret", "config")
    refused(done, "did you mean TSTITCH_TRT_KEY_PASSPHRASE?")
    assert "secret" not in done.err
    assert asked("TSTITCH_TRT_SAMPLE_STEPS", "x", "sample", "--help").code == 0


def test_a_refusal_says_which_values_the_user_did_not_type(run: Command, write: Write, fashion_bundle: Path) -> None:
    path = write("[sample]\nfraction = 0.4\n")
    done = run("sample", fashion_bundle, "--schedule", "small")
    refused(done, "both fraction 0.4 and schedule 'small'")
    assert f"note: --fraction 0.4 comes from {path}" in done.err


def test_config_shows_file_and_values(run: Command, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('[all]\nmemory-limit = "2GiB"\n[cache.prune]\nmax-size = "20GB"\n[serve]\nport = 9000\n')
    monkeypatch.setenv("TSTITCH_TRT_UI_PORT", "7000")
    monkeypatch.setenv("TSTITCH_TRT_KEY_PASSPHRASE", "secret")
    found = run("config", "--json").json
    assert found["file"] == str(path)
    assert found["exists"] is True
    values = {(v["command"], v["option"]): (v["value"], v["source"]) for v in found["values"]}
    assert values["serve", "port"] == (9000, "file")
    assert values["ui", "port"] == ("7000", "$TSTITCH_TRT_UI_PORT")
    assert values["cache prune", "max-size"] == ("20GB", "file")
    assert values["verify", "memory-limit"] == ("2GiB", "file")
    assert ("cache list", "memory-limit") not in values
    shown = run("config").out
    assert "serve" in shown
    assert "secret" not in shown + str(found)
    path.unlink()
    assert f"file: {path} (does not exist)" in run("config").out


def test_the_template_is_a_file_of_all_options(run: Command, write: Write) -> None:
    template = run("config", "--template").out
    assert tomllib.loads(template).keys() == tomllib.loads(template).keys() & {"all", *COMMANDS}
    path = write(template)
    assert run("config", "--json").json["values"] == []
    lines = [re.sub(r"^# ([a-z-]+ = )", r"\1", line) for line in template.splitlines()]
    path.write_text("\n".join(lines))
    done = run("config", "--json")
    assert done.code == 0, done.err
    set_here = {(v["command"], v["option"]) for v in done.json["values"]}
    assert set_here == {(" ".join(p), key) for p, command in every_command() for key in settable(command)}


def test_no_variable_means_two_things() -> None:
    owners: dict[str, str] = dict.fromkeys(VARIABLES, "tstitch-trt")
    starts = {}
    for path, command in every_command():
        for name, option in variables_of(command, path).items():
            assert owners.setdefault(name, " ".join(path)) == " ".join(path), name
            assert name.endswith(option_key(option).replace("-", "_").upper())
        if not hasattr(command, "commands"):
            starts[" ".join(path)] = ("TSTITCH_TRT_" + "_".join(path) + "_").replace("-", "_").upper()
    for name, owner in owners.items():
        assert [command for command, start in starts.items() if name.startswith(start)] == [owner] * (
            owner != "tstitch-trt"
        )


def test_the_files_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert config_path() is None, "empty in the tests"
    monkeypatch.delenv("TSTITCH_TRT_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert config_path() == Path.home() / ".config" / "tstitch-trt" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_path() == tmp_path / "tstitch-trt" / "config.toml"


def test_a_user_without_a_home_has_no_file_and_names_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as any number."""
    from tstitch_engines.bundle.cache import default_root

    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TSTITCH_TRT_CONFIG", "TSTITCH_TRT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert config_path() is None
    with pytest.raises(BadInput, match="no home folder"):
        default_root()


PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "configuration.md").read_text()


def test_the_page_lists_the_variables_that_the_code_reads() -> None:
    """Every name in capitals that is looked up in the environment, through a constant too."""
    read = set()
    for path in modules().values():
        tree = ast.parse(path.read_text())
        constants = {
            target.id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.search(r"\benviron\w*\.get$", ast.unparse(node.func)):
                name = node.args[0]
                for part in ast.walk(name):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        read.add(part.value)
                    elif isinstance(part, ast.Name) and part.id in constants:
                        read.add(constants[part.id])
    shells_own = {"COMP_WORDS"}  # set by the script of a completion
    read = {name for name in read if re.fullmatch(r"[A-Z][A-Z0-9_]+", name)} - shells_own
    assert {"TSTITCH_TRT_CACHE", "TSTITCH_TRT_KEY_PASSPHRASE", "NO_COLOR", "OMP_NUM_THREADS"} <= read
    assert {name for name in read if name.startswith("TSTITCH")} == set(VARIABLES)
    table = set(re.findall(r"^\| `([A-Z0-9_]+)` \|", PAGE, re.MULTILINE))
    assert [name for name in read if name not in PAGE] == []
    assert set(VARIABLES) <= table


def test_the_page_names_what_can_not_be_set_and_what_all_holds() -> None:
    from tstitch_trt.cli._defaults import SHARED

    for key in SHARED:
        assert f"`{key}`" in PAGE
    typed = {f"--{option_key(p)}" for _, c in every_command() for p in c.params if p.opts[0].startswith("-")}
    left = typed - {f"--{key}" for _, command in every_command() for key in settable(command)}
    assert [flag for flag in left - {"--template"} if f"`{flag}`" not in PAGE] == []
    assert os.environ["TSTITCH_TRT_CONFIG"] == ""
