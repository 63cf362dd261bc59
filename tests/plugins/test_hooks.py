"""Every hook is called where hookspecs.py says, and fails as it says; plugins are found, named and refused."""

from __future__ import annotations

import inspect
import itertools
import logging
import threading
import types

import pluggy
import pytest
import torch
import transformers
from stock import padded

import hf_paged
import zoo
from hf_paged import ConfigError, PagedConfig, PluginError, Reject, RequestRejectedError, hookimpl, hookspecs, plugins
from hf_paged.batch import CacheSpec
from hf_paged.engine.blocks import LRUPolicy
from hf_paged.engine.scheduler import FCFSScheduler
from hf_paged.request import Request, RequestOutput
from hf_paged.stats import CacheStats, EngineInfo, StepStats

transformers.logging.set_verbosity_error()
HOOKS = [name for name, function in vars(hookspecs).items() if hasattr(function, f"{hookspecs.PROJECT}_spec")]
NEW = 5


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    model = zoo.build("llama")
    yield model
    hf_paged.unpatch(model)


def plugin(**hooks):
    """A plugin object with these hooks. Each function takes what its hook gives it, without `self`."""
    made = types.SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})
    made.__name__ = "mine"
    return made


def failing(hook):
    """A plugin that raises in one hook."""
    space: dict = {}
    arguments = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    exec(f"def {hook}({arguments}):\n    raise ZeroDivisionError('oops')", space)
    return plugin(**{hook: space[hook]})


def patch(model, *given, **options):
    return hf_paged.patch(model, plugins=given, on_unsupported="error", **options)


def generate(model, rows=None, **options):
    """The new tokens of a greedy call."""
    inputs = padded(rows or zoo.prompts())
    output = model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def assert_stops_the_engine(model, hook):
    """A set-up hook that raises: no engine, and the error names the plugin and the hook."""
    with pytest.raises(PluginError, match=f"plugin 'mine' failed in {hook}: ZeroDivisionError: oops") as raised:
        patch(model, failing(hook))
        generate(model)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    hf_paged.unpatch(model)
    generate(model)  # the model is as it was


# ------------------------------------------------------------------------------------------------------- one by one


def test_every_hook_has_its_test():
    missing = [name for name in HOOKS if f"test_{name}" not in globals() and name != "register_cli"]  # see test_cli.py
    assert not missing


def test_validate_config(model):
    order, seen = [], []

    def validate_config(config):
        order.append("validate_config")
        seen.append(config)

    def register_schedulers(register):
        order.append("register_schedulers")

    handle = patch(model, plugin(validate_config=validate_config, register_schedulers=register_schedulers))
    assert order == ["validate_config", "register_schedulers"]  # before anything else
    assert seen == [handle.config]
    generate(model)
    assert len(order) == 2  # one patch, one set-up
    hf_paged.unpatch(model)
    assert_stops_the_engine(model, "validate_config")


def test_register_attention_backends(model):
    made = []

    def register_attention_backends(register, config):
        assert isinstance(config, PagedConfig)
        register("idle", lambda spec: pytest.fail("a backend that nobody chose was built"))
        register("mine", build)

    def build(spec):
        from hf_paged_sdpa.backend import SDPABackend

        assert isinstance(spec, CacheSpec)
        made.append(SDPABackend())
        return made[-1]

    expected = generate(model)
    patch(model, plugin(register_attention_backends=register_attention_backends), attention_backend="mine")
    assert generate(model) == expected
    assert len(made) == 1
    hf_paged.unpatch(model)
    assert_stops_the_engine(model, "register_attention_backends")


def test_select_attention_backend(model):
    asked, started = [], []

    def select_attention_backend(spec, device, names):
        asked.append((spec, device, names))
        return "sdpa"

    chooser = plugin(
        select_attention_backend=select_attention_backend, engine_started=lambda info: started.append(info)
    )
    patch(model, chooser)
    generate(model)
    (spec, device, names) = asked[0]
    assert len(asked) == 1
    assert len(spec.layers) == 2
    assert device == spec.device == torch.device("cpu")
    assert names == ("sdpa", "triton")
    assert started[0].attention_backend == "sdpa"
    hf_paged.unpatch(model)

    patch(model, chooser, attention_backend="sdpa")
    generate(model)
    assert len(asked) == 1  # the config decides, nobody is asked
    hf_paged.unpatch(model)

    patch(model, plugin(select_attention_backend=lambda names: "warp"))
    with pytest.raises(
        PluginError, match="plugin 'mine' chose the attention backend 'warp'; registered are sdpa, triton"
    ):
        generate(model)
    hf_paged.unpatch(model)

    patch(model, plugin(select_attention_backend=lambda spec: None))  # leaves it to the next one
    generate(model)
    hf_paged.unpatch(model)
    assert_stops_the_engine(model, "select_attention_backend")


def test_register_schedulers(model):
    order = []

    class Shortest(FCFSScheduler):
        def key(self, request):
            return len(request.prompt_token_ids)

    def register_schedulers(register, config):
        assert isinstance(config, PagedConfig)
        register("shortest", Shortest)

    shortest = plugin(
        register_schedulers=register_schedulers,
        request_finished=lambda request: order.append(len(request.prompt_token_ids)),
    )
    expected = generate(model, zoo.prompts(lengths=(20, 5, 11)))
    patch(model, shortest, scheduler="shortest", max_num_seqs=1)
    assert generate(model, zoo.prompts(lengths=(20, 5, 11))) == expected
    assert order == [5, 11, 20]
    hf_paged.unpatch(model)
    assert_stops_the_engine(model, "register_schedulers")


def test_register_cache_policies(model):
    freed = []

    class Watching(LRUPolicy):
        def keep(self, cached):
            freed.append(cached)
            return super().keep(cached)

    def register_cache_policies(register, config):
        assert isinstance(config, PagedConfig)
        register("watching", Watching)

    patch(model, plugin(register_cache_policies=register_cache_policies), cache_policy="watching")
    generate(model)
    assert any(freed)
    hf_paged.unpatch(model)
    assert_stops_the_engine(model, "register_cache_policies")


def test_register_logits_processors(model):
    calls = []

    class Only:
        def __init__(self, token):
            self.token = token

        def process(self, requests, logits):
            calls.append(self.token)
            if self.token == 77 and len(requests[0].prompt_token_ids) == 5:
                raise ZeroDivisionError("in a step")
            return torch.full_like(logits, -1e9).index_fill_(1, torch.tensor([self.token]), 0.0)

    def register_logits_processors(register, config):
        assert isinstance(config, PagedConfig)
        register(Only(41))
        register(Only(42))

    patch(model, plugin(register_logits_processors=register_logits_processors))
    assert generate(model) == [[42] * NEW] * 3  # both ran, in the order in which they were registered
    assert calls[:2] == [41, 42]
    for options in (
        {"do_sample": True},
        {"repetition_penalty": 1.1},
        {"logits_processor": [lambda ids, scores: scores]},
    ):
        assert generate(model, **options) == [[42] * NEW] * 3  # whoever chooses the token
    hf_paged.unpatch(model)

    handle = patch(model, plugin(register_logits_processors=lambda register: register(Only(77))))
    with pytest.raises(ZeroDivisionError, match="in a step"):
        generate(model, [zoo.prompts()[0]])
    assert generate(model, [zoo.prompts()[1]]) == [[77] * NEW]  # the engine goes on
    assert handle.stats.num_free == handle.stats.num_blocks
    hf_paged.unpatch(model)
    assert_stops_the_engine(model, "register_logits_processors")


def test_register_step_observers(model, caplog):
    seen, calls = [], []

    def broken(stats):
        calls.append(stats)
        raise ZeroDivisionError("an observer")

    def register_step_observers(register):
        register(broken)
        register(seen.append)

    expected = generate(model)
    patch(model, plugin(register_step_observers=register_step_observers))
    with caplog.at_level(logging.ERROR):
        assert generate(model) == expected
    assert len(seen) >= NEW
    assert all(isinstance(stats, StepStats) for stats in seen)
    assert sum(stats.num_prefill_tokens for stats in seen) == sum(map(len, zoo.prompts()))
    assert sum(stats.num_decode_tokens for stats in seen) == 3 * (NEW - 1)
    assert len(calls) == 1  # logged once, and dropped
    (record,) = [record for record in caplog.records if "is dropped" in record.message]
    assert "broken" in record.message
    assert record.exc_info
    hf_paged.unpatch(model)
    assert_stops_the_engine(model, "register_step_observers")


def test_prepare_model(model):
    seen, before = [], dict(vars(model))

    def prepare_model(model, ledger, config):
        seen.append((model, config))
        ledger.set_attribute(model, "prepared", True)

    expected = generate(model)
    handle = patch(model, plugin(prepare_model=prepare_model))
    assert seen == [(model, handle.config)]  # when it is patched, before its layers are looked at
    assert model.prepared
    assert generate(model) == expected
    assert len(seen) == 1
    hf_paged.unpatch(model)
    assert vars(model) == before

    def half_done(model, ledger):
        ledger.set_attribute(model, "prepared", True)
        raise ZeroDivisionError("halfway")

    with pytest.raises(PluginError, match="plugin 'mine' failed in prepare_model: ZeroDivisionError: halfway"):
        patch(model, plugin(prepare_model=half_done))
    assert vars(model) == before
    assert generate(model) == expected


def test_engine_started(model):
    started = []
    patch(model, plugin(engine_started=lambda info: started.append(info)))
    assert not started
    generate(model)
    generate(model)
    (info,) = started
    assert isinstance(info, EngineInfo)
    assert (info.model, info.attention_backend, info.scheduler) == ("LlamaForCausalLM", "sdpa", "fcfs")
    bundled = dict.fromkeys(("core", *plugins.BUNDLED), "bundled")
    assert info.plugins == {**bundled, "mine": "given to the engine"}
    hf_paged.unpatch(model)
    assert_stops_the_engine(model, "engine_started")


def test_engine_stopped(model, caplog):
    told, memory = [], []

    def engine_stopped(info, error):
        told.append((info, error))
        memory.append(built.engine.stats.pool_bytes)

    handle = patch(model, plugin(engine_stopped=engine_stopped), keep_pool=True)
    generate(model)
    ((built, _),) = handle._engines._engines.values()
    assert built.engine.stats.pool_bytes > 0
    assert not told
    hf_paged.unpatch(model)
    assert told == [(built.info, None)]
    assert memory == [0]  # it was given back before
    hf_paged.unpatch(model)
    assert len(told) == 1

    patch(model, failing("engine_stopped"))
    generate(model)
    with caplog.at_level(logging.ERROR):
        hf_paged.unpatch(model)
    assert "engine_stopped" in caplog.text
    assert "generate" not in vars(model)


def test_constrain_request(model):
    class Once:
        """Complete after one token."""

        def advance(self, request):
            return True

    def constrain_request(request, tokenizer):
        asked.append((request, tokenizer))
        return failure(request) if failure else Once()

    asked, failure = [], None
    wanted = hf_paged.SamplingParams(temperature=0.0, max_tokens=NEW, structured_outputs={"json_object": True})
    prompt = zoo.prompts()[0]
    options = {"skip_tokenizer_init": True, "plugins": (plugin(constrain_request=constrain_request),)}
    with hf_paged.LLM(model, **options) as llm:
        (output,) = llm.generate([prompt], wanted, use_tqdm=False)
        assert [type(value) for value in asked[0]] == [Request, type(None)]
        assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (1, "stop")
        llm.generate([prompt], wanted.replace(structured_outputs=None), use_tqdm=False)
        assert len(asked) == 1  # only requests that have structured outputs

        def failure(request):
            raise hf_paged.InvalidRequestError("not that schema")

        with pytest.raises(hf_paged.InvalidRequestError, match="prompt 0: not that schema"):
            llm.generate([prompt], wanted, use_tqdm=False)

        def failure(request):  # noqa: F811
            raise ZeroDivisionError("oops")

        with pytest.raises(PluginError, match="plugin 'mine' failed in constrain_request: ZeroDivisionError: oops"):
            llm.generate([prompt], wanted, use_tqdm=False)


def test_structured_outputs_that_nobody_sees_to_are_refused(model):
    wanted = hf_paged.SamplingParams(structured_outputs={"json_object": True})
    options = {"skip_tokenizer_init": True, "disable_plugins": ("hf_paged_structured",)}
    with hf_paged.LLM(model, **options) as llm, pytest.raises(ConfigError, match="none is loaded"):
        llm.generate([[5]], wanted, use_tqdm=False)


def test_admit_request(model):
    asked = []

    def admit_request(request, stats):
        asked.append((request, stats))
        if len(request.prompt_token_ids) == 5:
            return Reject("too short", retry_after=3.0)
        if len(request.prompt_token_ids) == 17:
            raise ZeroDivisionError("while admitting")
        return None

    short, middle, long = ([row] for row in zoo.prompts())
    expected = generate(model, long)
    handle = patch(model, plugin(admit_request=admit_request))
    with pytest.raises(RequestRejectedError, match="too short") as raised:
        generate(model, short)
    assert raised.value.retry_after == 3.0
    with pytest.raises(ZeroDivisionError, match="while admitting"):
        generate(model, middle)
    assert generate(model, long) == expected
    assert [type(value) for value in asked[0]] == [Request, CacheStats]
    assert len(asked) == 3
    assert handle.stats.num_free == handle.stats.num_blocks


def test_an_admission_that_fails_concerns_that_request_alone(model):
    begun, go_on = threading.Event(), threading.Event()

    def admit_request(request):
        if len(request.prompt_token_ids) == 5:
            raise ZeroDivisionError("while admitting")

    def first_step(stats):
        begun.set()
        go_on.wait(10)

    short, _, long = ([row] for row in zoo.prompts())
    expected = generate(model, long, max_new_tokens=20)
    hooks = plugin(admit_request=admit_request, register_step_observers=lambda register: register(first_step))
    patch(model, hooks)
    got = []
    thread = threading.Thread(target=lambda: got.append(generate(model, long, max_new_tokens=20)))
    thread.start()
    assert begun.wait(10)  # the other one runs
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    with pytest.raises(ZeroDivisionError, match="while admitting"):
        generate(model, short)
    thread.join()
    assert got == [expected]


def test_request_finished(model, caplog):
    told = []

    def request_finished(request, output):
        told.append((request, output))
        assert not request.tables  # its blocks are free
        if len(told) > 1:
            raise ZeroDivisionError("an ear")

    expected = generate(model)
    patch(model, plugin(request_finished=request_finished))
    with caplog.at_level(logging.ERROR):
        assert generate(model) == expected  # the outcome stays as it is
    assert sum("raised in request_finished" in record.message for record in caplog.records) == 2
    assert len(told) == 3
    for request, output in told:
        assert isinstance(output, RequestOutput)
        assert request.metrics.finished_time is not None
        assert output.finished
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].text == ""
    assert sorted(output.outputs[0].token_ids for _, output in told) == sorted(expected)


def test_register_routes():
    pytest.importorskip("fastapi")
    from traffic import Traffic

    seen = []

    def register_routes(app, config):
        seen.append((app, config))
        app.add_api_route("/hello", lambda: "you")

    def call(given):
        server = Traffic(types.SimpleNamespace(register_routes=lambda app, config: None))
        plugins.call(plugins.load(PagedConfig(plugins=(given,))), "register_routes", **server.hook_arguments)
        return server

    server = call(plugin(register_routes=register_routes))
    assert seen == [(server.app, server.app.state.config)]
    assert server.client.get("/hello").json() == "you"
    assert server.client.get("/metrics").status_code == 200  # a bundled plugin's
    with pytest.raises(PluginError, match="plugin 'mine' failed in register_routes"):
        call(failing("register_routes"))


# ------------------------------------------------------------------------------------------------------ names, options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "lifo"}, "scheduler='lifo' is not registered; known are fcfs, priority"),
        ({"cache_policy": "mru"}, "cache_policy='mru' is not registered; known are lru"),
        ({"attention_backend": "warp"}, "attention_backend='warp' is not registered; known are sdpa, triton"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(model, options, message):
    with pytest.raises(ConfigError, match=message):
        patch(model, **options)


@pytest.mark.parametrize(
    ("hook", "name", "what"),
    [
        ("register_schedulers", "fcfs", "scheduler"),
        ("register_cache_policies", "lru", "cache policy"),
        ("register_attention_backends", "sdpa", "attention backend"),
    ],
)
def test_a_name_is_registered_once(model, hook, name, what):
    with pytest.raises(PluginError, match=f"the {what} '{name}' is registered twice") as raised:
        patch(model, plugin(**{hook: lambda register: register(name, object)}))
    assert f"failed in {hook}" in str(raised.value)


def test_what_an_engine_registers_is_its_own():
    config = PagedConfig(plugins=(plugin(register_schedulers=lambda register: register("mine", FCFSScheduler)),))
    assert "mine" in plugins.registry(plugins.load(config), config).schedulers
    assert "mine" not in plugins.registry(plugins.load(PagedConfig()), PagedConfig()).schedulers


# ------------------------------------------------------------------------------------------- which plugins, from where


class Metrics:
    def __init__(self, fails=False):
        self.fails = fails

    @hookimpl
    def validate_config(self, config):
        if self.fails:
            raise ValueError("no")


def names(*given, **options):
    return [name for name, _ in plugins.loaded(plugins.load(PagedConfig(plugins=given, **options)))]


def test_a_misspelt_hook_raises():
    with pytest.raises(PluginError, match="plugin 'mine': unknown hook 'engine_start'"):
        plugins.load(PagedConfig(plugins=(plugin(engine_start=lambda info: None),)))


def test_a_misspelt_argument_raises():
    with pytest.raises(PluginError, match=r"plugin 'mine': (?s:.)*engine_started(?s:.)*inof"):
        plugins.load(PagedConfig(plugins=(plugin(engine_started=lambda inof: None),)))


def test_several_plugins_of_one_class():
    assert names(Metrics(), Metrics()) == ["core", *plugins.BUNDLED, "Metrics", "Metrics-2"]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_of_several_plugins_of_one_class_the_right_one_is_named(culprit):
    given = tuple(Metrics(fails=index == culprit) for index in range(3))
    config = PagedConfig(plugins=given)
    with pytest.raises(PluginError, match=f"plugin '{('Metrics', 'Metrics-2', 'Metrics-3')[culprit]}' failed"):
        plugins.registry(plugins.load(config), config)


def test_a_wrapper_is_not_blamed_for_what_it_hands_on():
    class Wrapper:
        @hookimpl(wrapper=True)
        def validate_config(self, config):
            return (yield)

    for given in itertools.permutations((Wrapper(), Metrics(fails=True))):
        config = PagedConfig(plugins=given)
        with pytest.raises(PluginError, match="plugin 'Metrics' failed in validate_config: ValueError: no"):
            plugins.registry(plugins.load(config), config)


def test_a_wrapper_is_blamed_for_what_it_raises_itself():
    class Wrapper:
        @hookimpl(wrapper=True)
        def validate_config(self, config):
            yield
            raise ValueError("mine")

    config = PagedConfig(plugins=(Wrapper(), Metrics()))
    with pytest.raises(PluginError, match="plugin 'Wrapper' failed in validate_config: ValueError: mine"):
        plugins.registry(plugins.load(config), config)


def test_the_same_plugin_twice_raises():
    metrics = Metrics()
    with pytest.raises(PluginError, match="plugin 'Metrics' is given, but it is loaded already"):
        names(metrics, metrics)


def test_a_class_instead_of_an_object_raises():
    with pytest.raises(PluginError, match=r"the class Metrics; give an object of it: Metrics\(\)"):
        names(Metrics)


@pytest.mark.parametrize("given", [object(), types.ModuleType("empty"), "hf_paged_sdpa"])
def test_a_plugin_without_hooks_raises(given):
    with pytest.raises(PluginError, match=r"has no hooks; mark its functions with @hf_paged\.hookimpl"):
        names(given)


def test_disable_plugins():
    assert names() == ["core", *plugins.BUNDLED]
    assert names(disable_plugins=("hf_paged_sdpa",)) == [name for name in names() if name != "hf_paged_sdpa"]
    config = PagedConfig(disable_plugins=("core",))
    with pytest.raises(ConfigError, match="scheduler='fcfs' is not registered; known are none"):
        plugins.pick("scheduler", "fcfs", plugins.registry(plugins.load(config), config).schedulers)


def test_disable_plugins_knows_whom_it_names():
    known = ", ".join(sorted(["core", *plugins.BUNDLED]))
    with pytest.raises(ConfigError, match=f"'hf_paged_sdpaa' is not registered; known are {known}"):
        names(disable_plugins=("hf_paged_sdpaa",))


def test_without_a_backend_a_model_says_so(model):
    patch(model, disable_plugins=plugins.BUNDLED)
    with pytest.raises(PluginError, match="no plugin chose an attention backend for cpu; registered are none"):
        generate(model)


def distribution(folder, name, module, source, version="1.5"):
    """An installed package with a plugin, as a package manager leaves it."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[hf_paged]\n{name} = {module}\n")


GOOD = """
from hf_paged import hookimpl
seen = []

@hookimpl
def validate_config(config):
    seen.append(config)
"""


def test_a_plugin_of_an_installed_package(tmp_path, monkeypatch):
    distribution(tmp_path, "hf-paged-hello", "hf_paged_hello_good", GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    config = PagedConfig()
    manager = plugins.load(config)
    assert ("hf-paged-hello", "hf-paged-hello 1.5") in plugins.loaded(manager)
    plugins.registry(manager, config)
    assert manager.get_plugin("hf-paged-hello").seen == [config]
    assert "hf-paged-hello" not in names(disable_plugins=("hf-paged-hello",))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import hf_paged_that_is_not_there", "plugin 'hf-paged-bad' can't be loaded: ModuleNotFoundError"),
        (GOOD.replace("validate_config", "validate_confg"), "plugin 'hf-paged-bad': unknown hook 'validate_confg'"),
        (GOOD.replace("(config)", "(cfg)"), "plugin 'hf-paged-bad' can't be loaded: PluginValidationError"),
    ],
)
def test_a_broken_plugin_of_an_installed_package_is_named(tmp_path, monkeypatch, source, message):
    distribution(tmp_path, "hf-paged-bad", f"hf_paged_bad_{abs(hash(source))}", source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=message):
        plugins.load(PagedConfig())
    assert names(disable_plugins=("hf-paged-bad",)) == ["core", *plugins.BUNDLED]


def test_two_installed_plugins_of_one_name(tmp_path, monkeypatch):
    distribution(tmp_path, "hf_paged_sdpa", "hf_paged_another", GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="two plugins are named 'hf_paged_sdpa'"):
        plugins.load(PagedConfig())


def test_plugins_are_asked_bundled_first_then_given():
    """pluggy asks the last one registered first, so that a given plugin goes before the bundled ones."""
    order = []
    given = [plugin(validate_config=lambda config, index=index: order.append(index)) for index in range(2)]
    config = PagedConfig(plugins=tuple(given))
    manager = plugins.load(config)
    assert isinstance(manager, pluggy.PluginManager)
    plugins.registry(manager, config)
    assert order == [1, 0]
