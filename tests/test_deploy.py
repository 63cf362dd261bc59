"""deploy/: files that no test runs, so each is held to what it has to fit: schemas, routes, options, metrics."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

pytest.importorskip("fastapi")
pytest.importorskip("kubernetes_validate")
import kubernetes_validate

from hf_paged import cli
from hf_paged.server.middleware import PROBES
from hf_paged.server.routes import ROUTERS
from hf_paged_metrics.metrics import PREFIX, sample_names

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
OLDEST = "1.30"  # the first whose preStop can sleep by itself
# Kinds of the Prometheus operator, which Kubernetes' own schemas don't have.
FOREIGN = {"PodMonitor"}


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def only(kind):
    (found,) = [document for path in MANIFESTS for document in documents(path) if document["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def deployment():
    return only("Deployment")


@pytest.fixture(scope="module")
def container(deployment):
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def arguments_of(command):
    """What `hf-paged` makes of a command line; it must know every option."""
    return cli.build_parser().parse_args(command)


# ----------------------------------------------------------------------------------------------------------- every file


@pytest.mark.parametrize("path", sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")]), ids=lambda p: p.name)
def test_yaml_parses_without_keys_given_twice(path):
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        merged = "tag:yaml.org,2002:merge"
        keys = [loader.construct_object(key, deep) for key, _ in node.value if key.tag != merged]
        assert len(keys) == len(set(keys)), f"{path.name}:{node.start_mark.line + 1}: a key is given twice"
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    def build(loader, node):
        mapping(loader, node)
        return yaml.SafeLoader.construct_yaml_map(loader, node)

    Strict.add_constructor("tag:yaml.org,2002:map", build)
    assert list(yaml.load_all(path.read_text(), Strict))


# ----------------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_kubernetes_schemas(path, version):
    for document in documents(path):
        if document["kind"] not in FOREIGN:
            kubernetes_validate.validate(document, version, strict=True)


def test_a_manifest_that_does_not_fit_is_noticed(deployment):
    broken = json.loads(json.dumps(deployment))
    broken["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["periodSecond"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, OLDEST, strict=True)


def test_kustomization_names_every_manifest():
    found = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert set(found["resources"]) == {path.name for path in MANIFESTS if path.parent == KUBERNETES}


def test_probes_ask_routes_that_need_no_key(container):
    routes = {route.path for router in ROUTERS for route in router.routes}
    ports = {port["name"] for port in container["ports"]}
    expected = {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    for name, path in expected.items():
        asked = container[name]["httpGet"]
        assert asked == {"path": path, "port": "http"}
        assert path in routes & PROBES
        assert asked["port"] in ports


def test_there_is_time_to_start_and_to_drain(deployment, container):
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    drain = arguments_of(["serve", *container["args"]]).drain_timeout
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert sleep >= 5  # endpoints take a while to be withdrawn
    assert grace > sleep + drain


def test_the_container_is_shut_in(deployment, container):
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert all(any(path.startswith(root) for root in writable) for path in image_environment().values())


def image_environment():
    """The image's folders that the server writes to, by variable."""
    text = (DEPLOY / "Dockerfile").read_text()
    return dict(re.findall(r"(HF_HOME|TRITON_CACHE_DIR|XDG_CACHE_HOME)=(\S+)", text))


def test_selectors_find_the_pods(deployment):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert only("Service")["spec"]["selector"].items() <= labels.items()
    assert only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert only("PodMonitor")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (port,) = only("Service")["spec"]["ports"]
    assert port["targetPort"] == "http"


def test_the_autoscaler_looks_at_a_metric_that_is_there(deployment):
    scaler = only("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["minReplicas"] == deployment["spec"]["replicas"] >= 2
    (metric,) = scaler["metrics"]
    (rule,) = yaml.safe_load(only("ConfigMap")["data"]["config.yaml"])["rules"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert metrics_in(rule["seriesQuery"]) == {f"{PREFIX}num_requests_waiting"}


# -------------------------------------------------------------------------------------------------------------- metrics


def metrics_in(expression):
    return set(re.findall(rf"{PREFIX}\w+", expression))


def dashboard():
    return json.loads((DEPLOY / "grafana/dashboards/hf_paged.json").read_text())


def expressions():
    """Every query of the dashboard and of the alerts, by where it is."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def test_every_metric_that_is_asked_for_is_served():
    names = sample_names()
    asked = {name: metrics_in(expression) for name, expression in expressions()}
    for name, found in asked.items():
        assert found <= names, f"{name}: {found - names}"
    assert len(set().union(*asked.values())) > 15


def test_the_dashboard_shows_every_metric():
    shown = set().union(*(metrics_in(expression) for _, expression in expressions()))
    shown = {re.sub("_(bucket|sum|count|total)$", "", name) for name in shown}
    served = {re.sub("_(bucket|sum|count|total)$", "", name) for name in sample_names()}
    assert served - shown == {f"{PREFIX}request_params_n"}


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_queries_are_balanced_and_quantiles_are_by_bucket(where, expression):
    for left, right in ("()", "{}", "[]"):
        assert expression.count(left) == expression.count(right)
    if "histogram_quantile" in expression:
        assert "_bucket" in expression
        assert re.search(r"by \([^)]*\ble\b", expression)
    for name in metrics_in(expression):  # a counter by itself says nothing
        if name.endswith(("_total", "_bucket")):
            assert re.search(rf"(rate|increase)\({name}", expression), where


def test_panels_do_not_overlap():
    cells = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_alerts_say_what_to_do():
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "action"}


def test_prometheus_and_grafana_find_each_other_and_their_files(compose):
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    for name in prometheus["rule_files"]:
        assert (DEPLOY / "prometheus" / name).is_file()
    (job,) = prometheus["scrape_configs"]
    assert job["job_name"] == "hf_paged"  # the alert HfPagedDown names it
    (target,) = job["static_configs"][0]["targets"]
    assert target.split(":") == [compose["x-server"]["networks"]["default"]["aliases"][0], "8000"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/api_key"
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/hf_paged.yaml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts


# -------------------------------------------------------------------------------------------------------------- compose


def test_compose_names_only_what_is_there(compose):
    for name, service in compose["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).is_dir(), f"{name}: {source}"
        assert set(service.get("secrets", ())) <= set(compose["secrets"])
        assert set(service.get("depends_on", ())) <= set(compose["services"])
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            assert service["build"]["target"] in stages()


def test_compose_publishes_on_this_machine_alone(compose):
    published = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert len(published) >= 4
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_compose_images_are_pinned(compose):
    for service in compose["services"].values():
        image, _, tag = service["image"].partition(":")
        assert "build" in service or re.fullmatch(r"v?\d+\.\d+\.\d+", tag), image


def test_compose_waits_for_the_drain(compose):
    for name in ("cpu", "cuda"):
        service = compose["services"][name]
        command = ["serve", *(part.replace("${MODEL:-", "").rstrip("}") for part in service["command"])]
        assert arguments_of(command).drain_timeout < int(service["stop_grace_period"].removesuffix("s"))


# ----------------------------------------------------------------------------------------------------------- Dockerfile


def instructions():
    """The Dockerfile's instructions: (name, arguments), lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def stages():
    """The instructions of each stage, those of the stages that it is built from first."""
    found = {}
    for name, arguments in instructions():
        if name == "FROM":
            base, _, stage = arguments.partition(" AS ")
            found[stage] = current = list(found.get(base, []))
        current.append((name, arguments))
    return found


def test_base_images_are_pinned_and_stages_named():
    named = set()
    for name, arguments in instructions():
        if name == "FROM":
            base, separator, stage = arguments.partition(" AS ")
            assert separator, f"FROM {arguments}: give the stage a name"
            assert base in named or re.search(r":\d+\.\d+", base), f"{base} is not pinned"
            named.add(stage)


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_images_run_as_nobody_in_particular_and_get_their_signals(stage):
    found = dict(stages()[stage])  # the last of each
    names = [name for name, _ in stages()[stage]]
    assert names[-1] == "USER"  # everything before it is root's
    assert found["USER"] not in ("root", "0")
    entry = json.loads(found["ENTRYPOINT"])  # exec form: a shell would keep SIGTERM to itself
    command = [*entry, *json.loads(found["CMD"])]
    assert command[0] == "hf-paged"
    args = arguments_of(command[1:])
    assert (args.host, str(args.port)) == ("0.0.0.0", found["EXPOSE"])
    assert f":{args.port}/ready" in found["HEALTHCHECK"]
    assert found["STOPSIGNAL"] == "SIGTERM"


def test_layers_carry_nothing_that_is_of_no_use():
    for name, arguments in instructions():
        assert name != "ADD", "COPY does what it says"
        for command in re.split("&&|;", arguments) if name == "RUN" else ():
            words = shlex.split(re.sub(r"--mount=\S+", "", command))
            if words[:2] == ["pip", "install"]:
                assert "--no-cache-dir" in words
            if words[:2] == ["apt-get", "install"]:
                assert {"--yes", "--no-install-recommends"} <= set(words)
                assert "rm -rf /var/lib/apt/lists/*" in arguments
                assert "apt-get update" in arguments
            assert words[:1] not in (["sudo"], ["cd"])
        if name == "WORKDIR":
            assert arguments.startswith("/")


def test_what_is_copied_is_let_in_and_there():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[0] == "*"
    for name, arguments in instructions():
        if name == "COPY" and "--from" not in arguments:
            for source in arguments.split()[:-1]:
                assert source in let_in
                assert (ROOT / source).exists()


def test_images_have_the_versions_that_are_tested():
    text = (DEPLOY / "Dockerfile").read_text()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package in ("torch", "hatchling"):
        assert f"{package}=={pins[package]}" in text
    (tested,) = re.findall(r"Python (3\.\d+)", (ROOT / "constraints.txt").read_text())
    assert set(re.findall(r"^FROM python:(3\.\d+)", text, re.MULTILINE)) == {tested}
    extras = re.findall(r"\[([\w,]+)\]\"", text)
    declared = re.search(r"optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for group in extras for extra in group.split(","))


def test_pages_and_files_name_the_same_models_port(container, compose):
    (port,) = container["ports"]
    assert port["containerPort"] == 8000
    assert compose["x-server"]["ports"] == ["127.0.0.1:8000:8000"]
