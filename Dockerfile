# The server in a container. The default target runs the embedded engine on a CPU; `--target vllm` runs vLLM on GPUs.
#
#   docker build -t tokenpacker .
#   docker run --rm -p 127.0.0.1:8000:8000 tokenpacker
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS embedded
# "cpu" installs torch without CUDA; "cu130" and the like install torch for GPUs.
ARG TORCH_BUILD=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/cache OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 MALLOC_ARENA_MAX=2
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /app
COPY requirements.lock ./
RUN version="$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock | head -n 1)" \
    && pip install --index-url "https://download.pytorch.org/whl/${TORCH_BUILD}" "torch==${version}"
COPY pyproject.toml README.md LICENSE ./
COPY src src
# hadolint ignore=DL3013
RUN PIP_CONSTRAINT=requirements.lock PIP_BUILD_CONSTRAINT=requirements.lock pip install '.[serve]' \
    && useradd --create-home --uid 10001 server && mkdir -p /cache && chown server /cache
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tokenpacker", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--engine", "embedded"]

# vLLM's own image brings torch, CUDA and transformers in the versions that fit together; only our package is added.
FROM vllm/vllm-openai:v0.32.0 AS vllm
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/cache
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
# pip leaves what vLLM's image has as long as it fits our ranges.
# hadolint ignore=DL3013
RUN python3 -m pip install . && mkdir -p /cache && useradd --create-home --uid 10001 server && chown server /cache
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tokenpacker", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--engine", "vllm"]

FROM embedded
