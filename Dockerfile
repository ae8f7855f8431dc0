# The server in a container: the embedded engine on a CPU, or with ENGINE=vllm vLLM on GPUs.
#
#   docker build -t tokenpacker .
#   docker build -t tokenpacker-vllm --build-arg ENGINE=vllm .
#   docker run --rm -p 127.0.0.1:8000:8000 tokenpacker
ARG PYTHON_VERSION=3.12
ARG ENGINE=embedded

FROM python:${PYTHON_VERSION}-slim AS embedded
# "cpu" installs torch without CUDA; "cu130" and the like install torch for GPUs.
ARG TORCH_BUILD=cpu
ENV PIP_CONSTRAINT=/app/requirements.lock PIP_BUILD_CONSTRAINT=/app/requirements.lock PIP_NO_CACHE_DIR=1 \
    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 MALLOC_ARENA_MAX=2
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY requirements.lock /app/
RUN version="$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' /app/requirements.lock | head -n 1)" \
    && PIP_CONSTRAINT='' pip install --index-url "https://download.pytorch.org/whl/${TORCH_BUILD}" "torch==${version}"

# vLLM's own image brings torch, CUDA and transformers in the versions that fit together; only our package is added.
FROM vllm/vllm-openai:v0.32.0 AS vllm

# hadolint ignore=DL3006
FROM ${ENGINE}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/cache
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
# pip leaves what vLLM's image has as long as it fits our ranges.
# hadolint ignore=DL3013
RUN python3 -m pip install '.[serve]' \
    && mkdir -p /cache && useradd --create-home --uid 10001 server && chown server /cache
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tokenpacker", "serve", "--host", "0.0.0.0", "--port", "8000"]
