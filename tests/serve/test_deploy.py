"""The files in ``deploy/``, as far as they can be held to account without Docker and without a cluster."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
INSTRUCTIONS = {
    "ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "CMD",
}  # fmt: skip
METRICS = {
    "ddit_requests_total", "ddit_request_seconds", "ddit_queued_seconds", "ddit_encoding_seconds",
    "ddit_denoising_seconds", "ddit_decoding_seconds", "ddit_first_partial_seconds", "ddit_speedup", "ddit_batch_size",
    "ddit_steps_total", "ddit_in_flight", "ddit_rejected_total", "ddit_out_of_memory_total", "ddit_retries_total",
    "ddit_cancelled_total", "ddit_video_jobs",
}  # fmt: skip


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile in order, lines joined, comments and flags of instructions left out."""
    lines = [line for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parted = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, re.sub(r"^(--\S+\s+)+", "", rest.strip())) for word, _, rest in parted]


def only(found: list[tuple[str, str]], word: str) -> str:
    """What the last such instruction says: earlier stages' count for nothing."""
    return [rest for instruction, rest in found if instruction == word][-1]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def ray_service() -> dict[str, Any]:
    (found,) = (document for document in documents("kuberay.yaml") if document["kind"] == "RayService")
    return found["spec"]


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/ddit_rt.json").read_text(encoding="utf-8"))
    variables = [variable["query"]["query"] for variable in dashboard["templating"]["list"]]
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + variables


def metrics_shown() -> set[str]:
    names = {name for text in expressions() for name in re.findall(r"ddit_\w+", text)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_unprivileged_and_say_when_they_are_ready(name: str) -> None:
    found = instructions(name)
    assert {word for word, _ in found} <= INSTRUCTIONS
    images = [rest for word, rest in found if word == "FROM"] + [rest for word, rest in found if word == "ARG"]
    assert all("latest" not in image and (":" in image or "$" in image) for image in images)
    uid = only(found, "USER").partition(":")[0]
    assert uid.isdigit() and int(uid) > 0
    installs = [rest for word, rest in found if word == "RUN" and "pip install" in rest]
    assert installs and all("-c constraints.txt" in rest and '".[serve]"' in rest for rest in installs)
    check = json.loads(only(found, "HEALTHCHECK").partition("CMD")[2])
    assert check[0] == "wget" and check[-1].endswith(":8000/health/ready")
    assert json.loads(only(found, "CMD"))[:2] == ["ddit-rt", "serve"]
    # what probes and drain.sh call
    assert any("apt-get install" in rest and "wget" in rest and "procps" in rest for word, rest in found)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_images_copy_is_there_and_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    lines = (DEPLOY / name).read_text(encoding="utf-8").splitlines()
    copies = [line.split()[1:] for line in lines if line.startswith("COPY ") and "--from" not in line]
    sources = {word for words in copies for word in words[:-1] if not word.startswith("--")}
    assert len(sources) > 5
    assert [source for source in sources if not (ROOT / source).exists() or source not in allowed] == []


def test_yaml_and_json_files_can_be_read() -> None:
    files = sorted(path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml", ".json"))
    assert len(files) >= 7
    for path in files:
        text = path.read_text(encoding="utf-8")
        read = json.loads(text) if path.suffix == ".json" else list(yaml.safe_load_all(text))
        assert read and all(read), path


def test_the_compose_file_mounts_what_is_there_and_opens_no_port_to_others() -> None:
    (compose,) = documents("compose.yaml")
    assert {"gpu", "cpu", "prometheus", "grafana"} == set(compose["services"])
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
    (prometheus,) = documents("prometheus.yml")
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    server = compose["services"]["gpu"]
    assert host in server["networks"]["default"]["aliases"] and server["ports"][0].endswith(f":{port}")


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    (sources,) = documents("grafana/provisioning/datasources/prometheus.yaml")
    (providers,) = documents("grafana/provisioning/dashboards/ddit_rt.yaml")
    (compose,) = documents("compose.yaml")
    grafana = compose["services"]["grafana"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in grafana["volumes"])
    assert mounts[providers["providers"][0]["options"]["path"]] == "./grafana/dashboards"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DEPLOY / mounts[str(home.parent)] / home.name).is_file()
    dashboard = json.loads((DEPLOY / "grafana/dashboards/ddit_rt.json").read_text(encoding="utf-8"))
    used = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert used == {sources["datasources"][0]["uid"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    assert metrics_shown() == METRICS


def test_the_servers_metrics_are_those_of_the_dashboard() -> None:
    metrics = pytest.importorskip("ddit_rt.serve.metrics")
    assert set(metrics.names()) == METRICS


def test_ray_takes_the_serve_part_of_the_kuberay_manifest() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    config = schema.ServeDeploySchema(**yaml.safe_load(ray_service()["serveConfigV2"]))
    (application,) = config.applications
    assert application.route_prefix == "/"


def test_the_kuberay_manifest_names_what_there_is() -> None:
    launch = pytest.importorskip("ddit_rt.serve.launch")
    (application,) = yaml.safe_load(ray_service()["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert module == launch.__name__ and callable(getattr(launch, name))


def test_the_servers_settings_in_deploy_are_taken(tmp_path: Path) -> None:
    settings = pytest.importorskip("ddit_rt.serve.settings")
    (own,) = (document for document in documents("kuberay.yaml") if document["kind"] == "ConfigMap")
    (tmp_path / "serve.yaml").write_text(own["data"]["serve.yaml"], encoding="utf-8")
    for path in (tmp_path / "serve.yaml", DEPLOY / "serve.yaml"):
        config = settings.ServeConfig.load(path)
        assert (config.host, config.port) == ("0.0.0.0", 8000)


def test_workers_have_a_gpu_become_ready_with_the_models_and_drain_before_they_stop() -> None:
    cluster = ray_service()["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "/health/ready" in container["readinessProbe"]["exec"]["command"][-1]
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(seconds)
    assert any(
        rest.endswith(f" /usr/local/bin/{command}") for word, rest in instructions("Dockerfile") if word == "COPY"
    )
    (compose,) = documents("compose.yaml")
    (settings,) = documents("serve.yaml")
    assert int(compose["services"]["gpu"]["stop_grace_period"].removesuffix("s")) > settings["drain_seconds"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^ray==(.+)$", pins, re.MULTILINE)
    assert pinned is None or pinned[1] == cluster["rayVersion"]
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] and str(security["runAsUser"]) in only(instructions("Dockerfile"), "USER")


def test_the_drain_script_waits_for_replicas_and_no_longer_than_it_may(tmp_path: Path) -> None:
    script = DEPLOY / "drain.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    told = tmp_path / "told"
    for name, body in {
        "ray": f'echo "ray $*" >> {told}',
        "pgrep": f'echo pgrep >> {told}; test "$(grep -c pgrep {told})" -lt "$LOOKS"',
        "sleep": f"echo sleep >> {told}",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def drain(seconds: str, looks: str) -> list[str]:
        told.unlink(missing_ok=True)
        path = f"{tmp_path}:/usr/bin:/bin"
        subprocess.run([script, seconds], check=True, timeout=20, env={"PATH": path, "LOOKS": looks})
        return told.read_text(encoding="utf-8").splitlines()

    said = drain("60", looks="3")
    assert said[0].startswith("ray drain-node") and said[0].endswith("--deadline-remaining-seconds 60")
    assert said[1:] == ["pgrep", "sleep", "pgrep", "sleep", "pgrep"]
    # replicas that do not end: not one wait beyond the time
    assert drain("0", looks="100")[1:] == ["pgrep"]
