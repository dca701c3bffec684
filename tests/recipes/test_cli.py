"""Command lines: paths are taken literally, and errors are one sentence. 10 s, 40 s with the slow ones."""

import importlib
import json
import os
from pathlib import Path

import pytest
import timm
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import zoo  # noqa: F401
from zoo.messages import UserError
from zoo.recipes import cli, early, sweep


@pytest.fixture
def called(monkeypatch, capsys, tmp_path):
    """Run a command in this process, in an empty folder; returns its output and exit code."""
    monkeypatch.chdir(tmp_path)

    def call(module, *words):
        monkeypatch.setattr("sys.argv", [f"zoo-{module}", *words])
        code = 0
        try:
            importlib.import_module(f"zoo.recipes.{module}").main()
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr()

    return call


# Paths.

NAMES = {
    "commas": "a,b",
    "equals": "lr=0.1",
    "brackets": "[a] (b) {c: d}",
    "quote": "it's",
    "quotes": 'the "best"',
    "backslash": "a\\b",
    "backslash at the end": "a\\",
    "backslash and quote": "a\\'b",
    "dollar": "$HOME",
    "script": "Фото 写真",
    "number": "007",
    "power": "1e5",
    "colon": "a: b",
    "hash": "#1",
    "percent": "100%",
    "tilde": "~x",
    "list": "[1,2]",
    "truth": "yes",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("key", ["run", "data.root", "+data.class_map"])
@pytest.mark.parametrize("folder", ["", "x/"])
def test_path_is_taken_as_it_is(name, key, folder):
    [override] = OverridesParser.create().parse_overrides([cli.literal(f"{key}={folder}{name}")])
    assert override.value() == folder + name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a [1], {b: c}", "it's 'x'\\"])
def test_path_reaches_the_configuration(called, name):
    code, (output, errors) = called("train", f"run={name}", "--cfg", "job")
    assert code == 0, errors
    assert OmegaConf.create(output).run == name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runs/lr=0.1", "it's"])
def test_first_word_of_eval_is_a_run(called, tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    code, (output, errors) = called("eval", name, "--cfg", "job")
    assert code == 0, errors
    assert OmegaConf.create(output).run == name


@pytest.mark.parametrize("word", ["run=null", "run='a b'", "pretrained=true", "pretrained=False", "run=", "model=a,b"])
def test_words_that_are_left_alone(word):
    assert cli.literal(word) == word


def test_quoted_name_that_exists_has_its_quotes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "'a'").mkdir()
    assert cli.literal("data.root='a'") == r"data.root='\'a\''"


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.literal("data.root=~/photos") == f"data.root={tmp_path}/photos"


def test_commas_separate_the_paths_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.literal("data.root=a,b", sweep=True) == "data.root=a,b"
    (tmp_path / "a,b").mkdir()
    assert cli.literal("data.root=a,b", sweep=True) == "data.root='a,b'"


@pytest.mark.slow
def test_flags_may_stand_between_keys(called):
    code, (output, errors) = called("train", "seed=3", "--cfg", "job", "optim.lr=0.5")
    assert code == 0, errors
    assert (OmegaConf.create(output).seed, OmegaConf.create(output).optim.lr) == (3, 0.5)


# Errors.

WRONG = {
    "--epochs 3": "write trainer.epochs=3 for --epochs",
    "--epochs=3": "write trainer.epochs=3 for --epochs=3",
    "--batch-size 8": "write trainer.batch_size=8 for --batch-size",
    "--optim.lr 0.1": "write optim.lr=0.1 for --optim.lr",
    "--data imagefolder": "write data=imagefolder for --data",
    "--pretrained": "write pretrained=true for --pretrained",
    "--run runs/x": "write run=runs/x for --run",
    "-lr 0.1": "write optim.lr=0.1 for -lr",
    "--qqqqqq 3": "there is no option --qqqqqq: settings are written key=value",
    "digits": "'digits' is not of the form key=value: did you mean data=digits?",
    "seed": "'seed' is not of the form key=value: write seed=<value>",
    "optim.betas=0.9,0.99": "for a list, write 'optim.betas=[0.9,0.99]'; to run them one after another, add -m",
    "trainer.amp=[1": """to pass it as a string, write "trainer.amp='[1'".""",
    "trainer.epochs=abc": "trainer.epochs=abc: Value 'abc' of type 'str' could not be converted to Integer",
    "model_kwargs=3": "model_kwargs=3: Cannot assign int to Dict[str, Any]",
    "seed=${nothing}": "Interpolation key 'nothing' not found",
    "recipe=van_b0": "there is no recipe=van_b0: did you mean recipe=imagenet/van_b0? --help recipe lists all",
    "recipe=zzzzzz": "there is no recipe=zzzzzz: --help recipe lists all",
    "optim=3": "there is no optim=3: There are adamw, sgd",
    "-m --cfg job": "-m, --cfg, --info and --shell-completion can't be combined",
    "--resolve": "--resolve needs --cfg",
    "-m seed=range(3,1)": "seed=range(3,1) gives no value",
    "-m seed=interval(0,1)": "does not support sweep type",
    "--cfg all-of-it": "invalid choice: 'all-of-it'",
    "--config-name zzz": "Cannot find primary config 'zzz'",
    "model=van_b9": "there is no model 'van_b9': did you mean van_b",
    "model=": "there is no model ''",
    "data=imagefolder": "data.root is not set",
    "data=imagefolder data.root=nowhere": "data.root=nowhere does not exist",
    "data.class_map=nowhere.txt": "data.class_map=nowhere.txt does not exist",
    "pretrained=nowhere.pth": "pretrained=nowhere.pth does not exist",
    "optim.weight_decay=-1": "optim.weight_decay=-1.0 is not allowed",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(called, tmp_path, words, message):
    code, (output, errors) = called("train", *words.split())
    assert code in (1, 2)
    assert output == ""
    [line] = errors.splitlines()
    assert line.startswith("zoo-train: error: ")
    assert message in line
    assert list(tmp_path.glob("*/*")) == []


LONG = "a" * 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "word", [LONG, f"run={LONG}", f"data.root={LONG}", f"pretrained={LONG}", f"{LONG}=3", f"--{LONG}"]
)
def test_name_that_is_too_long(called, word):
    code, (_, errors) = called("train", word, "data=imagefolder")
    assert code == 1
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("module", ["train", "eval"])
def test_folder_of_a_run_in_place_of_a_key(called, tmp_path, module):
    (tmp_path / "runs" / "lr=0.1").mkdir(parents=True)
    (tmp_path / "runs" / "lr=0.1" / "config.yaml").write_text("")
    _, (_, errors) = called(module, "seed=1", "runs/lr=0.1")
    assert "'runs/lr=0.1' is not of the form key=value: did you mean run=runs/lr=0.1?" in errors


def test_path_that_a_shell_took_apart(called, tmp_path):
    (tmp_path / "my photos").mkdir()
    _, (_, errors) = called("train", "data.root=my", "photos")
    assert "quote a value with spaces: 'data.root=my photos'" in errors


def test_list_of_nearest_recipes_is_short(called):
    _, (_, errors) = called("train", "recipe=imagenet/van_b9")
    assert errors.count("imagenet/") < 8


@pytest.mark.slow
@pytest.mark.parametrize("module", ["eval", "predict"])
def test_misspelt_run(called, tmp_path, module):
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    code, (_, errors) = called(module, *{"eval": ["runs/photo"], "predict": ["run=runs/photo", "a.png", "out"]}[module])
    assert code == 1
    assert f"zoo-{module}: error: there is no run folder runs/photo: did you mean" in errors
    assert "runs/photos?" in errors


@pytest.mark.slow
def test_early_checks_import_no_torch(run_cli, tmp_path):
    words = ("model=van_b0", "data=imagefolder", "data.root=nowhere")
    code, output = run_cli(*words, cwd=tmp_path, program="import sys; sys.modules['torch'] = None")
    assert (code, len(output.splitlines())) == (1, 1), output


def test_no_model_is_refused_early():
    for name in timm.list_models():
        if timm.model_entrypoint(name).__module__.startswith(("timm.", "zoo.")):  # others are those of tests
            early.check_model(name)


@pytest.mark.parametrize("name", ["convnext_tiny_in22ft1k", "hf-hub:timm/vit", "local-dir:x"])
def test_other_names_of_models_are_not_refused_early(name):
    early.check_model(name)


@pytest.mark.parametrize("what", ["file", "below a file", "dangling link"])
def test_folder_that_can_not_be_made(tmp_path, what):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling link").symlink_to("nowhere")
    path = tmp_path / {"below a file": "file/out"}.get(what, what)
    with pytest.raises(UserError, match="is a file, and can't be the output folder"):
        early.check_folder(path, "the output folder")


# Sweeps.


def test_what_varied_is_what_no_word_fixes():
    asked = ["seed=0,1", "optim.lr=choice(1,2)", "data.root='a,b'", "trainer.epochs=3"]
    job = ["seed=1", "optim.lr=2", "data.root='a,b'", "trainer.epochs=3"]
    assert sweep.varied(job, asked) == {"seed": "1", "optim.lr": "2"}


def test_sweeper_of_another_kind_chooses_keys_too():
    assert sweep.varied(["optim.lr=0.3"], ["hydra/sweeper=optuna"]) == {"optim.lr": "0.3"}


def test_values_that_vary_are_written_as_they_are_typed():
    words = ["seed=0", "trainer.patience=null", "pretrained=true", "resume=auto"]
    found = sweep.varied(words, [])
    assert found == {"seed": "0", "trainer.patience": "null", "pretrained": "true", "resume": "auto"}


@pytest.fixture
def trained(monkeypatch):
    """Runs of a sweep that end immediately; the seed 2 fails."""
    import zoo.recipes.commands.train as command

    def train(cfg):
        if cfg.seed == 2:
            raise UserError("there is no seed 2.")
        os.makedirs(cfg.run, exist_ok=True)
        return {"task": "classify", "metrics": {"top1": 10.0 * cfg.seed, "top5": 50.0}}

    monkeypatch.setattr(command, "_train", train)


@pytest.mark.slow
def test_sweep_names_its_folders_and_ends_with_a_table(called, trained, tmp_path):
    code, (output, errors) = called("train", "-m", "seed=0,1", "optim.lr=1e-3", "model=test_vit")
    assert code == 0, errors
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert first.endswith("-test_vit-seed=0")
    assert second.endswith("-test_vit-seed=1")
    lines = output.splitlines()
    assert lines[0].split() == ["seed", "top-1", "%", "top-5", "%", "folder"]
    assert lines[1].split() == ["0", "0.00", "50.00", f"runs/{first}"]
    assert lines[2].split() == ["1", "10.00", "best", "50.00", f"runs/{second}"]
    assert lines[3] == f"Side by side: zoo-report runs/{first} runs/{second}"


def test_sweep_over_few_classes_shows_no_top5():
    def columns(**about):
        result = {"task": "classify", "metrics": {"top1": 10.0, "top5": 100.0}, **about}
        return [column.header for column in sweep._table([({}, Path("run"), result)]).columns]

    assert columns(classes=5) == columns(per_class={"a": 1.0, "b": 2.0}) == ["top-1 %", "folder"]
    assert columns(classes=6) == columns() == ["top-1 %", "top-5 %", "folder"]


@pytest.mark.slow
def test_key_of_some_runs_of_a_sweep(called, monkeypatch, caplog):
    """It is left out of the others; a key that has an effect in none is refused, as in a single run."""
    import zoo.recipes.commands.train as command
    from zoo.recipes import composition

    seen = []

    def train(cfg):
        command.check(cfg)
        seen.append((cfg.probe.kind, cfg.probe.k, cfg.probe.epochs, composition.command_line().partition(" run=")[0]))
        return {"task": "classify", "metrics": {}}

    monkeypatch.setattr(command, "_train", train)
    code, (output, errors) = called("train", "-m", "probe=knn,linear", "probe.k=3", "probe.epochs=7")
    assert code == 0, errors + output
    assert seen == [
        ("knn", 3, 100, "zoo-train probe=knn probe.k=3"),
        ("linear", 20, 7, "zoo-train probe=linear probe.epochs=7"),
    ]
    said = errors + caplog.text  # if a run of another test has started the log
    assert "probe.k has no effect with probe.kind=linear: it is left out of this run of the sweep." in said
    code, (output, errors) = called("train", "-m", "probe=ep,linear", "probe.k=3")
    assert code == 1
    assert output.count("probe.k=3 has no effect with") == 2
    code, (output, errors) = called("train", "-m", "probe=none,linear", "trainer.freeze=1", "probe.epochs=7,8")
    assert "2 of 4 runs failed." in errors, output  # those of probe=none, which has no epochs, whatever their number


@pytest.mark.slow
def test_run_that_fails_does_not_end_a_sweep(called, trained, tmp_path):
    code, (output, errors) = called("train", "-m", "seed=0,2,3")
    assert code == 1
    assert "failed: there is no seed 2." in output
    assert "zoo-train: error: there is no seed 2." in errors + output
    assert "1 of 3 runs failed." in errors
    assert len([path for path in (tmp_path / "runs").iterdir() if path.is_dir()]) == 2


@pytest.mark.slow
def test_names_of_folders_are_safe(called, trained, tmp_path):
    called("train", "-m", "recipe=imagenet/van_b0,imagenet/van_b1", "data.root=a,b c", "log.project='x/y'")
    names = sorted(path.name[16:] for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert names == [f"van_b{i}-recipe=imagenet-van_b{i}-data.root={root}" for i in (0, 1) for root in ("a", "b-c")]


@pytest.mark.slow
def test_sweep_of_evaluations_names_its_folders(called, monkeypatch):
    import zoo.recipes.commands.eval as command

    seen = []
    monkeypatch.setattr(command, "_evaluate", lambda cfg: seen.append(cfg.out) or {"task": "classify", "metrics": {}})
    called("eval", "-m", "runs/x", "checkpoint=last,best")
    assert seen == ["runs/x/eval-checkpoint=last", "runs/x/eval-checkpoint=best"]


@pytest.mark.slow
def test_command_of_a_run_of_a_sweep_is_its_own(called, monkeypatch, tmp_path):
    import zoo.recipes.commands.train as command
    from zoo.recipes import composition

    seen = []
    monkeypatch.setattr(
        command, "_train", lambda cfg: seen.append(composition.command_line()) or {"task": "classify", "metrics": {}}
    )
    called("train", "-m", "seed=0,1", "optim.lr=1e-3")
    assert seen[1].startswith("zoo-train seed=1 optim.lr=0.001 run=runs/")


@pytest.mark.slow
def test_recorded_command_is_the_one_that_was_typed(called, monkeypatch, tmp_path):
    import zoo.recipes.commands.train as command
    from zoo.recipes import composition

    seen = []
    monkeypatch.setattr(command, "_train", lambda cfg: seen.append(composition.command_line()))
    called("train", "run=a,b", "model_kwargs.x=3")
    assert seen == ["zoo-train run=a,b model_kwargs.x=3"]


@pytest.mark.slow
def test_sweep_of_real_runs(command, tmp_path):
    small = ("log.wandb=disabled", "trainer.device=cpu", "model=test_vit", "data.img_size=32", "trainer.max_updates=2")
    code, output = command("train", "-m", "seed=0,1", *small)
    assert code == 0, output
    folders = sorted(path.parent for path in tmp_path.glob("runs/*/summary.json"))
    assert [json.loads((path / "summary.json").read_text())["seed"] for path in folders] == [0, 1]
    assert f"zoo-report {' '.join(str(path.relative_to(tmp_path)) for path in folders)}" in output
