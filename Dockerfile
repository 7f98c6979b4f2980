# PaceLLM on an NVIDIA GPU, the bundled model inside. Build and run: docker/README.md; without a GPU: docker/cpu.Dockerfile.
# "base" holds CUDA's runtime library alone; torch's wheels bring cuBLAS, cuDNN and NCCL with them, so "runtime" would
# hold those twice.
ARG BASE=docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS build
# names of extras of pyproject.toml: ray for deploy/ray
ARG EXTRAS=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# DL3008: Debian and Ubuntu keep only the newest build of a package; the base is what is pinned
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY docker/constraints.txt docker/requirements.py docker/
# pip stays behind in this stage: the environment that is shipped has none
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir --constraint docker/constraints.txt setuptools \
    && python3 -m venv --without-pip /opt/pacellm
COPY pyproject.toml ./
RUN python3 docker/requirements.py ${EXTRAS} < pyproject.toml > requirements.txt \
    && /build/bin/pip --python /opt/pacellm/bin/python install --no-cache-dir \
        --constraint docker/constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY pacellm pacellm
COPY server server
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /build/bin/pip --python /opt/pacellm/bin/python install --no-deps --prefix /app /wheels/*.whl

FROM ${BASE}
LABEL org.opencontainers.image.title="PaceLLM" \
      org.opencontainers.image.description="OpenAI-compatible inference server for long prompts, with memory per session" \
      org.opencontainers.image.licenses="Apache-2.0"
# gcc and Python's headers: Triton compiles its launchers when a kernel is first used
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 pacellm \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin pacellm \
    && install --directory --mode 0700 --owner pacellm --group pacellm /sessions \
    && install --directory --mode 0755 --owner pacellm --group pacellm /models
COPY --from=build /opt/pacellm /opt/pacellm
COPY --from=build /app /opt/pacellm
ENV PATH=/opt/pacellm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models \
    TRITON_HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache
USER 10001:10001
WORKDIR /models
# /models: checkpoints, and what is downloaded by hub name; /sessions: sessions over restarts
VOLUME ["/models", "/sessions"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
# flags given to the container come last and win: docker run IMAGE MODEL --pa-layers 8,20
ENTRYPOINT ["/usr/bin/tini", "--", "pacellm", "serve", "--host", "0.0.0.0", "--session-dir", "/sessions"]
