"""Configurations, the schema, and the messages for misspelt keys. About 10 s, 30 s with the slow ones."""

import dataclasses
import importlib
import re
import subprocess
import sys
from copy import deepcopy

import pytest
from omegaconf import OmegaConf

import zoo
from zoo.messages import UserError
from zoo.recipes import cli, config, reading, run_folder

GROUP_OPTIONS = [
    f"{group}={option}"
    for group in config.GROUPS
    if group != "recipe"
    for option in cli.options(group)
    if f"{group}={option}" != "data=timm"  # the user has to give its name
]


def _leaves(schema, prefix=""):
    for field in dataclasses.fields(schema):
        value = getattr(schema(), field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(type(value), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


@pytest.fixture
def of_run(compose, tmp_path):
    """The configuration of `zoo-eval` with `words` for a run that was started with others."""

    def call(run, *words):
        run_folder.save_config(tmp_path, compose(*run))
        keys = [word.partition("=")[0].lstrip("+") for word in words]
        return config.of_run(compose(*words, name="eval"), reading.load_config(tmp_path), keys)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        ["recipe=imagenet/dinat_large_ft384"],
        ["recipe=coco/mask2former_dinat_large"],
        ["recipe=ade20k/upernet_cswin_large"],
        ["+model_kwargs.drop_path_rate=0.1"],
        ["task=detect", "+mm.model.test_cfg.rcnn.score_thr=0.1"],
        [],
    ],
    ids=" ".join,
)
def test_configuration_of_a_run_comes_back_as_it_was(compose, of_run, run):
    found = OmegaConf.to_container(of_run(run))
    assert {key: found[key] for key in vars(config.Config())} == OmegaConf.to_container(compose(*run))


@pytest.mark.slow
def test_configuration_of_a_run_from_before_published_figures_were_settings(compose, tmp_path):
    old = OmegaConf.masked_copy(compose(), [key for key in vars(config.Config()) if key != "published"])
    run_folder.save_config(tmp_path, old)
    found = config.of_run(compose(name="eval"), reading.load_config(tmp_path), [])
    assert found.model == "test_van"
    assert found.published.model is None


@pytest.mark.slow
def test_keywords_of_a_run_are_changed_one_by_one(of_run):
    found = of_run(["+model_kwargs={drop_path_rate: 0.1, num_heads: 2}"], "+model_kwargs.drop_path_rate=0.2")
    assert found.model_kwargs == {"drop_path_rate": 0.2, "num_heads": 2}


@pytest.mark.slow
def test_mm_of_a_run_is_changed(of_run):
    found = of_run(["task=detect", "+mm.model.test_cfg.rcnn.score_thr=0.1"], "+mm.model.test_cfg.rcnn.score_thr=0.2")
    assert found.mm.model.test_cfg.rcnn == {"score_thr": 0.2}


@pytest.mark.slow
def test_override_beats_recipe(compose):
    assert compose("recipe=imagenet/van_b0", "trainer.epochs=7").trainer.epochs == 7


@pytest.mark.slow
def test_option_beats_recipe(compose):
    assert compose("recipe=imagenet/van_b0", "augment=none").augment.mixup == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("override", GROUP_OPTIONS)
def test_group_option_composes(compose, override):
    config.check(compose(override))


@pytest.mark.slow
def test_default_trains_test_van_on_digits(compose):
    cfg = compose()
    assert (cfg.model, cfg.data.name, cfg.task) == ("test_van", "digits", "classify")


@pytest.mark.parametrize("data", ["imagefolder", "timm data.name=tar"])
def test_other_data_do_not_inherit_what_is_meant_for_digits(compose, data):
    cfg = compose(*f"data={data}".split())
    assert cfg.augment.hflip == 0.5
    assert cfg.trainer.epochs == 30


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize("words", ["model_kwargs.drop_path_rate=0.25", "model_kwargs={drop_path_rate: 0.25}"])
def test_model_keywords_with_and_without_a_sign(command, sign, words):
    code, output = command("train", sign + words, "--cfg", "job")
    assert code == 0, output
    assert OmegaConf.create(output).model_kwargs == {"drop_path_rate": 0.25}


@pytest.mark.slow
def test_model_keyword_of_a_recipe_is_changed(command):
    _, output = command("train", "recipe=imagenet/van_b0", "model_kwargs.drop_path_rate=0.25", "--cfg", "job")
    assert OmegaConf.create(output).model_kwargs == {"drop_path_rate": 0.25}


# The schema.


@pytest.mark.parametrize("schema", [config.Config, config.EvalConfig], ids=lambda s: s.__name__)
def test_every_key_has_help(schema):
    assert [name for name, field in _leaves(schema) if not field.metadata.get("help")] == []


NAMES = """
model model_kwargs pretrained run resume seed task data.root data.name data.img_size data.num_workers data.max_corrupt
optim.lr optim.weight_decay optim.layer_decay trainer.epochs trainer.batch_size trainer.device trainer.amp
trainer.compile trainer.max_updates trainer.max_nonfinite trainer.deterministic log.wandb
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_name_that_scripts_rely_on(name):
    assert name in dict(_leaves(config.Config))


@pytest.mark.parametrize("name", ["checkpoint", "per_class", "out", "run", "data.root"])
def test_name_of_eval_that_scripts_rely_on(name):
    assert name in FIELDS


def test_keys_lists_groups_without_help():
    assert dict(config.keys())["trainer"] == ""


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.leraning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("optim.lr_mult", "optim.lr_factors"),
        ("learning_rate", "optim.lr"),
        ("optim.wieght_decay", "optim.weight_decay"),
        ("weight_decay", "optim.weight_decay"),
        ("trainer.batchsize", "trainer.batch_size"),
        ("batch_size", "trainer.batch_size"),
        ("trainer.epoch", "trainer.epochs"),
        ("train.epochs", "trainer.epochs"),
        ("data.image_size", "data.img_size"),
        ("data.workers", "data.num_workers"),
        ("sed", "seed"),
        ("modle", "model"),
        ("pretraind", "pretrained"),
        ("schedule.warmup", "schedule.warmup_epochs"),
        ("log.wandd", "log.wandb"),
    ],
)
def test_nearest_key(key, meant):
    assert config.nearest_key(key) == meant


def test_nearest_key_of_nothing_similar():
    assert config.nearest_key("qqqqqqqq") is None


def test_nearest_key_knows_the_keys_of_eval():
    assert config.nearest_key("perclass", config.EvalConfig) == "per_class"


# Invalid values.

REFUSED = [
    ("trainer.epochs=0", "1 or more"),
    ("trainer.batch_size=0", "1 or more"),
    ("trainer.eval_every=0", "1 or more"),
    ("trainer.max_updates=0", "1 or more, or null"),
    ("trainer.max_nonfinite=-1", "0 or more"),
    ("trainer.amp=fp8", "none, bf16 or fp16"),
    ("trainer.parallel=dp", "ddp or fsdp"),
    ("trainer.ema_decay=1.0", "between 0 and 1, or null"),
    ("trainer.ema_decay=0.0", "between 0 and 1, or null"),
    ("trainer.effective_batch_size=0", "1 or more, or null"),
    ("optim.lr=0", "above 0, or null"),
    ("optim.lr=nan", "above 0, or null"),
    ("optim.weight_decay=-0.1", "0 or more"),
    ("optim.layer_decay=0", "above 0, at most 1, or null"),
    ("optim.layer_decay=1.5", "above 0, at most 1, or null"),
    ("optim.clip_mode=hard", "norm, value or agc"),
    ("schedule.warmup_epochs=-1", "0 or more"),
    ("data.max_corrupt=-1", "0 or more"),
    ("data.max_pixels=0", "1 or more"),
    ("data.num_workers=-1", "0 or more, or null"),
    ("data.val_fraction=0", "between 0 and 1"),
    ("data.val_fraction=1", "between 0 and 1"),
    ("data.img_size=0", "1 or more, or null"),
    ("data.sampling=even", "uniform or balanced"),
    ("loss.name=hinge", "ce, bce or focal, or null"),
    ("loss.gamma=-1", "0 or more, at most 10"),
    ("eval.threshold=1.5", "a number, or numbers by class, between 0 and 1"),
    ("eval.threshold={cat:0}", "a number, or numbers by class, between 0 and 1"),
    ("eval.threshold=low", "a number, or numbers by class, between 0 and 1"),
    ("augment.smoothing=1", "0 or more and below 1"),
    ("augment.scale=[1,0.5]", "two rising numbers above 0"),
    ("augment.scale=[0.5]", "two rising numbers above 0"),
    ("augment.ratio=[0,1]", "two rising numbers above 0"),
    ("augment.mixup_mode=all", "batch, pair or elem"),
    ("log.wandb=maybe", "offline, online or disabled"),
    ("resume=yes", "auto, never or must"),
    ("seed=-1", "0 or more"),
]


FIELDS = dict(_leaves(config.EvalConfig))
RANGES = {name: field.metadata.get("allowed") for name, field in FIELDS.items()}
NUMBERS = [name for name, field in FIELDS.items() if re.search("int|float", str(field.type))]
# Strings that name something of the user, or that only other packages can check.
FREE = """
data.csv data.file_column data.label_column data.split_column data.label_separator
data.name data.root data.train_split data.val_split data.class_map data.input_key data.target_key data.train_ann
data.val_ann data.train_images data.val_images data.train_labels data.val_labels augment.auto_augment optim.opt
corruptions dense.method dense.no_decay distill.teacher distill.weights imagenet.val imagenet.real imagenet.v2
imagenet.a imagenet.r imagenet.sketch imagenet.c log.project model published.model published.source run out task
"""


def test_every_key_has_the_values_that_it_takes():
    texts = [name for name, field in FIELDS.items() if "str" in str(field.type) and "dict" not in field.type]
    assert [name for name in [*NUMBERS, *texts] if not RANGES[name] and name not in FREE.split()] == []
    assert set(FREE.split()) <= RANGES.keys()


@pytest.fixture(scope="module")
def defaults(compose):
    """The configuration of `zoo-eval`; read only."""
    return compose(name="eval")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1e30", "1e30"])
@pytest.mark.parametrize("key", NUMBERS)
def test_number_that_no_run_can_use(defaults, key, value):
    cfg, field = deepcopy(defaults), FIELDS[key]
    number = float(value) if "float" in field.type else int(float(value)) if "e" in value else -7_000_000_000
    several = {"list": [number, number], "dict": {"a": number}}
    OmegaConf.update(cfg, key, several.get(field.type[:4], number), force_add=True)
    with pytest.raises(UserError, match=rf"^{re.escape(key)}=.* is not allowed: it has to be [^\n]*\.$"):
        config.check(cfg)


@pytest.mark.parametrize("key", [name for name in RANGES if isinstance(RANGES[name], config.OneOf | config.Like)])
def test_word_that_no_run_can_use(defaults, key):
    cfg = deepcopy(defaults)
    OmegaConf.update(cfg, key, "nonsense")
    with pytest.raises(UserError, match=rf"^{re.escape(key)}=nonsense is not allowed: it has to be .* or .*\.$"):
        config.check(cfg)


ABSURD = {
    "augment.mixup_prob=5": "0 or more, at most 1",
    "augment.hflip=1.1": "0 or more, at most 1",
    "augment.scale=[1,2,3]": "two rising numbers above 0",
    "augment.ratio=[2,1]": "two rising numbers above 0",
    "augment.re_count=0": "1 or more, at most 100",
    "optim.clip_grad=0": "above 0, or null",
    "optim.betas=[0.9]": "two or three numbers, 0 or more and below 1, or null",
    "optim.betas=[0.9,1.0]": "two or three numbers, 0 or more and below 1, or null",
    "optim.lr=1e5": "above 0, or null, and 10,000 at most",
    "++optim.lr_factors={head.weight:1e5}": "factors above 0, and 10,000 at most",
    "++optim.lr_factors={head:1,stem:0}": "factors above 0",
    "data.std=[0,1,1]": "a list of numbers, above 0, at most 1, or null",
    "data.mean=[]": "a list of numbers, 0 or more, at most 1, or null",
    "data.img_size=1000000": "1 or more, or null, and 100,000 at most",
    "trainer.device=gpu": "auto, cpu, cuda, cuda:N, mps or xpu",
    "log.every=0": "1 or more",
}


@pytest.mark.parametrize(("override", "allowed"), ABSURD.items(), ids=ABSURD)
def test_absurd_value(compose, override, allowed):
    with pytest.raises(UserError, match=rf"is not allowed: it has to be {re.escape(allowed)}\.$"):
        config.check(compose(override))


@pytest.mark.slow
@pytest.mark.parametrize(("override", "allowed"), REFUSED, ids=[override for override, _ in REFUSED])
def test_check_names_key_value_and_what_is_allowed(compose, override, allowed):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"{re.escape(key)}=.* is not allowed.*{re.escape(allowed)}"):
        config.check(compose(override))


@pytest.mark.parametrize("mixing", ["augment.mixup=0.2", "augment.cutmix=1"])
def test_check_refuses_mixing_of_odd_batches(compose, mixing):
    with pytest.raises(UserError, match=r"trainer.batch_size=7 is odd"):
        config.check(compose(mixing, "trainer.batch_size=7"))


# The command.

MISSPELT = [
    ("optim.leraning_rate=1", "did you mean optim.lr?"),
    ("trainer.batchsize=4", "did you mean trainer.batch_size?"),
    ("+trainer.batchsize=4", "did you mean trainer.batch_size?"),
    ("augment=strng", "did you mean augment=strong?"),
    ("data=folder", "did you mean data=imagefolder?"),
    ("recipe=imagenet/van_b9", "imagenet/van_b0"),
    ("trainer.epochs=abc", "could not be converted to Integer"),
    ("trainer.amp=[1", "no viable alternative"),
    ("digits", "did you mean data=digits?"),
]


@pytest.mark.parametrize("override", ["dense.crop=[64,64]", "dense=mask2former", "+mm.randomness.seed=3"])
def test_classifiers_do_not_ignore_settings_of_detectors(command, override):
    code, output = command("train", override)
    key = override.partition("=")[0].lstrip("+")
    message = f"zoo-train: error: {key} has no effect with task=classify: it is for detectors and segmentors; leave it "
    assert (code, output) == (1, f"{message}out, or set task.\n")


@pytest.mark.slow
@pytest.mark.parametrize(("override", "message"), MISSPELT, ids=[override for override, _ in MISSPELT])
def test_misspelt_command(command, tmp_path, override, message):
    code, output = command("train", override)
    assert code != 0
    assert message in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [("model=van_b9", "did you mean van_b"), ("trainer.epochs=0", "trainer.epochs=0 is not allowed")],
)
@pytest.mark.slow
def test_wrong_value_on_the_command_line(command, tmp_path, override, message):
    code, output = command("train", override)
    assert code == 1
    assert f"zoo-train: error: {message}" in output or message in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def printed(monkeypatch, capsys):
    """Run a command in this process; returns its output and exit code."""

    def call(module, *words):
        monkeypatch.setattr("sys.argv", [f"zoo-{module}", *words])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"zoo.recipes.{module}").main()
        return ended.value.code, capsys.readouterr()

    return call


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_key(printed, flag):
    code, (output, _) = printed("train", flag)
    assert code == 0
    assert [name for name, _ in _leaves(config.Config) if f"  {name}=" not in output] == []


def test_help_has_the_defaults(printed):
    _, (output, _) = printed("train", "--help")
    assert "  trainer.epochs=30 " in output
    assert "  augment.scale=[0.35,1] " in output
    assert "  data.root=null " in output


def test_help_has_few_recipes(printed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, (output, _) = printed("train", "--help")
    groups, _, _ = output.partition("Groups")[2].partition("Keys")
    assert len(groups.splitlines()) < 40
    assert "imagenet/van_b0" not in output.partition("Groups")[2]
    assert re.search(r"imagenet/<name>\s+\(\d+\)", output)


def test_help_lists_the_recipes_on_request(printed):
    _, (output, _) = printed("train", "--help", "recipe")
    assert output.split() == [f"recipe={name}" for name in cli.options("recipe")]


@pytest.mark.parametrize(
    "name", ["checkpoint", "per_class", "out", "data.val_ann", "trainer.batch_size", "task", "recipe"]
)
def test_help_of_eval_lists(printed, name):
    assert f"  {name}=" in printed("eval", "--help")[1].out


@pytest.mark.parametrize("name", ["optim.lr", "trainer.epochs", "data.train_ann", "augment.mixup", "log.wandb"])
def test_help_of_eval_leaves_out(printed, name):
    assert f"  {name}=" not in printed("eval", "--help")[1].out


@pytest.mark.slow
def test_help_ends_with_its_reader(tmp_path):
    command = f"{sys.executable} -m zoo.recipes.train --help | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert result.stderr == ""


@pytest.mark.parametrize("module", ["train", "eval", "predict", "report"])
def test_version(printed, module):
    code, (output, _) = printed(module, "--version")
    assert code == 0
    assert re.fullmatch(rf"zoo {zoo.__version__}, torch 2\.\S+, timm 1\.\S+, Python 3\.\S+\n", output)


@pytest.mark.parametrize("module", ["eval", "predict", "report"])
def test_without_words_a_command_that_needs_some_explains_itself(printed, module):
    code, (output, errors) = printed(module)
    assert (code, output) == (2, "")
    assert f"zoo-{module}" in errors


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "eval"])
def test_cfg_job_prints_the_configuration(run_cli, tmp_path, module):
    code, output = run_cli("--cfg", "job", "optim.lr=0.125", cwd=tmp_path, module=module)
    assert code == 0
    assert OmegaConf.create(output).optim.lr == 0.125
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "eval"])
def test_misspelt_key_of_eval(command, module):
    code, output = command(module, "per_clas=true")
    assert code == 1
    assert ("did you mean per_class?" in output) == (module == "eval")


@pytest.mark.parametrize(
    "words",
    [
        "-m recipe=imagenet/van_b0,imagenet/van_b1",
        "-m augment=none,light seed=range(3)",
        "-m optim.lr=1e-3,5e-4",
        "~recipe",
        "hydra/launcher=basic",
        "recipe=null",
        "model_kwargs.drop_path_rate=0.1",
        "+model_kwargs.drop_path_rate=0.1",
    ],
)
def test_overrides_of_hydra_pass(words):
    checked = cli.check_overrides("zoo-train", config.Config, words.split())
    assert [word.lstrip("+") for word in checked] == [word.lstrip("+") for word in words.split()]


def test_free_keys_get_a_sign():
    words = ["model_kwargs.a=1", "+model_kwargs.b=2", "seed=3"]
    assert cli.check_overrides("zoo-train", config.Config, words) == ["++model_kwargs.a=1", *words[1:]]


def test_misspelt_option_in_a_sweep(capsys):
    with pytest.raises(SystemExit):
        cli.check_overrides("zoo-train", config.Config, ["augment=none,lihgt"])
    assert "did you mean augment=light?" in capsys.readouterr().err
