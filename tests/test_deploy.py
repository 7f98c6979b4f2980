"""What deploy/ and docker/ hold together by: names, ports, paths, users and times that one file takes from another.

What needs tools of its own (hadolint, check-jsonschema, kubernetes-validate: the extra ``deploy``; kubectl) is skipped
where they are not installed; `make check-deploy` makes that a failure.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from pacellm.cli.main import new_parser
from tests.deploy.tools import tool

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "deploy" / "compose"
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
STACK = "cpu with components/stack"
DOCKERFILES = [*sorted((ROOT / "docker").glob("*.Dockerfile")), ROOT / "Dockerfile"]
CUSTOM = ("PodMonitor", "PrometheusRule", "RayService", "ScaledObject", "ServiceMonitor")  # not Kubernetes' own


def there(path):
    """What other pieces of deploy/ bring; `make check-deploy` asks for all of them."""
    if not (ROOT / path).exists():
        (pytest.fail if os.environ.get("PACELLM_CHECK_DEPLOY") else pytest.skip)(f"{path} is not there yet")
    return ROOT / path


def output(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@functools.cache
def rendered(overlay):
    if overlay == STACK:
        return _with_a_stack()
    return list(yaml.safe_load_all(output(tool("kubectl"), "kustomize", KUBERNETES / "overlays" / overlay)))


def _with_a_stack():
    """As docs/deploy.md says it: an overlay of one's own with components/stack."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "deploy", Path(folder, "deploy"))
        own = Path(folder, "own")
        own.mkdir()
        parts = {"resources": ["overlays/cpu"], "components": ["components/stack"]}
        whole = {kind: [f"../deploy/kubernetes/{path}" for path in paths] for kind, paths in parts.items()}
        (own / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "pacellm", **whole}))
        return list(yaml.safe_load_all(output(tool("kubectl"), "kustomize", own)))


def templates(resources):
    for one in of_kind(resources, "StatefulSet") + of_kind(resources, "Deployment"):
        yield one["spec"]["template"]
    for one in of_kind(resources, "RayService"):
        cluster = one["spec"]["rayClusterConfig"]
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])


def of_kind(resources, kind):
    return [one for one in resources if one["kind"] == kind]


def serve_options(arguments):
    return new_parser().parse_args(["serve", *arguments])


def entrypoint(dockerfile):
    found = re.search(r"^ENTRYPOINT (\[.*\])$", dockerfile.read_text(), re.MULTILINE)
    return yaml.safe_load(found.group(1))


# images


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean(path):
    output(tool("hadolint"), "--failure-threshold", "style", path)


@pytest.mark.parametrize("name", ["Dockerfile", "docker/cpu.Dockerfile"])
def test_an_image_starts_the_server_under_an_init_as_nobody_special(name):
    path = ROOT / name
    text = path.read_text()
    init, dashes, *command = entrypoint(path)
    assert (init, dashes, command[:2]) == ("/usr/bin/tini", "--", ["pacellm", "serve"])
    options = serve_options(command[2:])
    assert (options.host, options.port, options.session_dir) == ("0.0.0.0", 8000, "/sessions")
    assert "\nUSER 10001:10001\n" in text
    assert "\nHEALTHCHECK " in text
    assert 'VOLUME ["/models", "/sessions"]' in text
    base = re.search(r"^ARG BASE=(\S+)$", text, re.MULTILINE).group(1)
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+[\w.-]*", base), "the base has no exact version"


def test_everything_that_the_server_asks_for_is_pinned():
    script = ROOT / "docker" / "requirements.py"
    project = (ROOT / "pyproject.toml").read_text()
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for line in output(sys.executable, script, input=project).splitlines():
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), line
    known = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pins[name] for name in known if name in pins} == {name: known[name] for name in known if name in pins}


def test_an_unknown_extra_is_named():
    script = ROOT / "docker" / "requirements.py"
    project = (ROOT / "pyproject.toml").read_text()
    done = subprocess.run([sys.executable, script, "cuda", "nonsense"], input=project, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no extra nonsense" in done.stderr


def test_what_the_images_copy_is_let_through():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in DOCKERFILES:
        for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE):
            for source in line.split()[:-1]:
                assert source in kept, f"{path.name} copies {source}"
                there(source)


# compose


class Loader(yaml.SafeLoader):
    """Reads Compose's !override as what it stands before."""


Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def compose(name):
    return yaml.load((COMPOSE / name).read_text(), Loader)


def test_compose_keeps_to_the_specification():
    output(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE / "compose.yml")


def test_compose_mounts_what_is_there():
    for name, service in compose("compose.yml")["services"].items():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            if source.startswith("."):
                assert there(Path(os.path.normpath(COMPOSE / source)).relative_to(ROOT)).is_dir(), name
    assert isinstance(yaml.safe_load(there("deploy/alertmanager/alertmanager.yml").read_text()), dict)


def test_prometheus_scrapes_what_is_composed():
    config = yaml.safe_load(there("deploy/prometheus/prometheus.yml").read_text())
    found = [one for job in config["scrape_configs"] for one in job["static_configs"]]
    found += [one for manager in config["alerting"]["alertmanagers"] for one in manager["static_configs"]]
    hosts = {target.split(":")[0] for one in found for target in one["targets"]}
    assert hosts <= compose("compose.yml")["services"].keys()


def test_compose_publishes_on_loopback_and_gives_few_rights():
    whole = compose("compose.yml")
    for name, service in whole["services"].items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert volume.endswith(":ro")
            else:
                assert source in whole["volumes"]
        assert all(port.startswith(("127.0.0.1:", "${PACELLM_BIND:-127.0.0.1}:")) for port in service["ports"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "memory" in service["deploy"]["resources"]["reservations"]
        assert name == "pacellm" or "healthcheck" in service  # the server's is its image's


def test_the_composed_server_takes_its_flags_and_is_stopped_after_it_drained():
    server = compose("compose.yml")["services"]["pacellm"]
    options = serve_options(server["command"])
    assert server["stop_grace_period"] == "6m"
    assert options.shutdown_timeout + 30 < 360  # the engine gets 30 s after that
    for service, name in (("compose.yml", "Dockerfile"), ("cpu.yml", "docker/cpu.Dockerfile")):
        build = compose(service)["services"]["pacellm"]["build"]
        assert build["dockerfile"] == name
        assert (ROOT / name).is_file()


def test_the_override_for_hosts_without_a_gpu_takes_the_device_away():
    reserved = compose("cpu.yml")["services"]["pacellm"]["deploy"]["resources"]["reservations"]
    assert reserved["devices"] == []
    assert "devices: !override []" in (COMPOSE / "cpu.yml").read_text()


# Kubernetes


STATEFUL = [name for name in OVERLAYS if name != "rayservice"]


@pytest.mark.parametrize("overlay", [*OVERLAYS, STACK])
def test_manifests_are_valid(overlay, tmp_path):
    validate = tool("kubernetes-validate")
    resources = rendered(overlay)
    for one in resources:
        if one["kind"] in CUSTOM:
            assert one["apiVersion"].count("/") == 1
            continue
        path = tmp_path / f"{one['kind']}-{one['metadata']['name']}.yaml"
        path.write_text(yaml.safe_dump(one))
    for number, template in enumerate(templates(resources)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        (tmp_path / f"Pod-{number}.yaml").write_text(yaml.safe_dump(pod))
    output(validate, "--strict", *sorted(tmp_path.iterdir()))


@pytest.mark.parametrize("overlay", [*OVERLAYS, STACK])
def test_pods_have_few_rights(overlay):
    found = 0
    for template in templates(rendered(overlay)):
        found, pod = found + 1, template["spec"]
        assert pod["automountServiceAccountToken"] is False
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            own = container["securityContext"]
            assert (own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]) == (False, True)
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert not container["image"].endswith(":latest")
            assert ":" in container["image"]
    assert found


@pytest.mark.parametrize("overlay", STATEFUL)
def test_a_replica_drains_before_it_is_killed(overlay):
    (template,) = templates(rendered(overlay))
    pod = template["spec"]
    server = pod["containers"][0]
    options = serve_options(server["args"])
    wait = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert options.request_timeout <= options.shutdown_timeout
    assert wait + options.shutdown_timeout + 30 < pod["terminationGracePeriodSeconds"]
    assert {name: server[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")} == {
        "startupProbe": "/ready",
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"http": options.port, "metrics": options.admin_port}
    mounted = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert mounted == {"/sessions", "/models", "/tmp", "/etc/pacellm"}


@pytest.mark.parametrize("overlay", STATEFUL)
def test_selectors_find_the_pods(overlay):
    resources = rendered(overlay)
    (workload,) = of_kind(resources, "StatefulSet")
    labels = workload["spec"]["template"]["metadata"]["labels"].items()
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels
    for service in of_kind(resources, "Service"):
        assert service["spec"]["selector"].items() <= labels
    for budget in of_kind(resources, "PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    for policy in of_kind(resources, "NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert workload["spec"]["serviceName"] in {one["metadata"]["name"] for one in of_kind(resources, "Service")}
    for monitor in of_kind(resources, "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = [one for one in of_kind(resources, "Service") if selector <= one["metadata"]["labels"].items()]
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


def test_only_replicas_with_a_shared_directory_are_scaled():
    for overlay in OVERLAYS:
        resources = rendered(overlay)
        scaled = of_kind(resources, "HorizontalPodAutoscaler") + of_kind(resources, "ScaledObject")
        for workload in of_kind(resources, "StatefulSet"):
            shared = "volumeClaimTemplates" not in workload["spec"]
            assert shared == bool(scaled)
            assert ("replicas" in workload["spec"]) == (not scaled)  # else applying it undoes the autoscaler
            assert serve_options(workload["spec"]["template"]["spec"]["containers"][0]["args"]).session_sync == shared


def test_either_autoscaler_fits(tmp_path):
    copy = tmp_path / "deploy"
    shutil.copytree(ROOT / "deploy", copy)
    overlay = copy / "kubernetes" / "overlays" / "gpu-fleet" / "kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("components/hpa #", "components/keda #"))
    resources = list(yaml.safe_load_all(output(tool("kubectl"), "kustomize", overlay.parent)))
    (scaled,) = of_kind(resources, "ScaledObject")
    (hpa,) = of_kind(rendered("gpu-fleet"), "HorizontalPodAutoscaler")
    behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == hpa["spec"]["behavior"]
    assert scaled["spec"]["scaleTargetRef"] == hpa["spec"]["scaleTargetRef"]


def test_a_ray_service_is_what_deploy_ray_takes():
    resources = rendered("rayservice")
    (service,) = of_kind(resources, "RayService")
    config, own = (
        yaml.safe_load(text) for text in (service["spec"]["serveConfigV2"], there("deploy/ray/serve.yaml").read_text())
    )
    (app,), (own_app,) = config["applications"], own["applications"]
    assert app.keys() == own_app.keys()
    assert app["import_path"] == own_app["import_path"]
    assert app["args"].keys() <= own_app["args"].keys()
    options = serve_options(app["args"]["serve"])
    assert (options.session_dir, options.session_sync, options.admin_port) == ("/sessions", True, 9100)
    (deployment,), (own_deployment,) = app["deployments"], own_app["deployments"]
    assert deployment.keys() == own_deployment.keys()
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["replicas"] == deployment["num_replicas"]  # one replica a worker
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert options.request_timeout < deployment["graceful_shutdown_timeout_s"] < grace
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == deployment["ray_actor_options"]["num_gpus"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"serve": 8000, "metrics": 9100}
    pins = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    assert f"ray=={service['spec']['rayClusterConfig']['rayVersion']}" in pins


def test_the_stack_is_what_compose_has():
    """Images, flags, variables and ports of compose.yml; the folders that it mounts are ConfigMaps here."""
    resources, services = rendered(STACK), compose("compose.yml")["services"]
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(resources, "ConfigMap")}
    names = {one["metadata"]["name"] for one in resources}
    targets = yaml.safe_load(next(data["prometheus.yml"] for data in maps.values() if "prometheus.yml" in data))
    (job,) = targets["scrape_configs"]
    assert job["job_name"] == "pacellm"
    assert set(job["dns_sd_configs"][0]["names"]) <= names
    assert {"alertmanager", "grafana", "prometheus"} == {
        one["metadata"]["name"] for one in of_kind(resources, "Deployment")
    }
    for deployment in of_kind(resources, "Deployment"):
        name, template = deployment["metadata"]["name"], deployment["spec"]["template"]
        (service,) = [one for one in of_kind(resources, "Service") if one["metadata"]["name"] == name]
        assert (
            service["spec"]["selector"]
            == deployment["spec"]["selector"]["matchLabels"]
            == template["metadata"]["labels"]
        )
        (container,) = template["spec"]["containers"]
        assert container["image"] == services[name]["image"]
        assert container.get("args", []) == services[name].get("command", [])
        env = {one["name"]: one["value"] for one in container.get("env", [])}
        assert env == services[name].get("environment", {})
        assert service["spec"]["ports"][0]["port"] == int(services[name]["ports"][0].split(":")[-1])
        volumes = {one["name"]: one for one in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        for volume in volumes.values():
            if "configMap" in volume:
                keys = {item["key"] for item in volume["configMap"].get("items", [])}
                assert keys <= maps[volume["configMap"]["name"]].keys()


def test_prometheus_takes_the_stacks_configuration():
    path = KUBERNETES / "components" / "stack" / "prometheus.yml"
    output(tool("promtool", "prometheus"), "check", "config", "--syntax-only", path)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_is_scraped_has_alerts_and_dashboards(overlay):
    resources = rendered(overlay)
    scraped = of_kind(resources, "ServiceMonitor") + of_kind(resources, "PodMonitor")
    assert len(of_kind(resources, "PrometheusRule")) == len(scraped)
    maps = [one for one in of_kind(resources, "ConfigMap") if "grafana_dashboard" in one["metadata"].get("labels", {})]
    assert len(maps) == len(scraped) == (overlay != "cpu")
    files = {path.name: path.read_text() for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
    assert all(one["data"] == files for one in maps)


def test_the_operators_rules_are_prometheus_own():
    script = KUBERNETES / "prometheusrule.py"
    made = output(sys.executable, script, there("deploy/prometheus/alerts.yml"))
    assert made == (KUBERNETES / "components" / "alerts" / "prometheusrule.yaml").read_text()
