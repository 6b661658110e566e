"""JSON schemas of the custom kinds in cluster/kuberay, of the fields that we use and no others: a misspelt
one is an error here, where a Kubernetes API server would drop it.

Written from KubeRay 1.7's API reference (docs.ray.io, "KubeRay CRD API reference") and types; the Prometheus
operator's PodMonitor v1; Kueue's v1beta2; Volcano's scheduling v1beta1. Pod templates are checked as
Kubernetes' own kind.
"""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
SECONDS = {"type": "integer", "minimum": 1}
SWITCH = {"type": "boolean"}
ANY = {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def fields(needed: dict[str, Any], /, **others: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(needed),
        "properties": needed | others,
        "additionalProperties": False,
    }


def each(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


def kind(name: str, version: str, spec: dict[str, Any] | None = None) -> dict[str, Any]:
    metadata = fields({"name": TEXT, "labels": TEXTS}, namespace=TEXT, annotations=TEXTS)
    parts: dict[str, Any] = {"apiVersion": {"const": version}, "kind": {"const": name}, "metadata": metadata}
    return fields(parts | ({"spec": spec} if spec else {}))


CLUSTER = fields(
    {
        "rayVersion": TEXT,
        "authOptions": fields({"mode": one_of("token", "disabled")}, secretName=TEXT),  # secretName: 1.6
        "enableInTreeAutoscaling": SWITCH,
        "headGroupSpec": fields(
            {"template": ANY, "rayStartParams": TEXTS},
            serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        ),
        "workerGroupSpecs": each(
            fields(
                {
                    "groupName": TEXT,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": TEXTS,
                    "template": ANY,
                },
                idleTimeoutSeconds=COUNT,
                priority={"type": "integer"},  # 1.7, Ray 2.56
            )
        ),
    },
    autoscalerOptions=fields(
        {"version": one_of("v1", "v2")},
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=COUNT,
        securityContext=ANY,
        resources=ANY,
    ),
    gcsFaultToleranceOptions=fields(
        {"redisAddress": TEXT}, redisPassword=fields({"valueFrom": fields({"secretKeyRef": ANY})})
    ),
)
JOB = fields(
    {"entrypoint": TEXT, "runtimeEnvYAML": TEXT, "rayClusterSpec": CLUSTER},
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=fields({"backoffLimit": COUNT}),
    submitterPodTemplate=ANY,
    backoffLimit=COUNT,
    preRunningDeadlineSeconds=SECONDS,  # 1.6
    activeDeadlineSeconds=SECONDS,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=COUNT,
    suspend=SWITCH,
)
SELECTOR = fields({"matchLabels": TEXTS})
QUOTA = each(fields({"name": TEXT, "nominalQuota": TEXT}))
GROUP = fields({"coveredResources": each(TEXT), "flavors": each(fields({"name": TEXT, "resources": QUOTA}))})
SCHEMAS = {
    "RayCluster": kind("RayCluster", "ray.io/v1", CLUSTER),
    "RayJob": kind("RayJob", "ray.io/v1", JOB),
    "PodMonitor": kind(
        "PodMonitor",
        "monitoring.coreos.com/v1",
        fields(
            {"selector": SELECTOR, "podMetricsEndpoints": each(fields({"port": TEXT}, interval=TEXT))},
            podTargetLabels=each(TEXT),
        ),
    ),
    "ResourceFlavor": kind("ResourceFlavor", "kueue.x-k8s.io/v1beta2"),
    "ClusterQueue": kind(
        "ClusterQueue",
        "kueue.x-k8s.io/v1beta2",
        fields({"namespaceSelector": SELECTOR, "resourceGroups": each(GROUP)}),
    ),
    "LocalQueue": kind("LocalQueue", "kueue.x-k8s.io/v1beta2", fields({"clusterQueue": TEXT})),
    "Queue": kind("Queue", "scheduling.volcano.sh/v1beta1", fields({"weight": COUNT, "capability": TEXTS})),
}
