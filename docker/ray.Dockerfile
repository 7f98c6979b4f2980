# Replicas under Ray Serve (deploy/ray): an image of the server that was built with EXTRAS=ray, and the application.
ARG BASE=pacellm:0.1.0-ray-base
FROM ${BASE}
USER 0:0
# KubeRay's own probes call bash, wget and grep
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/ray /opt/application/deploy/ray
ENV PYTHONPATH=/opt/application \
    HOME=/tmp
USER 10001:10001
# KubeRay gives the command that starts Ray; the server's health check is not Ray's
ENTRYPOINT []
HEALTHCHECK NONE
