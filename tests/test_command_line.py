"""Tests of the command line: values reach the task as typed, despite Hydra's grammar."""

import contextlib
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flashmoe_mlx.cli.application import run
from flashmoe_mlx.cli.arguments import parse
from flashmoe_mlx.cli.composition import build_config
from flashmoe_mlx.cli.normalization import normalize_argv
from flashmoe_mlx.cli.quoting import separate_texts, verbatim
from flashmoe_mlx.cli.task_keys import keys_of, known_keys, task_names
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.tasks import bench, generate
from flashmoe_mlx.tasks.shared.keys import CommonConfig

SPELLINGS = [
    ["+backend=pread", "+experts_k=4"],
    ["backend=pread", "experts_k=4"],
    ["+backend=pread", "experts_k=4"],
    ["backend=pread", "++experts_k=4"],
    ["++backend=pread", "+experts_k=4"],
]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def composed(*arguments: str) -> CommonConfig:
    with initialize_config_module("flashmoe_mlx.configs", version_base="1.3"):
        return build_config(compose("config", normalize_argv(arguments)))


@pytest.mark.parametrize("arguments", SPELLINGS, ids=" ".join)
def test_every_spelling_sets_backend_and_k(arguments: list[str]) -> None:
    config = composed(*arguments)
    assert config.backend["_target_"] == "flashmoe_mlx.backends.pread.PreadStore"
    assert config.experts_k == 4


def test_a_store_of_another_package_gets_no_options_of_the_default_backend() -> None:
    config = composed("backend._target_=your_package.PlainStore", "backend.slots=4")
    assert (config.backend["_target_"], config.backend["slots"]) == ("your_package.PlainStore", 4)
    assert "threads" not in config.backend


def test_no_arguments() -> None:
    config = composed()
    assert (config.task.name, config.model.name, config.experts_k) == ("generate", "demo", None)
    assert config.backend["_target_"].endswith("PreadStore")


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_flags_may_stand_anywhere(flag: str, place: int) -> None:
    arguments = ["+backend=pread", "+experts_k=2,4"]
    arguments.insert(place, flag)
    assert normalize_argv(arguments) == ["backend=pread", "++experts_k=2,4", flag]


def test_options_keep_their_values() -> None:
    assert normalize_argv(["--cfg", "job", "seed=1", "-p", "model"]) == ["++seed=1", "--cfg", "job", "-p", "model"]


def test_a_tilde_in_an_option_is_expanded() -> None:
    assert normalize_argv(["--config-dir=~/x"]) == [f"--config-dir={Path.home()}/x"]


def test_keys_of_hydra_are_not_changed() -> None:
    arguments = ["hydra/launcher=basic", "+hydra.job.name=y"]
    assert normalize_argv(arguments) == arguments


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
@pytest.mark.parametrize(
    ("value", "folder"),
    [
        ("x", "x"),
        ("/data/josé/run", "/data/josé/run"),
        ("a=b/[v2]", "a=b/[v2]"),
        ("it's, 5", "it's, 5"),
        ("'quoted, as Hydra wants it'", "quoted, as Hydra wants it"),
        ("'it\\'s'", "it's"),
        ("{a: b}", "{a: b}"),
        ("~/runs", str(Path.home() / "runs")),
        ("outputs/${now:%Y}", "outputs/${now:%Y}"),
        ("???", "./???"),
    ],
)
def test_run_directories_are_taken_literally(key: str, value: str, folder: str) -> None:
    (override,) = OverridesParser.create().parse_overrides(normalize_argv([f"{key}={value}"]))
    assert override.value() == folder


@given(text=TEXT)
def test_any_text_is_taken_literally(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides(normalize_argv([f"+prompt={text}"]))
    # OmegaConf has "???" for a missing value; test_question_marks_are_text covers it.
    literal = override.value() if text == "???" else OmegaConf.create({"prompt": override.value()}).prompt
    assert literal == text


KEYS = (
    "task", "model", "model.path", "model.x", "backend", "backend.slots", "backend.trace", "backends", "experiment",
    "experts_k", "prompt", "prompts", "hydra", "hydra.run.dir", "nosuch", "task.name",
)  # fmt: skip
VALUES = ("null", "???", "[a,b]", "{a:b}", "a,b", "'a','b'", "bench", "4", "~/x", "[", "")
ARGUMENT = st.one_of(
    TEXT,
    st.sampled_from(["-m", "--help", "--cfg", "job", "--info", "-p", "--resolve", "--experts_k=4"]),
    st.builds(
        "{}{}={}".format,
        st.sampled_from(["", "+", "++", "~"]),
        st.sampled_from(KEYS),
        st.one_of(TEXT, st.sampled_from(VALUES)),
    ),
)


@settings(deadline=None)
@given(arguments=st.lists(ARGUMENT, max_size=4))
def test_any_command_line_is_normalized_or_refused(arguments: list[str]) -> None:
    with contextlib.suppress(InputError):
        assert all(isinstance(argument, str) for argument in normalize_argv(arguments))


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
        ("zzzz=1", "zzzz: no such key; the keys are activations, backend, "),
        ("prompt", "prompt: expected key=value; --help lists the keys"),
        ("=4", "=4: expected key=value"),
        ("chat", "chat: expected key=value; for the task: task=chat"),
    ],
)
def test_messages_name_the_mistake(argument: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        normalize_argv([argument])
    assert str(raised.value).startswith(message)


def test_text_without_quotes() -> None:
    with pytest.raises(InputError, match=r'^is: expected key=value; text with spaces needs quotes: prompt="\.\.\."$'):
        normalize_argv(["prompt=What", "is", "this?"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experts_k=four", "experts_k=four: must be a whole number or null"),
        ("temperature=hot", "temperature=hot: must be a number"),
        ("raw=maybe", "raw=maybe: must be true or false"),
        ("source=x", "source: task=generate has no such key"),
        ("model.nosuch=1", "model.nosuch: no such key; model has cache_dir, family, path, synthetic"),
        ("model.pth=x", "model.pth: no such key; did you mean model.path?"),
    ],
)
def test_types_are_checked(argument: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        composed(argument)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("task", task_names())
def test_every_task_composes_its_defaults(task: str) -> None:
    config = composed(f"task={task}")
    assert config.task.name == task
    own = import_module(f"flashmoe_mlx.tasks.{task}").Config()
    assert type(config) is type(own)
    groups = {"task", "model", "backend"}
    assert {key: getattr(config, key) for key in keys_of(task) if key not in groups} == {
        key: getattr(own, key) for key in keys_of(task) if key not in groups
    }


@pytest.mark.parametrize("group", ["backend", "model", "task", "experiment"])
def test_every_yaml_satisfies_the_types(group: str) -> None:
    names = {path.stem for path in (Path(__file__).parent.parent / "configs" / group).glob("*.yaml")}
    installed = {found.name for found in distributions()}
    if "hydra-optuna-sweeper" not in installed:
        names.discard("tune")  # Hydra finds no such sweeper; test_tune.py composes it in CI's thorough tests
    if "hydra-ray-launcher" not in installed:
        names.discard("cluster")
    assert names
    for name in names:
        composed(f"{group}={name}")


@pytest.mark.parametrize("task", task_names())
def test_help_explains_exactly_the_keys_of_a_task(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([f"task={task}", "--help"]) == 0
    shown = capsys.readouterr().out
    own = shown[shown.index(f"\ntask={task}:") : shown.index("\nExamples")]
    groups = {"task", "model", "backend"}
    explained = dict(re.findall(r"^  (\w+)[\w.]*=.*(?:\n {28})?(\S.*)$", own, re.MULTILINE))
    assert set(explained) - groups == set(keys_of(task)) - groups - {"debug"}
    assert all(explained.values())
    assert "debug=true" in shown
    assert ("\n  backend=pread" in own) == ("backend" in keys_of(task))
    assert max(map(len, own.splitlines())) < 200


def test_help_without_a_task_is_about_generate(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-h", "backend=mmap"]) == 0
    shown = capsys.readouterr().out
    assert "task=generate: Answer a prompt" in shown
    assert "backend.populate=true" in shown
    assert all(f"  task={task} " in shown for task in task_names())


def test_help_needs_no_mlx() -> None:
    program = """
import sys
sys.modules["mlx"] = sys.modules["mlx.core"] = None
from flashmoe_mlx.__main__ import main
assert main(["task=bench", "--help"]) == 0
assert main(["--version"]) == 0
assert main(["prompt=hi"]) == 1
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "experts_ks=null" in result.stdout
    assert result.stderr.startswith("flashmoe_mlx: MLX is not installed or cannot run on this machine")


@pytest.mark.parametrize("task", task_names())
def test_a_task_refuses_keys_of_other_tasks(task: str) -> None:
    for key in sorted(set(known_keys()) - set(keys_of(task))):
        with pytest.raises(InputError) as raised:
            normalize_argv([f"task={task}", f"{key}=1"])
        assert raised.value.code == "unknown_key"
        assert str(raised.value).startswith(f"{key}: task={task} has no such key")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["task=bench", "max_tokens=99"],
            "max_tokens: task=bench has no such key; did you mean tokens?; max_tokens belongs to",
        ),
        (["task=bench", "profile=true"], "profile: task=bench has no such key; profile belongs to task=generate"),
        (["task=doctor", "backend=pread"], "backend: task=doctor has no such key; backend belongs to task=batch,"),
        (["task=doctor", "backend.threads=2"], "backend: task=doctor has no such key"),
        (["task=pack", "model.path=x"], "model: task=pack has no such key"),
        (["experiment=two_bit", "temperature=1"], "temperature: task=bench has no such key"),
        (["-m", "task=generate,bench", "max_tokens=9"], "max_tokens: task=bench has no such key"),
        (["task=bench", "tokns=3"], "tokns: no such key; did you mean tokens?"),
    ],
)
def test_keys_of_other_tasks_are_explained(arguments: list[str], reason: str) -> None:
    with pytest.raises(InputError) as raised:
        normalize_argv(arguments)
    assert str(raised.value).startswith(reason)


def test_keys_are_checked_again_after_composition() -> None:
    """An experiment outside the package may choose the task."""
    assert parse(["experiment=mine"]).tasks() is None
    assert normalize_argv(["experiment=mine", "max_tokens=3"]) == ["experiment=mine", "++max_tokens=3"]
    with pytest.raises(InputError) as raised:
        build_config(OmegaConf.create({"task": {"name": "bench"}, "max_tokens": 3}))
    assert raised.value.code == "unknown_key"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["task._target_=os.system"], "unknown_key"),
        (["+task._target_=os.system"], "unknown_key"),
        (["task.name=pack"], "unknown_key"),
        (["backend=[pread,mmap]"], "invalid_input"),
        (["backend={name:pread}"], "invalid_input"),
        (["task=???"], "invalid_input"),
        (["hydra=1"], "invalid_input"),
        (["--shell-completion"], "invalid_input"),
        (["-sc", "install=bash", "uninstall=bash"], "invalid_input"),
        (["-m", "--cfg", "job"], "contradiction"),
        (["--resolve"], "contradiction"),
        (["prompt=a", "prompt_file=b"], "contradiction"),
        (["task=bench", "prompts=[a]", "prompt_file=b"], "contradiction"),
        (["hydra.run.dir=~nosuchuser/x"], "no_home_folder"),
        (["hydra.sweep.dir="], "invalid_path"),
    ],
)
def test_mistakes_that_hydra_would_not_explain(arguments: list[str], code: str) -> None:
    with pytest.raises(InputError) as raised:
        normalize_argv(arguments)
    assert raised.value.code == code
    assert "\n" not in str(raised.value)


def test_a_target_in_a_configuration_is_refused() -> None:
    with pytest.raises(InputError) as raised:
        build_config(OmegaConf.create({"task": {"name": "generate", "_target_": "os.system"}}))
    assert raised.value.code == "invalid_value"
    with pytest.raises(InputError) as raised:
        build_config(OmegaConf.create({"task": {"name": "os.system"}}))
    assert raised.value.code == "unknown_task"


def test_question_marks_are_text() -> None:
    config = composed("prompt=???", "model.path=???", "backend=ram_hybrid", "backend.trace=???")
    assert isinstance(config, generate.Config)
    assert (config.prompt, config.model.path, config.backend["trace"]) == ("???", "???", "???")
    config_of_bench = composed("task=bench", "prompts=['???',b]", "backends=[{name:ram_hybrid,trace:'???'}]")
    assert isinstance(config_of_bench, bench.Config)
    assert config_of_bench.prompts == ["???", "b"]
    assert config_of_bench.backends == [{"name": "ram_hybrid", "trace": "???"}]


@pytest.mark.parametrize("text", ["costs ${5}", "a, b", "it's", "[x]", "null", "5", "\\", "\\\\${x}", ""])
def test_texts_in_a_list_are_taken_literally(text: str) -> None:
    quoted = text.replace("\\", "\\\\").replace('"', '\\"') if text.endswith("\\") else text
    config = composed("task=bench", f'prompts=["{quoted}",other]')
    assert isinstance(config, bench.Config)
    assert config.prompts == [text, "other"]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("'Hello','Who are you?'", ["Hello", "Who are you?"]),
        ("'a, b' , \"c\"", ["a, b", "c"]),
        ("'it\\'s','b'", ["it's", "b"]),
        ("[Hello, Who are you?]", ["Hello", "Who are you?"]),
        ("[it's,'q,r']", ["it's", "q,r"]),
        ("Hello, you", ["Hello, you"]),
        ("[v2]", ["[v2]"]),
        ("'one'", ["'one'"]),
        ("'a','b", ["'a','b"]),
        ("", [""]),
    ],
)
def test_several_texts_for_a_sweep(value: str, texts: list[str]) -> None:
    assert separate_texts(value) == texts
    for key in ("prompt", "model.path"):
        (override,) = OverridesParser.create().parse_overrides(normalize_argv(["-m", f"{key}={value}"])[:1])
        assert override.is_sweep_override() == (len(texts) > 1)
        if override.is_sweep_override():
            assert list(override.sweep_string_iterator()) == [verbatim(text) for text in texts]
        (alone,) = OverridesParser.create().parse_overrides(normalize_argv([f"{key}={value}"]))
        assert alone.value() == value


@pytest.mark.parametrize(
    "value", ["~/chat.moetrace", "/a,b/c", "/josé/[v2]=x", "C:\\x/y", "a b (c) é", "${x}/y", "/it's"]
)
def test_paths_of_backend_options_are_texts(value: str) -> None:
    for option in ("trace", "folder"):
        (override,) = OverridesParser.create().parse_overrides(normalize_argv([f"backend.{option}={value}"]))
        assert OmegaConf.create({"x": override.value()}).x == value


def test_values_of_backend_options_keep_their_types() -> None:
    config = composed("backend.threads=8", "backend.chunk_mib=0.5", "backend.direct=true", "backend.variant=null")
    assert isinstance(config, generate.Config)
    options = ("threads", "chunk_mib", "direct", "variant")
    assert [config.backend[name] for name in options] == [8, 0.5, True, None]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--cfg"], "unknown_option"),
        (["--cfg", "x"], "unknown_option"),
        (["--cfg", "seed=1"], "unknown_option"),
        (["--cfg="], "unknown_option"),
        (["--info=x"], "unknown_option"),
        (["-p"], "unknown_option"),
        (["--config-dir="], "unknown_option"),
        (["-m=4"], "unknown_option"),
        (["--version=3"], "unknown_option"),
        (["--experts_k=4"], "unknown_option"),
        (["-m", "foo"], "not_an_override"),
        (["--help", "foo"], "not_an_override"),
        (["--info", "nosuch"], "not_an_override"),
        (["~experts_k"], "not_an_override"),
        (["~backend=pread"], "not_an_override"),
    ],
)
def test_options_are_checked(arguments: list[str], code: str) -> None:
    with pytest.raises(InputError) as raised:
        parse(arguments)
    assert raised.value.code == code


def test_a_key_with_dashes_is_explained() -> None:
    with pytest.raises(InputError) as raised:
        parse(["--experts_k=4"])
    assert str(raised.value) == "--experts_k=4: no such option; write keys without dashes: experts_k=4"


@pytest.mark.parametrize("options", [["--info"], ["--info", "config"], ["-i"], ["-c", "job"], ["-cd", "x", "-m"]])
def test_options_with_and_without_a_value(options: list[str]) -> None:
    assert normalize_argv(["seed=1", *options]) == ["++seed=1", *options]
    assert normalize_argv([*options, "seed=1"]) == ["++seed=1", *options]


@pytest.mark.parametrize(
    "arguments",
    [
        ["task=bench", "experts_k=2", "experts_ks=[2,4]"],
        ["task=evaluate", "experts_k=2", "experts_ks=[2,4]"],
        ["task=bench", "prefetch=none", "prefetches=[none]"],
        ["task=bench", "backend=mmap", "backends=[pread]"],
        ["task=bench_io", "backend.threads=2", "backends=[pread]"],
        ["task=evaluate", "backend.variant=q2", "variants=[q4]"],
        ["experiment=compare_backends", "backend.threads=2"],
        ["experiment=experts_k", "experts_k=2"],
        ["model=synthetic", "model.path=x"],
        ["model=a/b", "model.synthetic.num_layers=2"],
    ],
)
def test_alternative_keys_are_refused(arguments: list[str]) -> None:
    for order in (arguments, arguments[::-1]):
        with pytest.raises(InputError) as raised:
            normalize_argv(order)
        assert raised.value.code == "contradiction"


@pytest.mark.parametrize(
    "arguments",
    [
        ["experiment=compare_backends", "backends=null", "backend=mmap"],
        ["experiment=experts_k", "experts_ks=null", "experts_k=2"],
        ["experiment=experts_k", "backend=mmap"],
        ["task=evaluate", "backend=mmap", "variants=[q4]"],
        ["model=demo", "model.path=x"],
    ],
)
def test_compatible_keys(arguments: list[str]) -> None:
    assert len(normalize_argv(arguments)) == len(arguments)


def test_sizes_of_another_model_are_refused() -> None:
    with pytest.raises(InputError) as raised:
        composed("model.synthetic.num_layers=2")
    assert raised.value.code in ("contradiction", "invalid_value")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("[null,007,1e3,true,1_000]", ["null", "007", "1e3", "true", "1_000"]),
        ("[Grüße, Wie geht's?]", ["Grüße", "Wie geht's?"]),
        ("['a, b',\"c\"]", ["a, b", "c"]),
        ("['a\\\\b','c\\'d']", ["a\\\\b", "c'd"]),
        ("[a\\, b,c]", ["a, b", "c"]),
        ("[😀:100:,[v2] x]", ["😀:100:", "[v2] x"]),
    ],
)
def test_every_list_of_prompts_is_texts(value: str, texts: list[str]) -> None:
    config = composed("task=bench", f"prompts={value}")
    assert isinstance(config, bench.Config)
    assert config.prompts == texts


@pytest.mark.parametrize("value", ["[[a],b]", "{a:b}", "[a", "x"])
def test_invalid_lists_of_texts(value: str) -> None:
    with pytest.raises((InputError, HydraException)):
        composed("task=bench", f"prompts={value}")


@pytest.mark.parametrize("path", ["~/x", "/données/x", "/a=b/x", "C:\\x", "/a b/(c)", "'/it\\'s/[v2], {x}'"])
def test_paths_in_a_list_of_backends(path: str) -> None:
    config = composed("task=bench", f"backends=[pread,{{name: ram_hybrid, trace: {path}, slots: 4}}]")
    assert isinstance(config, bench.Config)
    assert config.backends is not None
    first, second = config.backends
    assert first == "pread"
    expected = "/it's/[v2], {x}" if path.startswith("'") else path
    assert second == {"name": "ram_hybrid", "trace": expected, "slots": 4}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["task=bench", "experts_ks=[a]"], "experts_ks=[a]: must be a list such as [4,2] or null"),
        (["task=bench", "prompts={a:b}"], "prompts={a:b}: must be a list such as [a,b] or null"),
        (["task=bench", "prompts=[[a],b]"], "prompts=[[a],b]: must be a list such as [a,b] or null"),
        (["task=evaluate", "variants=[null]"], "variants=[null]: must be a list such as [a,b] or null"),
        (["task=evaluate", "kinds=[{a:true}]"], "kinds=[{a:true}]: must be a list such as [a,b] or null"),
        (["raw=null"], "raw=null: must be true or false"),
        (["template_options=3"], "template_options=3: must be a mapping such as {a:b}"),
    ],
)
def test_values_of_the_wrong_type_are_shown_as_typed(arguments: list[str], shown: str) -> None:
    with pytest.raises(InputError) as raised:
        composed(*arguments)
    assert raised.value.code == "invalid_value"
    assert str(raised.value) == shown


@pytest.mark.parametrize("sweep", ["experts_k=glob(*)", "backend=glob(nosuch*)", "seed=range(3,1)"])
def test_an_empty_sweep_is_refused(sweep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-m", sweep, f"hydra.sweep.dir={tmp_path}"]) == 2
    assert "nothing ran" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["backend=/etc/passwd"], "backend=/etc/passwd: no such backend"),
        (["template_options=[a]"], "template_options=[a]: "),
        (["hydra.mode=x"], "hydra.mode=x: Invalid value 'x'"),
        (["--cfg", "job", "--package", "nosuch"], "package 'nosuch' not found"),
    ],
)
def test_errors_of_hydra_are_one_line(
    arguments: list[str],
    shown: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    line = capsys.readouterr().err
    assert shown in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("variant", ["[a]", "{a:b}", "3", "true"])
@pytest.mark.parametrize("task", ["generate", "bench_io", "bench"])
@pytest.mark.sampled(4)
def test_a_variant_has_a_name(variant: str, task: str, tiny_pack: Path, tmp_path: Path) -> None:
    model = [f"task={task}", f"model.path={tiny_pack}", f"hydra.run.dir={tmp_path}"]
    assert run([*model, f"backend.variant={variant}"]) == 2
