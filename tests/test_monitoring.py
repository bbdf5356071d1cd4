"""The dashboard, the alerts and the pod in examples/deploy use existing names."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from openmeter_wsgi import OpenMeterMiddleware, Policy
from openmeter_wsgi.prometheus import export_metrics

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"
#: The metrics of an expression, and the labels that it groups or selects by.
METRIC = re.compile(r"\bopenmeter_wsgi_\w+")
LABEL = re.compile(r"\bby \(([^)]*)\)|(\w+)(?:=~|!=|=)\"")
#: Labels that a scrape, or a histogram, adds to a metric.
ADDED = {"job", "instance", "le"}


def expressions():
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        for target in panel["targets"]:
            name = f"{panel['title']}, {target['refId']}"
            yield pytest.param(target["expr"], id=name)
    alerts = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())
    for group in alerts["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"].keys() == {"summary", "description"}
            yield pytest.param(rule["expr"], id=rule["alert"])


@pytest.fixture(scope="module")
def exported():
    """The names of all metrics, and the labels of each."""
    registry = CollectorRegistry()
    app = OpenMeterMiddleware(lambda environ, start_response: [], dry_run=True)
    export_metrics(app, registry=registry)
    pages = (DEPLOY.parents[1] / "docs" / "metrics.md").read_text()
    found = {}
    for metric in registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        row = re.search(rf"^\| `{metric.name}\w*`.*", pages, re.M)
        labels = set(re.findall(r"`(\w+)`", row[0].split("|")[2])) if row else set()
        for suffix in suffixes.get(metric.type, [""]):
            found[metric.name + suffix] = labels
    return found


@pytest.mark.parametrize("expression", list(expressions()))
def test_an_expression_asks_for_metrics_and_labels_that_are_exported(
    expression, exported
):
    names = METRIC.findall(expression)
    labels = {
        label.strip()
        for grouped, selected in LABEL.findall(expression)
        for label in (grouped or selected).split(",")
    }

    assert names
    assert set(names) <= exported.keys()
    known = set().union(*(exported[name] for name in names))
    assert labels <= known | ADDED
    assert expression.count("(") == expression.count(")")


def test_the_containers_of_a_pod_share_a_spool_and_options():
    pod = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())["spec"]["template"]
    (ship,), (app,) = pod["spec"]["initContainers"], pod["spec"]["containers"]

    for container in (ship, app):
        variables = {one["name"]: one["value"] for one in container["env"]}
        options = {name.removeprefix("OPENMETER_").lower() for name in variables}
        assert options <= Policy.__dataclass_fields__.keys()
        assert variables["OPENMETER_SPOOL_DIR"] in ship["command"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert str(Path(variables["OPENMETER_SPOOL_DIR"]).parent) in mounts
    assert ship["restartPolicy"] == "Always"
    assert (
        pod["spec"]["terminationGracePeriodSeconds"]
        > 30 + Policy(dry_run=True).shutdown_timeout
    )
