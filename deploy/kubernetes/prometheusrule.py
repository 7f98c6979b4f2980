"""Prints the Prometheus operator's PrometheusRule with the groups of a rules file.

    python deploy/kubernetes/prometheusrule.py deploy/prometheus/alerts.yml \
        > deploy/kubernetes/components/alerts/prometheusrule.yaml
"""

import sys
from pathlib import Path

_HEADER = """\
# Made from deploy/prometheus/alerts.yml by deploy/kubernetes/prometheusrule.py; change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: pacellm
spec:
"""


def main() -> None:
    """The rules file is a document whose one key is ``groups``: indented, it is the spec."""
    if len(sys.argv) != 2:
        sys.exit("usage: prometheusrule.py RULES_FILE")
    lines = Path(sys.argv[1]).read_text().splitlines()
    start = lines.index("groups:")
    print(_HEADER + "\n".join(f"  {line}" if line.strip() else "" for line in lines[start:]))


main()
