"""What people type means what they mean, whatever Hydra's grammar thinks of it."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flashmoe_mlx.application import run
from flashmoe_mlx.command_line import tidy
from flashmoe_mlx.composition import typed
from flashmoe_mlx.config import TASK_CONFIGS, Config, known_keys
from flashmoe_mlx.errors import InputError

SPELLINGS = [
    ["+backend=pread", "+experts_k=4"],
    ["backend=pread", "experts_k=4"],
    ["+backend=pread", "experts_k=4"],
    ["backend=pread", "++experts_k=4"],
    ["++backend=pread", "+experts_k=4"],
]


def composed(*arguments: str) -> Config:
    with initialize_config_module("flashmoe_mlx.configs", version_base="1.3"):
        return typed(compose("config", tidy(arguments)))


@pytest.mark.parametrize("arguments", SPELLINGS, ids=" ".join)
def test_every_spelling_sets_backend_and_k(arguments: list[str]) -> None:
    config = composed(*arguments)
    assert config.backend["_target_"] == "flashmoe_mlx.backends.pread.PreadStore"
    assert config.experts_k == 4


def test_nothing_said() -> None:
    config = composed()
    assert (config.task.name, config.model.name, config.experts_k) == ("generate", "demo", None)
    assert config.backend["_target_"].endswith("PreadStore")


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_flags_may_stand_anywhere(flag: str, place: int) -> None:
    arguments = ["+backend=pread", "+experts_k=2,4"]
    arguments.insert(place, flag)
    assert tidy(arguments) == ["backend=pread", "++experts_k=2,4", flag]


def test_options_keep_their_values() -> None:
    assert tidy(["--cfg", "job", "seed=1", "-p", "model"]) == ["++seed=1", "--cfg", "job", "-p", "model"]


def test_hydras_own_keys_are_left_alone() -> None:
    arguments = ["hydra.run.dir=x", "hydra/launcher=basic", "+hydra.job.name=y"]
    assert tidy(arguments) == ["hydra.run.dir=x", "hydra/launcher=basic", "+hydra.job.name=y"]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_is_taken_as_it_stands(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides(tidy([f"+prompt={text}"]))
    assert OmegaConf.create({"prompt": override.value()}).prompt == text


@pytest.mark.parametrize(
    "text",
    [
        "it's",
        'say "hi"',
        "a, b, c",
        "${oc.env:HOME}",
        "\\${x}",
        "\\\\${x}",
        "back\\",
        "back\\\\",
        "\\'",
        "[1, 2] {3: 4}",
        "x=1",
        "line\nbreak\n",
        "# + ~ | ; &",
        "null and void",
        "glob(*)",
        " spaced ",
        "",
    ],
)
def test_awkward_texts(text: str) -> None:
    config = composed(f"prompt={text}", f"+model.path={text}")
    assert config.prompt == config.model.path == text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("modle=x", "modle: no such key; did you mean model?"),
        ("zzzz=1", "zzzz: no such key; there are answers, backend, "),
        ("prompt", "prompt: expected key=value; --help lists the keys"),
        ("=4", "=4: expected key=value"),
    ],
)
def test_mistakes_are_named(argument: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        tidy([argument])
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experts_k=four", "experts_k=four: must be a whole number or null"),
        ("temperature=hot", "temperature=hot: must be a number"),
        ("raw=maybe", "raw=maybe: must be true or false"),
        ("source=x", "source: task=generate has no such key"),
        ("model.nosuch=1", "model.nosuch: Key 'nosuch' not in 'ModelChoice'"),
    ],
)
def test_types_are_checked(argument: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        composed(argument)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("task", TASK_CONFIGS)
def test_every_task_composes(task: str) -> None:
    config = composed(f"task={task}")
    assert type(config) is TASK_CONFIGS[task]
    assert config.task.name == task


@pytest.mark.parametrize("group", ["backend", "model", "task"])
def test_every_yaml_satisfies_the_types(group: str) -> None:
    names = [path.stem for path in (Path(__file__).parent.parent / "configs" / group).glob("*.yaml")]
    assert names
    for name in names:
        composed(f"{group}={name}")


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    missing = [key for key in known_keys() if f" {key}=" not in shown]
    assert not missing
