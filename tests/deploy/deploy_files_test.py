"""The deployment files against the code: ports, probe paths, metric names, configuration keys, times and users agree, the
image has what the binary links and no more, and the server takes the configuration files and answers the health check."""

import fnmatch
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest

import yaml

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "end_to_end"))

from server_fixture import Server, binary, free_ports, source_dir  # noqa: E402

ROOT = source_dir()


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def load(path):
    return yaml.safe_load(read(path))


def deploy_files(*endings):
    found = [os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "deploy", "**"), recursive=True)]
    return sorted(path for path in found if path.endswith(endings))


def manifests():
    """kind -> document of the plain manifests; the headless Service is "HeadlessService"."""
    documents = [load(path) for path in deploy_files(".yaml") if "/kubernetes/" in path]
    headless = lambda document: document.get("spec", {}).get("clusterIP") == "None"
    return {("Headless" if headless(document) else "") + document["kind"]: document for document in documents}


def container():
    (only,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def config_defaults():
    """{section: {key: default as written}} from the structs of config/config.h."""
    text = re.sub(r"//[^\n]*", "", read("config/config.h"))
    structs = {name: body for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL)}
    field = re.compile(r"^\s*[\w:<>]+\s+(\w+)\s*(?:=\s*([^;]+))?;", re.MULTILINE)
    sections = {name: kind for kind, name in re.findall(r"^\s*(\w+Config) (\w+);", structs["Config"], re.MULTILINE)}
    return {section: dict(field.findall(structs[kind])) for section, kind in sections.items()}


def ports():
    server = config_defaults()["server"]
    return {name: int(server[f"{name}_port"]) for name in ("http", "grpc", "metrics")}


def metric_names():
    """{name: type} from the table of docs/metrics.md, which server/metrics.cc must have, too."""
    table = dict(re.findall(r"^\| `([\w:]+)` \| (\w+) \|", read("docs/metrics.md"), re.MULTILINE))
    assert len(table) > 20, table
    code = read("server/metrics.cc")
    missing = [name for name in table if f'"{name}"' not in code]
    assert not missing, f"in docs/metrics.md and not in server/metrics.cc: {missing}"
    return table


def sample_names():
    names = set()
    for name, kind in metric_names().items():
        names |= {name + end for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    return names


def duration_s(text):
    match = re.fullmatch(r"(\d+)(ms|s|m)", str(text))
    return int(match.group(1)) * {"ms": 0.001, "s": 1, "m": 60}[match.group(2)]


class Syntax(unittest.TestCase):
    def test_all_files_parse(self):
        files = deploy_files(".yaml", ".yml", ".json")
        self.assertGreater(len(files), 10)
        for path in files:
            with self.subTest(path=path):
                self.assertIsInstance(json.loads(read(path)) if path.endswith(".json") else load(path), dict)

    def test_kustomization_names_all_manifests(self):
        listed = set(manifests()["Kustomization"]["resources"])
        there = {os.path.basename(path) for path in deploy_files(".yaml") if "/kubernetes/" in path}
        self.assertEqual(listed, there - {"kustomization.yaml"})

    def test_kustomize_renders(self):
        if not shutil.which("kubectl"):
            self.skipTest("kubectl is not installed")
        result = subprocess.run(["kubectl", "kustomize", os.path.join(ROOT, "deploy", "kubernetes")],
                                capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        kinds = {document["kind"] for document in yaml.safe_load_all(result.stdout)}
        self.assertEqual(kinds, {kind.removeprefix("Headless") for kind in manifests()} - {"Kustomization"})


class Ports(unittest.TestCase):
    def test_code(self):
        self.assertEqual(ports(), {"http": 8000, "grpc": 8001, "metrics": 8002})

    def test_configuration_files(self):
        for config in (load("deploy/config/atp.yaml"), yaml.safe_load(manifests()["ConfigMap"]["data"]["atp.yaml"])):
            self.assertEqual({name: config["server"][f"{name}_port"] for name in ports()}, ports())
            self.assertEqual(config["server"]["host"], "0.0.0.0")

    def test_image(self):
        exposed = re.search(r"^EXPOSE (.*)$", read("Dockerfile"), re.MULTILINE).group(1).split()
        self.assertEqual([int(port) for port in exposed], list(ports().values()))
        self.assertIn(f"/dev/tcp/127.0.0.1/{ports()['metrics']} ", read("Dockerfile"))

    def test_compose(self):
        published = load("deploy/compose.yaml")["services"]["atp"]["ports"]
        self.assertEqual(published, [f"127.0.0.1:{port}:{port}" for port in ports().values()])

    def test_kubernetes(self):
        self.assertEqual({port["name"]: port["containerPort"] for port in container()["ports"]}, ports())
        for port in manifests()["Service"]["spec"]["ports"]:
            self.assertEqual(port["port"], ports()[port["name"]])
            self.assertEqual(port["targetPort"], port["name"])
        self.assertEqual(len(manifests()["Service"]["spec"]["ports"]), 3)
        (grpc,) = manifests()["HeadlessService"]["spec"]["ports"]
        self.assertEqual((grpc["port"], grpc["targetPort"]), (ports()["grpc"], "grpc"))
        annotations = manifests()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
        self.assertEqual(annotations["prometheus.io/port"], str(ports()["metrics"]))

    def test_prometheus(self):
        (job,) = load("deploy/prometheus/prometheus.yml")["scrape_configs"]
        services = load("deploy/compose.yaml")["services"]
        for target in job["static_configs"][0]["targets"]:
            host, port = target.split(":")
            self.assertIn(host, services)
            self.assertEqual(int(port), ports()["metrics"])


class Names(unittest.TestCase):
    def test_paths_exist_in_the_server(self):
        code = "".join(read(os.path.relpath(path, ROOT)) for path in glob.glob(os.path.join(ROOT, "server", "*.cc")))
        paths = {container()[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
        paths.add(load("deploy/prometheus/prometheus.yml")["scrape_configs"][0]["metrics_path"])
        paths.add(manifests()["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"])
        paths.add(re.search(r"GET (\S+) HTTP", read("Dockerfile")).group(1))
        self.assertEqual(paths, {"/health/ready", "/health/live", "/metrics"})
        for path in paths:
            self.assertTrue(f'"{path}"' in code, f"no {path} in server/*.cc")

    def test_probes_ask_the_right_question(self):
        self.assertEqual(container()["readinessProbe"]["httpGet"]["path"], "/health/ready")
        self.assertEqual(container()["livenessProbe"]["httpGet"]["path"], "/health/live")

    def test_metric_names(self):
        known = sample_names()
        metric = re.compile(r"\b((?:atp|vllm)[_:]\w+|process_\w+)")
        used = set()
        for panel in load("deploy/grafana/dashboards/atp.json")["panels"]:
            for target in panel.get("targets", []):
                used |= set(metric.findall(target["expr"]))
        for group in load("deploy/prometheus/alerts.yml")["groups"]:
            for rule in group["rules"]:
                used |= set(metric.findall(rule["expr"]))
        self.assertGreater(len(used), 20)
        self.assertEqual(used - known, set())

    def test_autoscaler_metric_is_a_gauge(self):
        (metric,) = manifests()["HorizontalPodAutoscaler"]["spec"]["metrics"]
        self.assertEqual(metric_names()[metric["pods"]["metric"]["name"]], "gauge")

    def test_configuration_keys(self):
        known = config_defaults()
        for config in (load("deploy/config/atp.yaml"), yaml.safe_load(manifests()["ConfigMap"]["data"]["atp.yaml"])):
            for section, keys in config.items():
                self.assertIn(section, known)
                self.assertEqual(set(keys) - set(known[section]), set(), section)

    def test_configuration_keys_that_texts_mention(self):
        known = config_defaults()
        key = re.compile(r"\b(" + "|".join(known) + r")\.([a-z]+(?:_[a-z]+)+)\b")
        for path in deploy_files(".yaml", ".yml", ".json", ".md") + ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"]:
            for section, name in key.findall(read(path)):
                with self.subTest(path=path, key=f"{section}.{name}"):
                    self.assertIn(name, known[section])


class Consistency(unittest.TestCase):
    def test_grace_periods_outlast_the_drain(self):
        drain_s = yaml.safe_load(manifests()["ConfigMap"]["data"]["atp.yaml"])["server"]["drain_timeout_ms"] / 1000
        pod = manifests()["Deployment"]["spec"]["template"]["spec"]
        command = container()["lifecycle"]["preStop"]["exec"]["command"]
        self.assertEqual(command[0], "sleep")
        self.assertGreater(pod["terminationGracePeriodSeconds"], drain_s + int(command[1]))
        compose = load("deploy/compose.yaml")["services"]["atp"]
        drain_s = load("deploy/config/atp.yaml")["server"]["drain_timeout_ms"] / 1000
        self.assertGreater(duration_s(compose["stop_grace_period"]), drain_s)

    def test_pods_notice_the_end_before_the_signal(self):
        # Readiness goes off with SIGTERM; endpoints must be gone before, by the preStop sleep.
        self.assertGreaterEqual(int(container()["lifecycle"]["preStop"]["exec"]["command"][1]), 5)
        self.assertEqual(container()["readinessProbe"]["failureThreshold"], 1)

    def test_selectors_match_the_pods(self):
        kinds = manifests()
        labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
        for selector in (kinds["Deployment"]["spec"]["selector"]["matchLabels"], kinds["Service"]["spec"]["selector"],
                         kinds["HeadlessService"]["spec"]["selector"],
                         kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]):
            self.assertTrue(selector)
            self.assertLessEqual(selector.items(), labels.items())
        target = kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        self.assertEqual((target["kind"], target["name"]), ("Deployment", kinds["Deployment"]["metadata"]["name"]))
        self.assertNotIn("replicas", kinds["Deployment"]["spec"])

    def test_budget_lets_a_node_drain_and_keeps_one_pod(self):
        self.assertGreater(manifests()["HorizontalPodAutoscaler"]["spec"]["minReplicas"],
                           manifests()["PodDisruptionBudget"]["spec"]["maxUnavailable"])

    def test_nothing_runs_as_root(self):
        user = re.search(r"^USER (\d+):(\d+)$", read("Dockerfile"), re.MULTILINE)
        self.assertGreater(int(user.group(1)), 0)
        pod = manifests()["Deployment"]["spec"]["template"]["spec"]["securityContext"]
        self.assertTrue(pod["runAsNonRoot"])
        self.assertEqual((pod["runAsUser"], pod["runAsGroup"]), (int(user.group(1)), int(user.group(2))))
        security = container()["securityContext"]
        self.assertTrue(security["readOnlyRootFilesystem"])
        self.assertFalse(security["allowPrivilegeEscalation"])
        self.assertEqual(security["capabilities"]["drop"], ["ALL"])
        compose = load("deploy/compose.yaml")["services"]["atp"]
        self.assertTrue(compose["read_only"])
        self.assertEqual(compose["cap_drop"], ["ALL"])

    def test_images_have_versions(self):
        images = [service["image"] for service in load("deploy/compose.yaml")["services"].values()]
        images += re.findall(r"^FROM (\S+)", read("Dockerfile"), re.MULTILINE)
        for image in images:
            self.assertRegex(image, r":[\w.-]+$")
            self.assertFalse(image.endswith(":latest"), image)

    def test_resources_are_set(self):
        resources = container()["resources"]
        self.assertIn("memory", resources["limits"])
        # The cache is sized by the limit, the threads by the configuration: both are asked for.
        self.assertEqual(resources["requests"]["memory"], resources["limits"]["memory"])
        configuration = yaml.safe_load(manifests()["ConfigMap"]["data"]["atp.yaml"])
        self.assertEqual(str(configuration["backend"]["threads"]), resources["requests"]["cpu"])

    def test_mounted_configuration_is_the_one_that_is_served(self):
        (mount,) = container()["volumeMounts"]
        path = container()["args"][container()["args"].index("--config") + 1]
        directory, name = os.path.split(path)
        self.assertEqual(directory, mount["mountPath"])
        self.assertIn(name, manifests()["ConfigMap"]["data"])
        self.assertIn(f'"{path}"', re.search(r"^CMD (.*)$", read("Dockerfile"), re.MULTILINE).group(1))


class Grafana(unittest.TestCase):
    def test_provisioned_files_are_where_compose_mounts_them(self):
        mounts = dict(mount.split(":")[:2] for mount in load("deploy/compose.yaml")["services"]["grafana"]["volumes"])
        by_target = {target: source for source, target in mounts.items()}
        (provider,) = load("deploy/grafana/provisioning/dashboards/atp.yaml")["providers"]
        dashboards = os.path.join("deploy", by_target[provider["options"]["path"]])
        self.assertTrue(os.path.exists(os.path.join(ROOT, dashboards, "atp.json")))
        provisioning = os.path.join(ROOT, "deploy", by_target["/etc/grafana/provisioning"])
        self.assertEqual(sorted(os.listdir(provisioning)), ["dashboards", "datasources"])

    def test_panels(self):
        dashboard = load("deploy/grafana/dashboards/atp.json")
        (source,) = load("deploy/grafana/provisioning/datasources/prometheus.yaml")["datasources"]
        self.assertIn(source["url"].split("/")[2].split(":")[0], load("deploy/compose.yaml")["services"])
        panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
        self.assertGreater(len(panels), 15)
        titles = [panel["title"] for panel in panels]
        self.assertEqual(len(titles), len(set(titles)))
        ids = [panel["id"] for panel in dashboard["panels"]]
        self.assertEqual(len(ids), len(set(ids)))
        taken = set()
        for panel in panels:
            with self.subTest(panel=panel["title"]):
                self.assertEqual(panel["datasource"]["uid"], source["uid"])
                self.assertTrue(panel["description"] and panel["targets"])
                self.assertTrue(panel["fieldConfig"]["defaults"]["unit"])
                seconds = any("_seconds" in target["expr"] and "quantile" in target["expr"] for target in panel["targets"])
                if seconds:
                    self.assertEqual(panel["fieldConfig"]["defaults"]["unit"], "s")
                place = panel["gridPos"]
                cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                         for y in range(place["y"], place["y"] + place["h"])}
                self.assertLessEqual(place["x"] + place["w"], 24)
                self.assertFalse(cells & taken, "it overlaps another")
                taken |= cells


def stages():
    """The Dockerfile's stages, continued lines joined: (build, final)."""
    text = re.sub(r"^\s*#.*\n", "", read("Dockerfile"), flags=re.MULTILINE).replace("\\\n", " ")
    first, second = [part for part in re.split(r"^(?=FROM )", text, flags=re.MULTILINE) if part.startswith("FROM ")]
    return first, second


def installed_packages(stage):
    found = []
    for arguments in re.findall(r"apt-get install ([^&\n]*)", stage):
        found += [word for word in arguments.split() if not word.startswith("-")]
    return found


def package_of(library):
    """The Debian package that a shared library is from."""
    # Where /lib is a link to /usr/lib, dpkg knows each file by one of the two names.
    real = os.path.realpath(library)
    for path in (library, real, real.removeprefix("/usr")):
        owner = subprocess.run(["dpkg-query", "-S", path], capture_output=True, text=True).stdout
        if owner:
            return owner.split(":")[0]
    raise AssertionError(f"no package owns {library}")


class Image(unittest.TestCase):
    def test_build_stage_installs_what_make_deps_installs(self):
        build, _ = stages()
        self.assertRegex(build, r"(?m)^RUN scripts/install_deps\.sh\b")
        self.assertIn("scripts/install_deps.sh", read("Makefile"))
        self.assertTrue(os.access(os.path.join(ROOT, "scripts", "install_deps.sh"), os.X_OK))
        self.assertEqual(installed_packages(build), [])

    def test_runtime_packages_are_those_of_the_linked_libraries(self):
        if not shutil.which("dpkg-query") or not shutil.which("objdump"):
            self.skipTest("dpkg-query and objdump are needed")
        if re.search(r"lib(a|ub|t)san", subprocess.run(["ldd", binary()], capture_output=True, text=True).stdout):
            self.skipTest("a sanitizer's build links other libraries")
        needed = re.findall(r"NEEDED\s+(\S+)", subprocess.run(["objdump", "-p", binary()], check=True,
                                                              capture_output=True, text=True).stdout)
        resolved = dict(re.findall(r"(\S+) => (\S+)", subprocess.run(["ldd", binary()], check=True, capture_output=True,
                                                                     text=True).stdout))
        packages = {package_of(resolved.get(library, library)) for library in needed}
        packages -= {"libc6", "libgcc-s1", "libstdc++6"}  # all others depend on them
        self.assertEqual(set(installed_packages(stages()[1])), packages)

    def test_final_stage_has_no_tools(self):
        _, final = stages()
        for package in installed_packages(final):
            self.assertFalse(package.endswith("-dev"), package)
            self.assertNotIn(package.split("-")[0], ("gcc", "g++", "clang", "cmake", "make", "build", "python3", "curl"))
        self.assertRegex(final.splitlines()[0], r"^FROM debian:bookworm-slim$")

    def test_everything_copied_exists_and_is_not_ignored(self):
        patterns = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]

        def ignored(path):
            result = False
            for pattern in patterns:
                negated = pattern.startswith("!")
                pattern = pattern.lstrip("!").rstrip("/")
                parents = [path] + [path[:i] for i, c in enumerate(path) if c == "/"]
                if any(fnmatch.fnmatch(p, pattern) for p in parents):
                    result = not negated
            return result
        for stage in stages():
            for arguments in re.findall(r"^COPY (?!--from)(.*)$", stage, re.MULTILINE):
                for source in shlex.split(arguments)[:-1]:
                    if source == ".":
                        continue
                    source = source.rstrip("/")
                    with self.subTest(source=source):
                        self.assertTrue(os.path.exists(os.path.join(ROOT, source)))
                        self.assertFalse(ignored(source))
        build_inputs = re.findall(r"add_subdirectory\(([^)\n]+)\)", read("CMakeLists.txt"))
        for folder in build_inputs + ["CMakeLists.txt", "CMakePresets.json", "cmake/dependencies.cmake"]:
            if not folder.startswith("tests"):
                self.assertFalse(ignored(folder), folder)
        for private in (".git", "build", "shared", "tests"):
            self.assertTrue(ignored(private), private)


class Running(unittest.TestCase):
    def test_the_server_takes_the_configuration_files(self):
        # Host, ports and model are the test's; everything else is the file's.
        config = manifests()["ConfigMap"]["data"]["atp.yaml"]
        path = os.path.join(ROOT, "deploy", "config", "atp.yaml")
        with Server(args=["--config", path, "--set", "server.host=127.0.0.1"]) as server:
            self.assertEqual(server.metric("atp_ready"), 1)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(config)
            file.flush()
            with Server(args=["--config", file.name, "--set", "server.host=127.0.0.1"]) as server:
                self.assertEqual(server.metric("atp_ready"), 1)

    def test_health_check_of_the_image(self):
        command = json.loads(re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", read("Dockerfile"), re.MULTILINE).group(1))

        def health(port):
            here = [word.replace(f"/{ports()['metrics']} ", f"/{port} ") for word in command]
            self.assertNotEqual(here, command)
            return subprocess.run(here, capture_output=True, timeout=30).returncode
        with Server() as server:
            self.assertEqual(health(server.metrics_port), 0)
        self.assertNotEqual(health(free_ports(1)[0]), 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
