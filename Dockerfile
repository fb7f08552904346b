# softmoe_train as an image: README, "In a container".
#
#   docker build -t softmoe .
#   docker build -t softmoe --build-arg BASE=registry/image:tag --build-arg EXTRAS=pictures,parquet .
#
# BASE          an image whose python3 (3.11 to 3.13) carries torch 2.11 to 2.13; that torch is checked first, and kept
# ACCEPT_TORCH  the version of a torch outside that range (NVIDIA's 2.11.0a0+...) that you want to use all the same
# EXTRAS        of pyproject.toml, separated by commas
# REVISION      the commit, for the label
#
# The default is the official image with the CUDA that pip's torch has too; it needs an NVIDIA driver of branch 580 or later. For older
# ones there is pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# What lies beneath, checked before anything is installed over it.
FROM ${BASE} AS beneath
ARG ACCEPT_TORCH=
# hadolint ignore=DL3002
USER 0
RUN --mount=type=bind,source=docker/beneath.py,target=/build/beneath.py \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    command -v python3 >/dev/null || { echo "this base has no python3: take one with Python 3.11 to 3.13 and torch" >&2; exit 2; }; \
    python3 /build/beneath.py check "${ACCEPT_TORCH}"

# What has no wheel on an index, our own package among it, and the quickstart's shards. Made in an environment without torch: DeepSpeed's
# setup asks a CUDA torch for a compiler that runtime images lack, although no operator is compiled then.
FROM beneath AS made
RUN --mount=type=bind,source=docker,target=/build/docker \
    python3 -m venv --without-pip /venv \
    && python3 -m pip --python /venv/bin/python install --no-cache-dir \
        --requirement /build/docker/build.txt --constraint /build/docker/constraints.txt \
        numpy pillow scikit-learn webdataset
RUN --mount=type=bind,source=docker,target=/build/docker \
    DS_BUILD_OPS=0 python3 -m pip --python /venv/bin/python wheel --no-cache-dir --no-deps --no-build-isolation --use-pep517 \
        --wheel-dir /wheels --constraint /build/docker/constraints.txt deepspeed antlr4-python3-runtime
COPY data/make_digits.py /src/data/
RUN /venv/bin/python /src/data/make_digits.py --out /shards/digits
COPY pyproject.toml README.md LICENSE /src/
COPY conf /src/conf
COPY softmoe_train /src/softmoe_train
RUN python3 -m pip --python /venv/bin/python wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /package /src

FROM beneath
ARG EXTRAS=pictures
ARG REVISION=unknown

# Everything that we need beside torch, from wheels alone: no code of a package runs here. An environment of our own above the base's
# keeps the base whole, and pip, which may not touch torch (--constraint), refuses what does not go with it.
RUN --mount=type=bind,source=docker,target=/build/docker \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    --mount=type=bind,from=made,source=/wheels,target=/wheels \
    set -eu; \
    python3 /build/docker/beneath.py pin >/tmp/pin; \
    python3 /build/docker/beneath.py wants "${EXTRAS}" >/tmp/wants; \
    python3 -m venv --without-pip --system-site-packages /opt/softmoe; \
    PIP_CONSTRAINT='' python3 -m pip --python /opt/softmoe/bin/python install --no-cache-dir --only-binary :all: --find-links /wheels \
        --requirement /tmp/wants --constraint /tmp/pin --constraint /build/docker/constraints.txt; \
    /opt/softmoe/bin/python /build/docker/beneath.py kept "$(cat /tmp/pin)"; \
    rm /tmp/pin /tmp/wants

# Any user may run it, named or not, in group 0 or in none: what must be written to is open as /tmp is.
RUN useradd --no-log-init --uid 10001 --gid 0 --home-dir /home/softmoe --shell /bin/sh softmoe \
    && mkdir -p /home/softmoe /work/runs \
    && chown 10001:0 /home/softmoe /work /work/runs \
    && chmod 1777 /home/softmoe /work /work/runs
COPY docker/entrypoint docker/environment docker/health.py /opt/softmoe/
COPY --from=made /shards /work/shards
RUN --mount=type=bind,from=made,source=/package,target=/package \
    python3 -m pip --python /opt/softmoe/bin/python install --no-cache-dir --no-deps --no-index /package/*.whl \
    && /opt/softmoe/bin/softmoe --version \
    && rm -rf /tmp/torchinductor_root

LABEL org.opencontainers.image.title="softmoe_train" \
      org.opencontainers.image.description="Distributed pretraining of Soft Mixture-of-Experts vision transformers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/softmoe/bin:${PATH} \
    HOME=/home/softmoe
WORKDIR /work
USER 10001:0
# A run that is asked to end saves first: give it `docker run --stop-timeout 150`, Docker's own patience is 10 s.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=1m --timeout=1m --start-period=2m --retries=2 CMD ["/opt/softmoe/bin/python", "/opt/softmoe/health.py"]
ENTRYPOINT ["/opt/softmoe/entrypoint"]
CMD ["softmoe", "--help"]
