"""Prints a running cluster's replicas that answer as JSON: name, process, digests of the sessions that each reports."""

import json
import os
import sys

import ray

from deploy.ray.table import read_report

ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, logging_level="error")
found = {}
for actor in ray.util.list_named_actors(all_namespaces=True):
    if actor["name"].startswith("SERVE_REPLICA::"):
        try:
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            pid = ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=5)
            report = ray.get(handle.record_routing_stats.remote(), timeout=5)["sessions"]
        except (ray.exceptions.RayError, ValueError):
            continue  # not there yet, or not any more
        found[actor["name"]] = {"pid": pid, "sessions": [key for key, _ in read_report(report)]}
print(json.dumps(found))
